"""The lane that compares: reads the same range from both sides.

Extents are not asked for: a server that lies about them would make both the copy and its check
wrong.
"""

from __future__ import annotations

import time

from v2v_async.copy.lane import Ahead, Lane, Side
from v2v_async.copy.plan import Plan
from v2v_async.copy.slot import Slot
from v2v_async.errors import NbdError
from v2v_async.units import KIB

# What a mismatch is narrowed down to: a page, and the block of most file systems.
BLOCK = 4 * KIB


class CompareLane(Lane):
    """Compares chunks of ``source`` and ``target``; differences go to the disk's list."""

    buffers_per_slot = 2

    def _plan_of(self, ahead: Ahead) -> Plan:
        chunk = ahead.chunk
        chunk.data = chunk.length
        return Plan([(chunk.offset, chunk.end, "data")])

    def _begin(self, slot: Slot) -> None:
        slot.state = "comparing"
        slot.pending = 2
        slot.sent = time.monotonic()
        try:
            self.source.read(slot.views[0][: slot.length], slot.offset, slot.on_answer)
        except NbdError:
            slot.pending = 0
            raise
        try:
            length = self._padded(slot.length)
            self.target.read(slot.views[1][:length], slot.offset, slot.on_answer)
        except NbdError:
            slot.pending -= 1
            raise

    def _again(self, slot: Slot) -> None:
        self._begin(slot)

    def _answered(self, slot: Slot) -> None:
        if slot.code:
            side: Side = "target" if self.target.is_lost else "source"
            self._failed(slot, "reading again", side)
            return
        if self.is_ending:
            return
        self.shared.note(slot.sent, slot.length)
        length = slot.length
        if length == slot.size:
            is_same = slot.buffers[0] == slot.buffers[1]
        else:
            is_same = bytes(slot.views[0][:length]) == bytes(slot.views[1][:length])
        if not is_same:
            self.disk.differ(self._differences(slot))
        if self.disk.digest is not None:
            self.disk.digest.add(slot.offset, slot.views[0][:length])
        slot.chunk.copied += length
        self._release(slot)

    def _differences(self, slot: Slot) -> list[tuple[int, int]]:
        """Return the ranges (offset, length) of blocks that differ."""
        one, other = slot.views[0], slot.views[1]
        found: list[tuple[int, int]] = []
        for at in range(0, slot.length, BLOCK):
            end = min(at + BLOCK, slot.length)
            if bytes(one[at:end]) != bytes(other[at:end]):
                found.append((slot.offset + at, end - at))
        return found
