"""A pair of connections of one disk, driven by one thread.

::

                 claim a chunk ──> ask its extents ──> plan ──> requests
                                                                   │
    slot:  free ──> what the lane's kind does with a request ──────┴──> free

A completion callback only notes what happened; the lane acts on it outside libnbd, since submitting
on the same handle in a callback deadlocks. One chunk's extents are asked for while the requests of
the one before are on their way.

When a connection is lost the lane ends: its unfinished chunks go back to the disk, and the engine
opens another pair for another lane. A request that fails on a connection that is well is sent again
by its slot after a while, where that makes sense.
"""

from __future__ import annotations

import errno as errno_codes
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from v2v_async.copy.chunks import Reply, Stride, count_skipped, plan_chunk
from v2v_async.copy.disk import Chunk, DiskCopy
from v2v_async.copy.ends import End
from v2v_async.copy.plan import Part, Plan
from v2v_async.copy.retrying import RETRYABLE, pause, refused
from v2v_async.copy.shared import Shared
from v2v_async.copy.slot import Slot
from v2v_async.copy.throttle import smoothed
from v2v_async.errors import ConnectionLostError, NbdError
from v2v_async.handle import Entries

Side: TypeAlias = Literal["source", "target"]

# A lane without any buffer asks for one so often. Other lanes of its disk have what it wants, which
# happens while a tuner's new setting is taken over.
ROOM_AGAIN_S = 0.02
# Ends that answer at once (files) would otherwise keep a thread from its other lanes.
_TURNS = 64


class Ahead:
    """A chunk whose extents have been asked for, of the source and perhaps of the target."""

    __slots__ = ("chunk", "pending", "source", "target")

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self.pending = 0
        self.source = Reply()
        self.target: Reply | None = None


class Lane(ABC):
    """Works on chunks of ``disk`` until there are none.

    All methods but the constructor are called by one thread. ``on_done`` is called there once.
    ``lost`` tells at the end which connection was lost, if one was.
    """

    buffers_per_slot = 1

    def __init__(
        self,
        disk: DiskCopy,
        source: End,
        target: End,
        shared: Shared,
        on_done: Callable[[], None],
        epoch: int | None = None,
    ) -> None:
        self.disk = disk
        self.source = source
        self.target = target
        self.shared = shared
        self.on_done = on_done
        self.epoch = disk.epoch if epoch is None else epoch
        self.lost: tuple[Side, NbdError] | None = None
        is_late = disk.is_stopping or self.epoch != disk.epoch
        self._generation = -1 if is_late else disk.generation
        self.wake_at: float | None = None
        self.wants_again = False
        self._ready: deque[Slot] = deque()
        self._answers: deque[Callable[[], None]] = deque()
        self._free: deque[Slot] = deque()
        self._slots: list[Slot] = []
        self._waiting: list[tuple[float, Slot]] = []
        self._plan = Plan()
        self._held: tuple[Slot, Part] | None = None
        self._chunk: Chunk | None = None
        self._chunks: dict[Chunk, None] = {}  # in order, so that a failing test can be repeated
        self._ahead: Ahead | None = None
        self._queries = 0
        self._no_more = False
        self._is_retired = False
        self._stride = Stride(disk)
        self._setting = shared.tuner.setting
        self._request_size = self._slot_size = 0
        self._resize()

    # What a kind of lane does.

    @abstractmethod
    def _begin(self, slot: Slot) -> None:
        """Send what the request in ``slot`` needs first."""

    @abstractmethod
    def _answered(self, slot: Slot) -> None:
        """Go on with a slot that nothing is pending of."""

    @abstractmethod
    def _again(self, slot: Slot) -> None:
        """Send again what failed."""

    def _plan_of(self, ahead: Ahead) -> Plan:
        """Return the requests for a chunk whose extents are known."""
        return plan_chunk(self.disk, ahead.chunk, ahead.source, ahead.target, self._stride.size)

    # What the worker calls.

    def advance(self) -> None:
        """Act on what has happened and send what may be sent."""
        self.wants_again = False
        self.wake_at = None
        ready, answers = self._ready, self._answers
        for _ in range(_TURNS):
            try:
                while answers:
                    answers.popleft()()
                while ready:
                    self._answered(ready.popleft())
                if not self.is_ending:
                    self._fill()
            except NbdError as error:
                self._fail_connection(error)
            # Submitting may complete requests at once; then there is more to do.
            if not ready and not answers:
                return
        self.wants_again = True

    @property
    def in_flight(self) -> int:
        """Requests that are waited for, those for extents and flushes among them."""
        return sum(1 for slot in self._slots if slot.pending) + self._queries

    @property
    def is_done(self) -> bool:
        """Whether nothing is on its way and nothing is left to do."""
        if not (self.is_ending or (self._no_more and not self._chunks)):
            return False
        return not (self._ready or self._answers or self.in_flight)

    def lose(self, side: Side, error: NbdError) -> None:
        """Note that a connection is gone; the lane ends when the other one is quiet."""
        self.lost = self.lost or (side, error)
        self._generation = -1
        if side == "target":
            self.disk.target_lost(self.epoch)

    def retire(self) -> None:
        """Claim no more chunks, from any thread: it ends when those that it has are done."""
        self._is_retired = True

    @property
    def is_ending(self) -> bool:
        """Whether it sends nothing more and only waits for what is on its way."""
        return self._generation != self.disk.generation

    def _end(self) -> None:
        for chunk in self._chunks:
            self.disk.give_back(chunk)
        self._chunks.clear()
        if self._ahead is not None:
            self.disk.give_back(self._ahead.chunk)
            self._ahead = None
        self._waiting.clear()

    def finished(self) -> None:
        """Let go of what is held; called once, when the lane is done or abandoned."""
        self._end()
        self.shared.budget.give_back(sum(slot.held for slot in self._slots))
        if self.shared.throttle is not None:
            self.shared.throttle.leave(self)
        self.on_done()

    def _fail_connection(self, error: NbdError) -> None:
        """Sort out what could not be sent: a lost connection, or a mistake of ours."""
        sides: tuple[tuple[Side, End], ...] = (("source", self.source), ("target", self.target))
        lost = [side for side, end in sides if end.is_lost]
        for side in lost:  # perhaps both: then what the target forgot has to be copied again
            self.lose(side, error)
        if lost:
            return
        if isinstance(error, ConnectionLostError):
            self.lose("source", error)
        else:
            self.disk.fail("copying", error)

    # Filling the slots.

    def _fill(self) -> None:
        disk = self.disk
        if self._waiting:
            self._send_waiting()
        if disk.wants_flush:
            self._flush()
        if self._ahead is None and not self._no_more:
            self._look_ahead()
        if self.shared.tuner.setting is not self._setting:
            self._resize()
        free = self._free
        while self._generation == disk.generation:
            if self._held is not None:
                slot, part = self._held
                self._held = None
            else:
                if free:
                    slot = free.popleft()
                    if slot.size < self._slot_size:
                        self._grow(slot)
                elif (made := self._new_slot()) is not None:
                    slot = made
                else:
                    return
                taken = self._take(slot.size)
                if taken is None:
                    free.appendleft(slot)
                    return
                part = taken
            offset, end, kind = part
            chunk = self._chunk
            assert chunk is not None
            if kind == "skip":
                free.appendleft(slot)
                count_skipped(self.disk, chunk, offset, end - offset)
                continue
            if (
                kind == "data"
                and self.shared.throttle is not None
                and not self._may_send(end - offset)
            ):
                self._held = (slot, part)
                return
            slot.chunk, slot.kind = chunk, kind
            slot.offset, slot.length = offset, end - offset
            slot.attempts = 0
            chunk.outstanding += 1
            self._begin(slot)

    def _resize(self) -> None:
        """Take over what the tuner has chosen."""
        setting = self._setting = self.shared.tuner.setting
        geometry = self.disk.geometry
        self._request_size = min(setting.request_size, geometry.largest_request)
        # A last request may be padded to a whole block of the target.
        self._slot_size = max(self._request_size, geometry.target_block)

    def _take(self, size: int) -> Part | None:
        """Return the next request of at most ``size`` bytes, None when there is none now."""
        if size > self._request_size:
            size = self._request_size
        if self.shared.throttle is not None:
            size = smoothed(self.shared.throttle, size, self.disk.geometry.block)
        while True:
            part = self._plan.take(size, self.disk.zero_size)
            if part is not None:
                return part
            if self._chunk is not None:
                chunk, self._chunk = self._chunk, None
                chunk.is_planned = True
                self._land_if_whole(chunk)
            ahead = self._ahead
            if ahead is None or ahead.pending:
                return None
            self._ahead = None
            self._chunk = chunk = ahead.chunk
            self._chunks[chunk] = None
            self._plan = self._plan_of(ahead)
            # A chunk holds all that may be in flight, or the lane would wait for extents.
            self._stride.follow(chunk, 2 * self._request_size * self._setting.depth)
            self._look_ahead()

    def _look_ahead(self) -> None:
        if self.disk.is_stopping or self._is_retired:
            self._no_more = True
            return
        chunk = self.disk.claim(self._stride.size)
        if chunk is None:
            self._no_more = True
            return
        ahead = self._ahead = Ahead(chunk)
        if chunk.is_there or chunk.parts is not None:
            return
        if self.disk.can_extents:
            self._ask(ahead, self.source, ahead.source)
            if self.disk.can_target_extents and not self.disk.is_known_zero:
                ahead.target = Reply()
                self._ask(ahead, self.target, ahead.target)

    def _ask(self, ahead: Ahead, end: End, reply: Reply) -> None:
        def told(entries: Entries) -> None:
            reply.entries = entries

        def done(error: Any) -> int:
            code = error.value

            def answered() -> None:
                self._queries -= 1
                ahead.pending -= 1
                reply.code = code

            self._answers.append(answered)
            return 1

        chunk = ahead.chunk
        ahead.pending += 1
        self._queries += 1
        try:
            end.block_status(chunk.length, chunk.offset, told, done)
        except NbdError as error:
            ahead.pending -= 1
            self._queries -= 1
            if isinstance(error, ConnectionLostError):
                raise
            reply.code = errno_codes.ENOTSUP  # it never negotiated them, or refuses the range

    def _new_slot(self) -> Slot | None:
        """Return one more slot, None where there may be no more or no memory is left for it."""
        if len(self._slots) >= self._setting.depth:
            return None
        count = self.buffers_per_slot
        if not self.shared.budget.take(self._slot_size * count):
            if not self._slots:
                self._wake_in(ROOM_AGAIN_S)
            return None
        slot = Slot(self._slot_size, count, self._ready)
        self._slots.append(slot)
        return slot

    def _grow(self, slot: Slot) -> None:
        """Give a free slot the size that is wanted now, if there is memory for it."""
        count = self.buffers_per_slot
        if self.shared.budget.take((self._slot_size - slot.size) * count):
            slot.grow(self._slot_size, count)

    def _drop(self, slot: Slot) -> None:
        self._slots.remove(slot)
        self.shared.budget.give_back(slot.held)

    def _may_send(self, length: int) -> bool:
        """Whether the throttle lets a request of ``length`` bytes go now."""
        throttle = self.shared.throttle
        assert throttle is not None
        wait = throttle.take(length, self)
        if wait <= 0:
            return True
        self._wake_in(wait)
        return False

    # The flush that makes what has landed durable.

    def _flush(self) -> None:
        self.disk.wants_flush = False
        if not self.disk.begin_flush():
            return

        def done(error: Any) -> int:
            code = error.value
            self._answers.append(lambda: self._was_flushed(code))
            return 1

        self._queries += 1
        try:
            self.target.flush(done)
        except NbdError:
            self._queries -= 1
            raise

    def _was_flushed(self, code: int) -> None:
        self._queries -= 1
        if code:
            # What it had may be gone, as after a loss of the connection: so it is taken for one.
            self.lose("target", refused("flush", 0, 0, code))
        else:
            self.disk.flushed(self.epoch)

    # Requests that are done, or failed.

    def _release(self, slot: Slot) -> None:
        """Free a slot whose request is done."""
        chunk = slot.chunk
        chunk.outstanding -= 1
        if chunk.is_planned and not chunk.outstanding:
            self._land_if_whole(chunk)
        slot.state = "free"
        if len(self._slots) > self._setting.depth or slot.size > self._slot_size:
            self._drop(slot)
        else:
            # The buffer that is warmest in the processor's cache goes first.
            self._free.appendleft(slot)

    def _land_if_whole(self, chunk: Chunk) -> None:
        if chunk.is_planned and not chunk.outstanding and chunk in self._chunks:
            del self._chunks[chunk]
            self.disk.landed(chunk, self.epoch)

    def _failed(self, slot: Slot, op: str, side: Side) -> None:
        """Deal with a slot whose request was answered with an error: again later, or give up."""
        code, slot.code = slot.code, 0
        error = refused(op, slot.offset, slot.length, code)
        if self.is_ending:
            return
        end = self.source if side == "source" else self.target
        if end.is_lost or code == errno_codes.ENOTCONN:
            self.lose(side, ConnectionLostError("the connection was lost", errno=code))
        elif code in RETRYABLE and slot.attempts < self.shared.retries:
            slot.attempts += 1
            when = time.monotonic() + pause(slot.attempts)
            self._waiting.append((when, slot))
            self._wake_in(when - time.monotonic())
        else:
            self.disk.fail(op, error)

    def _send_waiting(self) -> None:
        now = time.monotonic()
        due = [slot for when, slot in self._waiting if when <= now]
        self._waiting = [(when, slot) for when, slot in self._waiting if when > now]
        if self._waiting:
            self._wake_in(min(when for when, _ in self._waiting) - now)
        for slot in due:
            self._again(slot)

    def _wake_in(self, seconds: float) -> None:
        when = time.monotonic() + max(seconds, 0.0)
        self.wake_at = when if self.wake_at is None else min(self.wake_at, when)

    # Sizes.

    def _padded(self, length: int) -> int:
        """Round up; only the end of a disk may lie off the target's blocks."""
        unit = self.disk.geometry.target_block
        return -(-length // unit) * unit
