"""What the events so far add up to. Pure: no clock, no output; any order of events is survived.

A disk's fraction counts the bytes that really have to move, ``copied / data``, where bytes that
nobody has examined yet count as data; a disk without data falls back to ``landed / total``. It is
1 only after ``finished``, so a failed or cancelled run never reads 100 %.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from v2v_async.events import Bytes, Event

Outcome = Literal["finished", "failed", "cancelled"]
_OUTCOMES: dict[str, Outcome] = {
    "finished": "finished",
    "failed": "failed",
    "cancelled": "cancelled",
}
_WINDOW_S = 10.0  # long enough to smooth bursts of 4 MiB requests, short enough to show a stall
_SAMPLES = 50  # in a window: it ends within 2 % of where it should
_NO_BYTES = Bytes()


class Rate:
    """Bytes a second over a sliding window."""

    def __init__(self, window_s: float = _WINDOW_S) -> None:
        self._window_s = window_s
        self._samples: deque[tuple[float, int]] = deque()

    def add(self, time: float, count: int) -> None:
        """Note that ``count`` bytes in all had landed at ``time``. Older times are ignored."""
        samples = self._samples
        if samples and (time < samples[-1][0] or count < samples[-1][1]):
            return
        # A newer sample takes the place of one just before it: hundreds of events a second, of
        # all the disks of a batch, need no more memory than ten.
        if len(samples) > 1 and time - samples[-2][0] < self._window_s / _SAMPLES:
            samples[-1] = (time, count)
        else:
            samples.append((time, count))
        # Keep one sample from before the window, so that the window is always covered.
        while len(samples) > 2 and samples[1][0] <= time - self._window_s:
            samples.popleft()

    def at(self, now: float) -> float | None:
        """Return bytes a second at ``now``; None until there is something to tell it from."""
        if len(self._samples) < 2:
            return None
        (start, first), (last, count) = self._samples[0], self._samples[-1]
        elapsed = max(now, last) - start
        return (count - first) / elapsed if elapsed > 0 else None


@dataclass(slots=True)
class Task:
    """A step, or anything else that starts and ends."""

    name: str
    started: float
    ended: float | None = None
    outcome: Outcome | None = None

    def end(self, event: Event) -> None:
        """Note how it ended."""
        self.ended, self.outcome = event.time, _OUTCOMES[event.type]


@dataclass(frozen=True, slots=True)
class Work:
    """What a disk is at: bytes done of those to do, and how fast. ``label``: if not copying."""

    label: str
    fraction: float
    done: int
    total: int
    rate: float | None


@dataclass(slots=True)
class Disk:
    """One disk being copied, and then perhaps compared."""

    guest: str
    index: int
    started: float
    bytes: Bytes = _NO_BYTES
    ended: float | None = None
    outcome: Outcome | None = None
    rate: Rate = field(default_factory=Rate)
    compared: tuple[int, int] | None = None

    def work(self, now: float) -> Work:
        """Return what it is at."""
        if self.compared is not None and self.outcome is None:
            done, total = self.compared
            fraction = done / total if total else 0.0
            return Work("verifying", fraction, done, total, self.rate.at(now))
        return Work("", self.fraction, self.has_moved, self.to_move, self.rate.at(now))

    @property
    def to_move(self) -> int:
        """Bytes that have to move before it is done, as far as known."""
        return max(self.bytes.data, self.bytes.copied) or self.bytes.total

    @property
    def has_moved(self) -> int:
        """Those of :attr:`to_move` that have landed."""
        if self.bytes.data or self.bytes.copied:
            return self.bytes.copied
        return min(self.bytes.landed, self.bytes.total)

    @property
    def fraction(self) -> float:
        """0 to 1; 1 only when it is finished."""
        if self.outcome == "finished":
            return 1.0
        return min(self.has_moved / self.to_move, 0.999) if self.to_move > 0 else 0.0

    def update(self, event: Event) -> None:
        """Take in an event about this disk."""
        if event.bytes is not None:
            self.bytes = event.bytes
            if self.compared is None:
                self.rate.add(event.time, self.has_moved)
        if event.type == "verifying" and event.details is not None:
            if self.compared is None:
                self.rate = Rate()
            self.compared = event.details.get("compared", 0), event.details.get("total", 0)
            self.rate.add(event.time, self.compared[0])
        if event.type in _OUTCOMES:
            self.ended, self.outcome = event.time, _OUTCOMES[event.type]


@dataclass(slots=True)
class Guest:
    """One guest: the step it is in, and those it was in."""

    name: str
    started: float
    steps: dict[str, Task] = field(default_factory=dict)
    ended: float | None = None
    outcome: Outcome | None = None

    @property
    def current(self) -> Task | None:
        """The step that started last and has not ended."""
        return next((s for s in reversed(self.steps.values()) if s.ended is None), None)


@dataclass(slots=True)
class RunState:
    """All guests and disks of a run."""

    started: float | None = None
    last: float = 0.0
    outcome: Outcome | None = None
    guests: dict[str, Guest] = field(default_factory=dict)
    disks: dict[tuple[str, int], Disk] = field(default_factory=dict)
    warnings: int = 0

    def apply(self, event: Event) -> None:
        """Take in the next event."""
        if self.started is None:
            self.started = event.time
        self.last = max(self.last, event.time)
        self.warnings += event.type == "warning"
        if event.guest is None:
            if event.step is None and event.disk is None and event.type in _OUTCOMES:
                self.outcome = _OUTCOMES[event.type]
            if event.step is None and event.disk is None:
                return
        name = event.guest or ""
        guest = self.guests.setdefault(name, Guest(name, event.time))
        if event.disk is not None:
            # Other steps start servers for each disk; only copying moves bytes.
            if event.step in (None, "copy"):
                key = (name, event.disk)
                disk = self.disks.setdefault(key, Disk(name, event.disk, event.time))
                disk.update(event)
        elif event.step is not None:
            if event.type == "started" or event.step not in guest.steps:
                guest.steps.pop(event.step, None)  # so that a step begun again is the last one
                guest.steps[event.step] = Task(event.step, event.time)
            if event.type in _OUTCOMES:
                guest.steps[event.step].end(event)
        elif event.type in _OUTCOMES:
            guest.ended, guest.outcome = event.time, _OUTCOMES[event.type]

    def _is_copied(self, name: str) -> bool:
        guest = self.guests[name]
        step = guest.steps.get("copy")
        return "finished" in (step.outcome if step else None, guest.outcome, self.outcome)

    def elapsed(self, now: float) -> float:
        """Return seconds since the first event."""
        return max(now - self.started, 0.0) if self.started is not None else 0.0

    def duration(self, event: Event) -> float | None:
        """Return how long what ``event`` ends took: what it says, or else since its start."""
        if event.duration_s is not None:
            return event.duration_s
        begun: float | None = None
        guest = self.guests.get(event.guest or "")
        if event.disk is not None:
            disk = self.disks.get((event.guest or "", event.disk))
            begun = disk.started if disk is not None else None
        elif event.step is not None:
            task = guest.steps.get(event.step) if guest is not None else None
            begun = task.started if task is not None else None
        else:
            begun = guest.started if guest is not None and event.guest is not None else self.started
        return max(event.time - begun, 0.0) if begun is not None else None

    @property
    def to_move(self) -> int:
        """Bytes of all disks that have to move."""
        return sum(disk.to_move for disk in self.disks.values())

    @property
    def has_moved(self) -> int:
        """Bytes of all disks that have."""
        return sum(disk.has_moved for disk in self.disks.values())

    @property
    def fraction(self) -> float:
        """0 to 1 over all disks; 1 only when every guest's copy step is finished.

        All known disks being finished is not enough: more may follow.
        """
        names = {guest for guest, _ in self.disks}
        if names and all(self._is_copied(name) for name in names):
            return 1.0
        return min(self.has_moved / self.to_move, 0.999) if self.to_move > 0 else 0.0
