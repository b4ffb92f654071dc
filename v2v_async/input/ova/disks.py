"""The disks of an OVA: where each lies, what it is, and whether it may be opened.

::

    OVF's href ──> member of the archive ──> header (read here) ──> qemu-img info
                     │                         │ names others? refused
                     └ packed: to be unpacked first; the header alone is looked at
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from v2v_async import qemu_img
from v2v_async.errors import SourceError, V2VError
from v2v_async.events import Reporter
from v2v_async.input.checking import FORMATS, CheckedDisk
from v2v_async.input.image import DiskSource, FileImage, PluginImage, backing_name
from v2v_async.input.image_header import HEAD, TAIL, ImageHeader, read_header
from v2v_async.input.ova.archive import Archive
from v2v_async.input.ova.members import beside, chunks, find_disk
from v2v_async.input.ova.ovf import OvfDisk
from v2v_async.input.ova.tar_headers import BLOCK, Member
from v2v_async.input.ova.work import Work, in_thread
from v2v_async.redact import redact

_LONGEST_BACKING_NAME = 1023
"""Bytes that a qcow2 overlay has for the name of what is under it (docs/interop/qcow2.rst)."""


@dataclass(frozen=True, slots=True)
class OvaDisk:
    """A disk that was found.

    ``members``: its file first, then those that a VMDK descriptor names; none for an empty disk.
    ``unpacked_size``: bytes that its files take once unpacked, 0 where they are read in place.
    """

    described: OvfDisk
    checked: CheckedDisk
    members: tuple[Member, ...] = ()
    is_gzip: bool = False
    unpacked_size: int = 0


class DiskFinder:
    """Looks at the disks of one archive, which has been surveyed."""

    def __init__(self, archive: Archive, ovf: Member, room: int, reporter: Reporter) -> None:
        self._archive = archive
        self._ovf = ovf
        self._room = room
        self._reporter = reporter
        self.warnings: list[str] = []

    async def find(self, disk: OvfDisk) -> OvaDisk:
        """Look at one disk.

        Raises:
            SourceError: it is not there, damaged or dangerous.
        """
        if disk.href is None:
            return OvaDisk(disk, _empty(disk))
        archive = self._archive
        member = find_disk(archive.members, self._ovf.name, disk.href, archive.shown)
        what = f"the disk ‘{member.name}’ in ‘{archive.shown}’"
        if disk.is_chunked and chunks(archive.members, member) > 1:
            raise SourceError(
                f"{what} is one of several pieces, which is not supported",
                hint="unpack the OVA, join the pieces with cat in the order of their numbers, and "
                "give the folder",
            )
        work = Work()
        content = await in_thread(
            lambda: archive.content(member, work, self._room, gunzip=disk.is_gzip),
            work,
            self._reporter,
        )
        if content.size == 0:
            raise SourceError(f"{what} is empty (0 bytes)")
        header = read_header(content.head, content.tail, content.size, what)
        if disk.says_vmdk and header.format == "raw" and not _is_flat(member.name):
            self.warnings.append(f"{what} is no VMDK, as the OVF says: it is read as a raw disk")
        extents = await self._extents(header, member, what, disk)
        members = (member, *extents)
        if archive.is_packed or disk.is_gzip:
            size = header.size or disk.capacity or content.size
            return OvaDisk(
                disk,
                CheckedDisk(
                    DiskSource(FileImage(archive.path.absolute()), header.format, size),
                    redact(f"{archive.shown}: {member.name}"),
                    None,
                    (str(archive.path.absolute()),),
                ),
                members,
                disk.is_gzip,
                content.size + sum(extent.size for extent in extents),
            )
        local = archive.local_path(member)
        if local is not None:
            paths = [archive.local_path(extent) or local for extent in extents]
            checked = await check_local(local, header, paths, what)
        else:
            checked = await self._check_part(member, header, content.size, what)
        self._compare(disk, checked, what)
        return OvaDisk(disk, checked, members)

    async def _extents(
        self, header: ImageHeader, member: Member, what: str, disk: OvfDisk
    ) -> list[Member]:
        """Return the files that a VMDK descriptor names, looked at as it is itself."""
        archive = self._archive
        if not header.extents:
            return []
        if disk.is_gzip or (not archive.is_packed and archive.local_path(member) is None):
            raise SourceError(
                f"{what} is a VMDK descriptor, whose content lies in other files: it can't be "
                "read in place",
                hint="unpack the OVA with tar, and give the folder",
            )
        found = []
        for extent in header.extents:
            assert extent.file_name is not None, "those without a file are left out"
            other = beside(archive.members, member, extent.file_name, archive.shown)
            if extent.is_sparse:
                work = Work()
                content = archive.content(other, work, self._room, gunzip=False)
                inner = read_header(content.head, content.tail, content.size, f"‘{other.name}’")
                if inner.format != "vmdk" or inner.extents:
                    raise SourceError(f"{what} names ‘{other.name}’, which is no sparse extent")
            found.append(other)
        return found

    async def _check_part(
        self, member: Member, header: ImageHeader, size: int, what: str
    ) -> CheckedDisk:
        """Look at a disk that is a part of a tar file."""
        archive = self._archive
        path = archive.path.absolute()
        assert member.offset is not None
        length = size
        if header.format != "raw":
            # qemu wants whole sectors; tar pads to them, but for the end of a file cut short.
            length = min(-(-size // BLOCK) * BLOCK, path.stat().st_size - member.offset)
            length -= length % BLOCK
        source = DiskSource(FileImage(path, member.offset, length), header.format, size)
        shown = redact(f"{archive.shown}: {member.name}")
        if header.format == "raw":
            return CheckedDisk(source, shown, None, (str(path),))
        name = backing_name(source)
        if len(os.fsencode(name)) > _LONGEST_BACKING_NAME:
            raise SourceError(
                f"the name ‘{path}’ is too long for an overlay on a disk in it",
                hint="move the OVA, or make a link with a short name",
            )
        info = await _info(name, None, what)
        _check_info(info, header, [], what)
        return CheckedDisk(
            DiskSource(source.image, header.format, info.virtual_size), shown, None, (str(path),)
        )

    def _compare(self, disk: OvfDisk, checked: CheckedDisk, what: str) -> None:
        if disk.capacity is not None and checked.source.size < disk.capacity:
            self.warnings.append(
                f"{what} has {checked.source.size} bytes; the OVF says {disk.capacity}"
            )


def _empty(disk: OvfDisk) -> CheckedDisk:
    """Return a disk that has a size but no file: the guest's maker never wrote to it."""
    assert disk.capacity is not None
    shown = f"(an empty disk, ‘{disk.name}’)"
    image = PluginImage("null", (f"size={disk.capacity}",), shown)
    return CheckedDisk(DiskSource(image, "raw", disk.capacity), shown, 0)


async def look_at_unpacked(path: Path, extents: list[Path], what: str) -> CheckedDisk:
    """Look at a disk that has been unpacked to ``path``.

    Raises:
        SourceError: it is damaged or dangerous.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL))
        tail = file.read(TAIL)
    return await check_local(path, read_header(head, tail, size, what), extents, what)


async def check_local(
    path: Path, header: ImageHeader, extents: list[Path], what: str
) -> CheckedDisk:
    """Look at a disk that is a file, or a descriptor with the files of its extents.

    Raises:
        SourceError: qemu can't open it, or it names other files.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise SourceError(f"{what} is not a plain file")
    files = (str(path), *map(str, extents))
    if header.format == "raw":
        source = DiskSource(FileImage(path), "raw", status.st_size)
        return CheckedDisk(source, redact(str(path)), status.st_blocks * 512, files)
    info = await _info(path, header.format, what)
    _check_info(info, header, extents, what)
    source = DiskSource(FileImage(path), header.format, info.virtual_size)
    return CheckedDisk(source, redact(str(path)), info.allocated, files)


async def _info(image: Path | str, format_: str | None, what: str) -> qemu_img.ImageInfo:
    try:
        return await qemu_img.info(image, format_=format_)
    except V2VError as error:
        raise SourceError(
            f"{what} can't be read: {error.message}",
            hint="it is damaged, or was not copied whole",
        ) from error


def _check_info(
    info: qemu_img.ImageInfo, header: ImageHeader, extents: list[Path], what: str
) -> None:
    """Refuse what qemu has found that the header did not tell: two pairs of eyes."""
    if info.format != header.format or info.format not in FORMATS:
        raise SourceError(f"{what} is not {header.format}, but {info.format}: refused")
    if info.backing_file is not None:
        raise SourceError(
            f"{what} has a backing file, ‘{info.backing_file[:200]}’: refused, since it may be "
            "any file of this machine",
            hint="export the guest again, after its snapshots have been consolidated",
        )
    if info.is_encrypted:
        raise SourceError(f"{what} is encrypted, which is not supported here")
    if info.virtual_size == 0:
        raise SourceError(f"{what} is empty (0 bytes)")
    named = {os.path.realpath(name.removeprefix("file:")) for name in info.content_files}
    allowed = {os.path.realpath(extent) for extent in extents}
    is_foreign = not named <= allowed if header.extents else len(info.content_files) > 1
    if is_foreign or (info.format == "qcow2" and info.content_files):
        raise SourceError(f"{what} names other files than the OVA's: refused")


def _is_flat(name: str) -> bool:
    """Return whether VMware calls a file the raw content of a VMDK: ``x-flat.vmdk``."""
    return "-flat.vmdk" in name
