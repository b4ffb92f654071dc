"""Open a file, a device or a given descriptor as one side of a copy.

A path that is a pipe, a socket or a character device, and a descriptor that has a position or
appends, are streams (``pipe.py``): they are taken in order, from where they are.

Source: nbdcopy(1), open(2).
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Literal

from v2v_async.copy.file import FileEnd, access_flags
from v2v_async.copy.pipe import name_of
from v2v_async.errors import SizeMismatchError, SourceError, TargetError, V2VError
from v2v_async.handle import ExportInfo

_NEW_FILE_MODE = 0o644


def local_kind(what: str | Path | int) -> Literal["file", "stream"]:
    """Return how a path or a descriptor has to be copied; what does not exist is a file."""
    if isinstance(what, int):
        if not _is_file(os.fstat(what).st_mode):
            return "stream"
        # At another position, or appending, the file holds more than the disk: nbdcopy 1.14 loses
        # what `{ echo header; nbdcopy … -; } > file` wrote before.
        appends = access_flags(what) & os.O_APPEND
        return "stream" if appends or os.lseek(what, 0, os.SEEK_CUR) != 0 else "file"
    try:
        mode = os.stat(what).st_mode
    except OSError:
        return "file"
    return "file" if _is_file(mode) or stat.S_ISDIR(mode) else "stream"


def open_source(what: str | Path | int) -> tuple[FileEnd, ExportInfo]:
    """Open a file or device for reading. A given descriptor stays the caller's.

    Raises:
        SourceError: it is not there, can't be read, or is not a file or device.
    """
    try:
        fd = os.dup(what) if isinstance(what, int) else os.open(what, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SourceError(
            f"can't open the source ‘{name_of(what)}’: {error.strerror}",
            hint=_hint(error, "source"),
        ) from error
    try:
        _check(fd, what, SourceError)
        if access_flags(fd) & os.O_ACCMODE == os.O_WRONLY:
            raise SourceError(f"the source ‘{name_of(what)}’ was opened only for writing")
        end = FileEnd(fd, name_of(what))
        return end, end.info()
    except BaseException:
        os.close(fd)
        raise


def open_target(
    what: str | Path | int,
    size: int | None,
    *,
    keep: bool = False,
    source: FileEnd | None = None,
) -> tuple[FileEnd, ExportInfo, bool]:
    """Open a file or device for writing, and tell whether it is known to read as zeroes.

    A file that is not there is made. A regular file loses what it has, unless ``keep``, and gets
    ``size`` bytes (None: not known yet; what is written makes it grow). A device is used as it is.
    A given descriptor stays the caller's. ``source`` must not be the same file.

    Raises:
        TargetError: it can't be made, opened or written.
        SizeMismatchError: the device is too small.
    """
    fd, is_new = _open_target(what)
    try:
        end = FileEnd(fd, name_of(what))
        _check(fd, what, TargetError)
        if access_flags(fd) & os.O_ACCMODE == os.O_RDONLY:
            raise TargetError(f"the target ‘{name_of(what)}’ was opened only for reading")
        if source is not None and _identity(source.fd) == _identity(fd):
            raise TargetError(
                f"source and target are the same file, ‘{name_of(what)}’",
                hint="give the target another name",
            )
        is_zero = _prepare(end, size, keep)
        return end, end.info(), is_zero
    except BaseException:
        os.close(fd)
        if is_new and not isinstance(what, int):
            with suppress(OSError):
                os.unlink(what)
        raise


def _open_target(what: str | Path | int) -> tuple[int, bool]:
    """Return a descriptor, and whether the file was made just now."""
    try:
        if isinstance(what, int):
            return os.dup(what), False
        flags = os.O_CLOEXEC
        with suppress(OSError):
            if stat.S_ISBLK(os.stat(what).st_mode):
                # The kernel then refuses a device that is mounted or part of another one.
                flags |= os.O_EXCL
        try:
            return os.open(what, os.O_RDWR | flags), False
        except FileNotFoundError:
            return os.open(what, os.O_RDWR | os.O_CREAT | os.O_EXCL | flags, _NEW_FILE_MODE), True
        except PermissionError:
            return os.open(what, os.O_WRONLY | flags), False
    except OSError as error:
        raise TargetError(
            f"can't open the target ‘{name_of(what)}’: {error.strerror}",
            hint=_hint(error, "target"),
        ) from error


def _prepare(end: FileEnd, size: int | None, keep: bool) -> bool:
    if end.is_device:
        if _is_read_only_device(end.fd):
            raise TargetError(f"the device ‘{end.name}’ is read-only", hint="name another target")
        room = end.size()
        if size is not None and room < size:
            raise SizeMismatchError(
                f"the target ‘{end.name}’ has {room} bytes, the source {size}: it is too small"
            )
        return False
    try:
        is_zero = not keep or end.size() == 0
        if not keep:
            end.set_size(0)
        if size is not None:
            end.set_size(size)
    except OSError as error:
        raise TargetError(
            f"can't make ‘{end.name}’ {size or 0} bytes long: {error.strerror}",
            hint=_hint(error, "target"),
        ) from error
    return is_zero


def _is_read_only_device(fd: int) -> bool:
    # Linux 6.18 lets root open one for writing, and only then fails each write.
    device = os.fstat(fd).st_rdev
    with suppress(OSError):
        path = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/ro")
        return path.read_text().strip() == "1"
    return False


def _check(fd: int, what: str | Path | int, kind: type[V2VError]) -> None:
    mode = os.fstat(fd).st_mode
    if stat.S_ISDIR(mode):
        raise kind(f"‘{name_of(what)}’ is a directory", hint="name a file in it")
    if not _is_file(mode):
        raise kind(f"‘{name_of(what)}’ is neither a regular file nor a block device")


def _is_file(mode: int) -> bool:
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        return -1, status.st_rdev
    return status.st_dev, status.st_ino


def _hint(error: OSError, side: Literal["source", "target"]) -> str | None:
    match error.errno:
        case errno.ENOENT if side == "target":
            return "make its directory first"
        case errno.ENOENT:
            return "check the name; an NBD server is named by a URI such as nbd://HOST"
        case errno.EISDIR:
            return "name a file in it"
        case errno.EACCES | errno.EPERM if side == "target":
            return "check its permissions, and for a device that it is not read-only"
        case errno.EACCES | errno.EPERM:
            return "check its permissions"
        case errno.EROFS:
            return "it is read-only: name another target"
        case errno.EBUSY:
            return "the device is in use: unmount it, or stop what uses it"
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            return "name a target on a file system with more room"
        case _:
            return None
