"""One libnbd handle. The only module that imports ``nbd``.

The bindings release the GIL in every call, so handles of several threads run side by side; one
handle belongs to one thread at a time. A completion callback may only note what happened and
return 1: submitting on the same handle there deadlocks on its lock, and an exception is lost.

Source: libnbd(3), nbd_aio_pread(3), nbd_aio_get_direction(3).
"""

from __future__ import annotations

import errno as errno_codes
import os
import socket as sockets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import nbd

from v2v_async.errors import (
    ConnectError,
    ConnectionLostError,
    NbdError,
    RequestError,
    UnsupportedError,
)
from v2v_async.redact import redact

BASE_ALLOCATION: str = nbd.CONTEXT_BASE_ALLOCATION
DIRECTION_READ: int = nbd.AIO_DIRECTION_READ
DIRECTION_WRITE: int = nbd.AIO_DIRECTION_WRITE

# The default of 208 KiB holds less than one request: with 1 MiB the client's processor time for
# 2 GiB fell from 1.05-1.3 s to 0.9 s (shared/FACTS.md). net.core.wmem_max bounds it.
_SOCKET_BUFFER = 1024 * 1024

# Where block sizes are not told, every server must take these (NBD protocol, "Block size
# constraints"): any alignment, and at most 32 MiB a request.
_DEFAULT_MAXIMUM = 32 * 1024 * 1024
_DEFAULT_PREFERRED = 4096

Completion: TypeAlias = Callable[[Any], int]
"""Called with a C int whose ``value`` is an errno (0: done), on the driving thread; returns 1."""

Entries: TypeAlias = list[tuple[int, int]]
"""The extents of a reply: (length in bytes, flags)."""


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What the server said while negotiating. Sizes are bytes."""

    size: int
    minimum_block: int
    preferred_block: int
    maximum_block: int
    is_read_only: bool
    can_multi_conn: bool
    can_zero: bool
    can_fast_zero: bool
    can_trim: bool
    can_flush: bool
    can_fua: bool
    has_extents: bool


class ZeroTest:
    """Tells at memory speed whether parts of ``memory`` (shared, not copied) are all zeroes."""

    def __init__(self, memory: bytearray) -> None:
        self._buffer: Any = nbd.Buffer.from_buffer(memory)

    def __call__(self, offset: int, length: int) -> bool:
        return bool(self._buffer.is_zero(offset, length))


class Handle:
    """A connection to one export. Closed by :meth:`close`, at the latest with the object."""

    def __init__(self, contexts: Sequence[str] = (BASE_ALLOCATION,)) -> None:
        self._nbd: Any = nbd.NBD()
        self._socket: sockets.socket | None = None
        # Our planner keeps within what the server allows; libnbd's own checks would only turn its
        # mistakes into other errors. Zeroing the buffer before each read is wasted work for us.
        with suppress(AttributeError, nbd.Error):
            self._nbd.set_pread_initialize(False)
        for context in contexts:
            self._nbd.add_meta_context(context)

    def connect(self, endpoint: str) -> None:
        """Connect to a Unix socket (an absolute path) or an NBD URI; blocks.

        Raises:
            ConnectError: nobody is there, or negotiation failed. The handle can't be used again.
        """
        try:
            if endpoint.startswith("/"):
                self._nbd.connect_unix(endpoint)
            else:
                self._nbd.set_uri_allow_local_file(True)
                self._nbd.connect_uri(endpoint)
        except nbd.Error as error:
            is_there = _errno(error) not in (errno_codes.ECONNREFUSED, errno_codes.ENOENT)
            raise ConnectError(
                f"can't connect to ‘{redact(endpoint)}’: {_reason(error)}",
                errno=_errno(error),
                hint=None if is_there else "check the address, and that the server runs",
            ) from error
        self._enlarge_socket_buffers()

    def connect_command(self, argv: Sequence[str]) -> None:
        """Start a server by systemd socket activation and connect; it ends with the handle.

        Raises:
            ConnectError: it can't be started, or negotiation failed.
        """
        try:
            self._nbd.connect_systemd_socket_activation(list(argv))
        except nbd.Error as error:
            raise ConnectError(
                f"can't start or talk to ‘{argv[0]}’: {_reason(error)}", errno=_errno(error)
            ) from error
        self._enlarge_socket_buffers()

    def info(self) -> ExportInfo:
        """Return what was negotiated.

        Raises:
            NbdError: the handle is not connected.
        """
        handle = self._nbd
        try:
            minimum = handle.get_block_size(nbd.SIZE_MINIMUM) or 1
            preferred = handle.get_block_size(nbd.SIZE_PREFERRED) or _DEFAULT_PREFERRED
            maximum = handle.get_block_size(nbd.SIZE_MAXIMUM) or _DEFAULT_MAXIMUM
            return ExportInfo(
                size=handle.get_size(),
                minimum_block=minimum,
                preferred_block=max(preferred, minimum),
                maximum_block=maximum,
                is_read_only=handle.is_read_only(),
                can_multi_conn=handle.can_multi_conn(),
                can_zero=handle.can_zero(),
                can_fast_zero=handle.can_fast_zero(),
                can_trim=handle.can_trim(),
                can_flush=handle.can_flush(),
                can_fua=handle.can_fua(),
                has_extents=handle.can_meta_context(BASE_ALLOCATION),
            )
        except nbd.Error as error:
            raise NbdError(f"can't ask the server: {_reason(error)}") from error

    # Requests. Each raises ConnectionLostError or UnsupportedError where it can't be sent.

    def read(self, view: memoryview, offset: int, done: Completion) -> None:
        """Fill ``view`` (all of it) from ``offset``."""
        try:
            self._nbd.aio_pread(view, offset, done)
        except nbd.Error as error:
            raise self._mapped(error) from error

    def write(self, view: memoryview, offset: int, done: Completion) -> None:
        """Write ``view`` (all of it) at ``offset``; it must stay unchanged until done."""
        try:
            self._nbd.aio_pwrite(view, offset, done)
        except nbd.Error as error:
            raise self._mapped(error) from error

    def zero(
        self,
        length: int,
        offset: int,
        done: Completion,
        *,
        allocate: bool = False,
        only_fast: bool = False,
    ) -> None:
        """Make ``length`` bytes from ``offset`` read as zeroes; the server may make a hole.

        ``allocate``: it may not. ``only_fast``: it fails with ENOTSUP where writing zeroes would
        be as fast.
        """
        try:
            self._nbd.aio_zero(length, offset, done, _zero_flags(allocate, only_fast))
        except nbd.Error as error:
            raise self._mapped(error) from error

    def block_status(
        self, length: int, offset: int, told: Callable[[Entries], None], done: Completion
    ) -> None:
        """Ask for the ``base:allocation`` extents of a range; ``told`` gets each reply's."""

        def extent(context: str, _offset: int, entries: list[Any], error: Any) -> int:
            if context == BASE_ALLOCATION and error.value == 0:
                told(_pairs(entries))
            return 0

        # libnbd 1.16 and newer negotiate 64-bit extents; before, a reply ends at 4 GiB.
        call = getattr(self._nbd, "aio_block_status_64", self._nbd.aio_block_status)
        try:
            call(length, offset, extent, done)
        except nbd.Error as error:
            raise self._mapped(error) from error

    def flush(self, done: Completion) -> None:
        """Ask that all finished writes are on stable storage."""
        try:
            self._nbd.aio_flush(done)
        except nbd.Error as error:
            raise self._mapped(error) from error

    # The same, waiting for the answer inside libnbd: without the interpreter's lock, and without
    # waking Python for each part of it that arrives.

    def read_now(self, length: int, offset: int) -> bytearray:
        """Read and wait.

        Raises:
            RequestError: the server refused it.
        """
        try:
            return self._nbd.pread(length, offset)  # type: ignore[no-any-return]
        except nbd.Error as error:
            raise _refused("read", offset, length, error) from error

    def write_now(self, view: memoryview, offset: int) -> None:
        """Write and wait.

        Raises:
            RequestError: the server refused it.
        """
        try:
            self._nbd.pwrite(view, offset)
        except nbd.Error as error:
            raise _refused("write", offset, len(view), error) from error

    def zero_now(
        self, length: int, offset: int, *, allocate: bool = False, only_fast: bool = False
    ) -> None:
        """Make a range read as zeroes and wait.

        Raises:
            RequestError: the server refused it.
        """
        try:
            self._nbd.zero(length, offset, _zero_flags(allocate, only_fast))
        except nbd.Error as error:
            raise _refused("zero", offset, length, error) from error

    def trim_now(self, length: int, offset: int) -> None:
        """Say that a range is not needed, and wait; what it reads as then is the server's choice.

        Raises:
            RequestError: the server refused it.
        """
        try:
            self._nbd.trim(length, offset)
        except nbd.Error as error:
            raise _refused("trim", offset, length, error) from error

    def extents_now(self, length: int, offset: int, context: str = BASE_ALLOCATION) -> Entries:
        """Ask for the extents of a range in one of the contexts, and wait.

        Raises:
            RequestError: the server can't tell.
        """
        found: Entries = []

        def extent(told: str, _offset: int, entries: list[Any], error: Any) -> int:
            if told == context and error.value == 0:
                found[:] = _pairs(entries)
            return 0

        call = getattr(self._nbd, "block_status_64", self._nbd.block_status)
        try:
            call(length, offset, extent)
        except nbd.Error as error:
            raise _refused("block status", offset, length, error) from error
        return found

    def sever(self) -> None:
        """Cut the connection under a call that waits, from another thread; that call then fails.

        Not through libnbd: the call that waits has its lock.
        """
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(sockets.SHUT_RDWR)

    def flush_now(self) -> None:
        """Flush and wait.

        Raises:
            RequestError: the server could not.
        """
        try:
            self._nbd.flush()
        except nbd.Error as error:
            raise _refused("flush", 0, 0, error) from error

    # Driving it from a poll loop.

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return int(self._nbd.aio_get_fd())

    def direction(self) -> int:
        """Return what to poll for now; changes with each submission and each notification."""
        return self._nbd.aio_get_direction()  # type: ignore[no-any-return]

    def notify_readable(self) -> None:
        """Take what has arrived; completions run here. See :attr:`is_lost` where nothing is polled.

        Raises:
            ConnectionLostError: the connection is gone.
        """
        try:
            self._nbd.aio_notify_read()
        except nbd.Error as error:
            raise _gone(error) from error

    def notify_writable(self) -> None:
        """Send what is waiting; completions may run here.

        Raises:
            ConnectionLostError: the connection is gone.
        """
        try:
            self._nbd.aio_notify_write()
        except nbd.Error as error:
            raise _gone(error) from error

    @property
    def is_lost(self) -> bool:
        """Whether the connection has died or was closed."""
        return self._nbd is None or self._nbd.aio_is_dead() or self._nbd.aio_is_closed()

    def close(self, *, politely: bool = True) -> None:
        """Say good-bye and close. Requests in flight must have been waited for.

        nbdkit 1.32 aborts when a client vanishes with requests in flight (shared/FACTS.md).
        """
        if politely and not self.is_lost:
            with suppress(nbd.Error):
                self._nbd.shutdown()
        self._nbd = None  # the bindings close a handle when nobody refers to it
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _mapped(self, error: Any) -> NbdError:
        if self.is_lost:
            return ConnectionLostError(f"the connection was lost: {_reason(error)}")
        return UnsupportedError(f"the request can't be sent: {_reason(error)}")

    def _enlarge_socket_buffers(self) -> None:
        # A descriptor of our own, so that closing this object leaves libnbd's alone.
        with suppress(OSError, nbd.Error):
            self._socket = sockets.socket(fileno=os.dup(self._nbd.aio_get_fd()))
            for option in (sockets.SO_SNDBUF, sockets.SO_RCVBUF):
                self._socket.setsockopt(sockets.SOL_SOCKET, option, _SOCKET_BUFFER)


def version() -> str:
    """Return libnbd's version."""
    return str(nbd.NBD().get_version())


def _reason(error: Any) -> str:
    """Return libnbd's message without the name of its own function."""
    text = str(error.string)
    head, separator, tail = text.partition(": ")
    return tail if separator and head.startswith("nbd_") else text


def _refused(op: str, offset: int, length: int, error: Any) -> RequestError:
    return RequestError(
        op, offset=offset, length=length, reason=_reason(error), errno=_errno(error)
    )


def _gone(error: Any) -> ConnectionLostError:
    return ConnectionLostError(f"the connection was lost: {_reason(error)}", errno=_errno(error))


def _pairs(entries: list[Any]) -> Entries:
    """Return (length, flags): the 64-bit call gives pairs, the 32-bit one a flat list."""
    if entries and isinstance(entries[0], int):
        return list(zip(entries[::2], entries[1::2], strict=False))
    return entries


def _zero_flags(allocate: bool, only_fast: bool) -> int:
    return (nbd.CMD_FLAG_NO_HOLE if allocate else 0) | (nbd.CMD_FLAG_FAST_ZERO if only_fast else 0)


def _errno(error: Any) -> int:
    return int(error.errnum or 0)
