"""A regular file or a block device as one side of a copy.

::

    zero     sparse       PUNCH_HOLE ─ ZERO_RANGE ─ written
             allocated    ZERO_RANGE ─ PUNCH_HOLE then fallocate ─ written
             on devices   both are the kernel's zeroout; only PUNCH_HOLE never writes them itself
    extents  SEEK_DATA and SEEK_HOLE; a device, or a file system that can't tell, is all data

A request has been done when its call returns: the page cache takes and gives at memory speed, and
a disk that does not is waited for by the one thread that uses this end.

Source: fallocate(2), lseek(2), nbdcopy(1).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from ctypes import c_int

from v2v_async.errors import RequestError
from v2v_async.extent import STATE_HOLE, STATE_ZERO
from v2v_async.handle import Completion, Entries, ExportInfo
from v2v_async.linux import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    fallocate,
)
from v2v_async.units import KIB, MIB

# Two calls of about a microsecond for each: a reply takes milliseconds. Whoever asked sees that it
# ends early and takes the rest as data, or asks again.
MAX_ENTRIES = 4096
# What an NBD request may have: the engine cuts both sides alike.
_MAXIMUM_REQUEST = 32 * MIB
_LARGEST_PREFERRED = MIB
_ZEROES = bytes(256 * KIB)
_HOLE = STATE_HOLE | STATE_ZERO
_PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
# What says that a kind of zeroing is not there for this file at all.
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.ENOTTY)
# What says that it is not there for this range: a device wants whole sectors.
_UNSUITABLE = (errno.EINVAL, errno.EBUSY)


class FileEnd:
    """An open file or device, done with every request when the call returns. See ``ends.End``.

    Owns ``fd`` and closes it. Ends of several threads may share a file (:meth:`another`).
    """

    def __init__(self, fd: int, name: str) -> None:
        self.fd = fd
        self.name = name
        self.is_device = stat.S_ISBLK(os.fstat(fd).st_mode)
        self._can_punch = True
        self._can_zero_range = True
        self._can_allocate = not self.is_device
        self._can_seek = self._knows_holes()

    @property
    def is_lost(self) -> bool:
        """Whether it was closed."""
        return self.fd < 0

    def another(self) -> FileEnd:
        """Return one more end on the same file, for another thread.

        Opened anew where that is possible, so that each reader has a read-ahead of its own.
        """
        flags = os.O_CLOEXEC | (access_flags(self.fd) & os.O_ACCMODE)
        try:
            fd = os.open(f"/proc/self/fd/{self.fd}", flags)
        except OSError:
            fd = os.dup(self.fd)
        return FileEnd(fd, self.name)

    def info(self) -> ExportInfo:
        """Return what it can do, in a server's terms."""
        status = os.fstat(self.fd)
        preferred = status.st_blksize
        if preferred & (preferred - 1) or not 4 * KIB <= preferred <= _LARGEST_PREFERRED:
            preferred = 4 * KIB
        return ExportInfo(
            size=self.size(),
            minimum_block=1,
            preferred_block=preferred,
            maximum_block=_MAXIMUM_REQUEST,
            is_read_only=access_flags(self.fd) & os.O_ACCMODE == os.O_RDONLY,
            can_multi_conn=True,
            can_zero=True,
            can_fast_zero=True,
            can_trim=False,
            can_flush=True,
            can_fua=False,
            has_extents=self._can_seek,
        )

    def size(self) -> int:
        """Return its size in bytes, as it is now."""
        if self.is_device:
            return os.lseek(self.fd, 0, os.SEEK_END)
        return os.fstat(self.fd).st_size

    def set_size(self, size: int) -> None:
        """Cut or extend a regular file; a device stays as it is.

        Raises:
            OSError: it can't be done.
        """
        if not self.is_device:
            os.ftruncate(self.fd, size)

    # Requests. Failures are given to ``done``.

    def read(self, view: memoryview, offset: int, done: Completion) -> None:
        """Fill ``view`` from ``offset``; EIO where the file ends before."""
        done(c_int(_errno_of(self._read, view, offset)))

    def write(self, view: memoryview, offset: int, done: Completion) -> None:
        """Write all of ``view`` at ``offset``."""
        done(c_int(_errno_of(self._write, view, offset)))

    def zero(
        self,
        length: int,
        offset: int,
        done: Completion,
        *,
        allocate: bool = False,
        only_fast: bool = False,
    ) -> None:
        """Make a range read as zeroes. See ``ends.End``."""
        done(c_int(_errno_of(self._zero, length, offset, allocate, only_fast)))

    def block_status(
        self, length: int, offset: int, told: Callable[[Entries], None], done: Completion
    ) -> None:
        """Tell the extents of a range, at most :data:`MAX_ENTRIES` of them."""
        entries: Entries = []
        code = _errno_of(self._extents, length, offset, entries)
        if code == 0:
            told(entries)
        done(c_int(code))

    def flush(self, done: Completion) -> None:
        """Put all finished writes on stable storage."""
        done(c_int(_errno_of(self._flush)))

    # The same, raising.

    def read_now(self, length: int, offset: int) -> bytearray:
        """Read and return ``length`` bytes.

        Raises:
            RequestError: it failed, or the file ends before.
        """
        memory = bytearray(length)
        code = _errno_of(self._read, memoryview(memory), offset)
        self._raise("read", code, offset, length)
        return memory

    def write_now(self, view: memoryview, offset: int) -> None:
        """Write all of ``view``.

        Raises:
            RequestError: it failed.
        """
        self._raise("write", _errno_of(self._write, view, offset), offset, len(view))

    def zero_now(
        self, length: int, offset: int, *, allocate: bool = False, only_fast: bool = False
    ) -> None:
        """Make a range read as zeroes.

        Raises:
            RequestError: it failed.
        """
        code = _errno_of(self._zero, length, offset, allocate, only_fast)
        self._raise("zero", code, offset, length)

    def extents_now(self, length: int, offset: int) -> Entries:
        """Return the extents of a range, at most :data:`MAX_ENTRIES` of them.

        Raises:
            RequestError: it failed.
        """
        entries: Entries = []
        code = _errno_of(self._extents, length, offset, entries)
        self._raise("block status", code, offset, length)
        return entries

    def flush_now(self) -> None:
        """Put all finished writes on stable storage.

        Raises:
            RequestError: it failed.
        """
        self._raise("flush", _errno_of(self._flush), 0, 0)

    def sever(self) -> None:
        """Do nothing: what the kernel does for a file can't be cut short."""

    # There is nothing to poll.

    def fileno(self) -> int:
        """Return -1: requests are done when their call returns."""
        return -1

    def direction(self) -> int:
        """Return 0: there is nothing to wait for."""
        return 0

    def notify_readable(self) -> None:
        """Do nothing."""

    def notify_writable(self) -> None:
        """Do nothing."""

    def close(self, *, politely: bool = True) -> None:
        """Close the descriptor."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            # Errors of earlier writes (NFS, quotas) are those that a flush tells; who wants to
            # know of them flushes before.
            with suppress(OSError):
                os.close(fd)

    # How each is done; OSError where it fails.

    def _read(self, view: memoryview, offset: int) -> None:
        while view:
            count = os.preadv(self.fd, [view], offset)
            if count == 0:  # it has shrunk since its size was asked
                raise OSError(errno.EIO, "unexpected end of file")
            view, offset = view[count:], offset + count

    def _write(self, view: memoryview, offset: int) -> None:
        while view:
            count = os.pwrite(self.fd, view, offset)
            if count == 0:
                raise OSError(errno.ENOSPC, "nothing more can be written")
            view, offset = view[count:], offset + count

    def _zero(self, length: int, offset: int, allocate: bool, only_fast: bool) -> None:
        if length == 0:
            return
        if not allocate and self._can_punch:
            ok, self._can_punch = self._try(_PUNCH, offset, length)
            if ok:
                return
        # On a device this one writes zeroes itself where the hardware can't.
        if self._can_zero_range and not (only_fast and self.is_device):
            ok, self._can_zero_range = self._try(FALLOC_FL_ZERO_RANGE, offset, length)
            if ok:
                return
        if allocate and self._can_punch and self._can_allocate:
            ok, self._can_punch = self._try(_PUNCH, offset, length)
            if ok:
                ok, self._can_allocate = self._try(0, offset, length)
            if ok:
                return
        if only_fast:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        while length:
            part = memoryview(_ZEROES)[: min(length, len(_ZEROES))]
            self._write(part, offset)
            length, offset = length - len(part), offset + len(part)

    def _try(self, mode: int, offset: int, length: int) -> tuple[bool, bool]:
        """Return whether it was done, and whether it is worth trying again."""
        try:
            fallocate(self.fd, mode, offset, length)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return False, False
            if error.errno in _UNSUITABLE:
                return False, True
            raise
        return True, True

    def _extents(self, length: int, offset: int, entries: Entries) -> None:
        end = offset + length
        if not self._can_seek:
            entries.append((length, 0))
            return
        while offset < end and len(entries) < MAX_ENTRIES:
            data = self._seek(offset, os.SEEK_DATA, end)
            if data > offset:
                # Nothing lies behind the end of the file: reading there must fail, not give zeroes.
                hole_end = min(data, end, max(self.size(), offset))
                if hole_end > offset:
                    entries.append((hole_end - offset, _HOLE))
                if hole_end < min(data, end):
                    entries.append((end - hole_end, 0))
                    return
                offset = hole_end
                continue
            hole = min(self._seek(offset, os.SEEK_HOLE, end), end)
            # Both could say the same where another process writes just now.
            hole = max(hole, min(offset + 4 * KIB, end))
            entries.append((hole - offset, 0))
            offset = hole

    def _seek(self, offset: int, whence: int, end: int) -> int:
        """Return where data or a hole begins; ``end`` where there is none behind ``offset``."""
        try:
            return os.lseek(self.fd, offset, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return end
            raise

    def _knows_holes(self) -> bool:
        if self.is_device:  # lseek(2): only regular files; the kernel says EINVAL
            return False
        try:
            os.lseek(self.fd, 0, os.SEEK_HOLE)
        except OSError as error:
            return error.errno == errno.ENXIO  # an empty file
        return True

    def _flush(self) -> None:
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            # fdatasync(2): what has nothing to be synchronised.
            if error.errno not in (errno.EINVAL, errno.EROFS):
                raise

    def _raise(self, op: str, code: int, offset: int, length: int) -> None:
        if code:
            name = errno.errorcode.get(code, str(code))
            raise RequestError(
                op,
                offset=offset,
                length=length,
                reason=f"{os.strerror(code)} ({name}), ‘{self.name}’",
                errno=code,
            )


def access_flags(fd: int) -> int:
    """Return the flags that a descriptor was opened with."""
    return fcntl.fcntl(fd, fcntl.F_GETFL)


def _errno_of(call: Callable[..., None], *arguments: object) -> int:
    """Return the errno with which ``call`` failed, 0 where it did not."""
    try:
        call(*arguments)
    except OSError as error:
        return error.errno or errno.EIO
    return 0
