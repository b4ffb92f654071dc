"""What each reader of a stream has not been sent yet: bounded, whatever the reader does."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import anyio

from v2v_async.events import Event

MOST_UNSENT = 2000
"""Events for one reader. About 1 MB; a batch without progress events makes some ten a second."""

_ONLY_THE_LAST = frozenset({"progress", "verifying", "limits"})


class Reader:
    """Somebody who waits for something to be there, or for the end."""

    def __init__(self) -> None:
        self._woken = anyio.Event()
        self._ended = anyio.Event()
        self.is_closed = False

    def close(self) -> None:
        """Nothing more will come."""
        self.is_closed = True
        self._woken.set()
        self._ended.set()

    def _wake(self) -> None:
        self._woken.set()

    async def wait(self, longest_s: float) -> None:
        """Return when something is there, nothing more will come, or after ``longest_s``."""
        with anyio.move_on_after(longest_s):
            await self._woken.wait()
        if not self.is_closed:
            self._woken = anyio.Event()

    async def rest(self, longest_s: float) -> None:
        """Return after ``longest_s``, whatever comes, or when nothing more will come."""
        with anyio.move_on_after(longest_s):
            await self._ended.wait()


class EventQueue(Reader):
    """Events for one reader of ``/api/events``.

    Of a disk's progress only the last is kept. Of a reader who is further behind than that,
    everything is dropped and ``has_lost`` set: the state has to be loaded again.
    """

    def __init__(self, most: int = MOST_UNSENT) -> None:
        super().__init__()
        self._most = most
        self._unsent: dict[Hashable, tuple[int, Event]] = {}
        self.has_lost = False

    def __len__(self) -> int:
        return len(self._unsent)

    def put(self, number: int, event: Event) -> None:
        """Add an event, the ``number``-th of the run."""
        key: Hashable = number
        if event.type in _ONLY_THE_LAST:
            key = (event.type, event.guest, event.step, event.disk)
            self._unsent.pop(key, None)  # it goes to the end: behind what came before it
        self._unsent[key] = (number, event)
        if len(self._unsent) > self._most:
            self._unsent.clear()
            self.has_lost = True
        self._wake()

    def take(self) -> tuple[bool, list[tuple[int, Event]]]:
        """Return whether events were lost before these, and the numbered events."""
        taken, self._unsent = list(self._unsent.values()), {}
        lost, self.has_lost = self.has_lost, False
        return lost, taken


class Changed(Reader):
    """Names of guests that one page has not been told of since they changed."""

    def __init__(self) -> None:
        super().__init__()
        self._names: set[str] = set()

    def add(self, name: str | None) -> None:
        """Note that a guest, or something of the whole run, changed."""
        if name is not None:
            self._names.add(name)
        self._wake()

    def take(self) -> set[str]:
        """Return the names, and forget them."""
        taken, self._names = self._names, set()
        return taken


R = TypeVar("R", bound=Reader)


class TooManyReadersError(Exception):
    """No more streams are served at once."""


class Feed:
    """Hands each event to all readers; never waits for one."""

    def __init__(self, most_readers: int = 32) -> None:
        self._most_readers = most_readers
        self._queues: set[EventQueue] = set()
        self._pages: set[Changed] = set()
        self._is_closed = False
        self.events = 0
        """How many there have been."""

    @property
    def readers(self) -> int:
        """How many streams are open."""
        return len(self._queues) + len(self._pages)

    def publish(self, event: Event) -> None:
        """Hand on an event."""
        self.events += 1
        for queue in self._queues:
            queue.put(self.events, event)
        for page in self._pages:
            page.add(event.guest)

    def close(self) -> None:
        """End all streams, once they have been sent what is there; new ones end at once."""
        self._is_closed = True
        for reader in (*self._queues, *self._pages):
            reader.close()

    @contextmanager
    def queue(self) -> Iterator[EventQueue]:
        """Have the events from now on.

        Raises:
            TooManyReadersError: there are too many streams already.
        """
        made = EventQueue()
        with self._reading(made, self._queues):
            yield made

    @contextmanager
    def changes(self) -> Iterator[Changed]:
        """Have the names of the guests that change from now on.

        Raises:
            TooManyReadersError: there are too many streams already.
        """
        made = Changed()
        with self._reading(made, self._pages):
            yield made

    @contextmanager
    def _reading(self, reader: R, readers: set[R]) -> Iterator[None]:
        if self.readers >= self._most_readers:
            raise TooManyReadersError
        if self._is_closed:
            reader.close()
        readers.add(reader)
        try:
            yield
        finally:
            readers.discard(reader)
