"""Whether the limits and windows of a plan ever let each guest begin. Pure.

::

    needs of a guest ──> more than a limit: never
                     ──> in no hour of the week all of it at once: never
    names in limits  ──> of no guest: a slip of the pen?
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, time, timedelta

from v2v_async.batch.plan.model import GuestPlan, Plan
from v2v_async.batch.preflight.problems import Problem, names, of_guests
from v2v_async.batch.schedule.needs import Needs, source_host, target_name
from v2v_async.batch.schedule.windows import limits_at
from v2v_async.units import format_size

_MONDAY = datetime(2024, 1, 1)
_BYTES = ("memory", "scratch")
_LISTED = 6

Amounts = Mapping[str, int]


def too_large(needs: Mapping[str, Needs], capacities: Amounts) -> list[Problem]:
    """Return a problem for each limit that is less than guests need of it."""
    found: dict[tuple[str, int], list[str]] = {}
    for guest, needed in needs.items():
        for amounts in (_with(needed.convert, needed.keeps), *needed.disks.values()):
            for name, amount in amounts.items():
                if amount > capacities[name]:
                    guests = found.setdefault((name, amount), [])
                    if guest not in guests:
                        guests.append(guest)
    return [
        of_guests(
            guests,
            f"needs {_shown(name, amount)} of ‘{name}’, and the limit is "
            f"{_shown(name, capacities[name])}",
            f"raise limits.{name}"
            + (f", or lower the guest's {name}" if name in _BYTES else ", or leave it out"),
        )
        for (name, amount), guests in found.items()
    ]


def never_open(plan: Plan, needs: Mapping[str, Needs], capacities: Amounts) -> list[Problem]:
    """Return a problem for guests that the windows never let convert, or copy."""
    if not plan.windows:
        return []
    week = [
        dict(capacities) | limits_at(plan.limits, plan.windows, each).capacities
        for each in _moments(plan)
    ]
    found: dict[tuple[str, str], list[str]] = {}
    known: dict[tuple[tuple[str, int], ...], str | None] = {}
    for guest, needed in needs.items():
        tasks = {"conversion": needed.convert}
        if needed.disks:
            # They differ in nothing that a window changes.
            tasks["copy"] = next(iter(needed.disks.values()))
        for task, amounts in tasks.items():
            key = tuple(sorted(amounts.items()))
            if key not in known:
                known[key] = _closed(amounts, capacities, week)
            closed = known[key]
            if closed is not None:
                found.setdefault((task, closed), []).append(guest)
    return [
        of_guests(
            guests,
            f"the windows let no {task} of it begin at any time of the week: {closed}",
            "leave an hour open, or leave the guest out",
        )
        for (task, closed), guests in found.items()
    ]


def unused(plan: Plan) -> list[str]:
    """Return a warning for names in the limits that no guest uses, and the other way round."""
    found: list[str] = []
    used = {
        "hosts": _of(plan.guests, source_host),
        "datastores": _of(plan.guests, lambda guest: guest.datastore),
        "targets": _of(plan.guests, target_name),
        "groups": _of(plan.guests, lambda guest: guest.group),
    }
    for kind, theirs in used.items():
        limited = getattr(plan.limits, kind)
        for name in limited:
            if name not in theirs:
                found.append(f"[limits.{kind}.{name}] holds for no guest: {_list(kind, theirs)}")
    windows = {each.group for each in plan.windows if each.group is not None}
    listed = _list("groups", used["groups"])
    found += [
        f"a window is for the group ‘{name}’, which no guest is in: {listed}"
        for name in sorted(windows - used["groups"].keys())
    ]
    for kind, setting in (("datastores", "datastore"), ("groups", "group")):
        limited = set(getattr(plan.limits, kind)) | (windows if kind == "groups" else set())
        for name, guests in used[kind].items():
            if limited and name not in limited:
                found.append(
                    f"{names(guests)}: the {setting} ‘{name}’ is not in [limits.{kind}], so that "
                    "nothing limits it"
                )
    return found


def _of(
    guests: Iterable[GuestPlan], name_of: Callable[[GuestPlan], str | None]
) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for guest in guests:
        name = name_of(guest)
        if name is not None:
            found.setdefault(name, []).append(guest.name)
    return found


def _list(kind: str, theirs: Iterable[str]) -> str:
    known = sorted(theirs)
    if not known:
        return f"they name no {kind}"
    more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
    return f"their {kind} are {', '.join(known[:_LISTED])}{more}"


def _with(needs: Amounts, keeps: Amounts) -> dict[str, int]:
    return {name: needs.get(name, 0) + keeps.get(name, 0) for name in {**needs, **keeps}}


def _shown(name: str, amount: int) -> str:
    return format_size(amount) if name in _BYTES else str(amount)


def _moments(plan: Plan) -> list[datetime]:
    """Return moments of a week between which no limit changes."""
    times = {time(0)}
    for window in plan.windows:
        times |= {window.begin, window.end}
    days = [_MONDAY + timedelta(days=day) for day in range(7)]
    return [datetime.combine(day, each) for day in days for each in sorted(times)]


def _closed(amounts: Amounts, base: Amounts, week: Sequence[Amounts]) -> str | None:
    """Return why there is no moment at which all of it is there; None where there is one.

    What is more than the limit outside of all windows is not theirs to tell.
    """
    changed = {name for now in week for name in now if now[name] != base.get(name)}
    wanted = {name: amount for name, amount in amounts.items() if name in changed}
    if any(all(now[name] >= amount for name, amount in wanted.items()) for now in week):
        return None
    alone = [name for name, amount in wanted.items() if all(now[name] < amount for now in week)]
    if alone:
        return " and ".join(f"‘{name}’ is 0" for name in sorted(alone))
    return f"{' and '.join(f'‘{name}’' for name in sorted(wanted))} are never open together"
