"""The one stream of events that every screen, log and program reads.

Core code emits; renderers (``v2v_async/render/``) show. Nothing below the edge prints. Events are
JSON Lines, version 1, schema in ``docs/schema/event.json``. A consumer of version 1 must survive
types and fields that it does not know.

Events are emitted from the event loop's thread only.
"""

from __future__ import annotations

import time as _time
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from v2v_async.redact import redact

EventType = Literal[
    "started",  # a run, guest, step or disk begins
    "planned",  # a disk: bytes by class are known
    "progress",  # a disk: bytes that have landed
    "finished",
    "failed",
    "cancelled",
    "retrying",
    "warning",
    "message",  # something a person may want to read
    "debug",  # only with -v
]


class Bytes(BaseModel):
    """Bytes of a disk by class. Only what has landed counts as copied, zero or skipped.

    ``total`` is the disk's size. ``data`` is what may have to move: bytes found to hold data and
    those not examined yet, so it starts at ``total`` and falls as extents arrive. ``copied`` is
    data written, ``zero`` written as zeroes, ``skipped`` zeroes that the target had already.
    When a disk is done, ``copied + zero + skipped + resumed == total`` and ``data == copied``.
    """

    model_config = ConfigDict(frozen=True)

    total: int = 0
    data: int = 0
    zero: int = 0
    skipped: int = 0
    copied: int = 0
    resumed: int = 0
    retried: int = 0

    @property
    def landed(self) -> int:
        """Bytes of the disk that are right on the target now."""
        return self.copied + self.zero + self.skipped + self.resumed


class Event(BaseModel):
    """One thing that happened. Absent fields are left out of the JSON."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: Literal[1] = 1
    time: float = Field(description="seconds since the epoch")
    run: str
    type: str = Field(description="one of EventType; consumers must survive others")
    guest: str | None = None
    step: str | None = Field(
        default=None, description="input, convert, output, copy, finalize, cleanup"
    )
    disk: int | None = Field(default=None, description="1-based")
    text: str | None = None
    hint: str | None = Field(default=None, description="what to do next, for failures")
    offset: int | None = None
    log: str | None = None
    bytes: Bytes | None = None
    duration_s: float | None = None
    details: dict[str, Any] | None = Field(
        default=None, description="more of it, by type: sizes, versions, what was chosen"
    )

    def to_json(self) -> str:
        """Return the event as one line of JSON, without a newline."""
        return self.model_dump_json(exclude_none=True)


Emit = Callable[[Event], None]
"""Takes an event and returns at once; never raises."""


class Reporter:
    """Emits events about one run, guest, step or disk. Cheap; make one for each place.

    ``for_guest``, ``for_step`` and ``for_disk`` return reporters bound to that place. Texts are
    redacted here, once, for every renderer.
    """

    def __init__(
        self,
        emit: Emit,
        run: str,
        *,
        guest: str | None = None,
        step: str | None = None,
        disk: int | None = None,
        clock: Callable[[], float] = _time.time,
    ) -> None:
        self._emit = emit
        self.run = run
        self.guest = guest
        self.step = step
        self.disk = disk
        self._clock = clock

    def _bound(self, **place: Any) -> Reporter:
        known = {"guest": self.guest, "step": self.step, "disk": self.disk, **place}
        return Reporter(self._emit, self.run, clock=self._clock, **known)

    def tee(self, also: Emit) -> Reporter:
        """Return a reporter for the same place whose events ``also`` gets too."""
        emit = self._emit

        def both(event: Event) -> None:
            emit(event)
            also(event)

        return Reporter(
            both, self.run, guest=self.guest, step=self.step, disk=self.disk, clock=self._clock
        )

    def for_guest(self, guest: str) -> Reporter:
        """Return a reporter for one guest."""
        return self._bound(guest=guest, step=None, disk=None)

    def for_step(self, step: str) -> Reporter:
        """Return a reporter for one step of this guest."""
        return self._bound(step=step, disk=None)

    def for_disk(self, disk: int) -> Reporter:
        """Return a reporter for one disk (1-based) of this step."""
        return self._bound(disk=disk)

    def emit(self, type_: EventType, text: str | None = None, **fields: Any) -> None:
        """Emit an event of ``type_`` about this place."""
        for name in ("text", "hint"):
            value = text if name == "text" else fields.get("hint")
            if value is not None:
                fields[name] = redact(value)
        self._emit(
            Event(
                time=self._clock(),
                run=self.run,
                type=type_,
                guest=self.guest,
                step=self.step,
                disk=self.disk,
                **fields,
            )
        )

    def message(self, text: str) -> None:
        """Say something a person may want to read."""
        self.emit("message", text)

    def warning(self, text: str) -> None:
        """Say something a person should read."""
        self.emit("warning", text)

    def debug(self, text: str) -> None:
        """Say something that only ``-v`` shows."""
        self.emit("debug", text)
