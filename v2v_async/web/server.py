"""``--serve HOST:PORT``: the server beside a run, in its event loop.

It only shows: a page that breaks, a reader that does not read, or a request that is wrong never
reaches the run.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from urllib.parse import quote

import anyio
import anyio.to_thread

from v2v_async.errors import DependencyError
from v2v_async.events import Event
from v2v_async.render.batch_state import BatchState
from v2v_async.web.listening import listen, look_up, parse_address


@asynccontextmanager
async def serving(
    state: BatchState,
    address: str,
    *,
    token: str | None,
    on_listening: Callable[[str], None],
    clock: Callable[[], float] = time.time,
) -> AsyncIterator[Callable[[Event], None]]:
    """Serve ``state`` on ``address`` while the block runs; give it each event after the state.

    ``address`` is ``HOST:PORT``, or a port of loopback; port 0 is any that is free. ``token``: what
    readers have to know (``secrets.token_urlsafe()``); None lets in everybody who can connect.
    ``on_listening`` gets the page's address with the token in it, for a person to open: not for
    logs. ``clock`` gives seconds since the epoch.

    The block's end, also by cancellation, sends open streams what they have not had yet and stops
    the server within two seconds.

    Raises:
        UsageError: nobody can listen there.
        DependencyError: a library is missing.
    """
    try:
        from v2v_async.web.app import make_app
        from v2v_async.web.feed import Feed
        from v2v_async.web.guard import is_loopback
        from v2v_async.web.http_server import HttpServer
        from v2v_async.web.metrics import BatchCollector, Exposition, Tally
        from v2v_async.web.views import Views
    except ImportError as error:
        raise DependencyError(
            f"--serve: a library for it is not installed: {error}",
            hint="install it: pip install 'v2v-async[web]'",
        ) from error

    where = parse_address(address)
    listening = listen(where, await anyio.to_thread.run_sync(look_up, where))
    feed, tally = Feed(), Tally()
    try:
        port = int(listening.getsockname()[1])
        app = make_app(
            Views(state, clock),
            feed,
            Exposition(BatchCollector(state, tally, feed, clock)),
            token=token,
            # Browsers keep cookies by host: another run's page, on another port, has its own.
            cookie=f"v2v_token_{port}",
            is_local=is_loopback(where.host),
        )
        server = HttpServer(app, listening)
    except BaseException:
        listening.close()
        raise

    def publish(event: Event) -> None:
        tally.count(event)
        feed.publish(event)

    try:
        await server.start()
        on_listening(where.url(port) + (f"?token={quote(token)}" if token else ""))
        yield publish
    finally:
        with anyio.CancelScope(shield=True):
            feed.close()
            await server.stop()
