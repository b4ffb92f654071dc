"""The last lines of a terminal, drawn again and again; what is said for good scrolls up above.

::

    ✓ web-01   12.3 GiB in 3:12           said: part of the terminal's history
    nightly  12:31  ━━━━━╸────  43%       the live part; the cursor rests
    37 waiting  2 converting              below its last line

A thread draws, so that a terminal that takes nothing (Ctrl-S, a slow line) holds up nobody. Only
lines that have changed are sent.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Iterable
from typing import Self

from rich.console import Console

from v2v_async.render.line import Line, cut, painter, wide

Drawn = tuple[str, int]
"""A line as it was sent to the terminal, and its cells."""

_LEAST_PAUSE_S = 0.05  # of keys that are held down, and lines said one by one
_JOIN_TIMEOUT_S = 2.0


class LivePart:
    """Draws what ``lines(width, height)`` returns on ``console``, ``refreshes`` times a second.

    ``may_draw`` is asked before: a program in the background draws nothing. An error of the
    terminal ends the drawing, and is raised by the next :meth:`say`.
    """

    def __init__(
        self,
        console: Console,
        lines: Callable[[int, int], list[Line]],
        *,
        refreshes: float,
        may_draw: Callable[[], bool] = lambda: True,
        is_animated: bool = True,
    ) -> None:
        self._console = console
        self._lines = lines
        self._pause_s = 1 / refreshes
        self._may_draw = may_draw
        self._paint = painter(console)
        self._descriptor = descriptor_of(console)
        self._said: list[Line] = []
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._is_stopping = False
        self._is_moved = False
        self._error: Exception | None = None
        self._drawn: list[Drawn] = []
        self._size = (0, 0)
        self._thread = (
            threading.Thread(target=self._run, name="screen", daemon=True) if is_animated else None
        )

    def __enter__(self) -> Self:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Say what is left to say, and remove the live part."""
        self._is_stopping = True
        self._wake.set()
        if self._thread is None:
            self._end()
        else:
            # It may wait for the terminal, which nothing can be said to then anyway.
            self._thread.join(_JOIN_TIMEOUT_S)

    def say(self, lines: Iterable[Line]) -> None:
        """Have lines scroll up, above the live part.

        Raises:
            OSError: the terminal has gone, and was told so by what was drawn before.
        """
        with self._lock:
            if self._error is not None:
                raise self._error
            self._said += lines
        self._wake.set()

    def refresh(self) -> None:
        """Draw soon, since there is something new to see."""
        self._wake.set()

    def forget(self) -> None:
        """Draw anew below whatever is on the screen. Takes no lock: signals' handlers call it."""
        self._is_moved = True

    def draw(self) -> None:
        """Draw now. Only where nothing is animated, or from the drawing thread."""
        if not self._may_draw():
            self._drawn = []  # the shell writes there in the meantime
            return
        with self._lock:
            said, self._said = self._said, []
        width, height = size = self._console.size
        if self._is_moved:
            self._is_moved, self._drawn = False, []
        # One column stays free: a line that fills the last one leaves terminals of two minds.
        lines = [cut(line, width - 1) for line in self._lines(width - 1, height)]
        new = [(self._paint(line), wide(line)) for line in lines]
        is_anew = bool(said) or size != self._size
        self._write(self._anew(new, said, width) if is_anew else self._changes(new))
        self._drawn, self._size = new, size

    def _anew(self, new: list[Drawn], said: list[Line], width: int) -> str:
        """Return what replaces all that is drawn, on a terminal that may have been resized."""
        # Lines that a narrower terminal has broken take more of its rows.
        rows = sum(max(1, -(-cells // max(width, 1))) for _, cells in self._drawn)
        out = [_up(rows), "\x1b[J", *(f"{self._paint(line)}\n" for line in said)]
        return "".join(out + [f"{text}\n" for text, _ in new])

    def _changes(self, new: list[Drawn]) -> str:
        """Return what makes the drawn lines the new ones."""
        old = self._drawn
        out = [_up(len(old))]
        for number, (text, _) in enumerate(new):
            is_same = number < len(old) and old[number][0] == text
            out.append("\n" if is_same else f"{text}\x1b[K\n")
        if len(new) < len(old):
            out.append("\x1b[J")
        return "".join(out)

    def _write(self, text: str) -> None:
        encoding = self._console.encoding
        data = text.encode(encoding, "replace")
        if self._descriptor is None:
            self._console.file.write(data.decode(encoding))
            return
        # Not through the stream: its lock, held while the terminal takes nothing, would hold up
        # the end of the program.
        self._console.file.flush()
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:
                select.select([], [self._descriptor], [])

    def _end(self) -> None:
        if not self._may_draw():
            self._drawn = []
        with self._lock:
            said, self._said = self._said, []
        if said or self._drawn:
            self._write(self._anew([], said, self._console.size.width))
        self._drawn = []

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self.draw()
                time.sleep(_LEAST_PAUSE_S)
                self._wake.wait(self._pause_s)
                self._wake.clear()
            self._end()
        except Exception as error:
            with self._lock:
                self._error = error


def descriptor_of(console: Console) -> int | None:
    """Return the descriptor of the terminal that ``console`` writes to, if it is one."""
    try:
        number = console.file.fileno()
    except (OSError, ValueError, AttributeError):
        return None
    return number if os.isatty(number) else None


def _up(rows: int) -> str:
    return f"\r\x1b[{rows}A" if rows else "\r"
