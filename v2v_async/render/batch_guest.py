"""What the events so far say of one guest of a batch, and of its disks. Pure, as ``state``.

::

    planned ─> waiting ─┬─> checking ─> converting ─> converted ─> copying ─> finalizing ─> done
                 ↑      └──────────────────┬──────────────┘           │           │
                 └──────── retrying ───────┴────> failed, cancelled <─┴───────────┘

The phases are the journal's, but for those that a dead supervisor was in: until a guest has its
turn again, it is ``waiting``, or ``converted`` if its conversion was kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from v2v_async.batch.record.journal import ENDED
from v2v_async.events import Event
from v2v_async.render.state import Disk, Rate

_OUTCOMES = {"finished": "done", "failed": "failed", "cancelled": "cancelled"}
_BEGINNINGS = {
    "waiting": "waiting",
    "checking": "waiting",
    "converting": "waiting",
    "converted": "converted",
    "copying": "converted",
    "finalizing": "converted",
    "done": "done",
    "failed": "failed",
    "cancelled": "cancelled",
}
_CONVERSION = ("input", "convert", "output")
_LARGEST = 1e18
_COPY = (None, "copy")  # other steps start servers for each disk; only copying moves bytes


@dataclass(frozen=True, slots=True)
class FailureView:
    """Why a guest failed, or why its last attempt did."""

    text: str
    hint: str | None = None
    step: str | None = None
    disk: int | None = None
    offset: int | None = None
    log: str | None = None
    is_permanent: bool = False
    bundle: str | None = None


@dataclass(slots=True)
class DiskView(Disk):
    """One disk of a guest. ``estimate``: bytes that may have to move, before more is known."""

    estimate: int = 0
    waits_for: str | None = None
    is_copying: bool = False

    @property
    def to_move(self) -> int:
        """Bytes that have to move before it is done, as far as known."""
        return max(self.bytes.data, self.bytes.copied) or self.bytes.total or self.estimate

    @property
    def total(self) -> int:
        """The disk's size in bytes; 0 until it is known."""
        return self.bytes.total

    def begin_again(self) -> None:
        """Forget how an earlier attempt ended."""
        self.ended = self.outcome = self.compared = None
        self.rate = Rate()


@dataclass(slots=True)
class GuestView:
    """One guest. Times are seconds since the epoch.

    ``is_running``: an attempt has its turn. ``moves`` and ``moved`` are the bytes of its disks.
    ``is_known_failure``: it failed before those who look now began, and is only told again.
    """

    name: str
    phase: str = "waiting"
    phase_since: float | None = None
    attempt: int = 0
    priority: int = 0
    group: str | None = None
    started: float | None = None
    attempt_started: float | None = None
    ended: float | None = None
    is_paused: bool = False
    is_running: bool = False
    is_converted: bool = False
    waits_for: str | None = None
    waits_until: float | None = None
    failure: FailureView | None = None
    is_known_failure: bool = False
    steps: dict[str, float] = field(default_factory=dict)
    disks: dict[int, DiskView] = field(default_factory=dict)
    moves: int = 0
    moved: int = 0
    copying: int = 0

    @property
    def step(self) -> str | None:
        """The step that began last and has not ended."""
        return next(reversed(self.steps), None)

    @property
    def step_started(self) -> float | None:
        """When :attr:`step` began."""
        return next(reversed(self.steps.values()), None)

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will be done for it."""
        return self.phase in ENDED

    @property
    def reason(self) -> str | None:
        """What it waits for; a pause is known at once, before the scheduler gives it as reason."""
        return "paused" if self.is_paused and not self.is_running else self.waits_for

    @property
    def share(self) -> tuple[int, int]:
        """Its bytes to move, and those that have: what has ended has nothing left."""
        if self.phase == "done":
            return self.moves, self.moves
        if self.phase in ENDED:
            return self.moved, self.moved
        return self.moves, self.moved

    def fraction(self) -> float:
        """0 to 1 over its disks; 1 only when it is done."""
        if self.phase == "done":
            return 1.0
        return min(self.moved / self.moves, 0.999) if self.moves > 0 else 0.0

    def rate(self, now: float) -> float:
        """Bytes a second of its disks that are being copied."""
        return sum(d.rate.at(now) or 0.0 for d in self.disks.values() if d.is_copying)

    def elapsed(self, now: float) -> float | None:
        """Seconds since its first attempt began, or that it took."""
        if self.started is None:
            return None
        return max((now if self.ended is None else self.ended) - self.started, 0.0)

    # The events.

    def apply(self, event: Event, began: float | None = None) -> None:
        """Take in an event about this guest as a whole, or about one of its steps.

        ``began``: when the supervisor did, or who looks at its run; what failed before is known.
        """
        if event.step is not None:
            self._apply_step(event, event.step)
            return
        details = event.details or {}
        if event.type == "planned":
            self._plan(event, details, began)
        elif event.type == "waiting":
            self.waits_for = str(details.get("for") or "its turn")
            self.waits_until = number(details.get("until"))
        elif event.type == "started":
            self._begin(event, details)
        elif event.type == "converted":
            self.is_converted = True
            self._reach("converted", event.time)
        elif event.type == "retrying":
            self._rest()
            self.failure = _failure(event, details)
            self._reach("converted" if self.is_converted else "waiting", event.time)
            self.waits_for, self.waits_until = "time", number(details.get("at"))
        elif event.type in _OUTCOMES:
            self._rest()
            self.is_paused = False
            # Of one that had ended before, this only tells how: it took as long as it took.
            self.ended = event.time if self.ended is None else self.ended
            self.failure = _failure(event, details) if event.type == "failed" else None
            self._reach(_OUTCOMES[event.type], event.time)
        elif event.type in ("paused", "resumed"):
            self.is_paused = event.type == "paused" and not self.has_ended
            if not self.is_paused:
                self._forget_pause()

    def disk(self, index: int, time: float) -> DiskView:
        """Return its disk ``index``, which may be new."""
        known = self.disks.get(index)
        if known is None:
            known = self.disks[index] = DiskView(self.name, index, time)
        return known

    def apply_disk(self, event: Event, index: int) -> int:
        """Take in an event about a disk; return by how many bytes its copy went on."""
        if event.step not in _COPY:
            return 0
        disk = self.disk(index, event.time)
        if event.type == "waiting":
            disk.waits_for = str((event.details or {}).get("for") or "its turn")
            return 0
        moves, moved = disk.to_move, disk.has_moved
        if event.type in ("started", "planned") and not disk.is_copying:
            disk.begin_again()
        disk.update(event)
        self.moves += disk.to_move - moves
        self.moved += disk.has_moved - moved
        disk.waits_for = None
        if not self.is_running:
            return 0  # what an earlier supervisor had copied
        if event.type in ("started", "planned", "progress", "verifying"):
            if self.phase in ("checking", "converting", "converted"):
                self._reach("copying", event.time)
            self._set_copying(disk, disk.outcome is None)
        elif event.type in _OUTCOMES:
            self._set_copying(disk, False)
        return max(disk.has_moved - moved, 0) if event.type in ("progress", "finished") else 0

    def _apply_step(self, event: Event, step: str) -> None:
        self.steps.pop(step, None)  # so that a step begun again is the last one
        if event.type != "started" or self.has_ended:
            return
        self.steps[step] = event.time
        self.is_running = True
        self.waits_for = self.waits_until = None
        if step == "convert":
            self.is_converted = False  # what had been kept was of no use
        if step in _CONVERSION:
            if not self.is_converted:
                self._reach("converting", event.time)
        elif step == "copy":
            self._reach("copying", event.time)
        elif step == "finalize":
            self._reach("finalizing", event.time)

    def _plan(self, event: Event, details: dict[str, Any], began: float | None) -> None:
        """Begin with what a supervisor knows when it begins."""
        self._rest()
        phase = str(details.get("phase"))
        # What a supervisor finds wrong before it begins is planned as failed too, but is new.
        started, ended = number(details.get("began")), number(details.get("ended"))
        self.is_known_failure = phase == "failed" and (
            ended is None or began is None or ended < began
        )
        self.is_converted = _BEGINNINGS.get(phase) == "converted"
        self.is_paused = False
        if phase not in ENDED:
            self.ended = None
        elif ended is not None:
            self.started, self.ended = started, ended
        elif self.ended is None:
            self.ended = event.time
        self._reach(_BEGINNINGS.get(phase, "waiting"), event.time)
        self.priority = int(number(details.get("priority")) or 0)
        group = details.get("group")
        self.group = None if group is None else str(group)
        estimates = details.get("disks")
        for index, size in enumerate(estimates if isinstance(estimates, list) else (), 1):
            disk = self.disk(index, event.time)
            before = disk.to_move
            disk.estimate = max(int(number(size) or 0), 0)
            self.moves += disk.to_move - before

    def _begin(self, event: Event, details: dict[str, Any]) -> None:
        self._rest()
        self.attempt = int(number(details.get("attempt")) or self.attempt + 1)
        if self.started is None:
            self.started = event.time
        self.attempt_started = event.time
        self.ended = self.failure = None
        self.is_known_failure = False
        self.is_running = True
        # Its source and its target are opened again, but what it waits for is its copy.
        self._reach("converted" if self.is_converted else "checking", event.time)

    def _rest(self) -> None:
        """Have nothing of it run, and nothing waited for."""
        self.is_running = False
        self.steps.clear()
        self.waits_for = self.waits_until = None
        for disk in self.disks.values():
            disk.waits_for = None
            disk.is_copying = False
        self.copying = 0

    def _forget_pause(self) -> None:
        """Have nothing wait for the end of a pause."""
        if self.waits_for == "paused":
            self.waits_for = None
        for disk in self.disks.values():
            if disk.waits_for == "paused":
                disk.waits_for = None

    def _reach(self, phase: str, time: float) -> None:
        if phase != self.phase or self.phase_since is None:
            self.phase, self.phase_since = phase, time

    def _set_copying(self, disk: DiskView, is_copying: bool) -> None:
        self.copying += is_copying - disk.is_copying
        disk.is_copying = is_copying


def number(value: object) -> float | None:
    """Return what may be a number of an event's details, if it is one."""
    # Neither is infinity nor not-a-number one.
    return value if isinstance(value, (int, float)) and -_LARGEST < value < _LARGEST else None


def _failure(event: Event, details: dict[str, Any]) -> FailureView:
    step, disk, bundle = details.get("step"), number(details.get("disk")), details.get("bundle")
    return FailureView(
        text=event.text or "no reason was given",
        hint=event.hint,
        step=None if step is None else str(step),
        disk=None if disk is None else int(disk),
        offset=event.offset,
        log=event.log,
        is_permanent=bool(details.get("permanent")),
        bundle=None if bundle is None else str(bundle),
    )
