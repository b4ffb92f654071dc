"""Running NBD servers: ready or dead, watched, and gone at the end.

::

    start ──> spawn ──┬─ NBD handshake succeeds ──> ready ──> watched ──> stop
                      ├─ exits first ─────────────> ServerStartError (last words)
                      └─ neither in time ─────────> ended, ServerStartError

A server of the supervisor dies with it and is watched: when it goes away unasked, the block of
:func:`running_servers` is cancelled and ends with ServerExitedError. A *detached* server is for a
helper, which ends before the next one begins: it stays, and ``state.json`` tells who it is.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio
import anyio.abc

from v2v_async import process
from v2v_async.connection import open_connection
from v2v_async.errors import (
    ConnectError,
    ServerExitedError,
    ServerStartError,
    V2VError,
    most_telling,
)
from v2v_async.handle import ExportInfo
from v2v_async.process import ServerCommand
from v2v_async.redact import redact, redact_argv
from v2v_async.v2vdir import V2VDir, record_of

READY_TIMEOUT_S = 60.0
_FIRST_POLL_S, _LAST_POLL_S = 0.005, 0.2
_TAIL_LINES = 12
# A server that listens and yet ends the handshake can't open its disk; what is behind it (a remote
# server, a device) gets this many tries.
_MOST_REFUSALS = 4


class Server:
    """A server that answered. ``info`` is what it said when it became ready."""

    def __init__(self, name: str, command: ServerCommand, child: process.Child, log: Path) -> None:
        self.name = name
        self.command = command
        self.log = log
        self.process = child
        self.is_stopping = False
        self.info: ExportInfo | None = None

    @property
    def endpoint(self) -> str:
        """Where it listens, as connections want it."""
        return str(self.command.socket)

    async def stop(self, *, grace_s: float = process.GRACE_S) -> None:
        """End it (SIGTERM, grace, SIGKILL) and remove its socket. Shielded; may be repeated."""
        self.is_stopping = True
        await process.end(self.process, grace_s=grace_s)
        self.command.socket.unlink(missing_ok=True)


class Servers:
    """The servers of one guest; made by :func:`running_servers`."""

    def __init__(
        self, v2vdir: V2VDir, watchers: anyio.abc.TaskGroup | None, *, detached: bool
    ) -> None:
        self._v2vdir = v2vdir
        self._watchers = watchers
        self._detached = detached
        self._running: list[Server] = []

    async def start(self, name: str, command: ServerCommand, *, log: Path) -> Server:
        """Start a server and return it when it answers the NBD handshake.

        ``name`` is for messages (``in1``). Its output is appended to ``log``.

        Raises:
            ServerStartError: it exited or did not answer; nothing of it is left.
            DependencyError: its program is not installed.
        """
        command.socket.unlink(missing_ok=True)
        with log.open("ab") as output:
            output.write(f"$ {process.command_line(command.argv)}\n".encode())
            output.flush()
            child: process.Child
            if self._detached:
                child = process.start_detached(
                    command.argv, output=output, environment=command.environment
                )
            else:
                child = await process.start(
                    command.argv, stdout=output, stderr=output, environment=command.environment
                )
        server = Server(name, command, child, log)
        self._running.append(server)
        self._v2vdir.add_process(
            record_of(child.pid, command.program, redact_argv(command.argv), str(command.socket))
        )
        try:
            server.info = await self._ready(server)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.stop(server)
            raise
        if self._watchers is not None:
            self._watchers.start_soon(self._watch, server)
        return server

    async def stop(self, server: Server) -> None:
        """Stop one server before the end of the block."""
        await server.stop()
        if server in self._running:
            self._running.remove(server)
        self._v2vdir.forget_process(server.process.pid)

    async def stop_all(self) -> None:
        """Stop all of them, the last started first."""
        for server in reversed(list(self._running)):
            await self.stop(server)

    def exited(self) -> ServerExitedError | None:
        """Return the error of a server that went away unasked, if one has."""
        for server in self._running:
            if not server.is_stopping and server.process.returncode is not None:
                return _exited(server)
        return None

    async def _ready(self, server: Server) -> ExportInfo:
        result: list[ExportInfo] = []
        last_error: list[ConnectError] = []

        async def handshake(scope: anyio.CancelScope) -> None:
            pause_s = _FIRST_POLL_S
            refusals = 0
            while True:
                if server.command.socket.exists():
                    try:
                        connection = await open_connection(server.endpoint)
                    except TimeoutError:
                        pass
                    except ConnectError as error:
                        last_error.append(error)
                        refusals += error.errno != errno.ECONNREFUSED
                        if refusals >= _MOST_REFUSALS:
                            scope.cancel()
                            return
                    else:
                        connection.handle.close()
                        result.append(connection.info)
                        scope.cancel()
                        return
                await anyio.sleep(pause_s)
                pause_s = min(pause_s * 2, _LAST_POLL_S)

        async def early_exit(scope: anyio.CancelScope) -> None:
            await server.process.wait()
            scope.cancel()

        with anyio.move_on_after(READY_TIMEOUT_S):
            async with anyio.create_task_group() as race:
                race.start_soon(handshake, race.cancel_scope)
                race.start_soon(early_exit, race.cancel_scope)
        if result:
            return result[0]
        status = server.process.returncode
        tail = tail_of(server.log)
        if status is not None:
            why = f"ended at once ({process.describe_status(status)})"
        elif last_error and last_error[-1].errno != errno.ECONNREFUSED:
            why = f"can't serve the disk ({last_error[-1].message})"
        else:
            why = f"did not answer within {READY_TIMEOUT_S:.0f} s"
        raise ServerStartError(
            f"the server {server.name} ({server.command.program}) {why}{_quote(tail)}",
            argv=redact_argv(server.command.argv),
            stderr_tail=tail,
            log=server.log,
        )

    async def _watch(self, server: Server) -> None:
        await server.process.wait()
        if not server.is_stopping:
            raise _exited(server)


@asynccontextmanager
async def running_servers(v2vdir: V2VDir, *, detached: bool = False) -> AsyncIterator[Servers]:
    """Have servers for the duration of a block; all are stopped at its end, in reverse order.

    When ``detached``, they stay after a block that succeeded and are stopped after one that failed.

    Raises:
        ServerExitedError: a server went away unasked; the block was cancelled.
    """
    if detached:
        servers = Servers(v2vdir, None, detached=True)
        try:
            yield servers
        except BaseException:
            await _stop_all(servers)
            raise
        return
    try:
        async with anyio.create_task_group() as watchers:
            servers = Servers(v2vdir, watchers, detached=False)
            try:
                yield servers
            except V2VError as error:
                # A copy or a conversion often sees that a server has gone before its watcher does.
                with anyio.CancelScope(shield=True):
                    await _let_exits_show(servers)
                exited = servers.exited()
                if exited is not None:
                    exited.locate(
                        guest=error.guest, step=error.step, disk=error.disk, log=error.log
                    )
                    raise exited from error
                raise
            finally:
                await _stop_all(servers)
                watchers.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise most_telling(group) from None


def tail_of(log: Path, lines: int = _TAIL_LINES) -> str:
    """Return the last lines of a log, without secrets (empty where there is none)."""
    with suppress(OSError):
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 16 * 1024))
            text = file.read().decode(errors="replace")
        said = [line for line in text.splitlines() if line and not line.startswith("$ ")]
        return redact("\n".join(said[-lines:]))
    return ""


async def _stop_all(servers: Servers) -> None:
    with anyio.CancelScope(shield=True):
        await servers.stop_all()


async def _let_exits_show(servers: Servers) -> None:
    """Give a dead server's exit status a moment to arrive."""
    with anyio.move_on_after(0.5):
        while servers.exited() is None:
            await anyio.sleep(0.02)


def _exited(server: Server) -> ServerExitedError:
    status = server.process.returncode or 0
    tail = tail_of(server.log)
    return ServerExitedError(
        f"the server {server.name} ({server.command.program}) went away: "
        f"{process.describe_status(status)}{_quote(tail)}",
        status=status,
        stderr_tail=tail,
        log=server.log,
    )


def _quote(tail: str) -> str:
    last = tail.splitlines()[-1:] if tail else []
    return f": {last[0]}" if last else ""
