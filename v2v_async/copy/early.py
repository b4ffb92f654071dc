"""A disk that is copied while something else still changes it. Pure: no server, no clock.

::

    source as it is   |====data====|..zero..|====data====|....zero....|
    copied early      |=wrote=|skip|........|=wrote=|   left out      |
    changed since          |data|  |=data=|    |zero|       |=data=|
    what is to be done     |DATA|  |=DATA=|    |ZERO|       |=DATA=|       after the change

The early copy reads the source as it is, so what it copies is right but for what is changed. That
is left out as far as it is known in time, and at the end :meth:`Early.rest` tells what is still to
be done from the changed disk. The content of the target is then that of a copy which had waited.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from v2v_async.copy.plan import Part
from v2v_async.copy.ranges import Ranges
from v2v_async.events import Bytes

if TYPE_CHECKING:
    from v2v_async.copy.disk import DiskCopy

Span = tuple[int, int]
"""Offset and length in bytes."""


@dataclass(frozen=True, slots=True)
class Rest:
    """What is still to be done of a disk. Sizes are bytes.

    ``wasted``: data that was copied early and has to be copied or zeroed again. ``again``: zeroes
    that the early copy has counted and that are counted again. ``zeroes``: what it left out, and
    what reads as zeroes on the target all the same.
    """

    parts: tuple[Part, ...] = ()
    wasted: int = 0
    again: int = 0
    zeroes: int = 0

    def join(self, early: Bytes, late: Bytes) -> Bytes:
        """Return the bytes of both copies as those of one."""
        skipped = max(0, early.skipped - self.again)
        zero = early.zero - (self.again - (early.skipped - skipped))
        return Bytes(
            total=early.total,
            data=early.data + late.data,
            zero=zero + late.zero,
            skipped=skipped + self.zeroes + late.skipped,
            copied=early.copied + late.copied,
            retried=early.retried + late.retried,
            wasted=self.wasted,
        )


class Early:
    """The early copy of one disk, as who watches the changes sees it."""

    def __init__(self) -> None:
        self._copy: DiskCopy | None = None
        self._is_paused = False
        self._changed = Ranges()

    def attach(self, copy: DiskCopy) -> None:
        """Follow a copy that is about to begin."""
        copy.wrote = Ranges()
        copy.is_paused = self._is_paused
        self._copy = copy
        self.leave_out(self._changed)

    def pause(self, is_paused: bool) -> None:
        """Let the copy claim nothing more, or go on."""
        self._is_paused = is_paused
        if self._copy is not None:
            self._copy.is_paused = is_paused

    def leave_out(self, changed: Iterable[Span]) -> None:
        """Do not copy what has changed, as far as that has not begun."""
        for offset, length in changed:
            self._changed.add(offset, length)
        if self._copy is not None:
            block, size = self._copy.geometry.block, self._copy.geometry.size
            self._copy.leave_out(rounded(changed, block, size))

    @property
    def is_complete(self) -> bool:
        """Whether all has been copied that was to be."""
        return self._copy is not None and self._copy.is_complete

    def wasted(self) -> int:
        """Return how many bytes have been copied in vain, by what is known to have changed."""
        return 0 if self._copy is None else common(self._changed, self._copy.may_hold_data)

    @property
    def left_out(self) -> Ranges:
        """What has not been copied because it was known to have changed."""
        return Ranges() if self._copy is None else self._copy.left_out

    def rest(self, data: Iterable[Span], zero: Iterable[Span]) -> Rest:
        """Return what is to be done when the early copy is done and nothing changes any more.

        ``data`` and ``zero`` are all that has changed, by what it is now; what was left out is
        among it.
        """
        copy = self._copy
        assert copy is not None, "the early copy has not been made"
        left_out, wrote = copy.left_out, copy.may_hold_data
        parts, kept = rest_parts(
            data,
            zero,
            wrote=wrote,
            left_out=left_out,
            is_known_zero=copy.is_known_zero,
            block=copy.geometry.block,
            size=copy.geometry.size,
        )
        landed = Ranges((start, end - start) for start, end, _ in parts)
        for offset, length in left_out:
            landed.remove(offset, length)
        wasted = common(landed, wrote)
        return Rest(tuple(parts), wasted, landed.total - wasted, common(kept, left_out))


def rest_parts(
    data: Iterable[Span],
    zero: Iterable[Span],
    *,
    wrote: Ranges,
    left_out: Ranges,
    is_known_zero: bool,
    block: int,
    size: int,
) -> tuple[list[Part], Ranges]:
    """Return what is to be done for changed ranges, in order, and what of them is right already.

    ``wrote``: where the early copy may have written data; ``left_out``: where it did nothing. All
    parts begin and end on blocks, or at the end of the disk.
    """
    is_data, is_zero = rounded(data, block, size), Ranges()
    for offset, length in Ranges(zero):
        end = offset + length
        start = -(-offset // block) * block
        stop = end if end == size else end // block * block
        if stop < start:  # within one block
            is_data.add(*_outward(offset, length, block, size))
            continue
        is_zero.add(start, stop - start)
        for edge, beyond in ((offset, start), (stop, end)):
            if edge < beyond:
                is_data.add(*_outward(edge, beyond - edge, block, size))
    for offset, length in is_data:
        is_zero.remove(offset, length)
    unsure = rounded(wrote, block, size)
    if not is_known_zero:
        for offset, length in left_out:
            unsure.add(offset, length)
    parts: list[Part] = [(offset, offset + length, "data") for offset, length in is_data]
    kept = Ranges()
    for offset, length in is_zero:
        position = offset
        for start, count in unsure.gaps(offset, offset + length):
            kept.add(start, count)
            if start > position:
                parts.append((position, start, "zero"))
            position = start + count
        if position < offset + length:
            parts.append((position, offset + length, "zero"))
    return sorted(parts), kept


def rounded(spans: Iterable[Span], block: int, size: int) -> Ranges:
    """Return ranges made larger to whole blocks of a disk of ``size`` bytes."""
    return Ranges(_outward(offset, length, block, size) for offset, length in spans)


def common(one: Ranges, other: Ranges) -> int:
    """Return how many bytes are in both."""
    return sum(
        length - sum(gap for _, gap in other.gaps(offset, offset + length))
        for offset, length in one
    )


def _outward(offset: int, length: int, block: int, size: int) -> Span:
    start = offset // block * block
    end = min(-(-(offset + length) // block) * block, size)
    return start, max(0, end - start)
