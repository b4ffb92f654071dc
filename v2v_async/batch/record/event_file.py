"""The file with all events of a run, for other processes and for later.

It is appended to, a line each (JSON Lines, ``docs/schema/event.json``), by one supervisor after
the other. Of a disk's progress only some is kept: a weekend's run must not fill the disk.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from v2v_async.errors import V2VError
from v2v_async.events import Event

NAME = "events.jsonl"

PROGRESS_EVERY_S = 2.0
"""A disk of 100 GiB at 100 MiB/s leaves 170 KiB so."""
_FREQUENT = ("progress", "verifying")


class EventFile:
    """Appends events to ``run/events.jsonl``. A file that can't be written any more is told once.

    Raises:
        V2VError: (construction) it can't be opened.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / NAME
        try:
            self._fd = os.open(
                self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
            )
            # A supervisor that was killed may have left half a line.
            if (size := os.fstat(self._fd).st_size) and self._last_byte(size) != b"\n":
                os.write(self._fd, b"\n")
        except OSError as error:
            raise V2VError(f"‘{self.path}’ can't be written: {error.strerror}") from error
        self._shown: dict[tuple[str | None, int | None], float] = {}
        self.problem: OSError | None = None

    def __call__(self, event: Event) -> None:
        if event.type in _FREQUENT:
            key = event.guest, event.disk
            if event.time - self._shown.get(key, 0.0) < PROGRESS_EVERY_S:
                return
            self._shown[key] = event.time
        try:
            # One write for each line: a reader sees whole ones.
            os.write(self._fd, event.to_json().encode(errors="replace") + b"\n")
        except OSError as error:
            self.problem = self.problem or error

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _last_byte(self, size: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(size - 1)
            return file.read(1)


class EventReader:
    """Reads what is appended to a run's events from ``offset`` on (None: from its end)."""

    def __init__(self, run: Path, offset: int | None = 0) -> None:
        self.path = run / NAME
        self._rest = b""
        if offset is None:
            offset = self.path.stat().st_size if self.path.exists() else 0
        self._offset = offset

    def read(self) -> Iterator[Event]:
        """Yield the events that have come since the last time; a half-written line waits.

        Raises:
            V2VError: they can't be read.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return
        except OSError as error:
            raise V2VError(f"the events ‘{self.path}’ can't be read: {error.strerror}") from error
        self._offset += len(content)
        *lines, self._rest = (self._rest + content).split(b"\n")
        for line in lines:
            # Half a line of a supervisor that was killed, or events of a later version.
            with contextlib.suppress(ValueError):
                yield Event.from_json(line.decode(errors="replace"))
