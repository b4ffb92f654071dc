"""What the server answers, address by address."""

from __future__ import annotations

import gzip
from functools import partial
from importlib import resources
from pathlib import PurePath

import anyio.to_thread
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from v2v_async.web import streams
from v2v_async.web.feed import Changed, EventQueue, Feed
from v2v_async.web.guard import Guard
from v2v_async.web.metrics import Exposition
from v2v_async.web.streams import EventStream
from v2v_async.web.views import Views, to_json

_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_WORTH_PACKING = 1024
_PACKED_HARD = 4  # 500 guests: 200 KB become 12 KB in 3 ms; harder takes longer and saves little


def make_app(
    views: Views,
    feed: Feed,
    exposition: Exposition,
    *,
    token: str | None,
    cookie: str,
    is_local: bool,
) -> Starlette:
    """Return the ASGI application; see :class:`Guard` for who may read."""
    folder = resources.files("v2v_async.web") / "page"
    bodies = {each.name: each.read_bytes() for each in folder.iterdir()}

    async def page(request: Request) -> Response:
        name = request.scope["path"].lstrip("/") or "index.html"
        return await _packed(request, bodies[name], _TYPES[PurePath(name).suffix])

    async def state(request: Request) -> Response:
        return await _json(request, views.state())

    async def guest(request: Request) -> Response:
        name = request.path_params["name"]
        found = views.guest(name)
        if found is None:
            return await _json(request, {"error": f"there is no guest ‘{name}’"}, 404)
        return await _json(request, found)

    async def metrics(request: Request) -> Response:
        text, content_type = exposition.write(request.headers.get("accept", ""))
        return Response(text, media_type=content_type)

    async def health(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def events(request: Request) -> EventStream[EventQueue]:
        return EventStream(feed.queue(), streams.events)

    async def changes(request: Request) -> EventStream[Changed]:
        return EventStream(feed.changes(), partial(streams.changes, views=views))

    routes = [
        Route("/", page),
        *(Route(f"/{name}", page) for name in bodies),
        Route("/api/state", state),
        Route("/api/guests/{name:path}", guest),
        Route("/api/events", events),
        Route("/api/changes", changes),
        Route("/metrics", metrics),
        Route("/healthz", health),
    ]
    guard = Middleware(Guard, token=token, cookie=cookie, is_local=is_local)
    made = Starlette(routes=routes, middleware=[guard])
    made.router.redirect_slashes = False  # it would name the host that the request names
    return made


async def _json(request: Request, value: object, status: int = 200) -> Response:
    return await _packed(request, to_json(value).encode(), "application/json", status)


async def _packed(request: Request, body: bytes, content_type: str, status: int = 200) -> Response:
    """Return an answer, smaller where the reader can unpack it."""
    headers = {"Vary": "Accept-Encoding"}
    if len(body) >= _WORTH_PACKING and "gzip" in request.headers.get("accept-encoding", ""):
        body = await anyio.to_thread.run_sync(partial(gzip.compress, body, _PACKED_HARD))
        headers["Content-Encoding"] = "gzip"
    return Response(body, status, headers, content_type)
