"""``--events``: every event as one line of JSON, written at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from v2v_async.events import Event


class JsonLines:
    """Write events to a file or an open descriptor.

    A write that fails (disk full, reader gone) raises OSError; the broadcast says so once. A
    reader that does not read blocks the run: give it a file, or read.
    """

    name = "--events"

    def __init__(self, target: Path | int) -> None:
        self._target = target
        self._fd: int | None = None

    def __enter__(self) -> Self:
        if isinstance(self._target, int):
            self._fd = os.dup(self._target)
        else:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            self._fd = os.open(self._target, flags, 0o666)
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)

    def __call__(self, event: Event) -> None:
        if self._fd is None:
            return
        left = memoryview(_line(event))
        while left:
            left = left[os.write(self._fd, left) :]


def _line(event: Event) -> bytes:
    # An undecodable file name is a lone surrogate, which JSON in UTF-8 can't hold.
    return (event.to_json() + "\n").encode("utf-8", "replace")
