"""Opens both sides of a disk and settles how it is copied, before anything moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio.to_thread

from v2v_async.copy.connections import Connections
from v2v_async.copy.disk import DiskCopy
from v2v_async.copy.geometry import REQUEST_SIZE, Geometry, geometry
from v2v_async.copy.job import CopyJob
from v2v_async.copy.opening import (
    Opened,
    Pair,
    close_side,
    most_connections,
    open_source,
    open_target,
)
from v2v_async.copy.shared import Shared
from v2v_async.copy.shares import Budget
from v2v_async.copy.throttle import DiskThrottle
from v2v_async.copy.tuning import MAX_DEPTH, Limits, Setting, Tuner
from v2v_async.copy.worker import Worker
from v2v_async.options import CopyOptions

if TYPE_CHECKING:
    from v2v_async.copy.digest import DiskDigest
    from v2v_async.copy.remembering import Memory

# nbdcopy's default. On two busy processors 4 GiB to null took 2.8-4.4 s with 4 lanes, 3.1-4.3 s
# with 2, 3.7-5.5 s with 8.
LANES_PER_DISK = 4
MOST_LANES_PER_DISK = 8
"""Over a link of 20 ms throughput grew five-fold from 1 to 8 connections (Xen Orchestra #7216)."""
# Of 1 MiB on two connections, 4 were faster than 2 (1.8 s, 2.0 s); the tuner goes on from here.
REQUESTS_PER_LANE = 4
# Half of what there may be: the rest is for the tuner, and most copies never need it.
_AT_FIRST = 2


@dataclass(frozen=True, slots=True)
class Allotment:
    """What one disk may use of an engine.

    ``budget`` and ``throttle`` are its own parts of them. ``first_lanes``: pairs of connections
    that it will have when it begins; ``lanes``: those that its tuner begins with, which it may
    have later. ``may_wait``: each lane may have a thread of its own; else they share those of
    ``workers``.
    """

    options: CopyOptions
    workers: Sequence[Worker]
    budget: Budget
    throttle: DiskThrottle | None
    first_lanes: int
    lanes: int
    may_wait: bool


@dataclass(frozen=True, slots=True)
class Terms:
    """What was settled: the work, what its lanes share, its connections."""

    copy: DiskCopy
    shared: Shared
    connections: Connections
    digest: DiskDigest | None


async def negotiate(job: CopyJob, allotment: Allotment, memory: Memory | None) -> Terms:
    """Open both sides and fit the copy to them; with ``memory``, to what an earlier run has done.

    Raises:
        V2VError: a side can't be opened, or the two don't go together; nothing stays open.
    """
    options = allotment.options
    source = await open_source(job.source, wants_extents=options.extents)
    try:
        remembered = None
        if memory is not None:
            remembered = await anyio.to_thread.run_sync(memory.recall)
        # Where zeroes are skipped anyway, or are to take room, the target need not tell its own.
        wants_extents = not (job.is_known_zero or options.target_is_zero or options.allocated)
        target = await open_target(
            job.target,
            source.info.size,
            source,
            keep=options.target_is_zero or remembered is not None,
            wants_extents=wants_extents,
        )
    except BaseException:
        await close_side(source)
        raise
    connections = Connections(source, target, _most_lanes(job, options, source, target))
    try:
        shape = geometry(
            source.info,
            target.info,
            lanes=connections.most,
            request_size=_request_size(job, allotment),
            sparse=options.sparse,
        )
        unflushed = _unflushed(memory, shape)
        # Each has room for one request, at least when all of them begin.
        fitting = max(1, allotment.budget.limit // shape.request_size)
        connections.most = min(connections.most, fitting)
        is_known_zero = job.is_known_zero or options.target_is_zero or target.is_zero
        done: list[tuple[int, int]] = []
        if job.only is not None:
            done = list(job.only.gaps(0, source.info.size))
        elif memory is not None:
            pair = Pair(source, target)
            done, is_known_zero = await memory.begin(
                job, pair, options, is_known_zero=is_known_zero
            )
        digest = _digest(options, source.info.size)
    except BaseException:
        await connections.close()
        raise
    copy = DiskCopy(
        job.index,
        shape,
        is_known_zero=is_known_zero,
        can_zero=target.info.can_zero,
        can_fast_zero=target.info.can_fast_zero,
        can_extents=source.info.has_extents and options.extents,
        can_target_extents=target.info.has_extents and wants_extents,
        allocated=options.allocated,
        # With --verify it is taken of what is read then, whatever the extents told.
        digest=digest if not options.verify else None,
        written=memory.written if memory is not None else None,
        done=done,
        parts=job.parts,
    )
    if job.early is not None:
        job.early.attach(copy)
    if memory is not None:
        copy.on_durable = memory.note
        copy.flush_after, copy.hold_at = unflushed
    shared = _shared(job, allotment, shape, connections.most, copy.hold_at)
    return Terms(copy, shared, connections, digest)


def _digest(options: CopyOptions, size: int) -> DiskDigest | None:
    if options.digest is None:
        return None
    from v2v_async.copy.digest import DiskDigest, parse_kind  # hashlib costs some milliseconds

    return DiskDigest(parse_kind(options.digest), size)


def lanes_wanted(job: CopyJob, options: CopyOptions) -> int:
    """Return how many pairs of connections a disk may have, as far as its servers allow it."""
    if options.synchronous:
        return 1
    wanted = options.connections or options.max_connections or MOST_LANES_PER_DISK
    return min(wanted, job.max_connections or wanted)


def _most_lanes(job: CopyJob, options: CopyOptions, source: Opened, target: Opened) -> int:
    wanted = lanes_wanted(job, options)
    return min(wanted, most_connections(source, target) or wanted)


def _request_size(job: CopyJob, allotment: Allotment) -> int | None:
    wanted = allotment.options.request_size or job.request_size
    if wanted is None and allotment.budget.limit < REQUEST_SIZE:
        return allotment.budget.limit
    return wanted


def _unflushed(memory: Memory | None, shape: Geometry) -> tuple[int | None, int | None]:
    """Return how much to flush at once and at most; what lanes take at a time is less."""
    if memory is None:
        return None, None
    from v2v_async.copy.remembering import most_unflushed

    part, most = most_unflushed(shape.size)
    shape.chunk = min(shape.chunk, max(1, part // 2 // shape.request_size) * shape.request_size)
    return part, most


def _shared(
    job: CopyJob, allotment: Allotment, shape: Geometry, most: int, hold_at: int | None
) -> Shared:
    """Return how the disk's lanes begin, and how far the tuner may go.

    With ``hold_at`` (bytes) a killed copy has to do again what is on its way, as if it had landed.
    """
    options, budget = allotment.options, allotment.budget
    is_fixed_size = (options.request_size or job.request_size) is not None
    is_fixed = options.connections is not None or options.max_connections is not None
    lanes = most if is_fixed else min(LANES_PER_DISK, allotment.lanes, most)
    first_lanes = min(lanes, allotment.first_lanes)
    share = budget.limit // _AT_FIRST // (first_lanes * shape.request_size)
    depth = 1 if options.synchronous else options.requests
    start_depth = depth or max(1, min(REQUESTS_PER_LANE, share))
    most_depth = depth or MAX_DEPTH
    if options.queue_size is not None:
        most_depth = max(1, min(most_depth, options.queue_size // shape.request_size))
        start_depth = min(start_depth, most_depth)
    start = Setting(shape.request_size, start_depth, lanes)
    limits = Limits(
        request_size=shape.request_size if is_fixed_size else shape.largest_request,
        depth=most_depth,
        connections=lanes if is_fixed else most,
        # A lane has twice that in its chunks (copy/lane.py).
        in_flight=max(start.in_flight, min(budget.limit, (hold_at or 2 * budget.limit) // 2)),
    )
    tuner = Tuner(start, limits)
    tuner.is_settled = options.synchronous
    return Shared(tuner, budget, allotment.throttle, options.retries)
