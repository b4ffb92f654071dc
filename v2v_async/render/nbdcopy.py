"""nbdcopy's two ways to show progress, for people and programs that know them.

::

    ▖  40% [****************------------------------]      -p, on stderr, over itself
    40/100                                                  --progress=FD

Bytes of all disks count that are right on the target. 100 is shown only by :meth:`finish`, after
everything has succeeded: flushing and comparing take time too. Layout seen in nbdcopy 1.14.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import cycle

from v2v_async.events import Bytes, Event

_WIDTH = 40


class Percent:
    """Percent of all disks that have landed, from their events."""

    def __init__(self) -> None:
        self._disks: dict[int, Bytes] = {}

    def update(self, event: Event) -> bool:
        """Take in ``event``; return whether it tells how far a disk is."""
        if event.disk is None or event.bytes is None:
            return False
        self._disks[event.disk] = event.bytes
        return True

    @property
    def value(self) -> int:
        """0 to 99; a stream's length is unknown, so it counts for nothing."""
        total = sum(amounts.total for amounts in self._disks.values())
        landed = sum(amounts.landed for amounts in self._disks.values())
        return min(landed * 100 // total, 99) if total > 0 else 0


class ProgressBar:
    """Draws a bar through ``write``, over and over in one line."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._percent = Percent()
        self._marks = cycle("▖▘▝▗")
        self._is_open = False

    def __call__(self, event: Event) -> None:
        if self._percent.update(event):
            self._draw(next(self._marks), self._percent.value, "\r")
            self._is_open = True

    def _draw(self, mark: str, percent: int, end: str) -> None:
        done = _WIDTH * percent // 100
        self._write(f"{mark} {percent:3}% [{'*' * done}{'-' * (_WIDTH - done)}]{end}")

    def finish(self, *, is_done: bool) -> None:
        """Show 100 % after a success, else leave the bar as it is; end its line."""
        if is_done:
            self._draw("█", 100, "\n")
        elif self._is_open:
            self._write("\n")
        self._is_open = False


class ProgressLines:
    """Writes ``N/100`` to a descriptor: each N once, rising; stops when nobody reads it."""

    def __init__(self, fd: int) -> None:
        self._fd: int | None = fd
        self._percent = Percent()
        self._shown = -1

    def __call__(self, event: Event) -> None:
        if self._percent.update(event):
            self._show(self._percent.value)

    def _show(self, percent: int) -> None:
        if self._fd is None or percent <= self._shown:
            return
        self._shown = percent
        try:
            os.write(self._fd, f"{percent}/100\n".encode())
        except OSError:
            self._fd = None

    def finish(self, *, is_done: bool) -> None:
        """Write 100/100 after a success."""
        if is_done:
            self._show(100)


Progress = ProgressBar | ProgressLines
