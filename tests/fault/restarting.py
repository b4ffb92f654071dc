"""Servers that are killed and started again on the same socket, and connections that are cut.

``v2v_async.server`` ends a run when a server dies, so what must outlive that is started here.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket as sockets
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.waiting import until

FORGETTING = Path(__file__).with_name("forgetting.py")
_LOOK_S = 0.02  # it is ended from many sides; to be so late in seeing it is no loss
# Where a test is killed its servers go too.
_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()


def nbdkit(socket: Path, *arguments: str) -> list[str]:
    """Return the command of an nbdkit on ``socket``; filters are among the arguments."""
    return ["nbdkit", "--exit-with-parent", "--foreground", f"--unix={socket}", *arguments]


def qemu_nbd(socket: Path, *arguments: str) -> list[str]:
    """Return the command of a qemu-nbd on ``socket``."""
    return ["qemu-nbd", f"--socket={socket}", "--persistent", "--shared=0", *arguments]


class Restarting:
    """A server on a socket. As a context it is running at the start and gone at the end.

    With ``is_kept`` it is started again whenever it has ended, after ``down_s``.
    """

    def __init__(
        self,
        argv: Sequence[str],
        socket: Path,
        *,
        is_kept: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.argv = list(argv)
        self.socket = socket
        self.down_s = 0.0
        self.starts = 0
        self.kills = 0
        self._is_kept = is_kept
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._is_up = asyncio.Event()

    async def __aenter__(self) -> Self:
        await self.start()
        if self._is_kept:
            self._keeper = asyncio.create_task(self._keep())
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeper
        self.stop()

    @property
    def uri(self) -> str:
        """The NBD URI of its socket."""
        return f"nbd+unix:///?socket={self.socket}"

    @property
    def log(self) -> Path:
        """What it has said."""
        return self.socket.with_suffix(".log")

    @property
    def is_alive(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    async def start(self) -> None:
        """Start it and wait until it listens.

        Raises:
            RuntimeError: it ended at once, or does not listen.
        """
        self.socket.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*_WITH_PARENT, *self.argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
            )
        self.starts += 1
        try:
            await until(
                lambda: _listens(self.socket),
                lambda: f"{self.argv} listens: {self.log.read_text(errors='replace')[-2000:]}",
                of=self._process,
            )
        except AssertionError as error:  # not what is tested
            raise RuntimeError(str(error)) from None
        self._is_up.set()

    def kill(self, down_s: float = 0.0) -> None:
        """SIGKILL it, and wait for that; a kept one is started again ``down_s`` later."""
        self.down_s = down_s
        if self._process is not None and self.is_alive:
            self._is_up.clear()
            self.kills += 1
            self._process.kill()
            self._process.wait()

    def clients(self) -> int:
        """Return how many connections it has: its sockets but for the one it listens on."""
        if self._process is None:
            return 0
        found = 0
        with suppress(OSError):  # it has just ended
            for each in Path(f"/proc/{self._process.pid}/fd").iterdir():
                with suppress(OSError):
                    found += os.readlink(each).startswith("socket:")
        return max(0, found - 1)

    async def up(self) -> None:
        """Wait until a kept one is there, and has seen that its last client has gone.

        Which it may die of: nbdkit 1.32 aborts.
        """
        await until(
            lambda: self.is_alive and self._is_up.is_set() and not self.clients(),
            f"{self.socket} is served again",
            within_s=120,
        )

    def stop(self) -> None:
        """End it; a kept one as well."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    async def _keep(self) -> None:
        while True:
            if not self.is_alive:
                self._is_up.clear()
                down_s, self.down_s = self.down_s, 0.0
                await asyncio.sleep(down_s)
                # A lock on the image may outlive the process for a moment.
                with suppress(RuntimeError):
                    await self.start()
            await asyncio.sleep(_LOOK_S)


def _listens(path: Path) -> bool:
    with sockets.socket(sockets.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


class Proxy:
    """A TCP port before a server's Unix socket, whose connections can be cut or held up."""

    def __init__(self, backend: Path, *, delay_s: float = 0.0) -> None:
        self._backend = backend
        self._delay_s = delay_s
        self._open: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}
        self._flows = asyncio.Event()
        self._flows.set()
        self.cuts = 0
        self.accepted = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.close()
        self._flows.set()
        tasks = list(self._open)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def uri(self) -> str:
        """The NBD URI of the port."""
        return f"nbd://127.0.0.1:{self.port}/"

    def cut(self, share: float = 1.0) -> int:
        """Cut some of the connections, the oldest first; return how many."""
        chosen = list(self._open.values())[: max(1, round(share * len(self._open)))]
        for writers in chosen:
            for writer in writers:
                writer.transport.abort()
        self.cuts += len(chosen)
        return len(chosen)

    def hold(self) -> None:
        """Let nothing through until :meth:`go_on`."""
        self._flows.clear()

    def go_on(self) -> None:
        """Let it flow again."""
        self._flows.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        writers = self._open[task] = [writer]
        self.accepted += 1
        # Cancelled only by the proxy's own end; asyncio would print that.
        with suppress(OSError, asyncio.CancelledError):
            try:
                other, onward = await asyncio.open_unix_connection(str(self._backend))
                writers.append(onward)
                pumps = [
                    asyncio.create_task(self._pump(reader, onward)),
                    asyncio.create_task(self._pump(other, writer)),
                ]
                try:
                    await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for pump in pumps:
                        pump.cancel()
                    await asyncio.gather(*pumps, return_exceptions=True)
            finally:
                del self._open[task]
                for each in writers:
                    each.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while content := await reader.read(1 << 18):
                if self._delay_s:
                    await asyncio.sleep(self._delay_s)
                await self._flows.wait()
                writer.write(content)
                await writer.drain()
