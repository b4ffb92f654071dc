"""Connections that there are so many of: who wants several waits until that many are free."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio


class Places:
    """``total`` places; the first that asks is the first that gets, so that nobody starves."""

    def __init__(self, total: int) -> None:
        self.total = max(1, total)
        self._free = self.total
        self._waiting: deque[tuple[int, anyio.Event]] = deque()

    @property
    def taken_now(self) -> int:
        """How many are taken."""
        return self.total - self._free

    @asynccontextmanager
    async def taken(self, count: int) -> AsyncIterator[int]:
        """Have ``count`` places, or all where that is more; yields how many."""
        count = min(max(1, count), self.total)
        turn = anyio.Event()
        place = (count, turn)
        self._waiting.append(place)
        self._give()
        try:
            await turn.wait()
            yield count
        finally:
            if turn.is_set():
                self._free += count
            else:
                self._waiting.remove(place)
            self._give()

    def _give(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            count, turn = self._waiting.popleft()
            self._free -= count
            turn.set()
