"""A terminal set up for a live screen, and as it was before whatever happens.

::

    set ──> Ctrl-Z: as it was ──> fg: set again ──> end, crash, SIGTERM …: as it was

Only SIGKILL leaves it set (``reset`` helps). A program in the background neither sets nor writes:
the terminal is the shell's then.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import termios
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, Self

_HIDE_CURSOR, _SHOW_CURSOR = b"\x1b[?25l", b"\x1b[?25h"
# What ends the program where nobody else takes care of it.
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_WRITE_TIMEOUT_MS = 200
_LOCAL_FLAGS = 3  # where termios keeps them
_CHARACTERS = 6


class TerminalMode:
    """The cursor of ``screen`` hidden; ``keyboard``, if any, giving each key at once, unseen.

    Both are descriptors of terminals. ``on_continue`` is called from a signal's handler when the
    program goes on after Ctrl-Z: what is on the screen is not where it was. Signals are looked
    after only where it is entered in the main thread.
    """

    def __init__(
        self, screen: int, keyboard: int | None, on_continue: Callable[[], None] = lambda: None
    ) -> None:
        self._screen = screen
        self._keyboard = keyboard
        self._on_continue = on_continue
        self._before: list[Any] | None = None
        self._is_set = False
        self._is_given_back = False  # for good, or until the program goes on after Ctrl-Z
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        atexit.register(self._restore)
        if threading.current_thread() is threading.main_thread():
            self._look_after(signal.SIGTSTP, self._stop)
            for number in _ENDING:
                self._look_after(number, self._end)
            self._look_after(signal.SIGCONT, self._continue)
        self.check()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            # Somebody may have taken over since, and given back what was there before us.
            if signal.getsignal(number) == handler:
                signal.signal(number, signal.SIG_DFL)
        self._handlers.clear()
        self._restore()
        atexit.unregister(self._restore)

    def check(self) -> bool:
        """Return whether the program may draw; set up what is not when it may.

        It may in the foreground, until it ends or is stopped. Any thread may ask.
        """
        if not is_foreground(self._screen):
            self._is_set = False
            return False
        if self._is_given_back:
            return False
        if not self._is_set:
            self._set()
        return True

    def _set(self) -> None:
        self._is_set = True
        if self._keyboard is not None:
            with suppress(termios.error):
                now = termios.tcgetattr(self._keyboard)
                if self._before is None:
                    self._before = now[:]
                now[_LOCAL_FLAGS] &= ~(termios.ECHO | termios.ICANON)
                now[_CHARACTERS] = [*now[_CHARACTERS]]
                now[_CHARACTERS][termios.VMIN], now[_CHARACTERS][termios.VTIME] = 1, 0
                _set_attributes(self._keyboard, now)
        self._write(_HIDE_CURSOR)

    def _restore(self) -> None:
        # First: another thread that draws now would set what is just being restored.
        self._is_given_back = True
        if not self._is_set or not is_foreground(self._screen):
            return
        self._is_set = False
        if self._keyboard is not None and self._before is not None:
            with suppress(termios.error):
                _set_attributes(self._keyboard, self._before)
        self._write(_SHOW_CURSOR)

    def _write(self, sequence: bytes) -> None:
        """Write, unless the terminal takes nothing (Ctrl-S): that must not hold up the end."""
        poll = select.poll()
        poll.register(self._screen, select.POLLOUT)
        with suppress(OSError):
            if poll.poll(_WRITE_TIMEOUT_MS):
                os.write(self._screen, sequence)

    # Signals. Handlers run in the main thread, in the middle of anything: they take no locks.

    def _look_after(
        self, number: signal.Signals, handler: Callable[[int, FrameType | None], None]
    ) -> None:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, handler)
            self._handlers[number] = handler

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._restore()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        # Here it goes on, perhaps a day later.
        self._is_given_back = False
        signal.signal(number, self._stop)

    def _continue(self, number: int, frame: FrameType | None) -> None:
        # The shell has set its own terminal in the meantime.
        self._is_set = self._is_given_back = False
        self._on_continue()
        self.check()

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._restore()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def is_foreground(terminal: int) -> bool:
    """Whether this process may use a terminal; one that is not its own is its to use."""
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return True


def _set_attributes(terminal: int, attributes: list[Any]) -> None:
    """Set them without being stopped, should the program be put in the background just now."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        termios.tcsetattr(terminal, termios.TCSANOW, attributes)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
