"""Opens both sides of a disk and settles how it is copied, before anything moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from v2v_async.copy.connections import Connections
from v2v_async.copy.disk import DiskCopy
from v2v_async.copy.geometry import Geometry, geometry
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
from v2v_async.copy.throttle import Throttle
from v2v_async.copy.tuning import MAX_DEPTH, Limits, Setting, Tuner
from v2v_async.copy.worker import Worker
from v2v_async.options import CopyOptions
from v2v_async.units import MIB

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
# Half of all that there may be: the rest is for the tuners, and most copies never need it.
_IN_FLIGHT_AT_FIRST = 64 * MIB


@dataclass(slots=True)
class Common:
    """What the disks of a run share.

    ``may_wait``: each lane may have a thread of its own; else they share those of ``workers``.
    """

    options: CopyOptions
    workers: Sequence[Worker]
    budget: Budget
    throttle: Throttle | None
    at_once: int
    most_lanes: int
    may_wait: bool


@dataclass(frozen=True, slots=True)
class Terms:
    """What was settled: the work, what its lanes share, its connections."""

    copy: DiskCopy
    shared: Shared
    connections: Connections
    digest: DiskDigest | None


async def negotiate(job: CopyJob, common: Common, memory: Memory | None) -> Terms:
    """Open both sides and fit the copy to them; with ``memory``, to what an earlier run has done.

    Raises:
        V2VError: a side can't be opened, or the two don't go together; nothing stays open.
    """
    options = common.options
    source = await open_source(job.source, wants_extents=options.extents)
    try:
        remembered = memory.recall() if memory is not None else None
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
            request_size=options.request_size or job.request_size,
            sparse=options.sparse,
        )
        is_known_zero = job.is_known_zero or options.target_is_zero or target.is_zero
        done: list[tuple[int, int]] = []
        if memory is not None:
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
    )
    if memory is not None:
        copy.on_durable = memory.note
    shared = _shared(job, common, shape, connections.most)
    return Terms(copy, shared, connections, digest)


def _digest(options: CopyOptions, size: int) -> DiskDigest | None:
    if options.digest is None:
        return None
    from v2v_async.copy.digest import DiskDigest, parse_kind  # hashlib costs some milliseconds

    return DiskDigest(parse_kind(options.digest), size)


def _most_lanes(job: CopyJob, options: CopyOptions, source: Opened, target: Opened) -> int:
    if options.synchronous:
        return 1
    wanted = options.connections or options.max_connections or MOST_LANES_PER_DISK
    limits = [wanted, most_connections(source, target), job.max_connections]
    return min(limit for limit in limits if limit is not None)


def _shared(job: CopyJob, common: Common, shape: Geometry, most: int) -> Shared:
    """Return how the disk's lanes begin, and how far the tuner may go."""
    options = common.options
    is_fixed_size = (options.request_size or job.request_size) is not None
    is_fixed = options.connections is not None or options.max_connections is not None
    lanes = most if is_fixed else min(LANES_PER_DISK, most)
    first_lanes = min(lanes, max(1, common.most_lanes // common.at_once))
    share = _IN_FLIGHT_AT_FIRST // (common.at_once * first_lanes * shape.request_size)
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
        in_flight=max(start.in_flight, common.budget.limit // common.at_once),
    )
    tuner = Tuner(start, limits)
    tuner.is_settled = options.synchronous
    return Shared(tuner, common.budget, common.throttle, options.retries)
