"""Copies many disks at once: who runs, with how many connections, and what a failure stops.

::

    waiting (longest first) ──admit, at most --parallel──> running ──> done or failed
                                      │ each change divides the connections anew
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import anyio
import anyio.abc
import anyio.to_thread

from v2v_async.copy.driver import DiskDriver
from v2v_async.copy.job import CopyJob, DiskResult
from v2v_async.copy.negotiation import Common
from v2v_async.copy.shares import Budget, divide
from v2v_async.copy.throttle import RateFile, Throttle
from v2v_async.copy.worker import Worker
from v2v_async.errors import V2VError, most_telling
from v2v_async.events import Bytes, Reporter
from v2v_async.options import CopyOptions
from v2v_async.units import MIB, format_rate

if TYPE_CHECKING:
    from v2v_async.copy.checkpoint import CheckpointFolder

__all__ = ["CopyJob", "DiskResult", "copy_disks"]

# They poll the lanes of slow servers, whose answers leave time: more only help with more cores.
MAX_THREADS = max(1, min(4, os.cpu_count() or 1))
MAX_LANES = 16
"""Pairs of connections over all disks: servers start a thread, or sixteen, for each."""
MAX_BYTES_IN_FLIGHT = 128 * MIB
"""Over all disks. Enough for 2.5 GiB/s with 50 ms an answer; local copies begin with half of it."""
_RATE_FILE_EVERY_S = 0.5
_DEFAULTS = CopyOptions()


class Driver(Protocol):
    """One disk, however it is copied."""

    job: CopyJob
    result: DiskResult

    @property
    def size(self) -> int: ...
    @property
    def remaining(self) -> int: ...
    @property
    def most(self) -> int: ...
    async def open(self, stack: AsyncExitStack) -> None: ...
    def set_share(self, connections: int) -> None: ...
    def bytes(self) -> Bytes: ...
    async def run(self) -> DiskResult: ...


async def copy_disks(
    jobs: Sequence[CopyJob], reporter: Reporter, options: CopyOptions = _DEFAULTS
) -> list[DiskResult]:
    """Copy all disks, the longest first; return what came of each, in the order of ``jobs``.

    Everything is opened and negotiated before the first byte moves. When a disk fails the others
    are stopped, with nothing in flight; with ``keep_going`` they finish.

    Raises:
        V2VError: a disk failed (disk and offset say where).
        ExceptionGroup: several did.
    """
    if not jobs:
        return []
    at_once = max(1, min(options.parallel or len(jobs), len(jobs)))
    if options.checkpoint is not None or options.verify:
        options = replace(options, flush=True)
    failures: dict[int, V2VError] = {}
    try:
        async with AsyncExitStack() as stack, _common(options, at_once, reporter) as common:
            folder = None
            if options.checkpoint is not None:
                from v2v_async.copy.checkpoint import CheckpointFolder

                folder = stack.enter_context(CheckpointFolder(options.checkpoint))
            drivers: list[Driver] = []
            for job in jobs:
                try:
                    driver = _driver(job, common, reporter.for_disk(job.index), folder)
                    await driver.open(stack)
                except V2VError as error:
                    error.locate(disk=job.index)
                    raise
                drivers.append(driver)
            await _Schedule(drivers, common, reporter, failures).run()
            if folder is not None and not failures:
                await _forget(folder, reporter)
    except BaseExceptionGroup as group:
        raise most_telling(group) from None
    if len(failures) == 1:
        raise next(iter(failures.values()))
    if failures:
        raise ExceptionGroup(
            f"{len(failures)} disks failed", [failures[index] for index in sorted(failures)]
        )
    return [driver.result for driver in drivers]


def _driver(
    job: CopyJob, common: Common, reporter: Reporter, folder: CheckpointFolder | None
) -> Driver:
    # The others are imported only where they are needed: most copies need none of them.
    if common.options.copier != "native":
        from v2v_async.copy.external_driver import ExternalDriver

        return ExternalDriver(job, common.options, common.at_once, reporter)
    if "stream" in (job.source.kind, job.target.kind):
        from v2v_async.copy.stream_driver import StreamDriver

        return StreamDriver(job, common.options, reporter)
    memory = None
    if folder is not None:
        from v2v_async.copy.remembering import Memory

        memory = Memory(folder.disk(job.index), reporter)
    return DiskDriver(job, common, reporter, memory)


async def _forget(folder: CheckpointFolder, reporter: Reporter) -> None:
    """Remove the checkpoints of a run in which all disks were copied."""
    try:
        await anyio.to_thread.run_sync(folder.finish)
    except V2VError as error:
        reporter.warning(f"{error.message}; {error.hint}")


class _Schedule:
    """Runs drivers under the limits of a run."""

    def __init__(
        self,
        drivers: Sequence[Driver],
        common: Common,
        reporter: Reporter,
        failures: dict[int, V2VError],
    ) -> None:
        self._waiting = sorted(drivers, key=lambda d: d.size, reverse=True)
        self._running: list[Driver] = []
        self._common = common
        self._reporter = reporter
        self._failures = failures

    async def run(self) -> None:
        async with anyio.create_task_group() as group:
            self._admit(group)

    def _admit(self, group: anyio.abc.TaskGroup) -> None:
        """Start what may start, and divide the connections among what runs."""
        started = []
        while self._waiting and len(self._running) < self._common.at_once:
            driver = self._waiting.pop(0)
            self._running.append(driver)
            started.append(driver)
        shares = divide(
            self._common.most_lanes,
            [driver.remaining for driver in self._running],
            [driver.most for driver in self._running],
        )
        for driver, share in zip(self._running, shares, strict=True):
            driver.set_share(share)
        for driver in started:
            group.start_soon(self._run_one, driver, group)

    async def _run_one(self, driver: Driver, group: anyio.abc.TaskGroup) -> None:
        index = driver.job.index
        mine = self._reporter.for_disk(index)
        try:
            await driver.run()
        except V2VError as error:
            error.locate(disk=index)
            mine.emit(
                "failed", error.message, bytes=driver.bytes(), hint=error.hint, offset=error.offset
            )
            if not self._common.options.keep_going:
                raise
            self._failures[index] = error
        except anyio.get_cancelled_exc_class():
            mine.emit("cancelled", bytes=driver.bytes())
            raise
        self._running.remove(driver)
        self._admit(group)


@asynccontextmanager
async def _common(options: CopyOptions, at_once: int, reporter: Reporter) -> AsyncIterator[Common]:
    """Have the threads and limits of a run."""
    throttle = None
    if options.bandwidth is not None or options.bandwidth_file is not None:
        throttle = Throttle(options.bandwidth)
    threads = min(options.threads or MAX_THREADS, MAX_LANES)
    workers = [Worker() for _ in range(1 if options.synchronous else threads)]
    most_lanes = options.max_connections or max(MAX_LANES, at_once)
    common = Common(
        options=options,
        workers=workers,
        budget=Budget(MAX_BYTES_IN_FLIGHT),
        throttle=throttle,
        at_once=at_once,
        most_lanes=most_lanes,
        may_wait=(MAX_LANES if options.threads is None else options.threads) >= most_lanes,
    )
    limiter = anyio.CapacityLimiter(len(workers))
    async with anyio.create_task_group() as group:
        for worker in workers:
            group.start_soon(_run_thread, worker, limiter)
        scope = anyio.CancelScope()
        if throttle is not None and options.bandwidth_file is not None:
            file = RateFile(options.bandwidth_file, options.bandwidth)
            group.start_soon(_follow_rate, file, throttle, reporter, scope)
        try:
            yield common
        finally:
            scope.cancel()
            for worker in workers:
                worker.close()


async def _run_thread(worker: Worker, limiter: anyio.CapacityLimiter) -> None:
    # Threads can't be cancelled; this one ends soon after its lanes were.
    with anyio.CancelScope(shield=True):
        await anyio.to_thread.run_sync(worker.run, limiter=limiter)


async def _follow_rate(
    file: RateFile, throttle: Throttle, reporter: Reporter, scope: anyio.CancelScope
) -> None:
    with scope:
        while True:
            warning = file.poll()
            if warning is not None:
                reporter.warning(warning)
            if file.rate != throttle.rate:
                now = "unlimited" if file.rate is None else format_rate(file.rate)
                reporter.message(f"the bandwidth is now {now}")
                throttle.set_rate(file.rate)
            await anyio.sleep(_RATE_FILE_EVERY_S)
