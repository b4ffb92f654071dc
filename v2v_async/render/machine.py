"""``--machine-readable``: the two streams that virt-v2v gives to programs.

::

    chosen target   { "message": "…", "timestamp": "2026-11-23T02:31:52.684056630+00:00", "type": "error" }
    stdout          67/100

``type`` is message (a step starts), info, warning or error. The progress lines match
``^[0-9]+/[0-9]+$`` and always go to stdout, also when the messages go elsewhere; each number is
written once, they only rise, and 100/100 is written only when copying is finished.

Source: virt-v2v(1), "Machine readable output"; format seen in virt-v2v 2.2.
"""  # noqa: E501

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Literal, Self

from v2v_async.events import Event
from v2v_async.render.state import RunState
from v2v_async.render.text import STARTS

MessageType = Literal["message", "info", "warning", "error"]
Write = Callable[[str], object]


def message_line(text: str, time: float, type_: MessageType) -> str:
    """Return one message as virt-v2v writes it, without a newline."""
    moment = datetime.fromtimestamp(time).astimezone()
    offset = moment.strftime("%z")
    # virt-v2v writes nanoseconds; the clock here has microseconds.
    stamp = f"{moment:%Y-%m-%dT%H:%M:%S.%f}000{offset[:3]}:{offset[3:5]}"
    text = text.encode("utf-8", "replace").decode()
    quoted = json.dumps(text, ensure_ascii=False)
    return f'{{ "message": {quoted}, "timestamp": "{stamp}", "type": "{type_}" }}'


class Machine:
    """Write messages through ``write`` and progress through ``write_progress``.

    Both take one line with its newline, and may raise OSError. Errors are not written from
    events: the edge writes the one that ended the run, see :func:`message_line`.
    """

    name = "--machine-readable"

    def __init__(self, write: Write, write_progress: Write, *, quiet: bool = False) -> None:
        self._write = write
        self._write_progress = write_progress
        self._quiet = quiet
        self._state = RunState()
        self._shown = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Targets belong to the edge."""

    def __call__(self, event: Event) -> None:
        self._state.apply(event)
        if event.type == "warning" and event.text:
            self._message(event, event.text, "warning")
        elif event.type == "message" and event.text:
            self._message(event, event.text, "info")
        elif event.type == "started" and event.step is not None and event.disk is None:
            title = STARTS.get(event.step, event.step)
            self._message(event, f"{title}: {event.text}" if event.text else title, "message")
        if not self._quiet and event.type in ("progress", "finished"):
            self._progress()

    def _message(self, event: Event, text: str, type_: MessageType) -> None:
        self._write(message_line(text, event.time, type_) + "\n")

    def _progress(self) -> None:
        percent = int(self._state.fraction * 100)
        if percent > self._shown:
            self._shown = percent
            self._write_progress(f"{percent}/100\n")
