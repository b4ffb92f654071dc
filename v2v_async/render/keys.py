"""Keys as they are pressed: a thread reads them, one name for each.

The terminal must give them at once (:mod:`v2v_async.render.terminal_mode`).
"""

from __future__ import annotations

import os
import re
import select
import threading
from collections.abc import Callable
from typing import Self

from v2v_async.render.terminal_mode import is_foreground

# What terminals send, as xterm, the Linux console, screen and tmux do.
_NAMES = {
    b"[A": "up",
    b"[B": "down",
    b"[C": "right",
    b"[D": "left",
    b"[5~": "pgup",
    b"[6~": "pgdn",
    b"[H": "home",
    b"[F": "end",
    b"[1~": "home",
    b"[4~": "end",
    b"[7~": "home",
    b"[8~": "end",
}
_SEQUENCE = re.compile(rb"\x1b(?:O([A-Z])|(\[[0-9;?]*[ -/]*[@-~]))")
_BEGUN = re.compile(rb"\x1b(?:O|\[[0-9;?]*[ -/]*)?")
# A key's bytes come together; a person who presses Esc waits longer, even over a slow line.
_ESCAPE_TIMEOUT_S = 0.1
_BACKGROUND_S = 0.5
_JOIN_TIMEOUT_S = 2.0


def parse(received: bytes, *, is_all: bool = True) -> tuple[list[str], bytes]:
    """Return the names of the keys and what is left: the beginning of one, unless that is all."""
    names: list[str] = []
    while received:
        if received[0] != 0x1B:
            if 0x20 <= received[0] < 0x7F:
                names.append(chr(received[0]))
            received = received[1:]
        elif found := _SEQUENCE.match(received):
            name = _NAMES.get(b"[" + found[1] if found[1] else found[2])
            if name is not None:
                names.append(name)
            received = received[found.end() :]
        elif (begun := _BEGUN.match(received)) and begun.end() == len(received):
            if not is_all:
                return names, received
            names.append("escape")
            break
        else:
            received = received[1:]  # Alt and a key, or what nobody knows
    return names, b""


class Keys:
    """Calls ``on_key`` with the name of each key, from a thread of its own."""

    def __init__(self, keyboard: int, on_key: Callable[[str], None]) -> None:
        self._keyboard = keyboard
        self._on_key = on_key
        self._thread = threading.Thread(target=self._read, name="keys", daemon=True)
        self._stopped, self._stop = -1, -1

    def __enter__(self) -> Self:
        self._stopped, self._stop = os.pipe()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._stop)
        self._thread.join(_JOIN_TIMEOUT_S)
        if not self._thread.is_alive():
            os.close(self._stopped)

    def _read(self) -> None:
        begun = b""
        while True:
            # In the background keys are the shell's, and reading them would stop the program.
            has_keyboard = is_foreground(self._keyboard)
            wanted = [self._stopped, self._keyboard] if has_keyboard else [self._stopped]
            timeout = _BACKGROUND_S if not has_keyboard else _ESCAPE_TIMEOUT_S if begun else None
            ready, _, _ = select.select(wanted, [], [], timeout)
            if self._stopped in ready:
                return
            received = b""
            if self._keyboard in ready:
                if not is_foreground(self._keyboard):
                    continue
                try:
                    received = os.read(self._keyboard, 256)
                except OSError:
                    return  # the terminal has gone
                if not received:
                    return
            names, begun = parse(begun + received, is_all=not received)
            for name in names:
                self._on_key(name)
