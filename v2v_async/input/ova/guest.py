"""``-i ova``: a guest in an OVA, as VMware, VirtualBox and others export it.

The disks are read in place, inside the tar file or in the folder; only what is compressed is
unpacked, into the v2v directory, after the space for it has been checked. Nothing in an OVA is
trusted: it comes from strangers.
"""

from __future__ import annotations

import os
import posixpath
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from subprocess import DEVNULL
from typing import ClassVar, Self

import anyio.to_thread

from v2v_async import process
from v2v_async.errors import DependencyError, SourceError, UsageError
from v2v_async.events import Reporter
from v2v_async.input.checking import CheckedDisk, check_each, raise_problems, with_sizes
from v2v_async.input.contract import Input
from v2v_async.input.naming import DISK_SUFFIXES, name_after
from v2v_async.input.ova import manifest as manifests
from v2v_async.input.ova import ovf as descriptions
from v2v_async.input.ova.archive import Archive, check_room
from v2v_async.input.ova.disks import DiskFinder, OvaDisk, look_at_unpacked
from v2v_async.input.ova.manifest import Checksum, parse_manifest
from v2v_async.input.ova.members import find_manifests, find_ovf, usable
from v2v_async.input.ova.opening import open_ova
from v2v_async.input.ova.ovf import Ovf, OvfDisk, parse_ovf
from v2v_async.input.ova.packed import PackedTar
from v2v_async.input.ova.tar_headers import Member
from v2v_async.input.ova.unpacking import Unpacking, go_through, wanted_checksums
from v2v_async.input.ova.work import Work, in_thread
from v2v_async.input.overlay import (
    OVERLAY_HELP,
    OverlayKind,
    choose,
    is_kept,
    overlay_option,
    serve_overlays,
)
from v2v_async.model import SourceGuest
from v2v_async.options import InputOptions
from v2v_async.server import Servers
from v2v_async.v2vdir import V2VDir, default_parent

_SUFFIXES = (*DISK_SUFFIXES, ".ova", ".ovf")


class OvaInput(Input):
    """One guest in an OVA."""

    name: ClassVar[str] = "ova"
    option_help: ClassVar[dict[str, str]] = {"overlay": OVERLAY_HELP}

    def __init__(self, path: Path, overlay: OverlayKind | None) -> None:
        self._path = path
        self._overlay: OverlayKind | None = overlay
        self._archive: Archive | None = None
        self._ovf: Ovf | None = None
        self._disks: list[OvaDisk] = []
        self._checksums: dict[str, list[Checksum]] = {}
        self._seen: tuple[int, ...] | None = None
        self._told: set[str] = set()

    @classmethod
    def parse(cls, options: InputOptions) -> Self:
        """See :class:`Input`."""
        if len(options.arguments) != 1 or not options.arguments[0]:
            raise UsageError(
                "-i ova takes one argument",
                hint="name the OVA file, or the folder that it was unpacked to",
            )
        if options.transport is not None:
            raise UsageError(f"‘-it {options.transport}’ has no meaning with ‘-i ova’")
        if options.format is not None:
            raise UsageError(
                f"‘-if {options.format}’ has no meaning with ‘-i ova’: each disk's format is "
                "found out"
            )
        overlay = overlay_option("-i ova", cls.option_help, options)
        return cls(Path(options.arguments[0]), overlay)

    async def check(self, reporter: Reporter) -> None:
        """See :class:`Input`. A packed OVA is gone through once, without writing anything."""
        if not _is_unicode(self._path.absolute()):
            raise SourceError(
                f"‘{self._path}’: the name is not UTF-8, and qemu takes no other",
                hint="rename it, or make a link with another name",
            )
        archive, ovf_name = await anyio.to_thread.run_sync(open_ova, self._path)
        stamp = _stamp(archive)
        if self._seen == stamp and archive.is_packed:
            return  # nobody has changed it since it was looked at, which took its time
        self._seen = None
        room = _room(default_parent())
        work = Work()
        async with _unpacked(archive):
            await in_thread(partial(archive.survey, work, room), work, reporter)
        described = (
            find_ovf(archive.members, archive.shown)
            if ovf_name is None
            else usable(archive.members[ovf_name], archive.shown)
        )
        shown = f"‘{described.name}’ in ‘{archive.shown}’"
        text = await _text(archive, described, descriptions.MAX_SIZE)
        ovf = parse_ovf(text, shown)
        self._tell(ovf.warnings, reporter)
        if not ovf.disks:
            raise SourceError(f"{shown} describes a machine without disks")
        found = find_manifests(archive.members, archive.shown)
        if ovf_name is not None:  # the folder may hold other guests'
            own = ovf_name.removesuffix(posixpath.splitext(ovf_name)[1]) + ".mf"
            found = [member for member in found if member.name == own]
        checksums = await self._manifest(archive, found, reporter)
        disks = await self._look(archive, described, ovf, room, reporter)
        check_room(sum(disk.unpacked_size for disk in disks), room, archive.shown)
        self._archive, self._ovf, self._checksums = archive, ovf, checksums
        self._disks, self._seen = disks, stamp

    async def _manifest(
        self, archive: Archive, members: list[Member], reporter: Reporter
    ) -> dict[str, list[Checksum]]:
        found: dict[str, list[Checksum]] = {}
        for member in members:
            text = await _text(archive, member, manifests.MAX_SIZE)
            manifest = parse_manifest(text, f"‘{member.name}’ in ‘{archive.shown}’")
            self._tell(manifest.warnings, reporter)
            wanted, missing = wanted_checksums(
                manifest.checksums,
                posixpath.dirname(member.name),
                archive.members,
                archive.shown,
            )
            for name in missing:
                self._tell(
                    [f"the manifest has a checksum of ‘{name}’, which is not there (ignored)"],
                    reporter,
                )
            for name, checksums in wanted.items():
                usable(archive.members[name], archive.shown)
                found.setdefault(name, []).extend(checksums)
        return found

    async def _look(
        self, archive: Archive, described: Member, ovf: Ovf, room: int, reporter: Reporter
    ) -> list[OvaDisk]:
        finder = DiskFinder(archive, described, room, reporter)
        found: list[OvaDisk] = []

        async def look(disk: OvfDisk) -> CheckedDisk:
            one = await finder.find(disk)
            choose(self._overlay, one.checked.source)
            found.append(one)
            return one.checked

        await check_each([partial(look, disk) for disk in ovf.disks])
        self._tell(finder.warnings, reporter)
        return found

    def _tell(self, warnings: list[str], reporter: Reporter) -> None:
        """Say each once, however often the source is checked."""
        for text in warnings:
            if text not in self._told:
                self._told.add(text)
                reporter.warning(text)

    async def describe(self) -> SourceGuest:
        """See :class:`Input`."""
        assert self._ovf is not None, "check() comes first"
        disks = [disk.checked.described(i, disk.described.controller) for i, disk in self._each()]
        name = self._ovf.name or guest_name(self._path)
        return self._ovf.guest.model_copy(update={"name": name, "disks": disks})

    def _each(self) -> list[tuple[int, OvaDisk]]:
        return list(enumerate(self._disks, 1))

    async def setup(self, v2vdir: V2VDir, servers: Servers, reporter: Reporter) -> SourceGuest:
        """See :class:`Input`. The manifest's checksums are compared first.

        Overlays that are kept lie over what was unpacked then, which is taken again.
        """
        archive = self._archive
        assert archive is not None, "check() comes first"
        source = await self.describe()
        new = [index for index, _ in self._each() if not is_kept(v2vdir, index)]
        folders = [_folder(v2vdir, index) for index in new]
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        try:
            checked = await self._prepare(archive, new, v2vdir, reporter)
            sizes = await serve_overlays(
                [disk.source for disk in checked], self._overlay, v2vdir, servers
            )
        except BaseException:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        return with_sizes(source, sizes)

    async def _prepare(
        self, archive: Archive, new: list[int], v2vdir: V2VDir, reporter: Reporter
    ) -> list[CheckedDisk]:
        """Compare checksums, unpack the ``new`` disks, and return what is to be served."""
        unpackings: dict[str, Unpacking] = {}
        for index, disk in self._each():
            if not disk.unpacked_size:
                continue
            for position, member in enumerate(disk.members):
                if member.name in unpackings:
                    raise SourceError(f"the file ‘{member.name}’ is of two disks of the OVF")
                # A descriptor and what it names lie in one folder, so their names differ.
                unpackings[member.name] = Unpacking(
                    _folder(v2vdir, index) / posixpath.basename(member.name),
                    disk.is_gzip and position == 0,
                )
        needed = sum(disk.unpacked_size for index, disk in self._each() if index in new)
        left = {
            name: unpacking
            for name, unpacking in unpackings.items()
            if unpacking.path.parent in {_folder(v2vdir, index) for index in new}
        }
        checksums = self._checksums if new else {}
        if needed:
            check_room(needed, _room(v2vdir.path), archive.shown)
            reporter.message(f"unpacking {_files(len(left))} of ‘{archive.shown}’")
        if checksums:
            reporter.message(
                f"checking {_files(len(checksums))} of ‘{archive.shown}’ against the manifest"
            )
        for folder in {unpacking.path.parent for unpacking in left.values()}:
            folder.mkdir(mode=0o700)
        if left or checksums:
            work = Work()
            async with _unpacked(archive):
                await in_thread(partial(go_through, archive, checksums, left, work), work, reporter)
        checked: list[CheckedDisk] = []
        problems: list[tuple[int, SourceError]] = []
        for index, disk in self._each():
            if not disk.unpacked_size:
                checked.append(disk.checked)
                continue
            first, *extents = (unpackings[member.name].path for member in disk.members)
            what = f"the disk ‘{disk.members[0].name}’ in ‘{archive.shown}’"
            try:
                checked.append(await look_at_unpacked(first, extents, what))
            except SourceError as error:
                problems.append((index, error))
        raise_problems(problems)
        return checked


def _folder(v2vdir: V2VDir, index: int) -> Path:
    """Return where the files of disk ``index`` are unpacked to."""
    return v2vdir.path / f"ova-{index}"


def guest_name(path: Path) -> str:
    """Return the guest's name from the OVA's."""
    return name_after(path.absolute().name, _SUFFIXES)


def _is_unicode(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


async def _text(archive: Archive, member: Member, limit: int) -> bytes:
    return await anyio.to_thread.run_sync(archive.text, member, limit)


def _room(folder: Path) -> int:
    """Return the bytes that are free in a folder."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 1 << 62  # making the v2v directory there says it better


def _stamp(archive: Archive) -> tuple[int, ...]:
    status = archive.path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@asynccontextmanager
async def _unpacked(archive: Archive) -> AsyncIterator[None]:
    """Run zstd where Python has no module for it; the archive reads its pipe.

    Raises:
        SourceError: it says that the file is damaged.
        DependencyError: it is not installed.
    """
    if not isinstance(archive, PackedTar) or archive.compression != "zstd":
        yield
        return
    if shutil.which("zstd") is None:
        raise DependencyError(
            f"‘{archive.shown}’ is compressed by zstd, and that program is not installed",
            hint="install it: apt-get install zstd, or dnf install zstd",
        )
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as pipe:
        try:
            zstd = await process.start(
                ["zstd", "--decompress", "--stdout", "--quiet", "--", str(archive.path.absolute())],
                stdout=writing,
                stderr=DEVNULL,
            )
        finally:
            os.close(writing)
        archive.pipe = pipe
        try:
            yield
            status = await zstd.wait()
        finally:
            archive.pipe = None
            await process.end(zstd, grace_s=1.0)
    if status != 0:
        raise SourceError(
            f"‘{archive.shown}’ is damaged: zstd says so ({process.describe_status(status)})",
            hint="copy or download it again",
        )
