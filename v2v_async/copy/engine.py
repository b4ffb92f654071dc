"""The engine: threads, memory and rates that many copies share, each of which fails alone.

::

    copy ─┐                       ┌─> its connections: no more than there are, the first that asks
    copy ─┼─> waits for a place ──┼─> its part of the memory, as large as its part of them
    copy ─┘                       └─> the rates of its groups, then that of all copies
              the threads poll the lanes of any of them

One run's disks are copied on an engine of their own (``schedule.py``); a batch has one for all of
its guests, for as long as it runs.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace

import anyio
import anyio.to_thread

from v2v_async.copy.driver import DiskDriver
from v2v_async.copy.job import CopyJob, DiskResult
from v2v_async.copy.negotiation import Allotment, lanes_wanted
from v2v_async.copy.places import Places
from v2v_async.copy.shares import Budget
from v2v_async.copy.throttle import DiskThrottle, Throttle
from v2v_async.copy.worker import Worker
from v2v_async.errors import UsageError, V2VError, most_telling
from v2v_async.events import Bytes, Reporter
from v2v_async.options import CopyOptions

# They poll the lanes of slow servers, whose answers leave time: more only help with more cores.
MAX_THREADS = max(1, min(4, os.cpu_count() or 1))
MAX_LANES = 16
"""Pairs of connections over all disks of a run, and in a batch over those whose servers are near,
which are short of processors only: on two of these 8 disks took 1.3 times as long with 32 lanes as
with 16, and as long with 8. More processors change little, since a request of 512 KiB holds the
interpreter's lock for 27 µs of about 300: 11 lanes keep it busy. And servers start a thread, or
sixteen, for each connection.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What all copies of an engine may take together.

    ``bytes_in_flight`` is what their buffers hold; ``max_connections`` counts those to sources (as
    many go to targets, and one more for each disk that flushes); ``threads`` are those that poll
    (None: by the machine's processors).
    """

    bytes_in_flight: int
    max_connections: int
    threads: int | None = None


class Engine:
    """Copies disks, any number at once. Made by :func:`copy_engine`; for one event loop."""

    def __init__(self, limits: EngineLimits) -> None:
        threads = min(limits.threads or MAX_THREADS, MAX_LANES)
        self.workers = [Worker() for _ in range(threads)]
        self.budget = Budget(limits.bytes_in_flight)
        self._places = Places(limits.max_connections)
        self._waiting_threads = MAX_LANES if limits.threads is None else limits.threads
        self._running: list[tuple[DiskDriver, int]] = []  # and its connections
        self._throttles: dict[str, Throttle] = {"": Throttle()}

    def set_rates(self, rates: Mapping[str, int]) -> None:
        """Let groups have these rates (bytes a second) from now on, and ``""`` all copies together.

        What is not named is not limited any more.

        Raises:
            ValueError: a rate is not above zero; nothing has changed.
        """
        if any(rate <= 0 for rate in rates.values()):
            raise ValueError(f"no rate: {min(rates.values())} bytes a second")
        for name in {**self._throttles, **rates}:
            self._throttle(name).set_rate(rates.get(name))

    async def copy(
        self,
        job: CopyJob,
        options: CopyOptions,
        reporter: Reporter,
        *,
        groups: Sequence[str] = (),
    ) -> DiskResult:
        """Copy one disk and flush it; wait before for as many connections as it may have.

        These are ``options.connections``, or as many as suit it up to ``options.max_connections``,
        ``job.max_connections`` and those of the engine. ``options.checkpoint`` is a folder for this
        disk alone, which stays for the caller to remove: until then a copy that was done is found
        done, but where the target can't flush. ``options.bandwidth`` and ``bandwidth_file`` are of
        this copy alone; ``parallel``, ``threads`` and ``keep_going`` do not apply. ``groups`` name
        the rates that hold for it, the narrowest first.

        When this raises or is cancelled, nothing of it is in flight and other copies do not notice.

        Raises:
            V2VError: it failed (disk and offset say where).
        """
        if options.copier != "native" or "stream" in (job.source.kind, job.target.kind):
            raise UsageError(
                f"disk {job.index}: no other program and no stream can be copied with among others",
                hint="leave out --copier",
            )
        options = durable(options)
        mine = reporter.for_disk(job.index)
        driver: DiskDriver | None = None
        with telling(mine, lambda: driver.bytes() if driver is not None else None):
            async with AsyncExitStack() as stack:
                lanes = await stack.enter_async_context(
                    self._places.taken(lanes_wanted(job, options))
                )
                throttles = [self._throttle(name) for name in (*groups, "")]
                own = await stack.enter_async_context(own_rate(options, mine))
                if own is not None:
                    throttles.insert(0, own)
                part = self.budget.limit * lanes // self._places.total
                first = lanes if options.connections else self._near(len(self._running) + 1)
                driver = await self._open(
                    replace(job, max_connections=lanes),
                    self.allot(
                        options,
                        min(first, lanes),
                        part,
                        throttles,
                        together=max(MAX_LANES, len(self._running) + 1),
                    ),
                    mine,
                    stack,
                )
                with self._shared_with(driver, lanes):
                    result = await driver.run()
        return result

    @contextmanager
    def _shared_with(self, driver: DiskDriver, lanes: int) -> Iterator[None]:
        """Have a disk among those that the processors are divided among."""
        self._running.append((driver, lanes))
        self._divide()
        try:
            yield
        finally:
            self._running.remove((driver, lanes))
            self._divide()

    def _divide(self) -> None:
        for driver, lanes in self._running:
            is_told = driver.options.connections is not None
            driver.set_share(lanes, lanes if is_told else self._near(len(self._running)))

    @staticmethod
    def _near(disks: int) -> int:
        return max(1, MAX_LANES // disks)

    async def _open(
        self, job: CopyJob, allotment: Allotment, reporter: Reporter, stack: AsyncExitStack
    ) -> DiskDriver:
        path = allotment.options.checkpoint
        if path is not None:
            from v2v_async.copy.checkpoint import CheckpointFolder
            from v2v_async.copy.remembering import Memory, NothingToRememberError

            folder = CheckpointFolder(path)
            stack.push(folder)  # before it is entered: a cancellation leaves it open no more
            await anyio.to_thread.run_sync(folder.__enter__)
            memory = Memory(folder.disk(job.index), reporter)
            driver = DiskDriver(job, allotment, reporter, memory)
            try:
                await driver.open(stack)
                return driver
            except NothingToRememberError:
                reporter.message(
                    "the target can’t flush: if this copy is stopped, the next begins anew"
                )
        driver = DiskDriver(job, allotment, reporter)
        await driver.open(stack)
        return driver

    def allot(
        self,
        options: CopyOptions,
        lanes: int,
        bytes_in_flight: int,
        throttles: Sequence[Throttle],
        *,
        together: int,
        later: int | None = None,
    ) -> Allotment:
        """Return what one disk may use that is copied as ``options`` say.

        ``lanes`` it begins with, where ``together`` all disks have so many. ``later``: those that
        it may soon have, if it is more.
        """
        has_to_wait = bool(throttles) or options.checkpoint is not None
        return Allotment(
            options=options,
            workers=self.workers,
            budget=self.budget.part(max(1, bytes_in_flight)),
            throttle=DiskThrottle(throttles) if has_to_wait else None,
            first_lanes=lanes,
            lanes=lanes if later is None else later,
            may_wait=self._waiting_threads >= together,
        )

    def _throttle(self, name: str) -> Throttle:
        return self._throttles.setdefault(name, Throttle())


@asynccontextmanager
async def copy_engine(limits: EngineLimits) -> AsyncIterator[Engine]:
    """Have an engine. Whoever copies with it must have ended before the block does."""
    engine = Engine(limits)
    limiter = anyio.CapacityLimiter(len(engine.workers))
    try:
        async with anyio.create_task_group() as group:
            for worker in engine.workers:
                group.start_soon(_run_thread, worker, limiter)
            try:
                yield engine
            finally:
                for worker in engine.workers:
                    worker.close()
    except BaseExceptionGroup as group_of_one:
        # The threads raise nothing: it is what the block has raised.
        if len(group_of_one.exceptions) == 1:
            raise group_of_one.exceptions[0] from None
        raise


async def _run_thread(worker: Worker, limiter: anyio.CapacityLimiter) -> None:
    # Threads can't be cancelled; this one ends soon after its lanes were.
    with anyio.CancelScope(shield=True):
        await anyio.to_thread.run_sync(worker.run, limiter=limiter)


def durable(options: CopyOptions) -> CopyOptions:
    """Return options that flush where something else relies on it."""
    if options.checkpoint is not None or options.verify:
        return replace(options, flush=True)
    return options


@asynccontextmanager
async def own_rate(options: CopyOptions, reporter: Reporter) -> AsyncIterator[Throttle | None]:
    """Have the throttle that the options ask for, following its file where there is one."""
    if options.bandwidth is None and options.bandwidth_file is None:
        yield None
        return
    throttle = Throttle(options.bandwidth)
    if options.bandwidth_file is None:
        yield throttle
        return
    from v2v_async.copy.rate_file import followed

    async with followed(options.bandwidth_file, options.bandwidth, throttle, reporter):
        yield throttle


@contextmanager
def telling(reporter: Reporter, landed: Callable[[], Bytes | None]) -> Iterator[None]:
    """Say how a disk's copy ends where it does not end well, and which disk it is."""
    try:
        yield
    except (V2VError, BaseExceptionGroup) as found:
        error = most_telling(found) if isinstance(found, BaseExceptionGroup) else found
        if not isinstance(error, V2VError):
            raise
        error.locate(disk=reporter.disk)
        reporter.emit("failed", error.message, bytes=landed(), hint=error.hint, offset=error.offset)
        raise error from error.__cause__
    except anyio.get_cancelled_exc_class():
        reporter.emit("cancelled", bytes=landed())
        raise
