"""Hand each event to every renderer; a broken renderer never breaks the run."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from v2v_async.events import Event


class Renderer(Protocol):
    """Shows events. ``name`` is what a person reads when it fails."""

    name: str

    def __enter__(self) -> object: ...

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> object: ...

    def __call__(self, event: Event) -> None: ...


class Broadcast:
    """An :data:`~v2v_async.events.Emit` that fans out. Owns its renderers: closes what it opens.

    A renderer that raises gets no more events. The others get one warning about it.
    """

    def __init__(self, renderers: Sequence[Renderer]) -> None:
        self._renderers = list(renderers)
        self._opened: list[Renderer] = []

    def __enter__(self) -> Self:
        for renderer in self._renderers:
            try:
                renderer.__enter__()
            except BaseException:
                self.__exit__(None, None, None)
                raise
            self._opened.append(renderer)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        while self._opened:
            try:
                self._opened.pop().__exit__(exc_type, exc, traceback)
            except Exception:
                # Nothing is left to say it to: the screen may be the one that failed.
                continue

    def __call__(self, event: Event) -> None:
        pending = [event]
        while pending:
            current = pending.pop(0)
            for renderer in list(self._renderers):
                try:
                    renderer(current)
                except Exception as error:
                    self._renderers.remove(renderer)
                    pending.append(_lost(renderer, error, current))


def _lost(renderer: Renderer, error: Exception, event: Event) -> Event:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
    return Event(
        time=event.time,
        run=event.run,
        type="warning",
        text=f"{renderer.name}: {reason}; nothing more is written there, and the run goes on",
    )
