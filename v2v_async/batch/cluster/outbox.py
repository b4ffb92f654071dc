"""What a worker has to say, in order: events ten times a second at most, and never without end."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import anyio

from v2v_async.events import Event

_EVERY_S = 0.1
# One batch. A guest with -v says some hundred lines a second.
_MOST = 2000
_MAY_BE_LEFT_OUT = ("debug", "message")


class Outbox:
    """Gathers events and answers; ``send`` gets them as lines of JSON.

    Of the progress of one disk only the latest in a batch is sent. Where more comes than can be
    sent, ``debug`` and ``message`` events are left out, and a warning says how many.
    """

    def __init__(self, run: str, send: Callable[[list[str]], None]) -> None:
        self._run = run
        self._send = send
        # In order. A progress event has the key of its disk, and takes the last place.
        self._waiting: dict[object, Event | dict[str, Any]] = {}
        self._count = 0
        self._left_out = 0
        self._is_new = anyio.Event()
        self._is_urgent = anyio.Event()

    def event(self, event: Event) -> None:
        """Take an event."""
        if event.type == "progress":
            key: object = (event.guest, event.step, event.disk)
            self._waiting.pop(key, None)
        elif event.type in _MAY_BE_LEFT_OUT and len(self._waiting) >= _MOST:
            self._left_out += 1
            return
        else:
            self._count += 1
            key = self._count
        self._put(key, event)

    def tell(self, **said: Any) -> None:
        """Take an answer for the supervisor itself, who waits for it."""
        self._count += 1
        self._put(self._count, said)
        self._is_urgent.set()

    def flush(self, now: float) -> None:
        """Send what there is; ``now``: seconds since the epoch."""
        if self._left_out:
            text = f"{self._left_out} messages are left out: they came faster than they can be sent"
            self._left_out = 0
            self.event(Event(time=now, run=self._run, type="warning", text=text))
        waiting, self._waiting = self._waiting, {}
        self._is_new, self._is_urgent = anyio.Event(), anyio.Event()
        if waiting:
            self._send(
                [
                    each.to_json() if isinstance(each, Event) else json.dumps(each)
                    for each in waiting.values()
                ]
            )

    async def keep_sending(self, clock: Callable[[], float]) -> None:
        """Send what comes, answers at once, until cancelled; the rest is for :meth:`flush`."""
        while True:
            await self._is_new.wait()
            self.flush(clock())
            with anyio.move_on_after(_EVERY_S):
                await self._is_urgent.wait()

    def _put(self, key: object, what: Event | dict[str, Any]) -> None:
        self._waiting[key] = what
        self._is_new.set()
