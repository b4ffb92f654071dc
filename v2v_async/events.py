"""The one stream of events that every screen, log and program reads.

Core code emits; renderers (``v2v_async/render/``) show. Nothing below the edge prints. Events are
JSON Lines, version 1, schema in ``docs/schema/event.json``. A consumer of version 1 must survive
types and fields that it does not know.

Events are emitted from the event loop's thread only. They are plain dataclasses, since importing
pydantic would cost a short copy a tenth of a second of processor time.
"""

from __future__ import annotations

import json
import time as _time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from v2v_async.redact import redact

EventType = Literal[
    "started",  # a run, guest, step or disk begins
    "planned",  # a disk: bytes by class are known
    "progress",  # a disk: bytes that have landed
    "verifying",  # a disk: bytes that have been compared, in the details
    "finished",
    "failed",
    "cancelled",
    "retrying",
    "warning",
    "message",  # something a person may want to read
    "debug",  # only with -v
    # Of a batch:
    "waiting",  # a guest or disk waits; for what is in the details
    "converted",  # a guest is converted, and that is kept
    "paused",
    "resumed",
    "limits",  # how much of each limit is in use
]


@dataclass(frozen=True, slots=True)
class Bytes:
    """Bytes of a disk by class. Only what has landed counts as copied, zero or skipped.

    ``total`` is the disk's size. ``data`` is what may have to move: bytes found to hold data and
    those not examined yet, so it starts at ``total`` and falls as extents arrive. ``copied`` is
    data written, ``zero`` written as zeroes, ``skipped`` zeroes that the target had already.
    When a disk is done, ``copied + zero + skipped + resumed == total + wasted`` and ``data ==
    copied``. ``wasted`` is data that was copied while the guest was still being converted, and that
    the conversion then changed: it had to be done again.
    """

    total: int = 0
    data: int = 0
    zero: int = 0
    skipped: int = 0
    copied: int = 0
    resumed: int = 0
    retried: int = 0
    wasted: int = 0

    @property
    def landed(self) -> int:
        """Bytes of the disk that are right on the target now."""
        return self.copied + self.zero + self.skipped + self.resumed - self.wasted


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened. Absent fields are left out of the JSON."""

    version: Literal[1] = 1
    time: float = field(metadata={"description": "seconds since the epoch"})
    run: str
    type: str = field(metadata={"description": "one of EventType; consumers must survive others"})
    guest: str | None = None
    step: str | None = field(
        default=None,
        metadata={"description": "input, convert, output, copy, finalize, land, cleanup"},
    )
    disk: int | None = field(default=None, metadata={"description": "1-based"})
    text: str | None = None
    hint: str | None = field(
        default=None, metadata={"description": "what to do next, for failures"}
    )
    offset: int | None = None
    log: str | None = None
    bytes: Bytes | None = None
    duration_s: float | None = None
    details: dict[str, Any] | None = field(
        default=None,
        metadata={"description": "more of it, by type: sizes, versions, what was chosen"},
    )

    def to_json(self) -> str:
        """Return the event as one line of JSON, without a newline."""
        told = {each.name: getattr(self, each.name) for each in fields(self)}
        known = {name: value for name, value in told.items() if value is not None}
        if self.bytes is not None:
            known["bytes"] = {each.name: getattr(self.bytes, each.name) for each in fields(Bytes)}
        # What JSON has no word for, such as a path in the details, is told as text.
        return json.dumps(known, ensure_ascii=False, default=str, separators=(",", ":"))

    @staticmethod
    def from_json(line: str) -> Event:
        """Read what :meth:`to_json` wrote, or a later version did: unknown fields are left out.

        Raises:
            ValueError: it is not an event.
        """
        told = json.loads(line)
        try:
            known = {each.name: told[each.name] for each in fields(Event) if each.name in told}
            if known.get("bytes") is not None:
                amounts = known["bytes"]
                names = [each.name for each in fields(Bytes) if each.name in amounts]
                known["bytes"] = Bytes(**{name: amounts[name] for name in names})
            return Event(**known)
        except TypeError as error:
            raise ValueError(f"not an event: {error}") from None


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

    def pass_on(self, event: Event) -> None:
        """Emit an event that another reporter has made."""
        self._emit(event)

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
