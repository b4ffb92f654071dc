"""Ranges of a disk and what they hold, as an NBD server tells it.

A server may answer a block-status request with fewer or more extents than asked for, with unmerged
neighbours, with a last extent that ends before or after the range, or not at all::

    asked      |------------------------------|
    whole      |==data==|..hole..|====data====|
    unmerged   |==data==|==data==|====data====|     merged here
    short      |==data==|..hole..|                  the rest is unknown: taken as data
    long       |==data==|..hole..|====data========  cut at the end of the range
    failed                                          all of it is taken as data

Source: the NBD protocol's ``base:allocation`` context and ``NBD_REPLY_TYPE_BLOCK_STATUS``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

STATE_HOLE = 1
STATE_ZERO = 2


class Extent(NamedTuple):
    """``length`` bytes from ``offset``; ``is_zero``: they read as zeroes."""

    offset: int
    length: int
    is_zero: bool
    is_hole: bool = False

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + self.length


def from_reply(offset: int, length: int, entries: Iterable[tuple[int, int]]) -> Iterator[Extent]:
    """Yield merged extents that tile ``[offset, offset + length)`` exactly.

    ``entries`` are the server's (length in bytes, ``base:allocation`` flags) in order from
    ``offset``. What the server did not tell is data. A hole that does not promise zeroes must be
    read: only the zero flag makes an extent zero.
    """
    end = offset + length
    position = offset
    pending: Extent | None = None
    for entry_length, flags in _cover(entries, length):
        if position >= end:
            break
        extent = Extent(
            position,
            min(entry_length, end - position),
            is_zero=bool(flags & STATE_ZERO),
            is_hole=bool(flags & STATE_HOLE),
        )
        position = extent.end
        if pending is not None and _same_kind(pending, extent):
            pending = Extent(
                pending.offset, pending.length + extent.length, pending.is_zero, pending.is_hole
            )
            continue
        if pending is not None:
            yield pending
        pending = extent
    if pending is not None:
        yield pending


def align_data(extents: Iterable[Extent], block_size: int, disk_size: int) -> Iterator[Extent]:
    """Shrink zeroes to whole blocks and give the rest to data, so that no request cuts a block.

    ``extents`` tile a range that begins on a block; only the end of the disk may lie off one.
    Yields extents that tile the same range, with inner boundaries on blocks.
    """
    if block_size == 1:
        yield from extents
        return
    position: int | None = None
    end = 0
    for extent in extents:
        if position is None:
            position = extent.offset
        end = extent.end
        if not extent.is_zero:
            continue
        start = -(-extent.offset // block_size) * block_size
        stop = end if end == disk_size else end // block_size * block_size
        if stop <= start:
            continue
        if start > position:
            yield Extent(position, start - position, is_zero=False)
        yield Extent(start, stop - start, is_zero=True, is_hole=extent.is_hole)
        position = stop
    if position is not None and end > position:
        yield Extent(position, end - position, is_zero=False)


def _same_kind(one: Extent, other: Extent) -> bool:
    return one.is_zero == other.is_zero and one.is_hole == other.is_hole


def _cover(entries: Iterable[tuple[int, int]], length: int) -> Iterator[tuple[int, int]]:
    """Yield the entries, then data for what they leave of ``length`` (an empty entry ends them)."""
    told = 0
    for entry_length, flags in entries:
        if entry_length <= 0:
            break
        yield entry_length, flags
        told += entry_length
    if told < length:
        yield length - told, 0
