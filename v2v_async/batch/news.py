"""What a batch says about itself between the steps of its guests: who waits, what is in use."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from v2v_async.batch.schedule.scheduler import Scheduler
from v2v_async.events import Reporter


class News:
    """Emits ``waiting`` and ``limits`` events where something has changed since the last time."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._reasons: dict[Hashable, tuple[str, float | None]] = {}
        self._limits: dict[str, tuple[int, int]] = {}

    def tell(self, scheduler: Scheduler) -> None:
        """Say what is new."""
        reasons: dict[Hashable, tuple[str, float | None]] = {}
        key: Any
        for key, reason in scheduler.reasons().items():
            if not reason:
                continue  # it may start at once
            until = scheduler.due(key) if reason == "time" else None
            reasons[key] = reason, until
            if self._reasons.get(key) != reasons[key]:
                guest, part = key  # a guest's conversion, or one of its disks
                mine = self._reporter.for_guest(guest)
                if isinstance(part, int):
                    mine = mine.for_disk(part)
                mine.emit("waiting", details={"for": reason, "until": until})
        self._reasons = reasons
        limits = scheduler.limits()
        if limits != self._limits:
            self._limits = limits
            self._reporter.emit(
                "limits",
                details={
                    "taken": {name: taken for name, (taken, _) in limits.items()},
                    "capacities": {name: most for name, (_, most) in limits.items()},
                },
            )
