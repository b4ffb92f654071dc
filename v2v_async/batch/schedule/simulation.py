"""A batch without work: its own scheduler, made-up lengths, and a clock that jumps.

::

    facts, limits, windows ──> simulate ──> when each guest converts and copies
                             └> bounds ───> for how long each resource is busy at least

How long a conversion takes nobody knows before, nor how fast a disk can be read: both are guesses.
What waits for what, and in which order, is what the run itself would do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from math import inf

from v2v_async.batch.plan.model import GuestPlan, Plan
from v2v_async.batch.schedule.needs import BYTES_S, CONVERT_S, Facts, needs_of, places_of
from v2v_async.batch.schedule.scheduler import Rank, Scheduler, Task
from v2v_async.batch.schedule.windows import limits_at, next_change

_CONVERT = 0
"""The part of a guest that is its conversion; its disks are counted from 1."""

_LONGEST_WAIT_S = 8 * 86400.0
"""For a window: they come again every week."""
_SOON_S = 1e-6

Key = tuple[str, int]


@dataclass(slots=True)
class GuestForecast:
    """When a guest converts and copies, in seconds from the begin; inf: never."""

    name: str
    conversion: tuple[float, float] | None = None
    copies: dict[int, tuple[float, float]] = field(default_factory=dict)
    bytes: int = 0

    @property
    def begins_s(self) -> float:
        """When something of it begins."""
        spans = [*([self.conversion] if self.conversion else []), *self.copies.values()]
        return min((span[0] for span in spans), default=inf)

    @property
    def ends_s(self) -> float:
        """When all of it is done."""
        spans = [*([self.conversion] if self.conversion else []), *self.copies.values()]
        return max((span[1] for span in spans), default=inf)


@dataclass(frozen=True, slots=True)
class Forecast:
    """A whole batch. ``busy_s``: by resource, for how long at least it is taken as a whole.

    ``longest_s`` is what the longest guest takes alone; no schedule is shorter than that, or than
    the largest of ``busy_s``. ``stuck``: guests that nothing ever lets begin or end.
    """

    guests: list[GuestForecast]
    makespan_s: float
    busy_s: Mapping[str, float]
    longest_s: float
    stuck: list[str]

    @property
    def bottleneck(self) -> str | None:
        """The resource that is busy for longest; None where a single guest takes longer."""
        name = max(self.busy_s, key=self.busy_s.__getitem__, default=None)
        return name if name is not None and self.busy_s[name] >= self.longest_s else None

    @property
    def bound_s(self) -> float:
        """What no schedule is shorter than."""
        return max([self.longest_s, *self.busy_s.values()])


def simulate(
    guests: Sequence[GuestPlan],
    facts: Mapping[str, Facts],
    capacities: Mapping[str, int],
    plan: Plan,
    begin: datetime,
    *,
    converted: frozenset[str] = frozenset(),
) -> Forecast:
    """Return how the guests would go from ``begin`` (local, naive) on.

    Those in ``converted`` only have their copies before them.
    """
    simulation = _Simulation(guests, facts, capacities, plan, begin, converted)
    simulation.run()
    return simulation.result()


class _Simulation:
    """One run of the scheduler. ``now`` is in seconds from the begin."""

    def __init__(
        self,
        guests: Sequence[GuestPlan],
        facts: Mapping[str, Facts],
        capacities: Mapping[str, int],
        plan: Plan,
        begin: datetime,
        converted: frozenset[str],
    ) -> None:
        self._plan = plan
        self._begin = begin
        self._capacities = capacities
        self._needs = needs_of(guests, facts, capacities)
        self._facts = facts
        self._lengths_s = {
            guest.name: 0.0 if guest.name in converted else CONVERT_S for guest in guests
        }
        self._rate_names = {guest.name: ("", *places_of(guest)) for guest in guests}
        self._scheduler = Scheduler(capacities)
        self._found = {
            guest.name: GuestForecast(guest.name, bytes=sum(facts[guest.name].disks))
            for guest in guests
        }
        self._began: dict[Key, float] = {}
        self._converting: dict[str, float] = {}  # by guest: when it ends
        self._copying: dict[Key, float] = {}  # bytes that are left
        self._left = {name: len(each.disks) for name, each in self._needs.items()}
        self._waiting = 0
        self._rates: dict[str, int] = {}
        self._changes_at = 0.0
        self.now = 0.0

    def run(self) -> None:
        """Let the clock jump from event to event until nothing can happen any more."""
        for name, needs in self._needs.items():
            self._add((name, _CONVERT), needs.rank, needs.convert, needs.keeps)
        idle_since = 0.0
        while True:
            if self.now >= self._changes_at:
                self._apply_windows()
            for task in self._scheduler.start(self.now):
                self._start(task)
            if self._converting or self._copying:
                self._advance()
                idle_since = self.now
            elif self._waiting and self._changes_at - idle_since < _LONGEST_WAIT_S:
                self.now = self._changes_at
            else:
                return

    def result(self) -> Forecast:
        """Return what became of them."""
        guests = sorted(self._found.values(), key=lambda each: (each.begins_s, each.ends_s))
        done = [each for each in guests if self._left[each.name] == 0 and each.conversion]
        return Forecast(
            guests=guests,
            makespan_s=max((each.ends_s for each in done), default=0.0),
            busy_s=self._busy(),
            longest_s=max((self._alone_s(name) for name in self._needs), default=0.0),
            stuck=[each.name for each in guests if each not in done],
        )

    # Events.

    def _add(
        self, key: Key, rank: Rank, needs: Mapping[str, int], keeps: Mapping[str, int]
    ) -> None:
        self._scheduler.add(Task(key, key[0], rank, needs, keeps))
        self._waiting += 1

    def _start(self, task: Task) -> None:
        key = task.key
        assert isinstance(key, tuple)
        self._waiting -= 1
        self._began[key] = self.now
        name, part = key
        if part == _CONVERT:
            self._converting[name] = self.now + self._lengths_s[name]
        else:
            self._copying[key] = float(self._facts[name].disks[part - 1])

    def _advance(self) -> None:
        """Go on to the next end, or to the next change of the limits."""
        speeds = share_rates(
            {key: self._rate_names[key[0]] for key in self._copying}, self._rates, BYTES_S
        )
        ends = {key: left / speeds[key] for key, left in self._copying.items()}
        step = min(
            [self._changes_at - self.now, *ends.values()]
            + [end - self.now for end in self._converting.values()]
        )
        self.now += step
        for name, end in list(self._converting.items()):
            if end <= self.now + _SOON_S:
                self._end_conversion(name)
        for key, seconds in ends.items():
            self._copying[key] -= step * speeds[key]
            if seconds <= step + _SOON_S:
                self._end_copy(key)

    def _end_conversion(self, name: str) -> None:
        del self._converting[name]
        key = (name, _CONVERT)
        self._scheduler.finish(key)
        self._found[name].conversion = (self._began[key], self.now)
        needs = self._needs[name]
        for disk, amounts in needs.disks.items():
            rank = (*needs.rank, -needs.lengths_s.get(disk, 0.0))
            self._add((name, disk), rank, amounts, {})
        if not needs.disks:
            self._scheduler.release(name)

    def _end_copy(self, key: Key) -> None:
        del self._copying[key]
        self._scheduler.finish(key)
        name, disk = key
        self._found[name].copies[disk] = (self._began[key], self.now)
        self._left[name] -= 1
        if self._left[name] == 0:
            self._scheduler.release(name)

    def _apply_windows(self) -> None:
        """Have the limits hold that hold now, and note when they change."""
        moment = self._begin + timedelta(seconds=self.now)
        here = limits_at(self._plan.limits, self._plan.windows, moment)
        for name, amount in (dict(self._capacities) | here.capacities).items():
            self._scheduler.set_capacity(name, amount)
        self._rates = here.rates
        change = next_change(self._plan.windows, moment)
        self._changes_at = inf if change is None else (change - self._begin).total_seconds()

    # Bounds.

    def _alone_s(self, name: str) -> float:
        return self._lengths_s[name] + max(self._needs[name].lengths_s.values(), default=0.0)

    def _busy(self) -> dict[str, float]:
        """Return for how long each resource is taken at least."""
        loads = dict.fromkeys(self._capacities, 0.0)
        moved: dict[str, float] = {}
        for name, needs in self._needs.items():
            for resource, amount in needs.convert.items():
                loads[resource] += amount * self._lengths_s[name]
            for resource, amount in needs.keeps.items():
                loads[resource] += amount * self._alone_s(name)
            for disk, amounts in needs.disks.items():
                for resource, amount in amounts.items():
                    loads[resource] += amount * needs.lengths_s[disk]
            for place in self._rate_names[name]:
                moved[place] = moved.get(place, 0.0) + sum(self._facts[name].disks)
        most = dict(self._capacities)
        for window in self._plan.windows:
            for what in ("conversions", "disks"):
                resource = what if window.group is None else f"groups.{window.group}.{what}"
                most[resource] = max(most.get(resource, 0), getattr(window, what) or 0)
        busy = {name: load / most[name] for name, load in loads.items() if most[name]}
        for name, highest in _highest_rates(self._plan).items():
            busy[f"{name}.bandwidth".lstrip(".")] = moved.get(name, 0.0) / highest
        return busy


def share_rates(
    copies: Mapping[Key, Sequence[str]], rates: Mapping[str, int], fastest: float
) -> dict[Key, float]:
    """Return how fast each copy goes: none beyond ``fastest``, no sum beyond its rate, all fair.

    ``copies`` has the names of the rates that hold for each; those that ``rates`` lacks do not.
    """
    speeds: dict[Key, float] = {}
    left = {name: float(rate) for name, rate in rates.items()}
    members = {name: {key for key, mine in copies.items() if name in mine} for name in rates}
    members = {name: keys for name, keys in members.items() if keys}
    while members:
        name = min(members, key=lambda each: left[each] / len(members[each]))
        share = left[name] / len(members[name])
        if share >= fastest:
            break
        for key in members.pop(name):
            speeds[key] = share
            for other in [each for each in members if key in members[each]]:
                members[other].discard(key)
                left[other] -= share
                if not members[other]:
                    del members[other]
    return {key: speeds.get(key, fastest) for key in copies}


def _highest_rates(plan: Plan) -> dict[str, int]:
    """Return the highest rate at any time of those that windows may change.

    Where there is a time without limit, there is no highest.
    """
    found = dict(limits_at(plan.limits, [], datetime(2024, 1, 1)).rates)
    for window in plan.windows:
        name = f"groups.{window.group}" if window.group else ""
        if window.bandwidth is not None and name in found:
            found[name] = max(found[name], window.bandwidth)
    return found
