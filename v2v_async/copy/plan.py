"""From extents to requests. Pure: no server, no clock.

::

    extents    |====data====|....zero....|=data=|........zero........|
    requests   |read|read|re|    zero    |read| |   zero   |  zero   |
                    ^ cut at multiples of the request size, so that requests are aligned
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from v2v_async.extent import Extent


@dataclass(frozen=True, slots=True)
class Request:
    """Bring ``length`` bytes from ``offset`` over: by reading them, or as zeroes."""

    offset: int
    length: int
    is_zero: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a buffer that was read: ``start`` counts from the beginning of the buffer."""

    start: int
    length: int
    is_zero: bool


def plan(extents: Iterable[Extent], request_size: int, zero_size: int) -> Iterator[Request]:
    """Yield requests that tile the extents exactly, in order.

    Reads are at most ``request_size`` bytes and end on its multiples; zeroes are at most
    ``zero_size`` bytes.
    """
    for extent in extents:
        position = extent.offset
        while position < extent.end:
            if extent.is_zero:
                stop = min(position + zero_size, extent.end)
            else:
                stop = min((position // request_size + 1) * request_size, extent.end)
            yield Request(position, stop - position, extent.is_zero)
            position = stop


def split_zeroes(is_zero_block: Iterable[bool], block_size: int, length: int) -> list[Piece]:
    """Return the pieces of a buffer that was read, data and zeroes in turn.

    ``is_zero_block`` tells it for each block of ``block_size`` bytes, the last one perhaps shorter.
    """
    pieces: list[Piece] = []
    position = 0
    for is_zero in is_zero_block:
        stop = min(position + block_size, length)
        if pieces and pieces[-1].is_zero == is_zero:
            position = pieces.pop().start
        pieces.append(Piece(position, stop - position, is_zero))
        position = stop
    return pieces
