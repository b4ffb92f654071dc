"""Target disks that are there already: files or block devices that somebody else made.

They are written in place, so a run that fails leaves part of a guest in them. That can't be undone:
what was there is gone. It is said, with the command that empties them. They are never removed, nor
made shorter, and what is behind the end of the source's disk stays as it is.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import stat
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from v2v_async import nbdkit, qemu_img, qemu_nbd
from v2v_async.errors import TargetError, UsageError
from v2v_async.events import Reporter
from v2v_async.model import SourceDisk
from v2v_async.output import files
from v2v_async.server import Servers
from v2v_async.units import format_size
from v2v_async.v2vdir import MadeObject, TargetExport, V2VDir

_KIND = "half-written disk"
_DEV = Path("/dev")
_SYS_BLOCK = Path("/sys/dev/block")
_SECTOR = 512  # of everything below /sys/dev/block, whatever the device's own sectors are
_MAX_LINKS = 40  # as the kernel's (path_resolution(7))
_BLKROGET = 0x125E  # _IO(0x12, 94) of linux/fs.h

Format = Literal["raw", "qcow2"]


@dataclass(frozen=True, slots=True)
class InPlace:
    """A disk of the source, and what is written in place for it."""

    path: Path
    disk: SourceDisk


def device_at(path: Path) -> Path | None:
    """Return the block device that ``path`` is or links to; None where it is neither.

    It is named as the first link into /dev names it: /dev/VG/LV goes on being that volume, while
    the dm-N behind it is another one after the next boot.

    Raises:
        TargetError: a link into /dev leads to nothing there.
    """
    named = path.absolute()
    try:
        for _ in range(_MAX_LINKS):
            if named.is_relative_to(_DEV) or not named.is_symlink():
                break
            target = named.parent / named.readlink()
            named = Path(os.path.realpath(target.parent)) / target.name
        if named.is_block_device():
            return named
        is_lost = named != path.absolute() and named.is_relative_to(_DEV) and not named.exists()
    except OSError as error:
        raise files.target_error("look at", path, error) from error
    if is_lost:
        raise TargetError(
            f"‘{path}’ is a link to ‘{named}’, which is not there",
            hint="activate the volume (lvchange --activate y VG/LV), or remove the link",
        )
    return None


async def check(disks: Sequence[InPlace], sources: Sequence[SourceDisk], format_: Format) -> None:
    """Check that each disk has a place that is large enough, free and its own.

    ``sources``: all disks of the source, which none of them may be part of.

    Raises:
        TargetError, UsageError
    """
    for number, each in enumerate(disks):
        size = await _size(each.path, format_)
        for source in sources:
            if any(_share(each.path, Path(name)) for name in source.files):
                raise UsageError(
                    f"‘{each.path}’ is what the source's disk {source.index} is read from",
                    hint="name another disk for it",
                )
        for other in disks[:number]:
            if _share(each.path, other.path):
                raise UsageError(
                    f"‘{other.path}’ and ‘{each.path}’ are the same disk, or share a part of one",
                    hint="each disk of the guest needs its own",
                )
        if size < each.disk.size:
            raise TargetError(
                f"‘{each.path}’ has {format_size(size)}, and disk {each.disk.index} of the source "
                f"has {format_size(each.disk.size)}",
                hint=f"make it {each.disk.size} bytes long at least",
            )


async def setup(
    v2vdir: V2VDir, disks: Sequence[InPlace], format_: Format, servers: Servers
) -> None:
    """Serve the disks; what they hold is taken for anything but zeroes."""
    for each in disks:
        size = await _size(each.path, format_)
        v2vdir.add_object(
            MadeObject(kind=_KIND, name=str(each.path), undo=_emptying(each.path, size, format_))
        )
    await serve(v2vdir, disks, format_, servers)


async def problem(v2vdir: V2VDir, disks: Sequence[InPlace], format_: Format) -> str | None:
    """Return why disks that were set up can't be gone on with; None where they can."""
    known = {made.name for made in v2vdir.state.objects if made.kind == _KIND}
    for each in disks:
        if str(each.path) not in known:
            return f"‘{each.path}’ was not among the outputs"
        try:
            if format_ == "qcow2":
                await qemu_img.repair(each.path)
            if await _size(each.path, format_) < each.disk.size:
                return f"‘{each.path}’ is shorter than it was"
        except (qemu_img.ImageError, TargetError, UsageError) as error:
            return error.message
    return None


async def serve(
    v2vdir: V2VDir, disks: Sequence[InPlace], format_: Format, servers: Servers
) -> None:
    """Serve disks that are known to be written by this run."""
    for each in disks:
        socket = v2vdir.target_socket(each.disk.index)
        if format_ == "qcow2":
            command = qemu_nbd.serve_target(each.path, socket)
        else:
            command = nbdkit.serve_target_file(await nbdkit.probe(), each.path, socket)
        log = v2vdir.log("output", each.disk.index)
        await servers.start(f"out{each.disk.index}", command, log=log)
    mine = {each.disk.index for each in disks}
    others = [target for target in v2vdir.state.targets if target.index not in mine]
    v2vdir.update(targets=[*others, *(TargetExport(index=index) for index in sorted(mine))])


async def finish(v2vdir: V2VDir, paths: Sequence[Path]) -> None:
    """Have the disks' data written, and count them as a result.

    Raises:
        TargetError: a write failed, or they were not set up.
    """
    known = {made.name: made for made in v2vdir.state.objects if made.kind == _KIND}
    for path in paths:
        if str(path) not in known:
            raise TargetError(
                f"‘{path}’ is not among the outputs of this run",
                hint="the output must be set up first, with the same options",
            )
        await files.sync(path)


def release(v2vdir: V2VDir) -> None:
    """Forget that the disks were being written: the guest is whole."""
    for made in v2vdir.state.objects:
        if made.kind == _KIND:
            v2vdir.forget_object(made)


def abandon(v2vdir: V2VDir, reporter: Reporter) -> None:
    """Say which disks hold part of a guest."""
    for made in v2vdir.state.objects:
        if made.kind == _KIND:
            reporter.warning(
                f"‘{made.name}’ was there before and stays; it may hold part of the guest now; "
                f"empty it with: {made.undo}"
            )
            v2vdir.forget_object(made)


async def _size(path: Path, format_: Format) -> int:
    """Return the virtual size of a disk that may be written.

    Raises:
        TargetError, UsageError
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise UsageError(f"‘{path}’ is neither a file nor a block device")
        # O_EXCL: the kernel refuses a device that is mounted or belongs to another one.
        exclusive = os.O_EXCL if stat.S_ISBLK(mode) else 0
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | exclusive)
    except FileNotFoundError as error:
        raise UsageError(
            f"‘{path}’ does not exist",
            hint="make it first, or leave out -oo create=false",
        ) from error
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise TargetError(
                f"‘{path}’ is in use", hint=f"unmount it, or see: lsblk {shlex.quote(str(path))}"
            ) from error
        raise files.target_error("write", path, error) from error
    try:
        if stat.S_ISBLK(mode) and _is_read_only(descriptor):
            raise TargetError(
                f"‘{path}’ is read-only", hint=f"blockdev --setrw {shlex.quote(str(path))}"
            )
        size = os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.close(descriptor)
    if format_ == "raw":
        return size
    try:
        info = await qemu_img.info(path, format_="qcow2")
    except qemu_img.ImageError as error:
        raise TargetError(
            error.message, hint="make it first: qemu-img create -f qcow2, or leave out -of qcow2"
        ) from error
    if info.backing_file is not None:
        raise UsageError(
            f"‘{path}’ has a backing file, which the guest would see through",
            hint="name one that has none",
        )
    return info.virtual_size


def _is_read_only(device: int) -> bool:
    """Whether the kernel would refuse writes; it lets root open a read-only device for them."""
    answer = bytearray(struct.calcsize("i"))
    fcntl.ioctl(device, _BLKROGET, answer)
    return bool(struct.unpack("i", answer)[0])


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a disk, or a file. ``whole`` names that; ``backing``: the file of a loop device."""

    whole: tuple[str, int, int]
    start: float = 0
    end: float = float("inf")
    backing: str | None = None


def _share(path: Path, other: Path) -> bool:
    """Whether writing to ``path`` changes ``other``: the same thing, a partition of it, its disk.

    What lies behind LVM, RAID and the like is in use by them, which ``_size`` notices.
    """
    try:
        ours, theirs = _part(path), _part(other)
    except OSError:
        return False
    if ours.whole == theirs.whole:
        return ours.start < theirs.end and theirs.start < ours.end
    with suppress(OSError):
        if ours.backing is not None and Path(ours.backing).samefile(other):
            return True
    with suppress(OSError):
        if theirs.backing is not None and Path(theirs.backing).samefile(path):
            return True
    return False


def _part(path: Path) -> _Part:
    status = path.stat()
    if not stat.S_ISBLK(status.st_mode):
        return _Part(("file", status.st_dev, status.st_ino))
    number = (os.major(status.st_rdev), os.minor(status.st_rdev))
    folder = (_SYS_BLOCK / f"{number[0]}:{number[1]}").resolve()
    start, end = 0.0, float("inf")
    with suppress(OSError, ValueError):
        if (folder / "partition").exists():
            start = int((folder / "start").read_text()) * _SECTOR
            end = start + int((folder / "size").read_text()) * _SECTOR
            folder = folder.parent
            major, _, minor = (folder / "dev").read_text().strip().partition(":")
            number = int(major), int(minor)
    backing = None
    with suppress(OSError):
        backing = (folder / "loop" / "backing_file").read_text().rstrip("\n")
    return _Part(("disk", *number), start, end, backing)


def _emptying(path: Path, size: int, format_: Format) -> str:
    quoted = shlex.quote(str(path))
    if path.is_block_device():
        # Zeroes, not only a discard: not every device can, nor reads as zeroes after it.
        return f"blkdiscard --force --zeroout {quoted}"
    if format_ == "qcow2":
        return f"qemu-img create -f qcow2 {quoted} {size}"
    return f"truncate --size=0 {quoted} && truncate --size={size} {quoted}"
