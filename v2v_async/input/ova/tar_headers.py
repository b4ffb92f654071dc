"""Which files a tar archive holds and where their content lies, without unpacking anything.

Python's own module reads a header's extension into memory whatever size it claims, and follows
what an archive says of links and holes. Here everything is bounded and nothing is followed.

Formats: POSIX ustar and pax, GNU (long names, sizes of 8 GiB and more), and the old one before
them. Source: pax(1), ‘Extended Header’; tar.h of GNU tar.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Literal

from v2v_async.errors import SourceError

BLOCK = 512
_ZEROES = bytes(BLOCK)
_MOST_MEMBERS = 10_000
_LONGEST_EXTENSION = 1 << 16
_LONGEST_NAME = 4096
_PIECE = 1 << 20

Kind = Literal["file", "folder", "link", "special", "sparse"]
_KINDS: dict[bytes, Kind] = {
    b"0": "file",
    b"\0": "file",
    b"7": "file",  # contiguous: a file to everybody
    b"1": "link",
    b"2": "link",
    b"5": "folder",
    b"S": "sparse",
}
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", (b"x", b"X"), b"g"


@dataclass(frozen=True, slots=True)
class Member:
    """A file of an OVA. ``name`` is relative, without ``.`` and ``..``; ``size`` in bytes.

    ``offset`` is where its content begins in the archive, None where it must be unpacked.
    """

    name: str
    size: int
    kind: Kind = "file"
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class _Header:
    name: bytes
    size: int
    type: bytes
    has_more: bool


class TarReader:
    """Goes through an archive from front to back; ``file`` may be a pipe.

    Iterating yields the members; :meth:`read` gives the content of the last one.
    ``length`` is the archive's, where it is known: a content that reaches behind it is truncated.
    """

    def __init__(self, file: IO[bytes], what: str, *, length: int | None = None) -> None:
        self._file = file
        self._what = what
        self._length = length
        self._at = 0
        self._left = 0
        self._padding = 0

    @property
    def left(self) -> int:
        """Bytes of the content that have not been read."""
        return self._left

    def __iter__(self) -> Iterator[Member]:
        count = 0
        while (member := self._next()) is not None:
            count += 1
            if count > _MOST_MEMBERS:
                raise SourceError(f"{self._what} holds more than {_MOST_MEMBERS} files")
            yield member

    def read(self, size: int) -> bytes:
        """Return the next bytes of the content, empty at its end."""
        content = self._take(min(size, self._left))
        self._left -= len(content)
        return content

    def _next(self) -> Member | None:
        self._skip(self._left + self._padding)
        self._left = self._padding = 0
        name: bytes | None = None
        size: int | None = None
        is_sparse = False
        while True:
            header = self._header()
            if header is None:
                return None
            if header.type in (_LONG_NAME, _LONG_LINK, *_PAX, _PAX_GLOBAL):
                content = self._extension(header.size)
                if header.type == _LONG_NAME:
                    name = content.split(b"\0", 1)[0]
                elif header.type != _LONG_LINK:
                    records = _pax_records(content, self._what)
                    if header.type == _PAX_GLOBAL and records.keys() & {b"path", b"size"}:
                        raise SourceError(f"{self._what} gives all its files one name or size")
                    name = records.get(b"path", name)
                    if b"size" in records:
                        size = _decimal(records[b"size"], self._what)
                    is_sparse |= any(key.startswith(b"GNU.sparse.") for key in records)
                continue
            break
        if header.type == b"S":
            self._sparse_map(header.has_more)
        kind = _KINDS.get(header.type, "special")
        # Links, folders and devices have no content, whatever size they tell.
        length = (
            0
            if kind in ("link", "folder") or header.type in (b"3", b"4", b"6")
            else (header.size if size is None else size)
        )
        if is_sparse:
            kind = "sparse"
        if self._length is not None and self._at + length > self._length:
            raise SourceError(
                f"{self._what} ends in the middle of ‘{_shown(name or header.name)}’",
                hint="it was not copied or downloaded whole",
            )
        self._left, self._padding = length, -length % BLOCK
        raw = header.name if name is None else name
        return Member(normalised(raw, self._what), length, kind, self._at)

    def _header(self) -> _Header | None:
        block = self._take(BLOCK)
        if block == _ZEROES:
            block = self._take(BLOCK)  # the end is two of them; a single one is passed over
            if block == _ZEROES:
                return None
        if not block:
            return None
        if len(block) < BLOCK:
            raise SourceError(f"{self._what} ends in the middle of a header")
        return parse_header(block, self._what)

    def _extension(self, size: int) -> bytes:
        if size > _LONGEST_EXTENSION:
            raise SourceError(f"{self._what} has a file whose name or header takes {size} bytes")
        content = self._take(size)
        if len(content) < size:
            raise SourceError(f"{self._what} ends in the middle of a header")
        self._skip(-size % BLOCK)
        return content

    def _sparse_map(self, has_more: bool) -> None:
        """Pass over the further blocks of the map of an old GNU sparse file."""
        for _ in range(_LONGEST_EXTENSION):
            if not has_more:
                return
            block = self._take(BLOCK)
            if len(block) < BLOCK:
                break
            has_more = block[504] != 0
        raise SourceError(f"{self._what} has a map of holes without end")

    def _take(self, size: int) -> bytes:
        parts = []
        while size > 0:
            part = self._file.read(min(size, _PIECE))
            if not part:
                break
            parts.append(part)
            size -= len(part)
            self._at += len(part)
        return b"".join(parts)

    def _skip(self, size: int) -> None:
        if self._length is not None:
            self._file.seek(size, io.SEEK_CUR)
            self._at += size
            return
        while size > 0:
            part = self._take(min(size, _PIECE))
            if not part:
                raise SourceError(f"{self._what} ends in the middle of a file")
            size -= len(part)


def parse_header(block: bytes, what: str) -> _Header:
    """Read a header of 512 bytes.

    Raises:
        SourceError: it is none.
    """
    checksum = _number(block[148:156], what)
    rest = block[:148] + b" " * 8 + block[156:]
    # Some old programs summed signed characters.
    if checksum not in (sum(rest), sum(byte - 256 if byte > 127 else byte for byte in rest)):
        raise SourceError(f"{what} is damaged: a header's checksum is wrong")
    name = block[:100].split(b"\0", 1)[0]
    is_posix = block[257:263] == b"ustar\0"
    prefix = block[345:500].split(b"\0", 1)[0] if is_posix else b""
    return _Header(
        prefix + b"/" + name if prefix else name,
        _number(block[124:136], what),
        block[156:157],
        block[482] != 0,
    )


def looks_like_tar(head: bytes) -> bool:
    """Return whether a file that begins so is a tar archive."""
    if len(head) < BLOCK:
        return False
    try:
        return head[257:262] == b"ustar" or parse_header(head[:BLOCK], "").name != b""
    except SourceError:
        return False


def normalised(name: bytes | str, what: str) -> str:
    """Return a member's name without ``./``.

    Raises:
        SourceError: it leads out of the archive, as no honest one does.
    """
    text = name if isinstance(name, str) else name.decode("utf-8", "surrogateescape")
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if text.startswith("/") or ".." in parts:
        raise SourceError(
            f"{what} holds ‘{_shown(text)}’, a name that leads out of it: refused",
            hint="an OVA that does this is not to be trusted",
        )
    if "\0" in text or len(text) > _LONGEST_NAME:
        raise SourceError(f"{what} holds a file with an impossible name")
    return "/".join(parts)


def _shown(name: bytes | str) -> str:
    text = name if isinstance(name, str) else name.decode("utf-8", "replace")
    return text if len(text) <= 200 else text[:200] + "…"


def _number(field: bytes, what: str) -> int:
    """Return a number: octal text, or binary where that is too short for it (GNU)."""
    if field[0] & 0x80:
        if field[0] != 0x80:
            raise SourceError(f"{what} is damaged: a number in a header is absurd")
        value = int.from_bytes(field[1:], "big")
    else:
        text = field.split(b"\0", 1)[0].strip()
        try:
            value = int(text, 8) if text else 0
        except ValueError:
            value = -1
    if not 0 <= value < 1 << 62:
        raise SourceError(f"{what} is damaged: a number in a header is absurd")
    return value


def _decimal(text: bytes, what: str) -> int:
    if not text.isdigit() or len(text) > 18:
        raise SourceError(f"{what} is damaged: a size in a header is absurd")
    return int(text)


def _pax_records(content: bytes, what: str) -> dict[bytes, bytes]:
    """Read ``LENGTH KEY=VALUE\\n`` …; the length counts all of it."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(content) and content[at] != 0:
        space = content.find(b" ", at, at + 8)
        length = content[at:space] if space > 0 else b""
        if not length.isdigit():
            raise SourceError(f"{what} is damaged: an extended header can't be read")
        record = content[space + 1 : at + int(length)]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n") or at + int(length) > len(content):
            raise SourceError(f"{what} is damaged: an extended header can't be read")
        records[key] = value[:-1]
        at += int(length)
    return records
