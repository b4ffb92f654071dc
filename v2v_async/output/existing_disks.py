"""Target disks that are there already: files or block devices that somebody else made.

They are written in place, so a run that fails leaves part of a guest in them. That can't be undone:
what was there is gone. It is said, with the command that empties them.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
from collections.abc import Sequence
from contextlib import suppress
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


async def check(
    paths: Sequence[Path], disks: Sequence[SourceDisk], format_: Literal["raw", "qcow2"]
) -> None:
    """Check that each disk of the source has a place that is large enough and free.

    Raises:
        TargetError, UsageError
    """
    for path, disk in zip(paths, disks, strict=True):
        for name in disk.files:
            with suppress(OSError):
                if path.samefile(name):
                    raise UsageError(
                        f"‘{path}’ is what the source's disk {disk.index} is read from",
                        hint="name another disk: -oo disk=PATH",
                    )
        size = await _size(path, format_)
        if size < disk.size:
            raise TargetError(
                f"‘{path}’ has {format_size(size)}, and disk {disk.index} of the source has "
                f"{format_size(disk.size)}",
                hint=f"make it {disk.size} bytes long at least",
            )


async def setup(
    v2vdir: V2VDir,
    paths: Sequence[Path],
    disks: Sequence[SourceDisk],
    format_: Literal["raw", "qcow2"],
    servers: Servers,
) -> None:
    """Serve the disks; what they hold is taken for anything but zeroes."""
    for path, disk in zip(paths, disks, strict=True):
        size = await _size(path, format_)
        v2vdir.add_object(
            MadeObject(kind=_KIND, name=str(path), undo=_emptying(path, size, format_))
        )
        socket = v2vdir.target_socket(disk.index)
        if format_ == "qcow2":
            command = qemu_nbd.serve_target(path, socket)
        else:
            command = nbdkit.serve_target_file(await nbdkit.probe(), path, socket)
        log = v2vdir.log("output", disk.index)
        await servers.start(f"out{disk.index}", command, log=log)
    v2vdir.update(targets=[TargetExport(index=disk.index) for disk in disks])


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
                hint="the output must be set up first, with the same -oo disk",
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


async def _size(path: Path, format_: Literal["raw", "qcow2"]) -> int:
    """Return the virtual size of a disk that may be written.

    Raises:
        TargetError, UsageError
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise UsageError(f"-oo disk=‘{path}’ is neither a file nor a block device")
        # O_EXCL: the kernel refuses a device that is mounted or belongs to another one.
        exclusive = os.O_EXCL if stat.S_ISBLK(mode) else 0
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | exclusive)
    except FileNotFoundError as error:
        raise UsageError(
            f"-oo disk=‘{path}’ does not exist",
            hint="make it first, or leave out -oo create=false",
        ) from error
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise TargetError(
                f"‘{path}’ is in use", hint=f"unmount it, or see: lsblk {shlex.quote(str(path))}"
            ) from error
        raise files.target_error("write", path, error) from error
    try:
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
            f"-oo disk=‘{path}’ has a backing file, which the guest would see through",
            hint="name one that has none",
        )
    return info.virtual_size


def _emptying(path: Path, size: int, format_: Literal["raw", "qcow2"]) -> str:
    quoted = shlex.quote(str(path))
    if path.is_block_device():
        return f"blkdiscard --force {quoted}"
    if format_ == "qcow2":
        return f"qemu-img create -f qcow2 {quoted} {size}"
    return f"truncate --size=0 {quoted} && truncate --size={size} {quoted}"
