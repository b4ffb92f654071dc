"""Server-Sent Events: the run's events for programs, and what changed for the page.

Both begin with what a reader needs to catch up, so nothing is missed between two requests, and end
when the run's server does. Source: the HTML standard, section 9.2 (server-sent events).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

import anyio
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from v2v_async.web.feed import Changed, EventQueue, Reader, TooManyReadersError
from v2v_async.web.views import Views, to_json

BEAT_S = 5.0
"""A page that hears nothing for three of these has lost its connection."""

_CHANGES_EVERY_S = 1.0  # people read no faster, and each costs some milliseconds of processor

R = TypeVar("R", bound=Reader)


class EventStream(Generic[R]):
    """An ASGI answer that sends what ``messages`` yields, for as long as the reader is there."""

    def __init__(
        self,
        opened: AbstractContextManager[R],
        messages: Callable[[R], AsyncIterator[bytes]],
    ) -> None:
        self._opened = opened
        self._messages = messages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        start = {"type": "http.response.start", "status": 200, "headers": headers}
        if scope["method"] == "HEAD":
            await send(start)
            await send({"type": "http.response.body"})
            return
        try:
            with self._opened as reader:
                await send(start)
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(_until_gone, receive, tasks.cancel_scope)
                    async for message in self._messages(reader):
                        await send(
                            {"type": "http.response.body", "body": message, "more_body": True}
                        )
                    tasks.cancel_scope.cancel()
                await send({"type": "http.response.body"})
        except TooManyReadersError:
            answer = PlainTextResponse(
                "Too many streams are open: close some pages.\n", 503, {"Retry-After": "10"}
            )
            await answer(scope, receive, send)


async def _until_gone(receive: Receive, reading: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    reading.cancel()


def _message(data: str, *, event: str | None = None, number: int | None = None) -> bytes:
    lines = [] if event is None else [f"event: {event}"]
    if number is not None:
        lines.append(f"id: {number}")
    lines.append(f"data: {data}")
    # An undecodable file name is a lone surrogate, which UTF-8 can't hold.
    return ("\n".join(lines) + "\n\n").encode("utf-8", "replace")


async def events(queue: EventQueue) -> AsyncIterator[bytes]:
    """Yield the run's events as they come.

    ``reload`` at the beginning and where events were lost: the state as of now has to be loaded.
    """
    yield _message(to_json({"lost": False}), event="reload")
    while True:
        is_last = queue.is_closed
        has_lost, waiting = queue.take()
        if has_lost:
            yield _message(to_json({"lost": True}), event="reload")
        for number, event in waiting:
            yield _message(event.to_json(), number=number)
        if is_last:
            return
        if not waiting:
            yield b": still here\n\n"
        await queue.wait(BEAT_S)


async def changes(changed: Changed, views: Views) -> AsyncIterator[bytes]:
    """Yield the whole state, then the totals and those guests that changed, once a second."""
    yield _message(to_json(views.state()), event="state")
    last_beat = anyio.current_time()
    while True:
        await changed.wait(last_beat + BEAT_S - anyio.current_time())
        is_last = changed.is_closed
        names = changed.take()
        if anyio.current_time() >= last_beat + BEAT_S:
            last_beat = anyio.current_time()
            names |= views.at_work()
        yield _message(to_json(views.changes(names)), event="changes")
        if is_last:
            return
        await changed.rest(_CHANGES_EVERY_S)
