"""One pair of connections of one disk, driven by one thread.

::

                 claim a chunk ──> ask its extents ──> plan ──> requests
                                                                  │
    slot:  free ──(read)──> reading ──(split zeroes)──> writing ──┴──> free
                └─(zero)──────────────────────────────> writing

A completion callback only notes what happened; the lane acts on its notes outside libnbd, since
submitting on the same handle in a callback deadlocks. One chunk's extents are asked for while the
requests of the one before are on their way.
"""

from __future__ import annotations

import errno as errno_codes
import os
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from v2v_async.copy.disk import Counters, DiskCopy
from v2v_async.copy.plan import Piece, Request, plan, split_zeroes
from v2v_async.errors import NbdError, RequestError
from v2v_async.extent import align_data, from_reply
from v2v_async.handle import Completion, Entries, Handle, is_zero, share
from v2v_async.units import KIB

# Zeroes within data are looked for in blocks of this size, as nbdcopy's --sparse does: with runs of
# 32 KiB or more only, a fragmented disk took 21% more room.
_ZERO_BLOCK = 4 * KIB


class Slot:
    """One request on its way, with a buffer of its own that is reused."""

    def __init__(self, size: int) -> None:
        self.memory = bytearray(size)
        self.view = memoryview(self.memory)
        self.words = self.view.cast("Q") if size % 8 == 0 else None
        self.whole = share(self.memory)
        self.offset = 0
        self.length = 0
        self.pending = 0
        self.holds_bytes = 0


class _Ahead:
    """A chunk whose extents have been asked for; ``entries`` is None until they are known."""

    def __init__(self, offset: int, length: int) -> None:
        self.offset = offset
        self.length = length
        self.entries: Entries = []
        self.is_known = False


class Lane:
    """Copies chunks of ``disk`` from ``source`` to ``target`` with ``depth`` requests at once.

    All methods but the constructor are called by one thread. ``on_done`` is called there once.
    """

    def __init__(
        self,
        disk: DiskCopy,
        source: Handle,
        target: Handle,
        depth: int,
        on_done: Callable[[], None],
    ) -> None:
        self.disk = disk
        self.source = source
        self.target = target
        self.on_done = on_done
        self.counters = Counters()
        disk.counters.append(self.counters)
        geometry = disk.geometry
        # A last request may be padded to a whole block of the target.
        size = max(geometry.request_size, geometry.target_block)
        self._slots = [Slot(size) for _ in range(depth)]
        self._free = deque(self._slots)
        self._requests: Iterator[Request] = iter(())
        self._next: Request | None = None
        self._ahead: _Ahead | None = None
        self._no_more = False
        self._notes: deque[Callable[[], None]] = deque()
        self._zero_block = max(_ZERO_BLOCK, geometry.target_block)
        self._zeroes: Any = None
        if not disk.is_known_zero and not disk.can_zero:
            self._zeroes = bytearray(size)

    # What the worker calls.

    def advance(self) -> None:
        """Act on what has happened and send what may be sent."""
        while True:
            while self._notes:
                self._notes.popleft()()
            self._fill()
            # Submitting may complete requests at once; then there is more to do.
            if not self._notes:
                return

    @property
    def in_flight(self) -> int:
        """Requests that are waited for, the one for extents among them."""
        asked = self._ahead is not None and not self._ahead.is_known
        return len(self._slots) - len(self._free) + asked

    @property
    def is_done(self) -> bool:
        """Whether nothing is on its way and nothing is left to do."""
        if self.in_flight or self._notes:
            return False
        return self.disk.is_stopping or (
            self._no_more and self._ahead is None and self._next is None
        )

    def lost(self, side: str, error: BaseException) -> None:
        """Give up: a connection is gone, and with it what was in flight."""
        self.disk.fail(f"the {side}", error)

    # Filling the slots.

    def _fill(self) -> None:
        try:
            self._look_ahead()
            while self._free and not self.disk.is_stopping:
                request = self._take()
                if request is None:
                    return
                if request.is_zero and self._is_skipped(request):
                    self._landed(request.offset, request.length, "skipped")
                elif request.is_zero:
                    self._zero(self._free.popleft(), request)
                else:
                    self._read(self._free.popleft(), request)
        except NbdError as error:
            self.disk.fail("copying", error)

    def _take(self) -> Request | None:
        """Return the next request, None when there is none now."""
        while True:
            request, self._next = self._next, None
            if request is None:
                request = next(self._requests, None)
            if request is not None:
                return request
            ahead = self._ahead
            if ahead is None or not ahead.is_known:
                return None
            self._ahead = None
            self._start_chunk(ahead)
            self._look_ahead()

    def _look_ahead(self) -> None:
        if self._ahead is not None or self._no_more or self.disk.is_stopping:
            return
        chunk = self.disk.claim()
        if chunk is None:
            self._no_more = True
            return
        ahead = self._ahead = _Ahead(*chunk)
        if ahead.offset >= self.disk.geometry.size:  # behind the source
            ahead.entries, ahead.is_known = [(ahead.length, 3)], True
            return
        if not self.disk.can_extents:
            ahead.is_known = True
            return

        def told(entries: Entries) -> None:
            ahead.entries = entries

        def done(error: Any) -> int:
            code = error.value
            self._notes.append(lambda: self._extents_known(ahead, code))
            return 1

        self.source.block_status(ahead.length, ahead.offset, told, done)

    def _extents_known(self, ahead: _Ahead, code: int) -> None:
        ahead.is_known = True
        if code:
            # A server that can't tell is not asked again: all of it is data.
            ahead.entries = []
            self.disk.can_extents = False

    def _start_chunk(self, chunk: _Ahead) -> None:
        geometry = self.disk.geometry
        end = max(geometry.size, chunk.offset + chunk.length)
        extents = list(
            align_data(from_reply(chunk.offset, chunk.length, chunk.entries), geometry.block, end)
        )
        if chunk.offset < geometry.size:
            self.counters.examined += chunk.length
            self.counters.data += sum(e.length for e in extents if not e.is_zero)
        self._requests = plan(extents, geometry.request_size, geometry.zero_size)

    # The requests of a slot.

    def _is_skipped(self, what: Request | Piece) -> bool:
        return what.is_zero and self.disk.is_known_zero

    def _read(self, slot: Slot, request: Request) -> None:
        slot.offset, slot.length = request.offset, request.length
        slot.pending = 1
        self._hold(slot, request.length)

        def done(error: Any) -> int:
            code = error.value
            self._notes.append(lambda: self._was_read(slot, code))
            return 1

        buffer = slot.whole
        if request.length != len(slot.memory):
            buffer = share(slot.view[: request.length])
        try:
            self.source.read(buffer, request.offset, done)
        except NbdError:
            self._release(slot)
            raise

    def _was_read(self, slot: Slot, code: int) -> None:
        slot.pending = 0
        if code:
            self._failed("reading", slot.offset, slot.length, code)
        if self.disk.is_stopping:
            self._release(slot)
            return
        length = self._pad(slot)
        try:
            for piece in self._pieces(slot, length):
                self._write_piece(slot, piece)
        except NbdError as error:
            self.disk.fail("writing", error, slot.offset)
        if slot.pending == 0:
            self._release(slot)

    def _write_piece(self, slot: Slot, piece: Piece) -> None:
        offset = slot.offset + piece.start
        if piece.is_zero:
            self.counters.data -= self._counted(offset, piece.length)
            if self._is_skipped(piece):
                self._landed(offset, piece.length, "skipped")
                return
            if self.disk.can_zero:
                done = self._written(slot, offset, piece.length, "zero")
                self.target.zero(piece.length, offset, done)
                slot.pending += 1
                return
        done = self._written(slot, offset, piece.length, "zero" if piece.is_zero else "copied")
        whole = piece.length == len(slot.memory)
        buffer = slot.whole if whole else share(slot.view[piece.start : piece.start + piece.length])
        self.target.write(buffer, offset, done)
        slot.pending += 1

    def _zero(self, slot: Slot, request: Request) -> None:
        wanted = self._padded(request.length)
        slot.offset, slot.length = request.offset, wanted
        if self.disk.can_zero:
            done = self._written(slot, request.offset, wanted, "zero")
            slot.pending = 1
            try:
                self.target.zero(wanted, request.offset, done)
            except NbdError:
                self._release(slot)
                raise
            return
        # The server can't: write them, a buffer at a time; the rest is put back.
        length = min(wanted, len(self._zeroes))
        if length < wanted:
            self._next = Request(request.offset + length, wanted - length, is_zero=True)
        done = self._written(slot, request.offset, length, "zero")
        slot.pending = 1
        self._hold(slot, length)
        try:
            self.target.write(share(memoryview(self._zeroes)[:length]), request.offset, done)
        except NbdError:
            self._release(slot)
            raise

    def _written(self, slot: Slot, offset: int, length: int, kind: str) -> Completion:
        def done(error: Any) -> int:
            code = error.value
            self._notes.append(lambda: self._was_written(slot, offset, length, kind, code))
            return 1

        return done

    def _was_written(self, slot: Slot, offset: int, length: int, kind: str, code: int) -> None:
        if code:
            self._failed("zeroing" if kind == "zero" else "writing", offset, length, code)
        else:
            self._landed(offset, length, kind)
        slot.pending -= 1
        if slot.pending == 0:
            self._release(slot)

    # What a buffer holds.

    def _pad(self, slot: Slot) -> int:
        """Fill up what was read to a whole block of the target with zeroes; return its length."""
        length = self._padded(slot.length)
        if length != slot.length:
            slot.view[slot.length : length] = bytes(length - slot.length)
        return length

    def _padded(self, length: int) -> int:
        """Round up; only the end of a disk may lie off the target's blocks."""
        unit = self.disk.geometry.target_block
        return -(-length // unit) * unit

    def _pieces(self, slot: Slot, length: int) -> list[Piece]:
        """Find runs of zeroes, looking first at a single word of each block."""
        block = self._zero_block
        if slot.words is None:
            return [Piece(0, length, is_zero=False)]
        # Rounded up: what lies behind the end is old data, which can only make it look closer.
        firsts = slot.words[: -(-length // 8) : block // 8].tolist()
        if all(firsts):
            return [Piece(0, length, is_zero=False)]
        zeroes = (
            not first and is_zero(slot.whole, at * block, min(block, length - at * block))
            for at, first in enumerate(firsts)
        )
        return split_zeroes(zeroes, block, length)

    # Counting.

    def _counted(self, offset: int, length: int) -> int:
        """Return how many of these bytes belong to the source (padding does not)."""
        return max(0, min(offset + length, self.disk.geometry.size) - offset)

    def _landed(self, offset: int, length: int, kind: str) -> None:
        counters = self.counters
        counted = self._counted(offset, length)
        if kind == "copied":
            counters.copied += counted
        elif kind == "zero":
            counters.zero += counted
        else:
            counters.skipped += counted

    def _hold(self, slot: Slot, length: int) -> None:
        slot.holds_bytes = length
        self.counters.in_flight += length
        self.counters.most_in_flight = max(self.counters.most_in_flight, self.counters.in_flight)

    def _release(self, slot: Slot) -> None:
        self.counters.in_flight -= slot.holds_bytes
        slot.holds_bytes = 0
        slot.pending = 0
        self._free.append(slot)

    def _failed(self, op: str, offset: int, length: int, code: int) -> None:
        name = errno_codes.errorcode.get(code, str(code))
        self.disk.fail(
            op,
            RequestError(
                op, offset=offset, length=length, reason=f"{os.strerror(code)} ({name})", errno=code
            ),
        )
