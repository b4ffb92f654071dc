"""Copies the disks of one run: which runs when, with how many connections, what a failure stops.

::

    waiting (longest first) ──admit, at most --parallel──> running ──> done or failed
                                      │ each change divides the connections anew
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Protocol

import anyio
import anyio.abc
import anyio.to_thread

from v2v_async.copy.driver import DiskDriver
from v2v_async.copy.engine import (
    MAX_LANES,
    Engine,
    EngineLimits,
    copy_engine,
    durable,
    own_rate,
    telling,
)
from v2v_async.copy.job import CopyJob, DiskResult
from v2v_async.copy.negotiation import LANES_PER_DISK
from v2v_async.copy.shares import divide
from v2v_async.copy.throttle import Throttle
from v2v_async.errors import V2VError, most_telling
from v2v_async.events import Bytes, Reporter
from v2v_async.options import CopyOptions
from v2v_async.units import MIB

if TYPE_CHECKING:
    from v2v_async.copy.checkpoint import CheckpointFolder

__all__ = ["CopyJob", "DiskResult", "copy_disks"]

MAX_BYTES_IN_FLIGHT = 128 * MIB
"""Over all disks. Enough for 2.5 GiB/s with 50 ms an answer; local copies begin with half of it."""
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
    options = durable(options)
    most_lanes = options.max_connections or max(MAX_LANES, at_once)
    limits = EngineLimits(
        bytes_in_flight=MAX_BYTES_IN_FLIGHT,
        max_connections=most_lanes,
        threads=1 if options.synchronous else options.threads,
    )
    failures: dict[int, V2VError] = {}
    try:
        async with AsyncExitStack() as stack:
            engine = await stack.enter_async_context(copy_engine(limits))
            rate = await stack.enter_async_context(own_rate(options, reporter))
            folder = None
            if options.checkpoint is not None:
                from v2v_async.copy.checkpoint import CheckpointFolder

                folder = stack.enter_context(CheckpointFolder(options.checkpoint))
            make = _Maker(engine, options, at_once, most_lanes, rate, folder)
            drivers: list[Driver] = []
            for job in jobs:
                try:
                    driver = make(job, reporter.for_disk(job.index))
                    await driver.open(stack)
                except V2VError as error:
                    error.locate(disk=job.index)
                    raise
                drivers.append(driver)
            keep = failures if options.keep_going else None
            await _Schedule(drivers, at_once, most_lanes, reporter, keep).run()
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


class _Maker:
    """Makes the driver of each disk, on equal terms."""

    def __init__(
        self,
        engine: Engine,
        options: CopyOptions,
        at_once: int,
        most_lanes: int,
        rate: Throttle | None,
        folder: CheckpointFolder | None,
    ) -> None:
        self._engine = engine
        self._options = options
        self._at_once = at_once
        self._most_lanes = most_lanes
        self._throttles = [rate] if rate is not None else []
        self._folder = folder

    def __call__(self, job: CopyJob, reporter: Reporter) -> Driver:
        # The others are imported only where they are needed: most copies need none of them.
        options = self._options
        if options.copier != "native":
            from v2v_async.copy.external_driver import ExternalDriver

            return ExternalDriver(job, options, self._at_once, reporter)
        if "stream" in (job.source.kind, job.target.kind):
            from v2v_async.copy.stream_driver import StreamDriver

            return StreamDriver(job, options, reporter)
        memory = None
        if self._folder is not None:
            from v2v_async.copy.remembering import Memory

            memory = Memory(self._folder.disk(job.index), reporter)
        part = self._engine.budget.limit // self._at_once
        lanes = max(1, self._most_lanes // self._at_once)
        allotment = self._engine.allot(
            options,
            lanes,
            part,
            self._throttles,
            together=self._most_lanes,
            later=LANES_PER_DISK,
        )
        return DiskDriver(job, allotment, reporter, memory)


async def _forget(folder: CheckpointFolder, reporter: Reporter) -> None:
    """Remove the checkpoints of a run in which all disks were copied."""
    try:
        await anyio.to_thread.run_sync(folder.finish)
    except V2VError as error:
        reporter.warning(f"{error.message}; {error.hint}")


class _Schedule:
    """Runs drivers under the limits of a run.

    ``failures``: where those go that fail, by disk, while the others finish; None: they stop all.
    """

    def __init__(
        self,
        drivers: Sequence[Driver],
        at_once: int,
        most_lanes: int,
        reporter: Reporter,
        failures: dict[int, V2VError] | None,
    ) -> None:
        self._waiting = sorted(drivers, key=lambda d: d.size, reverse=True)
        self._running: list[Driver] = []
        self._at_once = at_once
        self._most_lanes = most_lanes
        self._reporter = reporter
        self._failures = failures

    async def run(self) -> None:
        async with anyio.create_task_group() as group:
            self._admit(group)

    def _admit(self, group: anyio.abc.TaskGroup) -> None:
        """Start what may start, and divide the connections among what runs."""
        started = []
        while self._waiting and len(self._running) < self._at_once:
            driver = self._waiting.pop(0)
            self._running.append(driver)
            started.append(driver)
        shares = divide(
            self._most_lanes,
            [driver.remaining for driver in self._running],
            [driver.most for driver in self._running],
        )
        for driver, share in zip(self._running, shares, strict=True):
            driver.set_share(share)
        for driver in started:
            group.start_soon(self._run_one, driver, group)

    async def _run_one(self, driver: Driver, group: anyio.abc.TaskGroup) -> None:
        try:
            with telling(self._reporter.for_disk(driver.job.index), driver.bytes):
                await driver.run()
        except V2VError as error:
            if self._failures is None:
                raise
            self._failures[driver.job.index] = error
        self._running.remove(driver)
        self._admit(group)
