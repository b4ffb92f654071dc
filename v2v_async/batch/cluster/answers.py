"""What a worker will say, and waits for that or for its end."""

from __future__ import annotations

from typing import Any

import anyio


class Answer:
    """What a worker will say once: ``come`` is set when it has, and it is ``told``."""

    def __init__(self) -> None:
        self.come = anyio.Event()
        self.told: dict[str, Any] | None = None

    def __call__(self, told: dict[str, Any]) -> None:
        self.told = told
        self.come.set()


async def either(*events: anyio.Event) -> None:
    """Wait until one of several things has happened."""
    async with anyio.create_task_group() as group:

        async def wait(event: anyio.Event) -> None:
            await event.wait()
            group.cancel_scope.cancel()

        for event in events:
            group.start_soon(wait, event)
