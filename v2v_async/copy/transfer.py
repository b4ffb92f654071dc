"""The lane that copies with many requests on their way: for servers that take their time.

::

    slot:  free ──(read)──> reading ──(split zeroes)──> writing ──> free
               └─(zero)───────────────────────────────> zeroing ──> free

Zeroes are made by the server (WRITE_ZEROES, never TRIM, which promises nothing) where it can;
those found in data only where that is fast, since their bytes are at hand.
"""

from __future__ import annotations

import errno
import time

from v2v_async.copy.chunks import count_written, count_zeroed
from v2v_async.copy.lane import Lane
from v2v_async.copy.plan import find_pieces
from v2v_async.copy.retrying import CANNOT
from v2v_async.copy.slot import Slot
from v2v_async.errors import NbdError
from v2v_async.units import MIB

ZEROES = memoryview(bytes(MIB))


class TransferLane(Lane):
    """Copies chunks of ``disk`` from ``source`` to ``target``."""

    def _begin(self, slot: Slot) -> None:
        if slot.kind == "data":
            self._read(slot)
        else:
            self._zero(slot)

    def _again(self, slot: Slot) -> None:
        if slot.state == "reading":
            self._read(slot)
        elif slot.state == "writing":
            self._write(slot)
        else:
            self._zero(slot)

    def _answered(self, slot: Slot) -> None:
        if slot.state == "reading":
            self._was_read(slot)
        elif slot.state == "writing":
            self._was_written(slot)
        else:
            self._was_zeroed(slot)

    # Data.

    def _read(self, slot: Slot) -> None:
        slot.state = "reading"
        slot.pending = 1
        slot.sent = time.monotonic()
        view = slot.views[0]
        if slot.length != slot.size:
            view = view[: slot.length]
        try:
            self.source.read(view, slot.offset, slot.on_answer)
        except NbdError:
            slot.pending = 0
            raise

    def _was_read(self, slot: Slot) -> None:
        if slot.code:
            self._failed(slot, "reading", "source")
            return
        if self.is_ending:
            return
        slot.attempts = 0
        if slot.chunk.is_there:
            count_written(self.disk, slot.chunk, slot.offset, slot.views[0][: slot.length], [])
            self._release(slot)
            return
        self._split(slot)
        self._write(slot)

    def _split(self, slot: Slot) -> None:
        """Pad what was read to whole blocks of the target, and find the zeroes in it."""
        length = self._padded(slot.length)
        if length != slot.length:
            slot.views[0][slot.length : length] = bytes(length - slot.length)
        slot.pieces = find_pieces(slot.words, slot.is_zero, length, self.disk.geometry.sparse)

    def _write(self, slot: Slot) -> None:
        slot.state = "writing"
        disk, target, view = self.disk, self.target, slot.views[0]
        pieces = slot.pieces
        slot.has_asked_zeroes = False
        if len(pieces) > 1 or pieces[0][2]:
            if slot.attempts:
                # Again, in one: of many pieces, each time another might fail.
                pieces = [(0, pieces[-1][0] + pieces[-1][1], False)]
            elif disk.is_known_zero:
                pieces = [piece for piece in pieces if not piece[2]]
            elif disk.makes_small_zeroes:
                slot.has_asked_zeroes = True
            else:
                pieces = [(0, pieces[-1][0] + pieces[-1][1], False)]
        if not pieces:
            self._was_written(slot)
            return
        slot.pending = len(pieces)
        sent = 0
        try:
            for start, length, is_zero in pieces:
                if is_zero:
                    target.zero(
                        length,
                        slot.offset + start,
                        slot.on_answer,
                        allocate=disk.allocated,
                        only_fast=disk.can_fast_zero,
                    )
                elif length == slot.size:
                    target.write(view, slot.offset, slot.on_answer)
                else:
                    target.write(view[start : start + length], slot.offset + start, slot.on_answer)
                sent += 1
        except NbdError:
            # What was sent is still answered; the slot is then found failed.
            slot.pending -= len(pieces) - sent
            slot.code = slot.code or errno.ENOTCONN
            raise

    def _was_written(self, slot: Slot) -> None:
        if slot.code:
            if slot.code in CANNOT and slot.has_asked_zeroes:
                # Perhaps only its zeroes were refused: from now on they are written.
                self.disk.makes_small_zeroes = False
                self._send_again(slot)
                return
            self._failed(slot, "writing", "target")
            return
        if not self.shared.tuner.is_settled:
            self.shared.note(slot.sent, slot.length)
        view = slot.views[0][: slot.length]
        count_written(self.disk, slot.chunk, slot.offset, view, slot.pieces)
        self._release(slot)

    # Zeroes.

    def _zero(self, slot: Slot) -> None:
        slot.state = "zeroing"
        disk, target = self.disk, self.target
        length = self._padded(slot.length)
        slot.has_asked_zeroes = disk.can_zero
        if disk.can_zero:
            slot.pending = 1
            try:
                target.zero(length, slot.offset, slot.on_answer, allocate=disk.allocated)
            except NbdError:
                slot.pending = 0
                raise
            return
        # The server can't: they are written.
        step = min(len(ZEROES), disk.geometry.request_size)
        offsets = range(slot.offset, slot.offset + length, step)
        slot.pending = len(offsets)
        sent = 0
        try:
            for offset in offsets:
                left = min(step, slot.offset + length - offset)
                target.write(ZEROES[:left], offset, slot.on_answer)
                sent += 1
        except NbdError:
            slot.pending -= len(offsets) - sent
            slot.code = slot.code or errno.ENOTCONN
            raise

    def _was_zeroed(self, slot: Slot) -> None:
        if slot.code:
            if slot.code in CANNOT and slot.has_asked_zeroes:
                self.disk.can_zero = False
                self._send_again(slot)
                return
            self._failed(slot, "zeroing", "target")
            return
        count_zeroed(self.disk, slot.chunk, slot.offset, slot.length)
        self._release(slot)

    def _send_again(self, slot: Slot) -> None:
        slot.code = 0
        if not self.is_ending:
            self._again(slot)
