"""A stream: a pipe, a socket, a terminal, or a file from where it is now, taken in order.

Nothing here blocks for long, so that a copy can be stopped while the other side keeps still:
reading and writing are tried after polling, and take or give what there is room for.

Source: pipe(7), fifo(7), nbdcopy(1).
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import stat
from contextlib import suppress
from pathlib import Path

import anyio

from v2v_async.copy.file import access_flags
from v2v_async.errors import SourceError, TargetError
from v2v_async.units import MIB

# A blocking pipe that polls as writable takes this much without blocking (pipe(7), PIPE_BUF).
_SURE_ROOM = select.PIPE_BUF
# Fewer turns a MiB than with the default of 64 KiB; /proc/sys/fs/pipe-max-size bounds it.
_PIPE_SIZE = MIB
_LOOK_FOR_READER_S = 0.05


class Stream:
    """One end of a stream. Owns ``fd`` and closes it."""

    def __init__(self, fd: int, name: str, *, is_writing: bool) -> None:
        self.name = name
        self._socket: socket.socket | None = None
        self._most: int | None = None
        mode = os.fstat(fd).st_mode
        if stat.S_ISFIFO(mode):
            with suppress(OSError):
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
            if is_writing:
                fd = _unblocked(fd)
                if not access_flags(fd) & os.O_NONBLOCK:
                    self._most = _SURE_ROOM
        elif stat.S_ISSOCK(mode):
            self._socket = socket.socket(fileno=fd)
        self.fd = fd

    def read_into(self, view: memoryview) -> int | None:
        """Read what has come; 0 at the end, None where nothing is there.

        Raises:
            SourceError: it failed.
        """
        try:
            return os.readv(self.fd, [view])
        except BlockingIOError:
            return None
        except OSError as error:
            raise SourceError(f"can't read from ‘{self.name}’: {error.strerror}") from error

    def write_some(self, view: memoryview) -> int:
        """Write what there is room for; return how much it was.

        Raises:
            TargetError: it failed, or nobody reads it any more.
        """
        try:
            if self._socket is not None:
                return self._socket.send(view, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            return os.write(self.fd, view[: self._most])
        except BlockingIOError:
            return 0
        except (BrokenPipeError, ConnectionResetError) as error:
            raise TargetError(
                f"the reader of ‘{self.name}’ has gone before the end of the disk",
                hint="see what the program that reads it says",
            ) from error
        except OSError as error:
            raise TargetError(f"can't write to ‘{self.name}’: {error.strerror}") from error

    def close(self) -> None:
        """Close it; the other side then sees the end."""
        if self._socket is not None:
            self._socket.close()
        elif self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


async def open_stream(what: str | Path | int, *, is_writing: bool) -> Stream:
    """Open a stream by its path, or a copy of a descriptor, which stays the caller's.

    Waits where nobody reads a named pipe yet.

    Raises:
        SourceError, TargetError: it can't be opened; a terminal as a target is refused.
    """
    kind = TargetError if is_writing else SourceError
    try:
        fd = os.dup(what) if isinstance(what, int) else await _open(what, is_writing)
    except OSError as error:
        raise kind(f"can't open ‘{name_of(what)}’: {error.strerror}") from error
    try:
        if is_writing and os.isatty(fd):
            raise TargetError(
                "a disk is not written to a terminal", hint="send the output to a file or a pipe"
            )
        return Stream(fd, name_of(what), is_writing=is_writing)
    except BaseException:
        os.close(fd)
        raise


def name_of(what: str | Path | int) -> str:
    """Return what a person calls a path or a descriptor."""
    if isinstance(what, int):
        return {0: "standard input", 1: "standard output"}.get(what, f"descriptor {what}")
    return str(what)


async def _open(path: str | Path, is_writing: bool) -> int:
    # O_NONBLOCK: a named pipe opens without the other side. A reader that polls first does not take
    # that for the end; a writer gets ENXIO until somebody reads (fifo(7)).
    flags = os.O_CLOEXEC | os.O_NONBLOCK | (os.O_WRONLY if is_writing else os.O_RDONLY)
    while True:
        try:
            return os.open(path, flags)
        except OSError as error:
            is_pipe = stat.S_ISFIFO(os.stat(path).st_mode)
            if error.errno != errno.ENXIO or not (is_writing and is_pipe):
                raise
        await anyio.sleep(_LOOK_FOR_READER_S)


def _unblocked(fd: int) -> int:
    """Return a descriptor for writing the same pipe that never blocks, in place of ``fd``.

    Opened anew, since flags set on ``fd`` itself would be seen by every process that shares it; the
    same one where that can't be. (Not for reading: a reader that opens a pipe whose writers have
    gone is not told that it has ended.)
    """
    try:
        again = os.open(f"/proc/self/fd/{fd}", os.O_CLOEXEC | os.O_NONBLOCK | os.O_WRONLY)
    except OSError:
        return fd
    os.close(fd)
    return again
