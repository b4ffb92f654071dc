"""OVAs that must be unpacked: compressed tars and zip files.

They can only be read from front to back. That is done once to find out what is in them, without
writing anything, and once more to unpack the disks.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import stat
import zipfile
from abc import abstractmethod
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Literal, cast

from v2v_async.errors import SourceError
from v2v_async.input.ova.archive import (
    DAMAGED,
    Archive,
    Content,
    Seen,
    Walk,
    check_room,
    check_text,
    damage,
    read_all,
)
from v2v_async.input.ova.gunzip import PIECE, Gunzip, Read
from v2v_async.input.ova.members import is_text
from v2v_async.input.ova.tar_headers import Member, TarReader, normalised
from v2v_async.input.ova.work import Work
from v2v_async.units import MIB

Compression = Literal["gzip", "bzip2", "xz", "zstd"]

_MOST_PACKED = 256  # a head is remembered of each
_MOST_TEXT = 64 * MIB
_LARGEST_DIRECTORY = 16 * MIB  # of a zip file: 100,000 files

_MOST_PADDING = 64  # pieces; tar pads to 10 KiB

COMPRESSIONS: tuple[tuple[bytes, Compression], ...] = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
)
_DAMAGED_ZIP = (*DAMAGED, NotImplementedError, RuntimeError, OverflowError)


class _Packed(Archive):
    """What can only be read from front to back. Remembers texts, and heads and tails."""

    is_packed = True

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._texts: dict[str, bytes] = {}
        self._contents: dict[str, Content] = {}
        self._inner: dict[str, Content | SourceError] = {}

    @abstractmethod
    def _each(self) -> Walk:
        """Go through everything."""

    def survey(self, work: Work, room: int) -> None:
        """See :class:`Archive`."""
        self.members, self._texts, self._contents, self._inner = {}, {}, {}, {}
        texts = total = 0
        work.begin("looking through", self.path.name, None)
        with closing(self._each()) as each:
            for member, read in each:
                self._add(member)
                if len(self.members) > _MOST_PACKED:
                    raise SourceError(
                        f"‘{self.shown}’ holds more than {_MOST_PACKED} files",
                        hint="unpack it, and give the folder",
                    )
                if member.kind == "file" and is_text(member.name):
                    texts += member.size
                    if texts > _MOST_TEXT:
                        raise SourceError(f"the descriptions in ‘{self.shown}’ are absurdly long")
                    self._texts[member.name] = read_all(read)
                    continue
                seen, inner = Seen(), _Inner(f"‘{member.name}’ in ‘{self.shown}’")
                while piece := read(PIECE):
                    work.advance(len(piece))
                    seen.add(piece)
                    inner.add(piece)
                    check_room(total + max(seen.size, inner.seen.size), room, self.shown)
                total += max(seen.size, inner.seen.size)
                if member.kind != "file":
                    continue
                self._contents[member.name] = seen.content
                self._inner[member.name] = inner.result()

    def text(self, member: Member, limit: int) -> bytes:
        """See :class:`Archive`."""
        check_text(member, self.shown, limit)
        return self._texts[member.name]

    def content(self, member: Member, work: Work, room: int, *, gunzip: bool) -> Content:
        """See :class:`Archive`."""
        if not gunzip:
            return self._contents[member.name]
        inner = self._inner[member.name]
        if isinstance(inner, SourceError):
            raise inner
        return inner

    def walk(self, names: Collection[str], work: Work) -> Walk:
        """See :class:`Archive`."""
        with closing(self._each()) as each:
            for member, read in each:
                if member.name not in names:
                    work.begin("passing over", member.name, member.size)
                    while piece := read(PIECE):
                        work.advance(len(piece))
                elif member.kind == "file":
                    if self.members.get(member.name) != member:
                        raise SourceError(f"‘{self.shown}’ changed while it was read")
                    yield member, read


class PackedTar(_Packed):
    """A compressed tar. ``pipe`` gives its content where another program unpacks it."""

    def __init__(self, path: Path, compression: Compression) -> None:
        super().__init__(path)
        self.compression = compression
        self.pipe: IO[bytes] | None = None

    def _each(self) -> Walk:
        with damage(self.shown), self._stream() as stream:
            reader = TarReader(stream, f"‘{self.shown}’")
            is_empty = True
            for member in reader:
                is_empty = False
                # Its place in a stream is of no use to anybody.
                yield Member(member.name, member.size, member.kind), _whole(reader, self.shown)
            if is_empty:
                raise SourceError(f"‘{self.shown}’ is {self.compression}, but holds no tar")
            for _ in range(_MOST_PADDING):
                if not stream.read(PIECE):  # the compression's own checksum comes last
                    return
            raise SourceError(f"‘{self.shown}’ goes on behind the end of its tar")

    @contextmanager
    def _stream(self) -> Iterator[IO[bytes]]:
        if self.pipe is not None:
            yield self.pipe
            return
        if self.compression == "gzip":
            with gzip.GzipFile(self.path, "rb") as unzipped:
                yield cast(IO[bytes], unzipped)
        elif self.compression == "bzip2":
            with bz2.BZ2File(self.path, "rb") as plain:
                yield cast(IO[bytes], plain)
        else:
            with lzma.LZMAFile(self.path, "rb") as unpacked:
                yield cast(IO[bytes], unpacked)


class ZipArchive(_Packed):
    """A zip file."""

    def _each(self) -> Walk:
        with (
            damage(self.shown, _DAMAGED_ZIP),
            self.path.open("rb", buffering=0) as raw,
            _Careful(raw) as careful,
            zipfile.ZipFile(cast(IO[bytes], careful)) as archive,
        ):
            for info in archive.infolist():
                name = normalised(info.filename, f"‘{self.shown}’")
                mode = info.external_attr >> 16
                if info.is_dir():
                    continue
                if stat.S_ISLNK(mode):
                    yield Member(name, 0, "link"), lambda size: b""
                    continue
                if info.flag_bits & 1:
                    raise SourceError(
                        f"‘{self.shown}’ is encrypted", hint="unpack it, and give the folder"
                    )
                with archive.open(info) as file:
                    yield Member(name, info.file_size), _guarded(file, self.shown)


class _Careful(io.BufferedReader):
    """Refuses to read at once what nobody needs at once: a directory of gigabytes."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            return super().read(_LARGEST_DIRECTORY)
        if size > _LARGEST_DIRECTORY:
            raise SourceError("the zip file has an absurdly long directory")
        return super().read(size)


class _Inner:
    """What is inside a file in passing, if it is gzip."""

    def __init__(self, what: str) -> None:
        self.seen = Seen()
        self._what = what
        self._gunzip: Gunzip | None = None
        self._failure: SourceError | None = None
        self._is_first = True

    def add(self, piece: bytes) -> None:
        if self._is_first and piece.startswith(b"\x1f\x8b"):
            self._gunzip = Gunzip(self._what)
        self._is_first = False
        if self._gunzip is not None and self._failure is None:
            try:
                for part in self._gunzip.feed(piece):
                    self.seen.add(part)
            except SourceError as error:
                self._failure = error

    def result(self) -> Content | SourceError:
        if self._gunzip is None:
            return SourceError(f"{self._what} is not gzip, though the OVF says so")
        if self._failure is None and not self._gunzip.is_whole:
            self._failure = SourceError(f"{self._what} ends too early: it is damaged")
        return self._failure or self.seen.content


def _whole(reader: TarReader, shown: str) -> Read:
    """Return a reader of the present member that does not take a broken pipe for its end."""
    left = reader.left

    def read(size: int) -> bytes:
        nonlocal left
        with damage(shown):
            piece = reader.read(size)
        left -= len(piece)
        if not piece and left:
            raise SourceError(f"‘{shown}’ ends in the middle of a file: it is damaged")
        return piece

    return read


def _guarded(file: IO[bytes], shown: str) -> Read:
    def read(size: int) -> bytes:
        with damage(shown, _DAMAGED_ZIP):
            return file.read(size)

    return read
