"""Files of a host behind ssh: looked at before a conversion, and how nbdkit serves them.

One nbdkit serves one file, to as many connections as are made to it. Its ssh plugin does one
request at a time on each connection but connections side by side, each with a login of its own:
over a line with 20 ms of delay 1, 4, 8 and 16 connections of one nbdkit read 9, 34, 65 and
121 MiB/s, and those of as many nbdkits no more (docs/sources-ssh.md). The readahead filter does
nothing over a plugin that takes one request at a time.

Here the same login is used as for the disks (libssh, sftp), so what can be looked at can be read.
"""

from __future__ import annotations

import errno
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import anyio.to_thread

from v2v_async import nbdkit, process, qemu_img, ssh
from v2v_async.connection import Connection, open_connection
from v2v_async.errors import (
    ConnectError,
    NbdError,
    ServerStartError,
    SourceError,
    V2VError,
)
from v2v_async.input.checking import FORMATS
from v2v_async.input.image import NEVER, RETRY, DiskSource, PluginImage, Retry
from v2v_async.input.image_header import HEAD, TAIL, read_header
from v2v_async.input.overlay import OverlayKind, serve_overlays, source_command
from v2v_async.server import Servers
from v2v_async.ssh import SshHost
from v2v_async.v2vdir import V2VDir, record_of

READY_TIMEOUT_S = 60.0
READ_TIMEOUT_S = 60.0
_POLL_S = 0.01


class RemoteFile:
    """A file that is open at the other end."""

    def __init__(self, shown: str, connection: Connection, socket: Path) -> None:
        self.shown = shown
        self.socket = socket
        self.size = connection.info.size
        self._connection = connection

    async def read(self, length: int, offset: int = 0) -> bytes:
        """Read up to ``length`` bytes; fewer only at the end of the file.

        Raises:
            SourceError: it can't be read.
        """
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        read = self._connection.handle.read_now
        try:
            with anyio.fail_after(READ_TIMEOUT_S):
                return bytes(
                    await anyio.to_thread.run_sync(read, length, offset, abandon_on_cancel=True)
                )
        except NbdError as error:
            raise SourceError(
                f"‘{self.shown}’ can't be read: {error.message}", hint="is it a file?"
            ) from error
        except TimeoutError as error:
            raise SourceError(
                f"‘{self.shown}’ can't be read: nothing came for {READ_TIMEOUT_S:.0f} s"
            ) from error


def remote_image(host: SshHost, path: str, retry: Retry = NEVER) -> PluginImage:
    """Return how nbdkit reads a file of the host, but for the password."""
    parameters = tuple(ssh.plugin_parameters(host, path))
    return PluginImage("ssh", parameters, host.uri(path), retry=retry)


def _with_password(image: PluginImage, password: Path | None) -> PluginImage:
    if password is None:
        return image
    return replace(image, parameters=(*image.parameters, f"password=+{password}"))


def remote_source(host: SshHost, path: str, format_: str, size: int) -> DiskSource:
    """Return a disk that is read from a file of the host, and is waited for when it goes away.

    It has no password yet: :func:`serve_remote` gives it for as long as it is needed.
    """
    return DiskSource(remote_image(host, path, RETRY), format_, size)


async def serve_remote(
    host: SshHost,
    disks: Sequence[DiskSource],
    wanted: OverlayKind | None,
    v2vdir: V2VDir,
    servers: Servers,
) -> list[int]:
    """Serve an overlay on each disk of :func:`remote_source`; return their sizes in bytes.

    nbdkit reads the password when it starts; its file is gone when this returns.

    Raises:
        V2VError: all that is wrong with any of them.
    """
    with ssh.password_file(host, v2vdir.path) as password:
        ready = [
            replace(disk, image=_with_password(disk.image, password))
            if isinstance(disk.image, PluginImage)
            else disk
            for disk in disks
        ]
        try:
            return await serve_overlays(ready, wanted, v2vdir, servers)
        except ServerStartError as error:
            disk = error.disk or 1
            doing = f"the disk ‘{disks[disk - 1].image.shown}’ can't be served"
            failure = host.failure(error.stderr_tail or error.message, doing=doing)
            failure.locate(disk=error.disk, log=error.log)
            raise failure from error


@asynccontextmanager
async def opened(host: SshHost, path: str) -> AsyncIterator[RemoteFile]:
    """Have a file of the host open for a block. One login is tried: hosts lock users out.

    Raises:
        LoginError: nobody can log in.
        SourceError: the file can't be opened.
    """
    features = await nbdkit.probe()
    v2vdir = V2VDir.create()
    socket = v2vdir.path / "file"
    shown = host.uri(path)
    doing = f"‘{shown}’ can't be opened"
    child: process.Child | None = None
    connection: Connection | None = None
    try:
        with ssh.password_file(host, v2vdir.path) as password:
            image = _with_password(remote_image(host, path), password)
            command = source_command(features, image, socket)
            log = v2vdir.log("input")
            with log.open("wb") as output:
                child = await process.start(command.argv, stdout=output, stderr=output)
            v2vdir.add_process(record_of(child.pid, command.program, socket=str(socket)))
            try:
                with anyio.fail_after(READY_TIMEOUT_S):
                    connection = await _connect(child, socket)
            except ConnectError as error:
                said = log.read_text(errors="replace")
                raise host.failure(said or error.message, doing=doing) from error
            except TimeoutError as error:
                raise SourceError(
                    f"{doing}: ‘{host.shown}’ did not answer within {READY_TIMEOUT_S:.0f} s"
                ) from error
        yield RemoteFile(shown, connection, socket)
    finally:
        with anyio.CancelScope(shield=True):
            if connection is not None:
                connection.handle.close()
            if child is not None:
                await process.end(child)
        v2vdir.remove()


async def _connect(child: process.Child, socket: Path) -> Connection:
    """Connect once nbdkit listens; behind the first connection it logs in."""
    while True:
        if socket.exists() or child.returncode is not None:
            try:
                return await open_connection(str(socket), timeout_s=READY_TIMEOUT_S)
            except ConnectError as error:
                # Between bind and listen a socket is there and nobody behind it.
                if error.errno != errno.ECONNREFUSED or child.returncode is not None:
                    raise
        await anyio.sleep(_POLL_S)


async def read_file(host: SshHost, path: str, *, most: int) -> bytes:
    """Return the content of a small file.

    Raises:
        SourceError: it can't be read, or is larger than ``most`` bytes.
    """
    async with opened(host, path) as file:
        if file.size > most:
            raise SourceError(
                f"‘{file.shown}’ has {file.size} bytes; more than {most} are not expected",
                hint="is it the right file?",
            )
        return await file.read(file.size)


async def check_image(file: RemoteFile, format_: str) -> int:
    """Return the virtual size of an image that is read at the other end, in bytes.

    Raises:
        SourceError: it can't be used.
    """
    if file.size == 0:
        raise SourceError(
            f"the disk ‘{file.shown}’ is empty (0 bytes)"
            + (": sftp does not tell the size of a block device" if "/dev/" in file.shown else "")
        )
    if format_ == "raw":
        return file.size
    if format_ not in FORMATS:
        raise SourceError(
            f"the disk ‘{file.shown}’ has the format {format_}, which is not supported",
            hint=f"supported are: {', '.join(FORMATS)}",
        )
    await _refuse_other_files(file, format_)
    served = {"driver": format_, "file": {"driver": "nbd", "path": str(file.socket)}}
    try:
        info = await qemu_img.info("json:" + json.dumps(served))
    except V2VError as error:
        reason = error.message.rpartition(": ")[2]
        raise SourceError(
            f"the disk ‘{file.shown}’ can't be read as {format_}: {reason}",
            hint="give its format with -if",
        ) from error
    # Two pairs of eyes: what the header did not tell.
    if info.backing_file is not None:
        raise SourceError(
            f"the disk ‘{file.shown}’ names another image below it",
            hint="make one image of it on its host: qemu-img convert",
        )
    return info.virtual_size


async def _refuse_other_files(file: RemoteFile, format_: str) -> None:
    """Refuse an image that names others: qemu would look for them on *this* machine."""
    what = f"the disk ‘{file.shown}’"
    head, tail = await file.read(HEAD), await file.read(TAIL, max(0, file.size - TAIL))
    header = read_header(head, tail, file.size, what)
    # A LUKS volume is raw to whoever has not its key.
    if header.format != ("raw" if format_ == "luks" else format_):
        raise SourceError(
            f"{what} can't be read as {format_}: it is {header.format}",
            hint="give its format with -if",
        )
    if header.extents:
        raise SourceError(
            f"{what} is a VMDK descriptor: its content lies in other files",
            hint="make one image of it on its host: qemu-img convert",
        )
