"""A stream copied to an end, with several writes on their way.

::

    stream ──> slot (filled to the request size) ──> pieces ── data ──> written
                                                       └───── zeroes ─> skipped, zeroed or written
"""

from __future__ import annotations

import errno
import select
from collections import deque
from dataclasses import dataclass, field
from functools import partial

from v2v_async.copy.ends import End
from v2v_async.copy.file import FileEnd
from v2v_async.copy.hashing import HashedEnd
from v2v_async.copy.pipe import Stream
from v2v_async.copy.plan import Piece, find_pieces
from v2v_async.copy.pump import Landed, Pump, fitting
from v2v_async.errors import SizeMismatchError, UnsupportedError
from v2v_async.handle import ExportInfo, ZeroTest

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(slots=True, eq=False)
class _Slot:
    """A buffer of the stream's bytes on their way to the target, and what was answered."""

    memory: bytearray
    offset: int = 0
    filled: int = 0
    pending: int = 0
    answers: list[tuple[Piece, int]] = field(default_factory=list)


class FromStream(Pump):
    """Copies ``source`` to its end, at most ``requests`` buffers of ``request_size`` at once.

    ``room`` is what fits the target, None where it grows. ``sparse`` is the size of the blocks
    in which zeroes are looked for (0: not at all); ``is_known_zero``: they are skipped.
    """

    def __init__(
        self,
        source: Stream,
        target: End,
        info: ExportInfo,
        landed: Landed,
        wake_fd: int,
        *,
        room: int | None,
        request_size: int,
        requests: int,
        sparse: int,
        is_known_zero: bool,
        flush: bool,
    ) -> None:
        super().__init__(target, wake_fd)
        self._source = source
        self._target = target
        self._room = room
        self._landed = landed
        self._unit = info.minimum_block
        self._size = fitting(request_size, info)
        self._requests = requests
        self._can_zero = info.can_zero
        self._is_known_zero = is_known_zero
        # Inner pieces begin on blocks of the target.
        self._zero_block = min(-(-sparse // self._unit) * self._unit, self._size)
        self._flush = flush and info.can_flush
        self._free: list[_Slot] = []
        self._made = 0
        self._touched: deque[_Slot] = deque()

    def copy(self) -> int:
        """Copy to the end of the stream."""
        slot: _Slot | None = None
        offset, at_end = 0, False
        while not at_end or self.in_flight or self._touched:
            self._settle()
            if slot is None and not at_end:
                slot = self._take(offset)
            elif at_end and not self.in_flight:
                continue
            if not self.wait(self._source, select.POLLIN if slot else 0) or slot is None:
                continue
            count = self._source.read_into(memoryview(slot.memory)[slot.filled :])
            if count is None:
                continue
            at_end = count == 0
            slot.filled += count
            if slot.filled == self._size or at_end:
                offset += slot.filled
                self._write(slot)
                slot = None
        self._finish(offset)
        return offset

    def _take(self, offset: int) -> _Slot | None:
        """Return a slot to fill, None while all are on their way."""
        if self._free:
            slot = self._free.pop()
        elif self._made < self._requests:
            slot = _Slot(bytearray(self._size))
            self._made += 1
        else:
            return None
        slot.offset, slot.filled = offset, 0
        return slot

    def _write(self, slot: _Slot) -> None:
        if self._room is not None and slot.offset + slot.filled > self._room:
            raise SizeMismatchError(
                f"the stream is longer than the target: only {self._room} bytes fit",
                hint="use a larger target",
            )
        length = self._padded(slot)
        slot.pending = 1  # ours: it is not free before all pieces are sent
        for piece in self._pieces(slot.memory, length):
            self._send(slot, piece)
        slot.pending -= 1
        self._touched.append(slot)

    def _padded(self, slot: _Slot) -> int:
        """Fill up with zeroes to a whole block of the target: the stream's end may lie off one."""
        length = -(-slot.filled // self._unit) * self._unit
        if self._room is not None:
            length = min(length, self._room - slot.offset)
        slot.memory[slot.filled : length] = bytes(length - slot.filled)
        return length

    def _pieces(self, memory: bytearray, length: int) -> list[Piece]:
        if not length:
            return []
        words = memoryview(memory).cast("Q") if len(memory) % 8 == 0 else None
        return find_pieces(words, ZeroTest(memory), length, self._zero_block)

    def _send(self, slot: _Slot, piece: Piece) -> None:
        start, length, is_zero = piece
        if is_zero and self._is_known_zero:
            self._count(slot, piece)
            return
        slot.pending += 1
        noted = partial(self._was_sent, slot, piece)
        if is_zero and self._can_zero:
            try:
                self.send(partial(self._target.zero, length, slot.offset + start), noted)
                return
            except UnsupportedError:
                self._can_zero = False
        view = memoryview(slot.memory)[start : start + length]
        self.send(partial(self._target.write, view, slot.offset + start), noted)

    def _was_sent(self, slot: _Slot, piece: Piece, code: int) -> None:
        # Within a callback of libnbd, where an exception would be lost: only noted.
        slot.pending -= 1
        slot.answers.append((piece, code))
        self._touched.append(slot)

    def _settle(self) -> None:
        """Act on what has been answered."""
        while self._touched:
            slot = self._touched.popleft()
            answers, slot.answers = slot.answers, []
            for piece, code in answers:
                start, length, is_zero = piece
                if code == 0:
                    self._count(slot, piece)
                elif is_zero and code in _UNSUPPORTED:
                    self._can_zero = False
                    self._send(slot, piece)  # written instead: the buffer holds them
                else:
                    raise self.refused("write", slot.offset + start, length, code)
            if slot.pending == 0 and slot not in self._free:
                self._free.append(slot)

    def _count(self, slot: _Slot, piece: Piece) -> None:
        """Report what has landed; padding does not count."""
        start, length, _ = piece
        self._landed(max(0, min(start + length, slot.filled) - start))

    def _finish(self, length: int) -> None:
        if self._room is None and isinstance(self._target, FileEnd | HashedEnd):
            try:
                self._target.set_size(length)
            except OSError as error:
                raise self.refused("resize", length, 0, error.errno or errno.EIO) from error
        if not self._flush:
            return
        codes: list[int] = []
        self.send(self._target.flush, codes.append)
        while not codes:
            self.wait()
        if codes[0]:
            raise self.refused("flush", 0, 0, codes[0])
