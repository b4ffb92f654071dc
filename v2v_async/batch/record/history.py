"""What the events of a run (``events.jsonl``) tell of its guests afterwards."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Of a weekend's run most lines are these; they are not even parsed.
_PROGRESS = (b'"type":"progress"', b'"type":"verifying"')
_ENDS = ("finished", "failed", "cancelled")


@dataclass(slots=True)
class GuestHistory:
    """What became of a guest, as far as events say.

    ``steps_s`` is how long each step took, all attempts together; ``copy_s`` the last copy alone.
    ``bundle`` is the failure bundle of the last failure.
    """

    steps_s: dict[str, float] = field(default_factory=dict)
    copy_s: float | None = None
    bundle: str | None = None


def read_history(path: Path) -> dict[str, GuestHistory]:
    """Return the history of each guest that the file names; empty where there is no such file."""
    found: dict[str, GuestHistory] = {}
    for event in _events(path):
        name, step, kind = event.get("guest"), event.get("step"), event.get("type")
        if not isinstance(name, str) or event.get("disk") is not None or kind not in _ENDS:
            continue
        history = found.setdefault(name, GuestHistory())
        duration = event.get("duration_s")
        if isinstance(step, str) and isinstance(duration, int | float):
            history.steps_s[step] = history.steps_s.get(step, 0.0) + duration
            if step == "copy":
                history.copy_s = float(duration)
        details = event.get("details")
        if isinstance(details, dict) and isinstance(details.get("bundle"), str):
            history.bundle = details["bundle"]
    return found


def last_events(path: Path, guest: str, count: int, *, most_bytes: int) -> list[dict[str, Any]]:
    """Return a guest's last events but for progress, as JSON has them; those of the run too.

    Only the last ``most_bytes`` of the file are looked at.
    """
    kept: deque[dict[str, Any]] = deque(maxlen=count)
    for event in _events(path, most_bytes):
        if event.get("guest", guest) == guest:
            kept.append(event)
    return list(kept)


def _events(path: Path, most_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the events but for progress; what is no event, such as half a line, is left out."""
    try:
        file = path.open("rb")
    except OSError:
        return
    with file:
        if most_bytes is not None and (size := path.stat().st_size) > most_bytes:
            file.seek(size - most_bytes)
            file.readline()  # most likely the end of one
        for line in file:
            if any(mark in line for mark in _PROGRESS):
                continue
            try:
                event = json.loads(line)
            except ValueError:  # of UnicodeDecodeError, too
                continue
            if isinstance(event, dict):
                yield event
