"""A batch for a person at a terminal: what is done scrolls up, what goes on stays below.

::

    event ──> BatchState ──> BatchView ──> LivePart ──> the terminal
                  └─ words ────────────────────┘↑
              keys ──> BatchView ───────────────┘

Events come from the event loop's thread, keys from one of their own, and a third one draws: the
state and the view have a lock.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from threading import Lock
from types import TracebackType
from typing import Self

from rich.cells import cell_len
from rich.console import Console, RenderableType

from v2v_async.events import Event
from v2v_async.render.batch_state import BatchState
from v2v_async.render.batch_view import BatchView
from v2v_async.render.batch_words import Said, said
from v2v_async.render.keys import Keys
from v2v_async.render.line import Line, text_of, wrap
from v2v_async.render.live_part import LivePart, descriptor_of
from v2v_async.render.terminal_mode import TerminalMode
from v2v_async.render.text import clean, clean_lines

_ABOUT = 16  # cells of a name, where it is shorter
_REFRESHES = 4  # a second: fast enough for numbers, under 2 % of a CPU with 500 guests
_MARKS = {
    "finished": ("✓", "green"),
    "failed": ("✗", "bold red"),
    "cancelled": ("■", "bold yellow"),
    "retrying": ("↻", "yellow"),
    "paused": ("‖", "yellow"),
    "resumed": ("▸", "yellow"),
    "warning": ("!", "yellow"),
    "message": (" ", ""),
    "debug": (" ", "bright_black"),
}


class BatchTerminal:
    """Show a batch's events on ``console``, which must be a terminal (or record, for a picture).

    ``keyboard`` is the descriptor of the terminal that keys are read from; None: there are none.
    ``on_leave`` is called, from another thread, when a person leaves a view that only follows.
    """

    name = "screen"

    def __init__(
        self,
        console: Console,
        *,
        verbose: bool = False,
        keyboard: int | None = None,
        on_leave: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.time,
        is_animated: bool = True,
    ) -> None:
        self._console = console
        self._verbose = verbose
        self._keyboard = keyboard
        self._on_leave = on_leave
        self._clock = clock
        self._lock = Lock()
        self._state = BatchState()
        self._view = BatchView(
            self._state, has_keys=keyboard is not None, can_leave=on_leave is not None
        )
        self._warned: set[tuple[str | None, str | None]] = set()
        self._mode: TerminalMode | None = None
        self._live = LivePart(
            console,
            self._lines,
            refreshes=_REFRESHES,
            may_draw=self._may_draw,
            is_animated=is_animated,
        )
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            screen = descriptor_of(self._console)
            if screen is not None:
                mode = TerminalMode(screen, self._keyboard, self._live.forget)
                self._mode = stack.enter_context(mode)
            stack.enter_context(self._live)
            if self._keyboard is not None:
                stack.enter_context(Keys(self._keyboard, self._press))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(exc_type, exc, traceback)

    def __call__(self, event: Event) -> None:
        with self._lock:
            self._state.apply(event)
            told = said(event, self._state, verbose=self._verbose)
        if told is None:
            return
        if event.type == "warning":
            # Five hundred guests meet the same lack of KVM: once is enough here.
            if (event.step, event.text) in self._warned:
                return
            self._warned.add((event.step, event.text))
        self._live.say(_lines_of(told, self._console.width - 1))

    def catch_up(self, events: Iterable[Event]) -> None:
        """Take in what happened before anybody looked, without saying it again."""
        for event in events:
            with self._lock:
                self._state.apply(event)
            if event.type == "warning":
                self._warned.add((event.step, event.text))

    def view(self) -> RenderableType:
        """Return the live part as it is now, for a picture."""
        return text_of(self._lines(self._console.width - 1, self._console.height))

    def _lines(self, width: int, height: int) -> list[Line]:
        # Above stays what was said last, below the cursor.
        room = max(height - max(2, height // 5), 1)
        try:
            with self._lock:
                return self._view.lines(self._clock(), width, room)
        except Exception as error:  # it would end the thread, and be seen by nobody
            return [[(f"(the screen could not be drawn: {clean(str(error))})", "")]]

    def _press(self, key: str) -> None:
        if key == "q" and self._on_leave is not None:
            self._on_leave()
            return
        with self._lock:
            has_changed = self._view.press(key)
        if has_changed:
            self._live.refresh()

    def _may_draw(self) -> bool:
        return self._mode is None or self._mode.check()


def keyboard_of_stdin() -> int | None:
    """Return the descriptor of stdin if keys can be read from it."""
    try:
        number = sys.stdin.fileno()
    except (OSError, ValueError, AttributeError):  # closed, or not there at all
        return None
    return number if os.isatty(number) else None


def _lines_of(told: Said, width: int) -> list[Line]:
    """Return what is said in lines of so many cells, what follows the first indented."""
    mark, style = _MARKS.get(told.kind, (" ", ""))
    text_style = {"warning": "yellow", "debug": "bright_black"}.get(told.kind, "")
    about = f"{told.about:<{_ABOUT}}  " if told.about else ""
    if cell_len(about) > width // 2:
        about = ""  # a long name has a line of its own, if need be
    indent = " " * (2 + cell_len(about))
    text = told.text if about or not told.about else f"{told.about}: {told.text}"
    rows: Line = []
    for line in clean_lines(text):
        rows += [(part, text_style) for part in wrap(line, width - len(indent))]
    for line in told.more:
        rows += [(part, "bright_black") for part in wrap(line, width - len(indent))]
    first: Line = [(f"{mark} ", style), (about, "bold"), rows[0]]
    return [first, *([(indent, ""), row] for row in rows[1:])]
