"""Drives one disk: gives it lanes, replaces those that are lost, flushes, tells how far it is.

::

    open both sides ──> lanes as many as its share ──> all has landed ──> flush ──> verify
                          ^        │ a connection is lost                  │ lost
                          └─ pause ┴───────────────────────────────────────┘
"""

from __future__ import annotations

from collections import deque
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, TypeAlias

import anyio
import anyio.abc
import anyio.from_thread
import anyio.to_thread

from v2v_async.copy.blocking import BlockingLane
from v2v_async.copy.connections import flush
from v2v_async.copy.disk import DiskCopy
from v2v_async.copy.flushing import Flushing
from v2v_async.copy.geometry import smaller_chunk
from v2v_async.copy.job import CopyJob, DiskResult
from v2v_async.copy.lane import Lane
from v2v_async.copy.negotiation import LANES_PER_DISK, Allotment, negotiate
from v2v_async.copy.opening import Pair, can_reconnect
from v2v_async.copy.retrying import Attempts
from v2v_async.copy.transfer import TransferLane
from v2v_async.copy.tuning import Setting
from v2v_async.copy.worker import DRAIN_S
from v2v_async.errors import NbdError, V2VError
from v2v_async.events import Bytes, Reporter
from v2v_async.units import format_size

if TYPE_CHECKING:
    from v2v_async.copy.remembering import Memory

AnyLane: TypeAlias = Lane | BlockingLane

_REPORT_EVERY_S = 0.2
_OPEN_AHEAD_S = 0.05  # a near server takes a millisecond for each, a far one would cost a start


class DiskDriver:
    """One disk whose sides are files and NBD exports. Open it with :meth:`open`, then run it."""

    def __init__(
        self, job: CopyJob, allotment: Allotment, reporter: Reporter, memory: Memory | None = None
    ) -> None:
        self.job = job
        self.result = DiskResult(job.index)
        self._allotment = allotment
        self.options = allotment.options
        self.reporter = reporter
        self._memory = memory
        self._share = self._near_share = 1
        self._changed = anyio.Event()
        self._lanes: dict[AnyLane, Pair] = {}
        self._hung_since: dict[AnyLane, float] = {}
        self._ended: deque[AnyLane] = deque()
        self._attempts = Attempts(allotment.options.retries)
        self._lost_up_to = -1

    async def open(self, stack: AsyncExitStack) -> None:
        """Connect and negotiate; no byte moves. What is open is closed with ``stack``.

        Raises:
            V2VError: a side can't be opened, or the two don't go together.
        """
        terms = await negotiate(self.job, self._allotment, self._memory)
        stack.push_async_callback(terms.connections.close)
        self.copy = self._work = terms.copy
        self.connections = terms.connections
        self.geometry = terms.copy.geometry
        self.digest = terms.digest
        self._shared = terms.shared
        self._first_connections = terms.shared.tuner.setting.connections
        self._most = terms.connections.most
        if self._shared.throttle is not None:
            self._shared.throttle.must_wait = self.copy.must_wait
        self._flushing = Flushing(self.copy, self.connections, self._memory, self._wake)
        self.reporter.emit("planned", bytes=self.copy.bytes(), details=self._choices())

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

    def set_share(self, connections: int, near: int | None = None) -> None:
        """Let it have so many pairs of connections from now on.

        ``near``: so many where its servers answer at once, and the processors are what is short.
        """
        self._share = connections
        self._near_share = connections if near is None else min(near, connections)
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
                if self.options.flush and self.connections.can_flush:
                    group.start_soon(self._flushing.run)
                await self.drive(self.copy, TransferLane, flush=self.options.flush)
                self.reporter.emit("progress", bytes=self.copy.bytes())
                await self._finish()
                group.cancel_scope.cancel()
        except BaseExceptionGroup as grouped:
            raise grouped.exceptions[0] from None
        finally:
            await self.connections.close()
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
            await self._open_ahead()
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
                else:
                    self._retire_surplus()
                if self._ended:
                    continue
                await self._changed.wait()
        finally:
            await self._stop()
        if work.error is not None:
            raise work.error

    def _wanted(self) -> int:
        wanted = min(max(self._first_connections, LANES_PER_DISK), self._near_share)
        tuned = self._shared.tuner.setting.connections
        if tuned > self._first_connections:  # more bring more, or may
            wanted = max(wanted, tuned)
        return max(1, min(self._share, wanted, self._most))

    @property
    def _waits(self) -> bool:
        """Whether lanes wait for each answer: with servers that are near, on several connections.

        One connection alone needs several requests on their way to keep both sides busy.
        """
        if self.options.synchronous:
            return True
        return self._most > 1 and self._allotment.may_wait and not self._shared.is_slow

    def _retire_surplus(self) -> None:
        """Let the newest lanes end where the share, or what the tuner wants, has become smaller."""
        for lane in list(self._lanes)[self._wanted() :]:
            lane.retire()

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
        min(self._allotment.workers, key=lambda worker: worker.load).add(made)

    async def _open_ahead(self) -> None:
        """Open the first connections before lanes that are busy make it slow; not for long."""
        pairs: list[Pair] = []
        until = anyio.current_time() + _OPEN_AHEAD_S
        try:
            while len(pairs) < self._wanted() and anyio.current_time() < until:
                pair = await self._pair()
                if pair is None:
                    break
                pairs.append(pair)
        finally:  # cancelled as well: nobody else would close them
            for pair in pairs:
                self.connections.give_back(pair)

    def _lane_done(self, lane: AnyLane) -> None:
        """Called in the worker's thread."""
        self._ended.append(lane)
        anyio.from_thread.run_sync(lambda: self._changed.set())

    async def _pair(self) -> Pair | None:
        """Return a pair of connections of this epoch; None after a failure, when it is told."""
        try:
            return await self.connections.take(self._work)
        except (NbdError, TimeoutError) as error:
            await self._try_later(f"connecting to the {self.connections.side}", error)
        except V2VError as error:
            self._work.fail(f"connecting to the {self.connections.side}", error)
        return None

    async def _after(self, lane: AnyLane) -> None:
        """Deal with a lane that has ended: keep its connections, or find out why they are gone."""
        pair = self._lanes.pop(lane)
        self._hung_since.pop(lane, None)
        if pair.target.end.is_lost:
            # Where both were lost at once the lane may have told only of the source.
            self._work.target_lost(lane.epoch)
        is_well = lane.lost is None and lane.epoch == self._work.epoch and not lane.in_flight
        if is_well and (self._most == 1 or len(self._lanes) < self._wanted()):
            self.connections.give_back(pair)
            return
        await self.connections.leave(pair, self._work, is_quiet=not lane.in_flight)
        if lane.lost is not None and not self._work.is_stopping:
            side, error = lane.lost
            self.geometry.chunk = smaller_chunk(self.geometry)
            endpoint = (pair.source if side == "source" else pair.target).endpoint
            if side == "target":
                self._flushing.had_loss()
            if not can_reconnect(endpoint):
                self._work.fail(f"the {side}", error)
            elif pair.number > self._lost_up_to:
                # What else was open then is lost with it: a server that dies is one attempt,
                # however many connections it had.
                self._lost_up_to = self.connections.opened
                await self._try_later(f"the {side} ‘{endpoint}’", error)

    async def _try_later(self, what: str, error: Exception) -> None:
        """Pause before the next attempt, or fail the disk when there have been enough."""
        copy = self._work
        wait = self._attempts.next_pause(copy.chunks_landed, copy.flushes, had_loss=copy.epoch > 0)
        if wait is None:
            copy.fail(what, error)
            return
        message = error.message if isinstance(error, V2VError) else "no answer in time"
        self.reporter.emit(
            "retrying",
            f"{what}: {message}; attempt {self._attempts.failures} of {self._attempts.most} "
            f"in {wait:g} s",
            bytes=self.copy.bytes(),
        )
        with anyio.move_on_after(wait):
            while not self._is_stopping():
                self._changed = anyio.Event()
                await self._changed.wait()
        self._attempts.begin(copy.chunks_landed, copy.flushes)

    def _is_stopping(self) -> bool:
        return self._work.is_stopping

    async def _flush_all(self) -> bool:
        """Flush after the last chunk; False where the target was lost and there is more to do."""
        if not self.connections.can_flush:
            self._work.everything_flushed()
            return True
        pair = self.connections.witness(self._work.epoch)
        if pair is None:
            pair = await self._pair()
            if pair is None:
                return False
            self.connections.give_back(pair)
        epoch = self._work.epoch
        try:
            await flush(pair)
        except NbdError as error:
            await self._flush_failed(epoch, error)
            return False
        if self._work.epoch != epoch:
            return False  # the flush of now and then has failed meanwhile: there is more to do
        self._work.everything_flushed()
        return True

    async def _flush_failed(self, epoch: int, error: NbdError) -> None:
        """Take a flush that failed for a loss of the target: what it had may be gone as well."""
        self._work.target_lost(epoch)
        self._flushing.had_loss()
        if not can_reconnect(self.connections.target.endpoint):
            self._work.fail("flushing", error)
        else:
            await self._try_later("flushing the target", error)

    async def _finish(self) -> None:
        """Do what comes after the copy: remember, verify."""
        if self._memory is not None:
            await self._memory.save(is_complete=True)
        if self.options.verify:
            from v2v_async.copy.verifying import verify

            await verify(self, repair=self.options.repair)

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
                        self.connections.give_back(pair)
                if self._lanes:
                    self._sever_hung()
                    with anyio.move_on_after(_REPORT_EVERY_S):
                        await self._changed.wait()

    def _wake(self) -> None:
        """Called by any thread."""
        for worker in self._allotment.workers:
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
                setting = tuner.setting
                self.reporter.debug(_told(setting))
                self._changed.set()  # there may be lanes to add, or to retire
            self._sever_hung()
            if self._work.has_todo and len(self._lanes) < self._wanted():
                self._changed.set()  # what one lane has learnt may be for others to do
            if self._memory is not None:
                await self._memory.save()
            await anyio.sleep(_REPORT_EVERY_S)


async def _run_thread(lane: BlockingLane) -> None:
    # Threads can't be cancelled; this one ends soon after its disk is told to stop.
    with anyio.CancelScope(shield=True):
        await anyio.to_thread.run_sync(lane.run, limiter=anyio.CapacityLimiter(1))


def _told(setting: Setting) -> str:
    return (
        f"now {setting.depth} requests of {format_size(setting.request_size)} on "
        f"{setting.connections} connections"
    )
