"""One pass over an OVA's files: their checksums, and the disks that must be unpacked.

Each file is read once, whatever is wanted of it.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from v2v_async.errors import SourceError
from v2v_async.input.ova.archive import Archive
from v2v_async.input.ova.gunzip import PIECE, Gunzip, Read
from v2v_async.input.ova.manifest import Checksum
from v2v_async.input.ova.members import Members, inside
from v2v_async.input.ova.tar_headers import Member
from v2v_async.input.ova.work import Work

_HOLE = 64 * 1024
"""Bytes: zeroes of this size and place are left out, so that an unpacked raw disk is sparse."""
_NOTHING = bytes(_HOLE)
_MOST_TOLD = 10


@dataclass(frozen=True, slots=True)
class Unpacking:
    """Where a file of the OVA goes to."""

    path: Path
    is_gzip: bool = False


def wanted_checksums(
    checksums: Sequence[Checksum], folder: str, members: Members, shown: str
) -> tuple[dict[str, list[Checksum]], list[str]]:
    """Return the checksums of files that are there, and the names of those that are not.

    VMware lists files that it does not ship (virt-v2v; bug 1570407 of Red Hat). ``folder`` is the
    manifest's.

    Raises:
        SourceError: a name leads out of the OVA.
    """
    found: dict[str, list[Checksum]] = {}
    missing: list[str] = []
    for checksum in checksums:
        name = inside(folder, checksum.name, f"‘{shown}’: the manifest names ‘{checksum.name}’")
        member = members.get(name)
        if member is None or member.kind == "folder":
            missing.append(posixpath.join(folder, checksum.name))
        else:
            found.setdefault(name, []).append(checksum)
    return found, missing


def go_through(
    archive: Archive,
    checksums: Mapping[str, Sequence[Checksum]],
    unpackings: Mapping[str, Unpacking],
    work: Work,
) -> None:
    """Read every file that is named once: unpack it, and compare its checksums.

    Raises:
        SourceError: files differ from what the manifest says (all of them are told), one is
            damaged, or can't be unpacked.
    """
    wrong: list[str] = []
    left = {*checksums, *unpackings}
    with closing(archive.walk(frozenset(left), work)) as walk:
        for member, read in walk:
            left.discard(member.name)
            unpacking = unpackings.get(member.name)
            if unpacking is None:
                work.begin("checking", member.name, member.size, "verifying")
            else:
                work.begin("unpacking", member.name, member.size)
            wrong += _one(archive, member, read, checksums.get(member.name, ()), unpacking, work)
    if left:
        raise SourceError(f"‘{archive.shown}’ changed: ‘{min(left)}’ is not there any more")
    if wrong:
        more = f"; and {len(wrong) - _MOST_TOLD} more" if len(wrong) > _MOST_TOLD else ""
        raise SourceError(
            f"‘{archive.shown}’ is damaged: {'; '.join(wrong[:_MOST_TOLD])}{more}",
            hint="copy or download it again",
        )


def _one(
    archive: Archive,
    member: Member,
    read: Read,
    checksums: Sequence[Checksum],
    unpacking: Unpacking | None,
    work: Work,
) -> list[str]:
    """Deal with one file; return what is wrong with its checksums."""
    what = f"‘{member.name}’ in ‘{archive.shown}’"
    hashes = {
        checksum.algorithm: hashlib.new(checksum.algorithm, usedforsecurity=False)
        for checksum in checksums
    }
    with ExitStack() as stack:
        writer: _SparseFile | None = None
        gunzip = Gunzip(what) if unpacking is not None and unpacking.is_gzip else None
        if unpacking is not None:
            writer = stack.enter_context(_SparseFile(unpacking.path, what))
        while piece := read(PIECE):
            for hash_ in hashes.values():
                hash_.update(piece)
            if writer is not None:
                for part in gunzip.feed(piece) if gunzip is not None else (piece,):
                    writer.write(part)
                    work.advance(0)
            work.advance(len(piece))
        if gunzip is not None and not gunzip.is_whole:
            raise SourceError(f"{what} ends too early: it is damaged")
    return [
        f"the {checksum.algorithm.upper()} of ‘{member.name}’ is {found}, and the manifest says "
        f"{checksum.digest}"
        for checksum in checksums
        if (found := hashes[checksum.algorithm].hexdigest()) != checksum.digest
    ]


class _SparseFile:
    """A new file in which zeroes become holes."""

    def __init__(self, path: Path, what: str) -> None:
        self._path = path
        self._what = what
        self._file: IO[bytes] | None = None
        self._size = 0

    def __enter__(self) -> _SparseFile:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        try:
            self._file = os.fdopen(os.open(self._path, flags, 0o600), "wb", buffering=0)
        except OSError as error:
            raise self._failed(error) from error
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._file is not None
        with self._file as file:
            file.truncate(self._size)

    def write(self, content: bytes) -> None:
        """Append ``content``.

        Raises:
            SourceError: there is no room for it.
        """
        assert self._file is not None
        try:
            view = memoryview(content)
            while view:
                # Up to the next boundary, so that whole blocks of zeroes are seen as such.
                part = view[: _HOLE - self._size % _HOLE]
                if part != _NOTHING[: len(part)]:
                    self._file.seek(self._size)
                    written = 0
                    while written < len(part):
                        written += self._file.write(part[written:])
                self._size += len(part)
                view = view[len(part) :]
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> SourceError:
        return SourceError(
            f"{self._what} can't be unpacked to ‘{self._path.parent}’: {error.strerror}",
            hint="set TMPDIR to a folder on a larger file system",
        )
