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


def split_zeroes(
    is_zero_block: Iterable[bool], block_size: int, length: int, shortest: int
) -> list[Piece]:
    """Return the pieces of a buffer that was read: data, and runs of zeroes worth skipping.

    ``is_zero_block`` tells it for each block of ``block_size`` bytes, the last one perhaps shorter.
    Runs of zeroes under ``shortest`` bytes stay data: another request costs more than they do.
    """
    pieces: list[Piece] = []
    position = 0
    for is_zero in is_zero_block:
        stop = min(position + block_size, length)
        _append(pieces, Piece(position, stop - position, is_zero))
        position = stop
    merged: list[Piece] = []
    for piece in pieces:
        # A short run at either end may go on in the neighbouring request: it is no reason to keep
        # it, since each request stands alone.
        keep_zero = piece.is_zero and piece.length >= shortest
        _append(merged, Piece(piece.start, piece.length, keep_zero))
    return merged


def _append(pieces: list[Piece], piece: Piece) -> None:
    if piece.length == 0:
        return
    if pieces and pieces[-1].is_zero == piece.is_zero:
        last = pieces.pop()
        piece = Piece(last.start, last.length + piece.length, piece.is_zero)
    pieces.append(piece)
