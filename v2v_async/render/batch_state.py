"""What the events of a batch so far add up to. Pure: no clock, no output.

Any order of events is survived. Each event costs the same whether there are five guests or five
thousand: what it changes of one guest is added to the sums, which are never made anew::

    event ─> GuestView ─> what changed ─> counts, waits, bytes, who runs
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from v2v_async.events import Event
from v2v_async.render.batch_guest import DiskView, FailureView, GuestView, number
from v2v_async.render.state import Outcome, Rate

__all__ = ["BatchState", "DiskView", "FailureView", "GuestView"]

_OUTCOMES: dict[str, Outcome] = {
    "finished": "finished",
    "failed": "failed",
    "cancelled": "cancelled",
}
# For the time left: of the seconds in which something was copied, since between two copies there
# is no rate to tell it from, and a disk that ends must not make it jump.
_LONG_WINDOW_S = 120.0
# What is looked at before a batch begins may be talked of; that makes no guest of it.
_TALK = ("warning", "message", "debug")


class BatchState:
    """All guests of a batch.

    ``counts`` is by phase, with ``paused`` beside it, and ``paused`` how many of each phase are;
    ``waits`` and ``disk_waits`` are how many guests and disks wait for what, and ``reasons`` the
    same of guests, but that those which are paused wait for nothing else; ``running``, ``waiting``
    and ``failed`` hold the guests that have their turn, those that do not, and those that have
    failed, in the order in which they came to be so; ``timed`` those that wait for a time.
    ``moved_now`` counts the bytes copied since the first event.
    """

    def __init__(self) -> None:
        self.run: str | None = None
        self.name: str | None = None
        self.started: float | None = None
        self.last = 0.0
        self.outcome: Outcome | None = None
        self.is_paused = False
        self.warnings = 0
        self.guests: dict[str, GuestView] = {}
        self.running: dict[str, GuestView] = {}
        self.waiting: dict[str, GuestView] = {}
        self.failed: dict[str, GuestView] = {}
        self.timed: dict[str, GuestView] = {}
        self.counts: Counter[str] = Counter()
        self.paused: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.disk_waits: Counter[str] = Counter()
        self.limits: dict[str, tuple[int, int]] = {}
        self.to_move = 0
        self.has_moved = 0
        self.moved_now = 0
        self.copying = 0
        self.unconverted = 0
        self.failed_before = 0
        self.conversions = 0
        self.conversions_s = 0.0
        self._rate = Rate()
        self._long_rate = Rate(_LONG_WINDOW_S)
        self._copying_s = 0.0

    def apply(self, event: Event) -> None:
        """Take in the next event."""
        if self.run is None:
            self.run, self.started, self.last = event.run, event.time, event.time
        if event.time > self.last:
            if self.copying:
                self._copying_s += event.time - self.last
            self.last = event.time
        if event.type == "warning":
            self.warnings += 1
        if event.guest is None:
            if event.step is None and event.disk is None:
                self._apply_run(event)
            return
        guest = self.guests.get(event.guest)
        if guest is None:
            if event.type in _TALK:
                return
            guest = self.guests[event.guest] = GuestView(event.guest)
            self._add(guest)
        if event.disk is None:
            self._apply_guest(event, guest)
        else:
            self._apply_disk(event, guest, event.disk)

    # Sums.

    @property
    def fraction(self) -> float:
        """0 to 1 of the bytes; 1 only when every guest has ended."""
        if self.guests and self.left == 0:
            return 1.0
        return min(self.has_moved / self.to_move, 0.999) if self.to_move > 0 else 0.0

    @property
    def left(self) -> int:
        """How many guests have not ended."""
        return len(self.running) + len(self.waiting)

    def elapsed(self, now: float) -> float:
        """Return seconds since the supervisor began."""
        return max(now - self.started, 0.0) if self.started is not None else 0.0

    def rate(self, now: float) -> float | None:
        """Return bytes a second of all copies; None while nothing is copied."""
        return self._rate.at(now) if self.copying else None

    def eta(self, now: float) -> float | None:
        """Return the seconds that are left, or None where nothing tells.

        Nothing does while all that is left is paused. Copies take their bytes at the rate of late.
        Conversions that are left take as long as those before them, as many at a time as the limit
        allows, and the last one's copy follows it.
        """
        if self.outcome is not None or self.is_paused or self.counts["paused"] >= self.left:
            return None
        bytes_left = self.to_move - self.has_moved
        rate = self._long_rate.at(self._copying_s + self._since_last(now))
        if bytes_left > 0 and not rate:
            return None
        copies_s = bytes_left / rate if rate else 0.0
        if not self.unconverted:
            return copies_s
        if not self.conversions:
            return None
        each_s = self.conversions_s / self.conversions
        under_way = [
            max(each_s - (now - guest.attempt_started), 0.0)
            for guest in self.running.values()
            if _is_unconverted(guest) and guest.attempt_started is not None
        ]
        at_once = max(self.limits.get("conversions", (0, 0))[1], len(under_way), 1)
        waiting = self.unconverted - len(under_way)
        conversions_s = max(
            (waiting * each_s + sum(under_way)) / at_once,
            max(under_way, default=0.0) + (each_s if waiting else 0.0),
        )
        last_copy_s = copies_s / self.left
        return max(copies_s, conversions_s + last_copy_s)

    def next_time(self) -> float | None:
        """Return when the first guest that waits for a time goes on (epoch, seconds)."""
        times = (guest.waits_until for guest in self.timed.values() if not guest.is_paused)
        return min((time for time in times if time is not None), default=None)

    def snapshot(self, now: float) -> dict[str, Any]:
        """Return everything as JSON has it."""
        return {
            "version": 1,
            "run": self.run,
            "name": self.name,
            "now": now,
            "started": self.started,
            "outcome": self.outcome,
            "paused": self.is_paused,
            "warnings": self.warnings,
            "counts": {name: count for name, count in self.counts.items() if count},
            "waits": {name: count for name, count in self.waits.items() if count},
            "disk_waits": {name: count for name, count in self.disk_waits.items() if count},
            "limits": {
                name: {"taken": taken, "capacity": capacity}
                for name, (taken, capacity) in self.limits.items()
            },
            "bytes": {
                "to_move": self.to_move,
                "moved": self.has_moved,
                "rate": self.rate(now),
                "eta_s": self.eta(now),
            },
            "guests": [_guest_snapshot(guest, now) for guest in self.guests.values()],
        }

    # The events.

    def _since_last(self, now: float) -> float:
        return max(now - self.last, 0.0) if self.copying else 0.0

    def _apply_run(self, event: Event) -> None:
        details = event.details or {}
        if event.type == "started":
            # Perhaps of another supervisor than before: the first is dead, and its turns with it.
            self.run, self.started = event.run, event.time
            self.name = str(details["batch"]) if details.get("batch") else self.name
            self.outcome, self.is_paused, self.limits = None, False, {}
        elif event.type == "limits":
            self._apply_limits(details)
        elif event.type in ("paused", "resumed"):
            self.is_paused = event.type == "paused"
        elif event.type in _OUTCOMES:
            self.outcome = _OUTCOMES[event.type]

    def _apply_limits(self, details: dict[str, Any]) -> None:
        taken, capacities = details.get("taken"), details.get("capacities")
        if not isinstance(taken, dict) or not isinstance(capacities, dict):
            return
        self.limits = {
            str(name): (int(number(taken.get(name)) or 0), int(number(capacity) or 0))
            for name, capacity in capacities.items()
        }

    def _apply_guest(self, event: Event, guest: GuestView) -> None:
        self._remove(guest)
        has_converted = guest.phase == "converting"
        guest.apply(event, self.started)
        self._add(guest)
        # A conversion that was kept from before did not take this attempt's time.
        if event.type == "converted" and has_converted and guest.attempt_started is not None:
            self.conversions += 1
            self.conversions_s += max(event.time - guest.attempt_started, 0.0)

    def _apply_disk(self, event: Event, guest: GuestView, index: int) -> None:
        to_move, has_moved = guest.share
        copying, phase = guest.copying, guest.phase
        disk = guest.disks.get(index)
        waited_for = disk.waits_for if disk is not None else None
        was_unconverted = _is_unconverted(guest)
        more = guest.apply_disk(event, index)
        now_to_move, now_has_moved = guest.share
        self.to_move += now_to_move - to_move
        self.has_moved += now_has_moved - has_moved
        self.copying += guest.copying - copying
        if guest.phase != phase:
            self.counts[phase] -= 1
            self.counts[guest.phase] += 1
            self.paused[phase] -= guest.is_paused
            self.paused[guest.phase] += guest.is_paused
            self.unconverted += _is_unconverted(guest) - was_unconverted
        disk = guest.disks.get(index)
        waits_for = disk.waits_for if disk is not None else None
        if waits_for != waited_for:
            if waited_for is not None:
                self.disk_waits[waited_for] -= 1
            if waits_for is not None:
                self.disk_waits[waits_for] += 1
        if more or guest.copying:
            self.moved_now += more
            self._rate.add(event.time, self.moved_now)
            self._long_rate.add(self._copying_s, self.moved_now)

    # A guest in the sums.

    def _add(self, guest: GuestView) -> None:
        self._count(guest, 1)
        for place, belongs in (
            (self.running, guest.is_running),
            (self.waiting, not guest.is_running and not guest.has_ended),
            (self.failed, guest.phase == "failed"),
            (self.timed, guest.waits_until is not None),
        ):
            if belongs:
                place.setdefault(guest.name, guest)
            else:
                place.pop(guest.name, None)

    def _remove(self, guest: GuestView) -> None:
        self._count(guest, -1)

    def _count(self, guest: GuestView, sign: int) -> None:
        self.counts[guest.phase] += sign
        self.counts["paused"] += sign * guest.is_paused
        self.paused[guest.phase] += sign * guest.is_paused
        if guest.waits_for is not None:
            self.waits[guest.waits_for] += sign
        if guest.reason is not None:
            self.reasons[guest.reason] += sign
        for disk in guest.disks.values():
            if disk.waits_for is not None:
                self.disk_waits[disk.waits_for] += sign
        to_move, has_moved = guest.share
        self.to_move += sign * to_move
        self.has_moved += sign * has_moved
        self.copying += sign * guest.copying
        self.unconverted += sign * _is_unconverted(guest)
        self.failed_before += sign * guest.is_known_failure


def _is_unconverted(guest: GuestView) -> bool:
    return not guest.is_converted and guest.phase in ("waiting", "checking", "converting")


def _guest_snapshot(guest: GuestView, now: float) -> dict[str, Any]:
    failure = guest.failure
    step_started = guest.step_started
    return {
        "name": guest.name,
        "phase": guest.phase,
        "paused": guest.is_paused,
        "running": guest.is_running,
        "attempt": guest.attempt,
        "priority": guest.priority,
        "group": guest.group,
        "step": guest.step,
        "step_s": None if step_started is None else max(now - step_started, 0.0),
        "elapsed_s": guest.elapsed(now),
        "waits_for": guest.waits_for,
        "waits_until": guest.waits_until,
        "failure": failure
        and {
            "text": failure.text,
            "hint": failure.hint,
            "step": failure.step,
            "disk": failure.disk,
            "offset": failure.offset,
            "log": failure.log,
            "permanent": failure.is_permanent,
            "bundle": failure.bundle,
        },
        "disks": [
            _disk_snapshot(guest.disks[index], now, is_done=guest.phase == "done")
            for index in sorted(guest.disks)
        ],
    }


def _disk_snapshot(disk: DiskView, now: float, *, is_done: bool) -> dict[str, Any]:
    work = disk.work(now)
    rate = work.rate if disk.is_copying else None
    return {
        "number": disk.index,
        "total": disk.total,
        "to_move": disk.to_move,
        "moved": disk.to_move if is_done else disk.has_moved,
        "rate": rate,
        "eta_s": (work.total - work.done) / rate if rate else None,
        "verified": disk.compared[0] if disk.compared is not None else None,
        "waits_for": disk.waits_for,
        "outcome": disk.outcome,
    }
