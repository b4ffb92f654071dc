"""gzip files, unpacked piece by piece."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

from v2v_async.errors import SourceError
from v2v_async.units import MIB

PIECE = 1 * MIB
"""Bytes that are read and unpacked at once: little beside a disk, much beside a system call."""
Read = Callable[[int], bytes]
"""Gives the next bytes of a content, at most so many; none at its end."""


class Gunzip:
    """gzip, piece by piece; several in a row are one (RFC 1952, 2.2)."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._state = zlib.decompressobj(wbits=31)

    @property
    def is_whole(self) -> bool:
        """Whether it ended where it should."""
        return self._state.eof

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """Yield what ``piece`` unpacks to, in pieces of bounded size.

        Raises:
            SourceError: it is damaged.
        """
        try:
            while piece:
                if self._state.eof:
                    piece = piece.lstrip(b"\0")  # padding is allowed behind it
                    if not piece:
                        return
                    self._state = zlib.decompressobj(wbits=31)
                part = self._state.decompress(piece, PIECE)
                if part:
                    yield part
                piece = self._state.unused_data if self._state.eof else self._state.unconsumed_tail
                if not part and not self._state.eof:
                    return
        except zlib.error as error:
            raise SourceError(f"{self._what} is no gzip file, or damaged: {error}") from error


def unpacked(read: Read, what: str, advance: Callable[[int], None]) -> Iterator[bytes]:
    """Yield the content of a gzip file; ``advance`` gets the packed bytes that were read.

    Raises:
        SourceError: it is damaged.
    """
    gunzip = Gunzip(what)
    while piece := read(PIECE):
        for part in gunzip.feed(piece):
            advance(0)  # much may come of little
            yield part
        advance(len(piece))
    if not gunzip.is_whole:
        raise SourceError(f"{what} ends too early: it is damaged")
