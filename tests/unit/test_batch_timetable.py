"""Windows while a run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from v2v_async.batch.plan.model import GuestPlan, Plan
from v2v_async.batch.timetable import Timetable
from v2v_async.events import Event, Reporter

CAPACITIES = {"conversions": 2, "disks": 8, "groups.web.disks": 3}
PLAN = {
    "limits": {"bandwidth": "50MB/s", "groups": {"web": {"bandwidth": "10MB/s"}}},
    "windows": [
        {"begin": "08:00:00", "end": "18:00:00", "bandwidth": "5MB/s", "conversions": 0},
        {"begin": "12:00:00", "end": "13:00:00", "group": "web", "disks": 0, "bandwidth": "1MB/s"},
    ],
    "guests": [GuestPlan(name="a")],
}


class Limits:
    """Takes the place of a runner: what it is told."""

    def __init__(self) -> None:
        self.capacities = dict(CAPACITIES)
        self.rates: Mapping[str, int] = {}

    def set_capacity(self, name: str, amount: int) -> None:
        self.capacities[name] = amount

    def set_rates(self, rates: Mapping[str, int]) -> None:
        self.rates = rates


def test_limits_follow_the_clock() -> None:
    limits, events = Limits(), list[Event]()
    now = datetime(2026, 11, 23, 7)
    plan = Plan.model_validate(PLAN)
    timetable = Timetable(
        plan,
        CAPACITIES,
        limits,  # type: ignore[arg-type]
        limits.set_rates,
        Reporter(events.append, "r"),
        clock=lambda: now,
    )
    timetable.apply()
    assert limits.capacities == CAPACITIES
    assert limits.rates == {"": 50_000_000, "groups.web": 10_000_000}
    assert events == []
    now = datetime(2026, 11, 23, 8)
    timetable.apply()
    assert limits.capacities == {**CAPACITIES, "conversions": 0}
    assert limits.rates[""] == 5_000_000
    assert [event.text for event in events] == [
        "the limit of conversions is now 0",
        "the bandwidth has changed: a window has opened or closed",
    ]
    events.clear()
    timetable.apply()
    assert events == [], "nothing is new"
    now = datetime(2026, 11, 23, 12, 30)
    timetable.apply()
    assert limits.capacities == {"conversions": 0, "disks": 8, "groups.web.disks": 0}
    assert limits.rates == {"": 5_000_000, "groups.web": 1_000_000}
    now = datetime(2026, 11, 23, 19)
    timetable.apply()
    assert limits.capacities == CAPACITIES
    assert limits.rates == {"": 50_000_000, "groups.web": 10_000_000}
