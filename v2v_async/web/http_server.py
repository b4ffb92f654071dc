"""uvicorn in somebody else's event loop: silent, without signal handlers, and gone when told so."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

MOST_CONNECTIONS = 64
"""More are told 503: each holds a descriptor, and the copies need theirs."""

_GRACE_S = 1
_STOP_WITHIN_S = 2.0


class HttpServer(uvicorn.Server):
    """Serves an application on a socket that listens."""

    def __init__(self, app: ASGIApp, listening: socket.socket) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=MOST_CONNECTIONS,
                timeout_graceful_shutdown=_GRACE_S,
            )
        )
        self._listening = listening
        self._is_up = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to the supervisor."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept."""
        await super().startup(sockets)
        self._is_up.set()

    async def start(self) -> None:
        """Return when connections are accepted."""
        _silence()
        # A task of its own, in nobody's group: what may go wrong in it is no reason to end a run.
        self._task = asyncio.create_task(self.serve([self._listening]))
        self._task.add_done_callback(_heed)
        up = asyncio.create_task(self._is_up.wait())
        try:
            await asyncio.wait({self._task, up}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            up.cancel()
        if self._task.done():
            await self._task

    async def stop(self) -> None:
        """End it within two seconds, whatever its readers do. To be shielded."""
        self.should_exit = True
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=_STOP_WITHIN_S)
            self._task.cancel()
        for connection in list(self.server_state.connections):
            # What a reader did not take is dropped: it would keep the descriptor open.
            connection.transport.abort()
        for task in list(self.server_state.tasks):
            task.cancel()
        left = {*self.server_state.tasks, *({self._task} if self._task else ())}
        if left:
            await asyncio.wait(left, timeout=_STOP_WITHIN_S)
        self._listening.close()


def _heed(task: asyncio.Task[None]) -> None:
    # What nobody asks for, asyncio prints.
    if not task.cancelled():
        task.exception()


def _silence() -> None:
    # Without a handler, warnings go to stderr, into the middle of the screen.
    logger = logging.getLogger("uvicorn.error")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
