"""Wait for what nothing tells of.

Tests watch programs of others: that a server listens, that a worker has come to a step or that an
orphan has gone is seen in files, sockets and ``/proc``, and these wake nobody. So they are looked
at again and again, up to a deadline: what does not come fails the test by its name, and holds up
no run. What does tell (the end of a child, an event, a line in a pipe) is waited for itself.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import anyio

_Found = TypeVar("_Found")
# A test waits half of it too long; most looks take well under 1 ms, so that they cost little.
_EVERY_S = 0.02
# Of a socket that listens, in /proc/net/unix (__SO_ACCEPTCON).
_ACCEPTS = "00010000"


def listens(socket: Path) -> bool:
    """Whether somebody listens on a socket: it is there a moment before. Takes no connection."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return any(line.endswith(f" {socket}") and line.split()[3] == _ACCEPTS for line in lines[1:])


def wait_until(
    check: Callable[[], _Found | None],
    what: str | Callable[[], str],
    *,
    within_s: float = 30.0,
    of: subprocess.Popen[Any] | None = None,
) -> _Found:
    """Return what ``check`` finds as soon as that is true.

    ``what`` should be so; a function says it with what is known when it is not. ``of``: the
    program that brings it about, whose end is the end of the waiting.

    Raises:
        AssertionError: it is not so in time, or the program has ended before.
    """
    waiting = _Waiting(check, what, within_s, of)
    while not (found := waiting.look()):
        time.sleep(_EVERY_S)  # see above
    return found


async def until(
    check: Callable[[], _Found | None],
    what: str | Callable[[], str],
    *,
    within_s: float = 30.0,
    of: subprocess.Popen[Any] | None = None,
) -> _Found:
    """As :func:`wait_until`; the event loop goes on meanwhile."""
    waiting = _Waiting(check, what, within_s, of)
    while not (found := waiting.look()):
        await anyio.sleep(_EVERY_S)  # see above
    return found


@dataclass
class _Waiting(Generic[_Found]):
    check: Callable[[], _Found | None]
    what: str | Callable[[], str]
    within_s: float
    of: subprocess.Popen[Any] | None

    def __post_init__(self) -> None:
        self._end = time.monotonic() + self.within_s

    def look(self) -> _Found | None:
        """Return what there is now; raise where nothing more can be hoped for."""
        # Asked first: it may have brought it about just before its end.
        status = None if self.of is None else self.of.poll()
        found = self.check()
        if found or (status is None and time.monotonic() < self._end):
            return found
        why = f"within {self.within_s:g} s" if status is None else f"before the end ({status})"
        what = self.what if isinstance(self.what, str) else self.what()
        raise AssertionError(f"not {why}: {what}")
