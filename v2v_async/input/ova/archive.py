"""An OVA as it lies on the disk: a folder, a tar file, or something that must be unpacked.

::

    Folder      files                       read where they are
    TarArchive  an uncompressed tar         read where they are: offset and length
    PackedTar   gzip, bzip2, xz, zstd       gone through from front to back; disks are unpacked
    ZipArchive  not an OVA by the standard, but some are shipped so: as PackedTar

Everything here blocks: it is called in a worker thread. What is packed is gone through once, and
what is needed of its files to know what they are is remembered: nothing is written for that.
"""

from __future__ import annotations

import io
import lzma
import os
import stat
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar

from v2v_async.errors import SourceError
from v2v_async.input.image_header import HEAD, TAIL
from v2v_async.input.ova.gunzip import PIECE, Read, unpacked
from v2v_async.input.ova.tar_headers import Member, TarReader
from v2v_async.input.ova.work import Work
from v2v_async.units import format_size

_MOST_FILES = 10_000

Walk = Generator[tuple[Member, Read], None, None]
"""Files and their content, one after the other; to be closed."""
DAMAGED = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)


@dataclass(frozen=True, slots=True)
class Content:
    """What a file begins and ends with, and its size in bytes."""

    head: bytes
    tail: bytes
    size: int


class Seen:
    """Beginning, end and size of what goes through."""

    def __init__(self) -> None:
        self.size = 0
        self._head = bytearray()
        self._tail = b""

    def add(self, piece: bytes) -> None:
        """Take in the next bytes."""
        self.size += len(piece)
        if len(self._head) < HEAD:
            self._head += piece[: HEAD - len(self._head)]
        self._tail = piece[-TAIL:] if len(piece) >= TAIL else (self._tail + piece)[-TAIL:]

    @property
    def content(self) -> Content:
        """All that was seen."""
        return Content(bytes(self._head), self._tail, self.size)


class Archive(ABC):
    """An OVA. ``members`` is there after :meth:`survey`."""

    is_packed: ClassVar[bool] = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shown = str(path)
        self.members: dict[str, Member] = {}

    @abstractmethod
    def survey(self, work: Work, room: int) -> None:
        """Find out what is in it; what is packed may unpack to ``room`` bytes at most.

        Raises:
            SourceError: it is damaged or dangerous.
        """

    @abstractmethod
    def text(self, member: Member, limit: int) -> bytes:
        """Return a whole small file.

        Raises:
            SourceError: it is longer than ``limit`` bytes.
        """

    @abstractmethod
    def content(self, member: Member, work: Work, room: int, *, gunzip: bool) -> Content:
        """Return what a disk begins and ends with: unpacked, where it is gzip in the OVA."""

    @abstractmethod
    def walk(self, names: Collection[str], work: Work) -> Walk:
        """Go through the named files, in any order; read each before the next."""

    def local_path(self, member: Member) -> Path | None:
        """Return a file's own path; None where it lies in an archive."""
        return None

    def _add(self, member: Member) -> None:
        if member.name in self.members and "folder" not in (
            member.kind,
            self.members[member.name].kind,
        ):
            raise SourceError(
                f"‘{self.shown}’ holds ‘{member.name}’ more than once: refused",
                hint="which one is meant can't be known; pack it again",
            )
        self.members[member.name] = member


class _Direct(Archive):
    """Files that can be read where they are."""

    @abstractmethod
    def _open(self, member: Member) -> IO[bytes]:
        """Open the file that holds it, at its first byte."""

    def text(self, member: Member, limit: int) -> bytes:
        """See :class:`Archive`."""
        check_text(member, self.shown, limit)
        with self._reading(member) as read:
            return read_all(read)

    def content(self, member: Member, work: Work, room: int, *, gunzip: bool) -> Content:
        """See :class:`Archive`."""
        if gunzip:
            what = f"‘{member.name}’ in ‘{self.shown}’"
            seen = Seen()
            work.begin("reading", member.name, member.size)
            with self._reading(member) as read:
                for piece in unpacked(read, what, work.advance):
                    seen.add(piece)
                    check_room(seen.size, room, self.shown)
            return seen.content
        with damage(self.shown), self._open(member) as file:
            head = file.read(min(HEAD, member.size))
            tail = head[-TAIL:]
            if member.size > len(head):
                file.seek(member.size - len(head) - TAIL, io.SEEK_CUR)
                tail = file.read(TAIL)
        return Content(head, tail, member.size)

    def walk(self, names: Collection[str], work: Work) -> Walk:
        """See :class:`Archive`."""
        for name in sorted(names):
            member = self.members[name]
            with self._reading(member) as read:
                yield member, read

    @contextmanager
    def _reading(self, member: Member) -> Iterator[Read]:
        left = member.size

        def read(size: int) -> bytes:
            nonlocal left
            with damage(self.shown):
                piece = file.read(min(size, left))
            if not piece and left:
                raise SourceError(f"‘{self.shown}’ became shorter while it was read")
            left -= len(piece)
            return piece

        with damage(self.shown), self._open(member) as file:
            yield read


class Folder(_Direct):
    """An OVA that has been unpacked."""

    def survey(self, work: Work, room: int) -> None:
        """See :class:`Archive`. A link is a file of it if it stays within."""
        self.members = {}
        root = os.path.realpath(self.path)
        links: dict[tuple[int, int], int] = {}
        entries: list[tuple[str, os.stat_result]] = []

        def fail(error: OSError) -> None:
            raise error

        with damage(self.shown):
            for folder, _, files in os.walk(root, onerror=fail):
                for file in files:
                    path = os.path.join(folder, file)
                    status = os.lstat(path)
                    links[status.st_dev, status.st_ino] = (
                        links.get((status.st_dev, status.st_ino), 0) + 1
                    )
                    entries.append((path, status))
                if len(entries) > _MOST_FILES:
                    raise SourceError(
                        f"‘{self.shown}’ holds more than {_MOST_FILES} files: is it an OVA?",
                        hint="give the folder that the .ovf file is in",
                    )
            for path, status in entries:
                self._add(self._entry(root, path, status, links))

    def _entry(
        self,
        root: str,
        path: str,
        status: os.stat_result,
        links: dict[tuple[int, int], int],
    ) -> Member:
        name = os.path.relpath(path, root)
        if stat.S_ISLNK(status.st_mode):
            target = os.path.realpath(path)
            if os.path.commonpath((root, target)) != root or not os.path.isfile(target):
                return Member(name, 0, "link")
            status = os.stat(target)
        if not stat.S_ISREG(status.st_mode):
            return Member(name, 0, "special")
        # A file with a further name outside may be one that its maker could not read himself.
        if status.st_nlink > links.get((status.st_dev, status.st_ino), 0):
            return Member(name, 0, "link")
        return Member(name, status.st_size)

    def local_path(self, member: Member) -> Path | None:
        """See :class:`Archive`."""
        return Path(os.path.realpath(self.path)) / member.name

    def _open(self, member: Member) -> IO[bytes]:
        return (Path(os.path.realpath(self.path)) / member.name).open("rb")


class TarArchive(_Direct):
    """An uncompressed tar file."""

    def survey(self, work: Work, room: int) -> None:
        """See :class:`Archive`."""
        self.members = {}
        with damage(self.shown), self.path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            for member in TarReader(file, f"‘{self.shown}’", length=length):
                self._add(member)

    def _open(self, member: Member) -> IO[bytes]:
        assert member.offset is not None
        file = self.path.open("rb")
        file.seek(member.offset)
        return file


def check_room(needed: int, room: int, shown: str) -> None:
    """Raise SourceError where what is unpacked would be more than there is room for."""
    if needed > room:
        raise SourceError(
            f"‘{shown}’ must be unpacked, which needs more than the {format_size(room)} that are "
            "free for it",
            hint="set TMPDIR to a folder on a larger file system, or unpack it elsewhere and give "
            "the folder",
        )


def read_all(read: Read) -> bytes:
    return b"".join(iter(lambda: read(PIECE), b""))


def check_text(member: Member, shown: str, limit: int) -> None:
    if member.size > limit:
        raise SourceError(
            f"‘{member.name}’ in ‘{shown}’ is too long: {format_size(member.size)}, and at most "
            f"{format_size(limit)} are read",
            hint="an OVA that does this is not to be trusted",
        )


@contextmanager
def damage(shown: str, kinds: tuple[type[Exception], ...] = DAMAGED) -> Iterator[None]:
    try:
        yield
    except kinds as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SourceError(f"‘{shown}’ can't be read: {reason or 'it ends too early'}") from error
