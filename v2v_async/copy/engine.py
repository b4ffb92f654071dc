"""Copies many disks at once and tells how far each one is."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import anyio
import anyio.abc
import anyio.from_thread
import anyio.to_thread

from v2v_async.connection import Connection, open_connection
from v2v_async.copy.disk import DiskCopy, Geometry, geometry
from v2v_async.copy.lane import Lane
from v2v_async.copy.worker import DRAIN_S, Worker
from v2v_async.errors import NbdError, V2VError, most_telling
from v2v_async.events import Bytes, Reporter
from v2v_async.handle import BASE_ALLOCATION
from v2v_async.units import MIB, format_size

# Two threads on two cores keep up with nbdcopy; more only help where there are more cores.
MAX_THREADS = max(1, min(4, os.cpu_count() or 1))
# Pairs of connections over all disks. One client gains little from more (8 over a 20 ms link gave
# five times one: Xen Orchestra #7216), and servers start a thread for each.
MAX_LANES = 16
LANES_PER_DISK = 4
# Data in flight beyond the processor's cache buys nothing on local sockets (shared/FACTS.md).
REQUESTS_PER_LANE = 4
MAX_BYTES_IN_FLIGHT = 64 * MIB
_REPORT_EVERY_S = 0.2


@dataclass(frozen=True, slots=True)
class CopyJob:
    """One disk: endpoints are socket paths or NBD URIs.

    ``is_known_zero``: nobody has written the target yet, it reads as zeroes.
    """

    index: int
    source: str
    target: str
    is_known_zero: bool = False
    max_connections: int | None = None
    request_size: int | None = None


@dataclass(slots=True)
class _Disk:
    """A job whose first connections have been negotiated."""

    job: CopyJob
    source: Connection
    target: Connection
    lanes: int
    depth: int
    copy: DiskCopy


async def copy_disks(
    jobs: Sequence[CopyJob], reporter: Reporter, *, parallel: int | None = None
) -> list[Bytes]:
    """Copy all disks, the longest first, at most ``parallel`` at once; return bytes by class.

    Everything is negotiated before the first byte moves. Success means flushed. When a disk fails
    the others are stopped, with nothing in flight.

    Raises:
        CopyError: a disk failed (disk and offset say where).
        ConnectError: an endpoint can't be reached.
    """
    if not jobs:
        return []
    at_once = max(1, min(parallel or len(jobs), len(jobs)))
    disks: list[_Disk] = []
    try:
        async with AsyncExitStack() as stack, anyio.create_task_group() as threads:
            for job in jobs:
                disks.append(await _negotiate(stack, job, at_once))
            for disk in disks:
                mine = reporter.for_disk(disk.job.index)
                mine.emit("planned", bytes=disk.copy.bytes(), details=_choices(disk))
            wanted = min(MAX_THREADS, sum(disk.lanes for disk in disks))
            workers = [Worker() for _ in range(wanted)]
            limiter = anyio.CapacityLimiter(len(workers))
            for worker in workers:
                threads.start_soon(_run_thread, worker, limiter)
            try:
                await _copy_all(disks, workers, reporter, at_once)
            finally:
                for worker in workers:
                    worker.close()
    except BaseExceptionGroup as group:
        raise most_telling(group) from None
    return [disk.copy.bytes() for disk in disks]


async def _run_thread(worker: Worker, limiter: anyio.CapacityLimiter) -> None:
    # Threads can't be cancelled; this one ends soon after its lanes were.
    with anyio.CancelScope(shield=True):
        await anyio.to_thread.run_sync(worker.run, limiter=limiter)


async def _negotiate(stack: AsyncExitStack, job: CopyJob, at_once: int) -> _Disk:
    try:
        source = await _connect(stack, job.source)
        # Whether the target is zero we know, or don't care: its extents are not asked for.
        target = await _connect(stack, job.target, wants_extents=False)
        lanes = _lanes(job, source, target, at_once)
        shape = geometry(source.info, target.info, lanes=lanes, request_size=job.request_size)
    except V2VError as error:
        error.locate(disk=job.index)
        raise
    share = MAX_BYTES_IN_FLIGHT // (min(MAX_LANES, lanes * at_once) * shape.request_size)
    copy = DiskCopy(
        job.index,
        shape,
        is_known_zero=job.is_known_zero,
        can_zero=target.info.can_zero,
        can_extents=source.info.has_extents,
    )
    return _Disk(job, source, target, lanes, max(1, min(REQUESTS_PER_LANE, share)), copy)


async def _connect(
    stack: AsyncExitStack, endpoint: str, *, wants_extents: bool = True
) -> Connection:
    connection = await open_connection(
        endpoint, contexts=[BASE_ALLOCATION] if wants_extents else []
    )

    async def close() -> None:
        with anyio.CancelScope(shield=True), anyio.move_on_after(DRAIN_S):
            await anyio.to_thread.run_sync(connection.handle.close, abandon_on_cancel=True)

    stack.push_async_callback(close)
    return connection


def _lanes(job: CopyJob, source: Connection, target: Connection, at_once: int) -> int:
    """Return how many pairs of connections a disk gets."""
    if not (source.info.can_multi_conn and target.info.can_multi_conn):
        # Without multi-conn a flush on one connection says nothing of what others wrote.
        return 1
    lanes = min(LANES_PER_DISK, max(1, MAX_LANES // at_once))
    return min(lanes, job.max_connections or lanes)


async def _copy_all(
    disks: list[_Disk], workers: list[Worker], reporter: Reporter, at_once: int
) -> None:
    slots = anyio.Semaphore(at_once)
    async with anyio.create_task_group() as group:
        # The semaphore is fair: waiting here keeps the order, longest first.
        for disk in sorted(disks, key=lambda d: d.copy.geometry.size, reverse=True):
            await slots.acquire()
            group.start_soon(_copy_one, disk, workers, reporter, slots.release)


async def _copy_one(
    disk: _Disk,
    workers: list[Worker],
    reporter: Reporter,
    release: Callable[[], None],
) -> None:
    mine = reporter.for_disk(disk.job.index)
    started = anyio.current_time()
    mine.emit("started", bytes=disk.copy.bytes())
    try:
        async with AsyncExitStack() as stack:
            await _drive(stack, disk, workers, mine)
            mine.emit("progress", bytes=disk.copy.bytes())
            # A server that hangs in its flush must not hold a cancelled run.
            await anyio.to_thread.run_sync(disk.target.handle.flush_now, abandon_on_cancel=True)
    except V2VError as error:
        error.locate(disk=disk.job.index)
        mine.emit(
            "failed", error.message, bytes=disk.copy.bytes(), hint=error.hint, offset=error.offset
        )
        raise
    except anyio.get_cancelled_exc_class():
        mine.emit("cancelled", bytes=disk.copy.bytes())
        raise
    finally:
        release()
    mine.emit("finished", bytes=disk.copy.bytes(), duration_s=anyio.current_time() - started)


async def _drive(
    stack: AsyncExitStack, disk: _Disk, workers: list[Worker], reporter: Reporter
) -> None:
    """Give the disk's lanes to the workers and wait for all of them."""
    pairs = [(disk.source, disk.target)]
    try:
        for _ in range(1, disk.lanes):
            source = await _connect(stack, disk.job.source)
            target = await _connect(stack, disk.job.target, wants_extents=False)
            pairs.append((source, target))
    except NbdError as error:
        error.locate(disk=disk.job.index)
        raise
    done = [anyio.Event() for _ in pairs]
    lanes = [
        Lane(disk.copy, source.handle, target.handle, disk.depth, _thread_safe(event))
        for (source, target), event in zip(pairs, done, strict=True)
    ]
    disk.copy.wake = lambda: _wake_all(workers)
    for lane in lanes:
        min(workers, key=lambda worker: worker.load).add(lane)
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(_report, disk.copy, reporter)
            await _all(done)
            group.cancel_scope.cancel()
    finally:
        disk.copy.cancel()
        with anyio.CancelScope(shield=True):
            await _all(done)
        for lane in lanes:
            if lane.in_flight:  # its server hangs: a good-bye would hang as well
                lane.source.close(politely=False)
                lane.target.close(politely=False)
    if disk.copy.error is not None:
        raise disk.copy.error


def _wake_all(workers: Sequence[Worker]) -> None:
    for worker in workers:
        worker.wake()


def _thread_safe(event: anyio.Event) -> Callable[[], None]:
    return lambda: anyio.from_thread.run_sync(event.set)


async def _all(events: Sequence[anyio.Event]) -> None:
    for event in events:
        await event.wait()


async def _report(copy: DiskCopy, reporter: Reporter) -> None:
    last: Bytes | None = None
    while True:
        now = copy.bytes()
        if now != last:
            reporter.emit("progress", bytes=now)
            last = now
        await anyio.sleep(_REPORT_EVERY_S)


def _choices(disk: _Disk) -> dict[str, object]:
    """Return what was negotiated and chosen, for the events and the log."""
    shape: Geometry = disk.copy.geometry
    return {
        "size": shape.size,
        "connections": disk.lanes,
        "requests": disk.lanes * disk.depth,
        "request_size": shape.request_size,
        "block_size": shape.block,
        "source_extents": disk.copy.can_extents,
        "target_known_zero": disk.copy.is_known_zero,
        "target_can_zero": disk.copy.can_zero,
        "memory": format_size(disk.lanes * disk.depth * shape.request_size),
    }
