"""The lane that copies one request at a time in a thread of its own: for servers that are near.

It waits inside libnbd, without the interpreter's lock. A lane that polls is woken for each part of
an answer that arrives, takes the lock each time, and holds up every other lane when it is put to
sleep with it: on two busy cores 4 GiB took 3.0-5.5 s that way, 1.8-2.6 s with four lanes of this
kind, nbdcopy 2.2-2.7 s. Where an answer takes long, one request at a time is far too few: then the
lane says so, stops after its request, and lanes of the other kind go on.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from v2v_async.copy.chunks import (
    Reply,
    Stride,
    count_skipped,
    count_written,
    count_zeroed,
    plan_chunk,
)
from v2v_async.copy.disk import Chunk, DiskCopy
from v2v_async.copy.ends import BlockingEnd
from v2v_async.copy.lane import ROOM_AGAIN_S, Side
from v2v_async.copy.plan import Kind, Piece, find_pieces
from v2v_async.copy.retrying import CANNOT, RETRYABLE, pause, refused
from v2v_async.copy.shared import Shared
from v2v_async.copy.throttle import smoothed
from v2v_async.copy.transfer import ZEROES
from v2v_async.errors import ConnectionLostError, NbdError, RequestError
from v2v_async.handle import Entries, ZeroTest

T = TypeVar("T")


class _Ended(Exception):
    """The lane has to end now; why is noted elsewhere."""


class BlockingLane:
    """Copies chunks of ``disk``, waiting for each answer. :meth:`run` is its thread's body.

    ``lost`` tells at the end which connection was lost, if one was.
    """

    in_flight = 0

    def __init__(
        self,
        disk: DiskCopy,
        source: BlockingEnd,
        target: BlockingEnd,
        shared: Shared,
        on_done: Callable[[], None],
        epoch: int,
    ) -> None:
        self.disk = disk
        self.source = source
        self.target = target
        self.shared = shared
        self.epoch = epoch
        self.lost: tuple[Side, NbdError] | None = None
        self._on_done = on_done
        is_late = disk.is_stopping or epoch != disk.epoch
        self._generation = -1 if is_late else disk.generation
        self._chunk: Chunk | None = None
        self._done_to = 0
        self._is_retired = False
        self._stride = Stride(disk)
        self._waiting = threading.Event()

    # Called by any thread.

    def wake(self) -> None:
        """End a pause early, to see whether there is still something to wait for."""
        self._waiting.set()

    def retire(self) -> None:
        """End after the request that is on its way."""
        self._is_retired = True

    def sever(self) -> None:
        """Give up on servers that do not answer: the call that waits fails."""
        self.source.sever()
        self.target.sever()

    @property
    def is_ending(self) -> bool:
        """Whether it sends nothing more."""
        return self._generation != self.disk.generation

    # The thread.

    def run(self) -> None:
        """Copy until nothing is left to claim, or the disk stops, or a connection is lost."""
        held = 0
        try:
            held = self._wait_for_room()
            while not self._is_over:
                chunk = self._chunk = self.disk.claim(self._stride.size)
                if chunk is None:
                    break
                self._copy(chunk)
                self._chunk = None
                self.disk.landed(chunk, self.epoch)
        except _Ended:
            pass
        except Exception as error:  # a mistake of ours must fail the disk, not hang the run
            self.disk.fail("copying", error)
        finally:
            if self._chunk is not None:
                self._leave(self._chunk)
            self.shared.budget.give_back(held)
            if self.shared.throttle is not None:
                self.shared.throttle.leave(self)
            self._on_done()

    @property
    def _is_over(self) -> bool:
        return self.is_ending or self.shared.is_slow or self._is_retired

    def _wait_for_room(self) -> int:
        """Return how much was taken of the budget: one request, or 0 where the lane is over."""
        size = self.disk.geometry.request_size
        while not self._is_over:
            if self.shared.budget.take(size):
                return size
            self._pause(ROOM_AGAIN_S)
        return 0

    def _leave(self, chunk: Chunk) -> None:
        """Give an unfinished chunk back; what has been done of it counts if the target is well."""
        done = self._done_to - chunk.offset
        if self.lost is not None and self.lost[0] == "source" and done > 0:
            self.disk.keep(chunk, done)
            self.disk.landed(chunk, self.epoch)
        else:
            self.disk.give_back(chunk)

    def _copy(self, chunk: Chunk) -> None:
        disk = self.disk
        self._done_to = chunk.offset
        size, block = disk.geometry.request_size, disk.geometry.block
        throttle = self.shared.throttle
        plan = plan_chunk(disk, chunk, *self._extents(chunk), self._stride.size)
        self._stride.follow(chunk)
        while (part := plan.take(smoothed(throttle, size, block), disk.zero_size)) is not None:
            offset, end, kind = part
            self._do(chunk, kind, offset, end - offset)
            self._done_to = end
            if disk.wants_flush:
                self._flush()
            if self._generation != disk.generation:
                raise _Ended
            if (self.shared.is_slow or self._is_retired) and end < chunk.end:
                # The rest is for others; those that send many requests at once, if it is slow.
                disk.keep(chunk, end - chunk.offset)
                return

    def _extents(self, chunk: Chunk) -> tuple[Reply, Reply | None]:
        disk = self.disk
        if chunk.is_there or chunk.parts is not None or not disk.can_extents:
            return Reply(), None
        source = self._told(self.source, "source", chunk)
        if not disk.can_target_extents or disk.is_known_zero:
            return source, None
        if not any(flags for _, flags in source.entries):
            return source, None  # there is nothing to make zeroes of
        return source, self._told(self.target, "target", chunk)

    def _told(self, end: BlockingEnd, side: Side, chunk: Chunk) -> Reply:
        try:
            entries: Entries = end.extents_now(chunk.length, chunk.offset)
        except RequestError as error:
            if end.is_lost:
                self._lose(side, error)
            return Reply(code=error.errno or errno.ENOTSUP)
        return Reply(entries)

    def _do(self, chunk: Chunk, kind: Kind, offset: int, length: int) -> None:
        if kind == "skip":
            count_skipped(self.disk, chunk, offset, length)
        elif kind == "zero":
            self._zero(offset, length)
            count_zeroed(self.disk, chunk, offset, length)
        else:
            self._move(chunk, offset, length)

    # Data.

    def _move(self, chunk: Chunk, offset: int, length: int) -> None:
        disk, shared = self.disk, self.shared
        if shared.throttle is not None:
            self._wait_for_rate(length)
        began = time.monotonic()
        data = self._try("reading", "source", lambda: self.source.read_now(length, offset))
        read_s = time.monotonic() - began
        if chunk.is_there:
            count_written(disk, chunk, offset, memoryview(data), [])
            return
        padding = -length % disk.geometry.target_block
        if padding:
            data += bytes(padding)
        view = memoryview(data)
        words = view.cast("Q") if len(data) % 8 == 0 else None
        pieces = find_pieces(words, ZeroTest(data), len(data), disk.geometry.sparse)
        began = time.monotonic()
        self._write(view, offset, pieces)
        shared.note_pace(max(read_s, time.monotonic() - began))
        count_written(disk, chunk, offset, view[:length], pieces)

    def _write(self, view: memoryview, offset: int, pieces: list[Piece]) -> None:
        disk, target = self.disk, self.target
        if len(pieces) == 1 and not pieces[0][2]:
            self._try("writing", "target", lambda: target.write_now(view, offset))
            return
        if not disk.is_known_zero and not disk.makes_small_zeroes:
            pieces = [(0, len(view), False)]
        for start, length, is_zero in pieces:
            piece = view[start : start + length]
            if not is_zero:
                self._write_piece(piece, offset + start)
            elif not disk.is_known_zero:
                self._zero_piece(piece, offset + start)

    def _write_piece(self, piece: memoryview, offset: int) -> None:
        self._try("writing", "target", lambda: self.target.write_now(piece, offset))

    def _zero_piece(self, piece: memoryview, offset: int) -> None:
        """Make zeroes that were found in data: by the server only where that is fast."""
        disk = self.disk
        if disk.makes_small_zeroes:
            try:
                self._try(
                    "zeroing",
                    "target",
                    lambda: self.target.zero_now(
                        len(piece),
                        offset,
                        allocate=disk.allocated,
                        only_fast=disk.can_fast_zero,
                    ),
                    unless=CANNOT,
                )
                return
            except RequestError:
                disk.makes_small_zeroes = False
        self._write_piece(piece, offset)

    # Zeroes.

    def _zero(self, offset: int, length: int) -> None:
        disk = self.disk
        length += -length % disk.geometry.target_block
        if disk.can_zero:
            try:
                self._try(
                    "zeroing",
                    "target",
                    lambda: self.target.zero_now(length, offset, allocate=disk.allocated),
                    unless=CANNOT,
                )
                return
            except RequestError:
                disk.can_zero = False
        step = min(len(ZEROES), disk.geometry.request_size)
        for at in range(offset, offset + length, step):
            if self.is_ending:
                raise _Ended
            self._write_piece(ZEROES[: min(step, offset + length - at)], at)

    # The flush that makes what has landed durable, where no witness does it.

    def _flush(self) -> None:
        disk = self.disk
        disk.wants_flush = False
        if not disk.begin_flush():
            return
        try:
            self.target.flush_now()
        except RequestError as error:
            # What it had may be gone, as after a loss of the connection: so it is taken for one.
            self._lose("target", error)
        disk.flushed(self.epoch)

    # Failures, pauses, rates.

    def _try(
        self,
        op: str,
        side: Side,
        request: Callable[[], T],
        unless: frozenset[int] = frozenset(),
    ) -> T:
        """Do ``request``, again after a while where that makes sense.

        Raises:
            RequestError: its errno is among ``unless``.
            _Ended: it failed for good, or the disk stops.
        """
        end = self.source if side == "source" else self.target
        attempt = 0
        while True:
            try:
                return request()
            except RequestError as error:
                if end.is_lost or error.errno == errno.ENOTCONN:
                    self._lose(side, error)
                if error.errno in unless:
                    raise
                if error.errno not in RETRYABLE or attempt >= self.shared.retries:
                    offset = error.offset or 0
                    self.disk.fail(op, refused(op, offset, error.length, error.errno))
                    raise _Ended from error
                attempt += 1
                self._pause(pause(attempt))
                if self.is_ending:
                    raise _Ended from error

    def _lose(self, side: Side, error: NbdError) -> None:
        if not self.is_ending:
            text = getattr(error, "reason", error.message)
            self.lost = side, ConnectionLostError(f"the connection was lost: {text}")
        self._generation = -1
        if side == "target":
            self.disk.target_lost(self.epoch)
        raise _Ended from error

    def _pause(self, seconds: float) -> None:
        self._waiting.clear()
        if not self.is_ending:
            self._waiting.wait(seconds)

    def _wait_for_rate(self, length: int) -> None:
        throttle = self.shared.throttle
        assert throttle is not None
        while (seconds := throttle.take(length, self)) > 0:
            self._pause(seconds)
            if self.disk.wants_flush:  # perhaps all lanes wait for that
                self._flush()
            if self.is_ending:
                raise _Ended
