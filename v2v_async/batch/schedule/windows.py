"""Parts of the week in which other limits hold. Pure: the time is given, local and naive."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import get_args

from v2v_async.batch.plan.model import Day, Limits, Window

KINDS = ("hosts", "datastores", "targets", "groups")
"""What limits may be named after."""

_DAYS: tuple[Day, ...] = get_args(Day)


@dataclass(frozen=True, slots=True)
class Now:
    """The limits that hold: resource names as in :mod:`needs`, rates in bytes a second.

    ``rates`` is by place (``groups.web``, ``hosts.esx1``), ``""`` for all copies together; what is
    not in it has no limit.
    """

    capacities: dict[str, int]
    rates: dict[str, int]


def is_open(window: Window, now: datetime) -> bool:
    """Tell whether ``now`` is in the window; one that passes midnight belongs to its first day."""
    return any(begin <= now < end for begin, end in _spans(window, now))


def limits_at(limits: Limits, windows: Iterable[Window], now: datetime) -> Now:
    """Return what the windows that are open now change; a later one in the plan wins."""
    capacities: dict[str, int] = {}
    rates = {
        f"{kind}.{name}": group.bandwidth
        for kind in KINDS
        for name, group in getattr(limits, kind).items()
        if group.bandwidth is not None
    }
    if limits.bandwidth is not None:
        rates[""] = limits.bandwidth
    for window in windows:
        if not is_open(window, now):
            continue
        if window.bandwidth is not None:
            rates["" if window.group is None else f"groups.{window.group}"] = window.bandwidth
        for what in ("conversions", "disks"):
            amount = getattr(window, what)
            if amount is not None:
                capacities[what if window.group is None else f"groups.{window.group}.{what}"] = (
                    amount
                )
    return Now(capacities, rates)


def next_change(windows: Iterable[Window], now: datetime) -> datetime | None:
    """Return when a window opens or closes next; None where there are none."""
    changes = (
        moment
        for window in windows
        for span in _spans(window, now)
        for moment in span
        if moment > now
    )
    return min(changes, default=None)


def _spans(window: Window, now: datetime) -> Iterator[tuple[datetime, datetime]]:
    """Yield the window's spans from the last week to the next."""
    for offset in range(-7, 8):
        day = now.date() + timedelta(days=offset)
        if _DAYS[day.weekday()] not in window.days:
            continue
        begin = datetime.combine(day, window.begin)
        end = datetime.combine(day, window.end)
        if window.end <= window.begin:
            end += timedelta(days=1)
        yield begin, end
