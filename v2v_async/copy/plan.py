"""From extents to requests. Pure: no server, no clock.

::

    source     |====data====|....zero....|=data=|........zero........|
    target     |######### anything #########|......zero......|## any #|   (asked where not known)
    parts      |    DATA    |    ZERO    |  DATA  |   SKIP   |  ZERO  |
    requests   |read|read|re|    zero    |read|re |          |zero|zer|
                    ^ cut at multiples of the request size, so that requests are aligned
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, TypeAlias

from v2v_async.extent import Extent

Kind = Literal["data", "zero", "skip"]
"""Read and write it; make it zeroes on the target; it reads as zeroes there already."""

Part: TypeAlias = tuple[int, int, Kind]
"""(offset, end, kind): a range of the disk, in bytes."""

Piece: TypeAlias = tuple[int, int, bool]
"""(start, length, is zero): a range of a buffer that was read, in bytes."""


def arrange(
    source: Iterable[Extent],
    target_zeroes: Sequence[tuple[int, int]] = (),
    *,
    all_zero: bool = False,
    bridge: int = 0,
) -> list[Part]:
    """Return what to do with each range of a chunk; the parts tile it as ``source`` does.

    ``target_zeroes``: ranges (offset, end) of the target, in order, that read as zeroes;
    ``all_zero``: all of it does. A zero extent of at most ``bridge`` bytes between two that hold
    data is read with them: one longer request costs less than two.
    """
    parts: list[Part] = []
    for extent in source:
        if not extent.is_zero:
            _add_data(parts, extent.offset, extent.end, bridge)
        elif all_zero:
            parts.append((extent.offset, extent.end, "skip"))
        else:
            parts += _split(extent.offset, extent.end, target_zeroes)
    return parts


def _add_data(parts: list[Part], offset: int, end: int, bridge: int) -> None:
    if bridge and len(parts) > 1:
        gap_offset, gap_end, kind = parts[-1]
        before = parts[-2]
        if kind != "data" and gap_end - gap_offset <= bridge and before[2] == "data":
            parts[-2:] = [(before[0], end, "data")]
            return
    parts.append((offset, end, "data"))


def _split(offset: int, end: int, zeroes: Sequence[tuple[int, int]]) -> Iterator[Part]:
    """Yield zero and skip parts of a range that must read as zeroes."""
    position = offset
    for start, stop in zeroes:
        start, stop = max(start, position), min(stop, end)
        if start >= stop:
            continue
        if start > position:
            yield (position, start, "zero")
        yield (start, stop, "skip")
        position = stop
    if position < end:
        yield (position, end, "zero")


def cut(parts: Sequence[Part], at: int) -> tuple[list[Part], list[Part]]:
    """Return the parts before and behind the offset ``at``, which may lie within one."""
    head: list[Part] = []
    for index, (offset, end, kind) in enumerate(parts):
        if end <= at:
            head.append((offset, end, kind))
            continue
        tail = list(parts[index + 1 :])
        if offset < at:
            head.append((offset, at, kind))
            offset = at
        return head, [(offset, end, kind), *tail]
    return head, []


class Plan:
    """Cuts parts into requests, in order; request sizes may change on the way."""

    __slots__ = ("_at", "_parts", "_position")

    def __init__(self, parts: Sequence[Part] = ()) -> None:
        self._parts = parts
        self._at = 0
        self._position = parts[0][0] if parts else 0

    def take(self, request_size: int, zero_size: int) -> Part | None:
        """Return the next request, None when all have been taken.

        Reads are at most ``request_size`` bytes and end on its multiples; zeroes are at most
        ``zero_size`` bytes; what is skipped is in one piece.
        """
        if self._at == len(self._parts):
            return None
        _, end, kind = self._parts[self._at]
        position = self._position
        if kind == "data":
            stop = (position // request_size + 1) * request_size
        elif kind == "zero":
            stop = position + zero_size
        else:
            stop = end
        if stop < end:
            self._position = stop
            return (position, stop, kind)
        self._at += 1
        if self._at < len(self._parts):
            self._position = self._parts[self._at][0]
        return (position, end, kind)


def split_zeroes(is_zero_block: Iterable[bool], block_size: int, length: int) -> list[Piece]:
    """Return the pieces of a buffer that was read, data and zeroes in turn.

    ``is_zero_block`` tells it for each block of ``block_size`` bytes, the last one perhaps shorter.
    """
    pieces: list[Piece] = []
    position = 0
    for is_zero in is_zero_block:
        stop = min(position + block_size, length)
        if pieces and pieces[-1][2] == is_zero:
            position = pieces.pop()[0]
        pieces.append((position, stop - position, is_zero))
        position = stop
    return pieces


def find_pieces(
    words: memoryview | None, is_zero: Callable[[int, int], bool], length: int, block: int
) -> list[Piece]:
    """Return the pieces of a buffer of which ``length`` bytes were read; ``block`` 0: do not look.

    ``words`` are its 64-bit words (None: it has no whole number of them); ``is_zero`` tests a range
    (offset, length). A single word of each block is looked at first: that costs microseconds a MiB.
    """
    if not block or words is None:
        return [(0, length, False)]
    # Rounded up: what lies behind the end is old data, which can only make it look closer.
    firsts = words[: -(-length // 8) : block // 8].tolist()
    if all(firsts):
        return [(0, length, False)]
    zeroes = (
        not first and is_zero(at * block, min(block, length - at * block))
        for at, first in enumerate(firsts)
    )
    return split_zeroes(zeroes, block, length)
