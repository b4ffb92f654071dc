"""Drives one disk: opens its connections, replaces lost ones, flushes, and tells how far it is.

::

    open both sides ──> lanes as many as its share ──> all has landed ──> flush ──> verify
                          ^        │ a connection is lost                  │ lost
                          └─ pause ┴───────────────────────────────────────┘

A flush proves only what went to the same server before it. Where a disk has several connections, a
server could have been restarted between two of them; so one more, the *witness*, is opened before
anything is written and used for flushes alone: as long as it answers, it is the same server.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import anyio
import anyio.from_thread
import anyio.to_thread

from v2v_async.copy.blocking import BlockingLane
from v2v_async.copy.disk import DiskCopy
from v2v_async.copy.geometry import geometry
from v2v_async.copy.job import CopyJob, DiskResult
from v2v_async.copy.lane import Lane
from v2v_async.copy.opening import (
    Opened,
    Pair,
    another,
    can_reconnect,
    close_side,
    most_connections,
    open_source,
    open_target,
    template,
)
from v2v_async.copy.shared import Shared
from v2v_async.copy.shares import Budget
from v2v_async.copy.throttle import Throttle
from v2v_async.copy.transfer import TransferLane
from v2v_async.copy.tuning import MAX_DEPTH, Limits, Setting, Tuner
from v2v_async.copy.worker import DRAIN_S, Worker
from v2v_async.errors import NbdError, V2VError
from v2v_async.events import Bytes, Reporter
from v2v_async.options import CopyOptions
from v2v_async.units import MIB, format_size

if TYPE_CHECKING:
    from v2v_async.copy.digest import DiskDigest
    from v2v_async.copy.remembering import Memory

AnyLane: TypeAlias = Lane | BlockingLane

# nbdcopy's default, and the best of 2, 4 and 8 on two processors (benchmarks/README.md).
LANES_PER_DISK = 4
MOST_LANES_PER_DISK = 8
"""Over a link of 20 ms throughput grew five-fold from 1 to 8 connections (Xen Orchestra #7216)."""
REQUESTS_PER_LANE = 4
_IN_FLIGHT_AT_FIRST = 64 * MIB
_REPORT_EVERY_S = 0.2
# What a server that dies may lose, and has to be copied again. The kernel writes back what is 30 s
# old by itself, so that a flush costs little then.
_FLUSH_EVERY_S = 30.0
_FLUSH_AFTER_LOSS_S = 2.0
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.25, 5.0


@dataclass(slots=True)
class Common:
    """What the disks of a run share."""

    options: CopyOptions
    workers: Sequence[Worker]
    budget: Budget
    throttle: Throttle | None
    at_once: int
    most_lanes: int


class DiskDriver:
    """One disk whose sides are files and NBD exports. Open it with :meth:`open`, then run it."""

    def __init__(
        self, job: CopyJob, common: Common, reporter: Reporter, memory: Memory | None = None
    ) -> None:
        self.job = job
        self.result = DiskResult(job.index)
        self._common = common
        self._options = common.options
        self.reporter = reporter
        self._memory = memory
        self._share = 1
        self._changed = anyio.Event()
        self._lanes: dict[AnyLane, Pair] = {}
        self._hung_since: dict[AnyLane, float] = {}
        self.digest: DiskDigest | None = None
        self._idle: list[Pair] = []
        self._templates: list[Opened] = []
        self._ended: deque[AnyLane] = deque()
        self._witness: Pair | None = None
        self._kept_target: Pair | None = None
        self._failures = 0
        self._seen = (0, 0)
        self._flush_every_s = _FLUSH_EVERY_S

    # Before anything moves.

    async def open(self, stack: AsyncExitStack) -> None:
        """Connect and negotiate; no byte moves. What is open is closed with ``stack``.

        Raises:
            V2VError: a side can't be opened, or the two don't go together.
        """
        job, options = self.job, self._options
        stack.push_async_callback(self._close_all)
        source = await open_source(job.source, wants_extents=options.extents)
        try:
            remembered = self._memory.recall() if self._memory is not None else None
            self._wants_target_extents = not (
                job.is_known_zero or options.target_is_zero or options.allocated
            )
            target = await open_target(
                job.target,
                source.info.size,
                source,
                keep=options.target_is_zero or remembered is not None,
                wants_extents=self._wants_target_extents,
            )
        except BaseException:
            source.end.close()
            raise
        first = Pair(source, target)
        self._idle.append(first)
        # More are opened from it, also when the first lane has gone and its files are closed.
        self._first = Pair(template(source), template(target))
        self._templates = [self._first.source, self._first.target]
        self._most = self._most_lanes(first)
        if options.digest is not None:
            from v2v_async.copy.digest import DiskDigest, parse_kind

            self.digest = DiskDigest(parse_kind(options.digest), source.info.size)
        self.geometry = geometry(
            source.info,
            target.info,
            lanes=self._most,
            request_size=options.request_size or job.request_size,
            sparse=options.sparse,
        )
        is_known_zero = job.is_known_zero or options.target_is_zero or target.is_zero
        done: list[tuple[int, int]] = []
        if self._memory is not None:
            done, is_known_zero = await self._memory.begin(
                job, first, options, is_known_zero=is_known_zero
            )
        self.copy = DiskCopy(
            job.index,
            self.geometry,
            is_known_zero=is_known_zero,
            can_zero=target.info.can_zero,
            can_fast_zero=target.info.can_fast_zero,
            can_extents=source.info.has_extents and options.extents,
            can_target_extents=target.info.has_extents and self._wants_target_extents,
            allocated=options.allocated,
            # With --verify it is taken of what is read then, whatever the extents told.
            digest=self.digest if not options.verify else None,
            written=self._memory.written if self._memory is not None else None,
            done=done,
        )
        if self._memory is not None:
            self.copy.on_durable = self._memory.note
        self._work = self.copy
        self._shared = self._make_shared()
        self.reporter.emit("planned", bytes=self.copy.bytes(), details=self._choices())

    def _most_lanes(self, first: Pair) -> int:
        options = self._options
        if options.synchronous:
            return 1
        limits = [
            options.connections or MOST_LANES_PER_DISK,
            most_connections(first.source, first.target),
            self.job.max_connections,
        ]
        if options.connections is None and options.max_connections is not None:
            limits[0] = options.max_connections
        return min(limit for limit in limits if limit is not None)

    def _make_shared(self) -> Shared:
        options, job, shape = self._options, self.job, self.geometry
        is_fixed_size = (options.request_size or job.request_size) is not None
        depth = 1 if options.synchronous else options.requests
        explicit = options.connections is not None or options.max_connections is not None
        lanes = self._most if explicit else min(LANES_PER_DISK, self._most)
        first_lanes = min(lanes, max(1, self._common.most_lanes // self._common.at_once))
        share = _IN_FLIGHT_AT_FIRST // (self._common.at_once * first_lanes * shape.request_size)
        start_depth = depth or max(1, min(REQUESTS_PER_LANE, share))
        most_depth = depth or MAX_DEPTH
        if options.queue_size is not None:
            most_depth = max(1, min(most_depth, options.queue_size // shape.request_size))
            start_depth = min(start_depth, most_depth)
        start = Setting(shape.request_size, start_depth, lanes)
        tuner = Tuner(
            start,
            Limits(
                request_size=shape.request_size if is_fixed_size else shape.largest_request,
                depth=most_depth,
                connections=lanes if explicit else self._most,
                in_flight=max(start.in_flight, self._common.budget.limit // self._common.at_once),
            ),
        )
        tuner.is_settled = options.synchronous
        retries = options.retries
        return Shared(tuner, self._common.budget, self._common.throttle, retries)

    def _choices(self) -> dict[str, object]:
        """Return what was negotiated and chosen, for the events and the log."""
        shape, copy, setting = self.geometry, self.copy, self._shared.tuner.setting
        return {
            "size": shape.size,
            "connections": min(setting.connections, self._most),
            "requests": 1 if self._waits else setting.depth,
            "request_size": setting.request_size,
            "block_size": shape.block,
            "source_extents": copy.can_extents,
            "target_known_zero": copy.is_known_zero,
            "target_can_zero": copy.can_zero,
            "memory": format_size(setting.in_flight),
        }

    # What the engine asks and says.

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self.geometry.size

    @property
    def remaining(self) -> int:
        """Bytes that nobody has looked at yet."""
        return self.copy.remaining

    @property
    def most(self) -> int:
        """Pairs of connections that it could use."""
        return self._most

    def bytes(self) -> Bytes:
        """Return what has landed so far."""
        return self.copy.bytes()

    def set_share(self, connections: int) -> None:
        """Let it have so many pairs of connections from now on."""
        self._share = connections
        self._changed.set()

    async def run(self) -> DiskResult:
        """Copy the disk, and flush it.

        Raises:
            CopyError: it failed; nothing is in flight any more.
        """
        started = anyio.current_time()
        self.reporter.emit("started", bytes=self.copy.bytes())
        try:
            async with anyio.create_task_group() as group:
                self._threads = group
                group.start_soon(self._tick)
                if self._options.flush and self._first.target.info.can_flush:
                    group.start_soon(self._flush_now_and_then)
                await self.drive(self.copy, TransferLane, flush=self._options.flush)
                self.reporter.emit("progress", bytes=self.copy.bytes())
                await self._finish()
                group.cancel_scope.cancel()
        except BaseExceptionGroup as grouped:
            raise grouped.exceptions[0] from None
        self.result.bytes = self.copy.bytes()
        if self.digest is not None:
            self.result.digest = await anyio.to_thread.run_sync(self.digest.hexdigest)
        self.reporter.emit(
            "finished",
            bytes=self.copy.bytes(),
            duration_s=anyio.current_time() - started,
            details=self._chosen(),
        )
        return self.result

    def _chosen(self) -> dict[str, object]:
        setting = self._shared.tuner.setting
        told: dict[str, object] = {
            "connections": min(setting.connections, self._most),
            "requests": 1 if self._waits else setting.depth,
            "request_size": setting.request_size,
        }
        if self.result.digest is not None:
            told["digest"] = self.result.digest
        return told

    # Lanes.

    async def drive(self, work: DiskCopy, kind: type[Lane], *, flush: bool) -> None:
        """Let lanes of a kind do all of ``work``, and flush the target.

        Raises:
            CopyError: it failed; nothing is in flight any more.
        """
        self._work = work
        work.wake = self._wake
        try:
            while True:
                self._changed = anyio.Event()
                while self._ended:
                    await self._after(self._ended.popleft())
                if work.is_stopping:
                    if not self._lanes:
                        break
                elif work.is_complete and not self._lanes:
                    if not flush or await self._flush_all():
                        break
                    continue
                elif work.has_todo and len(self._lanes) < self._wanted():
                    await self._add_lane(kind)
                    continue
                if self._ended:
                    continue
                await self._changed.wait()
        finally:
            await self._stop()
        if work.error is not None:
            raise work.error

    def _wanted(self) -> int:
        connections = self._shared.tuner.setting.connections
        return max(1, min(self._share, connections, self._most))

    @property
    def _waits(self) -> bool:
        """Whether lanes wait for each answer: with servers that are near, on several connections.

        One connection alone needs several requests on their way to keep both sides busy.
        """
        if self._options.synchronous:
            return True
        return self._most > 1 and self._options.threads != 1 and not self._shared.is_slow

    async def _add_lane(self, kind: type[Lane]) -> None:
        pair = await self._pair()
        if pair is None:
            return
        lane: AnyLane
        ends = pair.source.end, pair.target.end
        if kind is TransferLane and self._waits:
            lane = BlockingLane(
                self._work, *ends, self._shared, lambda: self._lane_done(lane), pair.epoch
            )
            self._lanes[lane] = pair
            self._threads.start_soon(_run_thread, lane)
            return
        lane = made = kind(
            self._work, *ends, self._shared, lambda: self._lane_done(lane), epoch=pair.epoch
        )
        self._lanes[lane] = pair
        min(self._common.workers, key=lambda worker: worker.load).add(made)

    def _lane_done(self, lane: AnyLane) -> None:
        """Called in the worker's thread."""
        self._ended.append(lane)
        anyio.from_thread.run_sync(lambda: self._changed.set())

    async def _pair(self) -> Pair | None:
        """Return a pair of connections of this epoch; None after a failure, when it is told."""
        copy = self._work
        epoch = copy.epoch
        kept, self._kept_target = self._kept_target, None
        side = "target"
        try:
            if self._has_witness:
                await self._call_witness(epoch)
            while self._idle:
                pair = self._idle.pop()
                if pair.epoch == epoch and not pair.source.end.is_lost:
                    return pair
                if self._most == 1 and pair.epoch == epoch and kept is None:
                    kept = pair  # only its target can flush what it has written
                    await pair.close_source()
                else:
                    await pair.close()
            side = "source"
            source = await another(self._first.source, wants_extents=copy.can_extents)
            side = "target"
            if kept is not None and kept.epoch == epoch:
                return Pair(source, kept.target, epoch)
            try:
                target = await another(self._first.target, wants_extents=copy.can_target_extents)
            except BaseException:
                await anyio.to_thread.run_sync(source.end.close)
                raise
        except (NbdError, TimeoutError) as error:
            self._kept_target = kept
            await self._try_later(f"connecting to the {side}", error)
            return None
        except V2VError as error:
            copy.fail(f"connecting to the {side}", error)
            return None
        return Pair(source, target, epoch)

    @property
    def _has_witness(self) -> bool:
        return self._most > 1 and self._first.target.endpoint.kind == "nbd"

    async def _call_witness(self, epoch: int) -> None:
        """Have a witness of this epoch, which is connected before anything is written in it."""
        if self._witness is not None:
            if self._witness.epoch == epoch:
                return
            await self._witness.close()
            self._witness = None
        made = await another(self._first.target, wants_extents=False)
        self._witness = Pair(made, made, epoch)

    async def _after(self, lane: AnyLane) -> None:
        """Deal with a lane that has ended: keep its connections, or find out why they are gone."""
        pair = self._lanes.pop(lane)
        self._hung_since.pop(lane, None)
        if pair.target.end.is_lost:
            # Where both were lost at once the lane may have told only of the source.
            self._work.target_lost(lane.epoch)
        if lane.lost is None and lane.epoch == self._work.epoch and not lane.in_flight:
            self._idle.append(pair)
            return
        if (
            self._most == 1
            and not lane.in_flight
            and lane.epoch == self._work.epoch
            and not pair.target.end.is_lost
        ):
            # Without multi-conn only this connection can flush what it has written.
            self._kept_target = pair
            await pair.close_source()
        else:
            await pair.close(politely=not lane.in_flight)
        if lane.lost is not None and not self._work.is_stopping:
            side, error = lane.lost
            endpoint = (pair.source if side == "source" else pair.target).endpoint
            if side == "target":
                self._flush_every_s = _FLUSH_AFTER_LOSS_S
            if not can_reconnect(endpoint):
                self._work.fail(f"the {side}", error)
            else:
                await self._try_later(f"the {side} ‘{endpoint}’", error)

    async def _try_later(self, what: str, error: Exception) -> None:
        """Pause before the next attempt, or fail the disk when there have been enough."""
        copy = self._work
        # Attempts count as long as nothing has come of them: a chunk that landed, and where the
        # target was lost, one that was flushed.
        seen = (copy.chunks_landed, copy.flushes)
        if seen[1] > self._seen[1] or (copy.epoch == 0 and seen[0] > self._seen[0]):
            self._failures = 0
        self._seen = seen
        self._failures += 1
        if self._failures > self._options.retries:
            copy.fail(what, error)
            return
        message = error.message if isinstance(error, V2VError) else "no answer in time"
        wait = min(_FIRST_PAUSE_S * 2 ** (self._failures - 1), _LAST_PAUSE_S)
        self.reporter.emit(
            "retrying",
            f"{what}: {message}; attempt {self._failures} of {self._options.retries} in {wait:g} s",
            bytes=self.copy.bytes(),
        )
        with anyio.move_on_after(wait):
            while not self._is_stopping():
                self._changed = anyio.Event()
                await self._changed.wait()

    def _is_stopping(self) -> bool:
        return self._work.is_stopping

    async def _flush_all(self) -> bool:
        """Flush after the last chunk; False where the target was lost and there is more to do."""
        if not self._first.target.info.can_flush:
            self._work.everything_flushed()
            return True
        pair = self._witness
        if pair is None or pair.epoch != self._work.epoch:
            pair = await self._pair()
            if pair is None:
                return False
            self._idle.append(pair)
        epoch = self._work.epoch
        try:
            await self._flush_on(pair)
        except NbdError as error:
            await self._flush_failed(epoch, error)
            return False
        if self._work.epoch != epoch:
            return False  # the flush of now and then has failed meanwhile: there is more to do
        self._work.everything_flushed()
        return True

    async def _flush_on(self, pair: Pair) -> None:
        # A server that hangs in its flush must not hold a cancelled run.
        await anyio.to_thread.run_sync(pair.target.end.flush_now, abandon_on_cancel=True)

    async def _flush_failed(self, epoch: int, error: NbdError) -> None:
        """Take a flush that failed for a loss of the target: what it had may be gone as well."""
        self._work.target_lost(epoch)
        self._flush_every_s = _FLUSH_AFTER_LOSS_S
        if not can_reconnect(self._first.target.endpoint):
            self._work.fail("flushing", error)
        else:
            await self._try_later("flushing the target", error)

    async def _flush_now_and_then(self) -> None:
        """Make durable what has landed, so that a server that dies loses little."""
        copy = self._work
        while True:
            await anyio.sleep(self._interval())
            witness, epoch = self._witness, copy.epoch
            if not self._has_witness:
                copy.wants_flush = True  # by the lane, on the only connection
                self._wake()
            elif witness is not None and witness.epoch == epoch and copy.begin_flush():
                try:
                    await self._flush_on(witness)
                except NbdError:
                    self._flush_every_s = _FLUSH_AFTER_LOSS_S
                    copy.target_lost(epoch)  # the lanes will find out why
                else:
                    copy.flushed(epoch)

    async def _finish(self) -> None:
        """Do what comes after the copy: remember, verify."""
        if self._memory is not None:
            await self._memory.save(is_complete=True)
        if self._options.verify:
            from v2v_async.copy.verifying import verify

            await verify(self, repair=self._options.repair)

    async def _stop(self) -> None:
        """Let all lanes end; what is in flight is waited for, but not for ever."""
        self._work.cancel()
        with anyio.CancelScope(shield=True):
            while self._lanes:
                self._changed = anyio.Event()
                while self._ended:
                    lane = self._ended.popleft()
                    pair = self._lanes.pop(lane)
                    self._hung_since.pop(lane, None)
                    if lane.in_flight:  # its server hangs: a good-bye would hang as well
                        await pair.close(politely=False)
                    else:
                        self._idle.append(pair)
                if self._lanes:
                    self._sever_hung()
                    with anyio.move_on_after(_REPORT_EVERY_S):
                        await self._changed.wait()

    async def _close_all(self) -> None:
        kept = [pair for pair in (self._witness, self._kept_target) if pair is not None]
        for pair in (*self._idle, *kept):
            await pair.close()
        for side in self._templates:
            await close_side(side)
        self._idle.clear()
        self._witness = self._kept_target = None

    def _wake(self) -> None:
        """Called by any thread."""
        for worker in self._common.workers:
            worker.wake()
        for lane in list(self._lanes):
            if isinstance(lane, BlockingLane):
                lane.wake()

    def _sever_hung(self) -> None:
        """Cut the connections of lanes that ought to end and wait for servers that hang."""
        now = anyio.current_time()
        for lane in list(self._lanes):
            if not (isinstance(lane, BlockingLane) and lane.is_ending):
                continue
            if now - self._hung_since.setdefault(lane, now) > DRAIN_S:
                lane.sever()

    # Telling, and what has to be done now and then.

    async def _tick(self) -> None:
        copy, tuner = self.copy, self._shared.tuner
        last = None
        setting = tuner.setting
        while True:
            now = copy.bytes()
            if now != last:
                self.reporter.emit("progress", bytes=now)
                last = now
            if tuner.setting != setting:
                more = tuner.setting.connections > setting.connections
                setting = tuner.setting
                self.reporter.debug(_told(setting))
                if more:
                    self._changed.set()
            self._sever_hung()
            if self._memory is not None:
                await self._memory.save()
            await anyio.sleep(_REPORT_EVERY_S)

    def _interval(self) -> float:
        if self._memory is not None:
            return min(self._memory.interval_s, self._flush_every_s)
        return self._flush_every_s


async def _run_thread(lane: BlockingLane) -> None:
    # Threads can't be cancelled; this one ends soon after its disk is told to stop.
    with anyio.CancelScope(shield=True):
        await anyio.to_thread.run_sync(lane.run, limiter=anyio.CapacityLimiter(1))


def _told(setting: Setting) -> str:
    return (
        f"now {setting.depth} requests of {format_size(setting.request_size)} on "
        f"{setting.connections} connections"
    )
