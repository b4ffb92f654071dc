"""What a run's journal knows, told as the events that every screen reads.

A supervisor that takes up a run begins with them, and so does whoever looks at a run from outside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from v2v_async.batch.plan.model import Plan
from v2v_async.batch.record import folder
from v2v_async.batch.record.journal import ENDED, Failure, GuestRecord
from v2v_async.batch.schedule.needs import Facts
from v2v_async.events import Reporter


def tell_state(
    run: Path,
    plan: Plan,
    facts: Mapping[str, Facts],
    records: Sequence[GuestRecord],
    reporter: Reporter,
) -> None:
    """Emit ``planned`` for each guest, and what is known of its disks and how it ended.

    ``run`` is the run's folder.
    """
    plans = {guest.name: guest for guest in plan.guests}
    for record in records:
        guest = plans[record.name]
        mine = reporter.for_guest(record.name)
        known = facts.get(record.name)
        mine.emit(
            "planned",
            details={
                "disks": list(known.disks) if known is not None else [],
                "phase": record.phase,
                "priority": guest.priority,
                "group": guest.group,
                "attempt": record.attempts,
                "began": record.began,
                "ended": record.ended,
            },
        )
        for number, amounts in enumerate(record.disks, 1):
            if amounts.total:
                mine.for_step("copy").for_disk(number).emit("progress", bytes=amounts)
        if record.is_paused and record.phase not in ENDED:
            mine.emit("paused")
        if record.phase == "failed" and record.failure is not None:
            bundle = folder.bundle_path(run, record.name)
            more = {"bundle": str(bundle)} if bundle.exists() else {}
            tell_failure(mine, record.failure, more)


def tell_failure(
    reporter: Reporter,
    failure: Failure,
    more: Mapping[str, Any],
    *,
    duration_s: float | None = None,
) -> None:
    """Emit ``failed`` for the guest of ``reporter``; ``more`` joins its details."""
    reporter.emit(
        "failed",
        failure.message,
        hint=failure.hint,
        offset=failure.offset,
        log=failure.log,
        duration_s=duration_s,
        details={
            "step": failure.step,
            "disk": failure.disk,
            "permanent": failure.is_permanent,
            **more,
        },
    )
