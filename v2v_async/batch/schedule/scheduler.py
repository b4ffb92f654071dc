"""Which task of a batch starts next: pure, synchronous, without a clock of its own.

A task takes an amount of each resource that it names (conversions, disks, connections to one host,
bytes of scratch space …), and gives it back when it is done; what it *keeps* (the scratch space of
an overlay) stays with its guest until the guest is done. Tasks start in the order of their rank as
far as they fit, and a task that does not fit waits beside the resource that is short::

    add ──> ready ──fits──> running ──finish──> (what the guest keeps) ──release──> free
              │  ▲
        short of R │ R is freed
              ▼  │
          waiting[R]      sorted by rank; only the first few are looked at when R is freed

A task that others have overtaken too often becomes the *urgent* one: nobody may take what it needs
any more, so it starts as soon as enough tasks have ended. There is one at a time, and it always can
start in the end, since no task asks for more than a resource has.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter

from v2v_async.errors import UsageError

LOOK_BEHIND = 32
"""How many tasks that wait for one resource are looked at when it is freed: bounds the time."""

MAX_OVERTAKEN = 64
"""How often others may start before a task that was there first and did not fit."""

Rank = tuple[float, ...]
"""Smaller starts earlier."""


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to do for one guest. Amounts are in the resource's own unit.

    ``needs`` is taken while it runs, ``keeps`` from its start until :meth:`Scheduler.release` of
    the guest. ``not_before`` is a time of the caller's clock, in seconds (retries back off).
    """

    key: Hashable
    guest: str
    rank: Rank
    needs: Mapping[str, int] = field(default_factory=dict)
    keeps: Mapping[str, int] = field(default_factory=dict)
    not_before: float = 0.0

    @property
    def wants(self) -> dict[str, int]:
        """What must be free for it to start."""
        names = {**self.needs, **self.keeps}
        return {name: self.needs.get(name, 0) + self.keeps.get(name, 0) for name in names}


@dataclass(slots=True, eq=False)
class _Waiting:
    """A task that has not started."""

    task: Task
    wants: dict[str, int]
    number: int
    overtaken: int = 0
    short_of: str | None = None
    queue: list[_Waiting] | None = None

    place: tuple[Rank, int] = field(init=False)

    def __post_init__(self) -> None:
        self.place = (self.task.rank, self.number)


def _by_time(waiting: _Waiting) -> float:
    return waiting.task.not_before


_by_place = attrgetter("place")


class Scheduler:
    """Holds what waits and what runs; :meth:`start` says what begins now.

    ``capacities`` names every resource. The caller does the work and tells when it has ended.
    """

    def __init__(self, capacities: Mapping[str, int]) -> None:
        self._capacity = dict(capacities)
        # A limit may be lowered for some hours; what fits the largest that was set can wait for it.
        self._largest = dict(capacities)
        self._taken = dict.fromkeys(capacities, 0)
        self._ready: list[_Waiting] = []
        self._waiting: dict[str, list[_Waiting]] = {name: [] for name in capacities}
        self._later: list[_Waiting] = []
        self._freed: set[str] = set()
        self._running: dict[Hashable, Task] = {}
        self._kept: dict[str, list[Mapping[str, int]]] = {}
        self._known: dict[Hashable, _Waiting] = {}
        self._paused: dict[str, list[Task]] = {}
        self._urgent: _Waiting | None = None
        self._numbers = 0

    def add(self, task: Task) -> None:
        """Have a task wait for its turn.

        Raises:
            UsageError: it needs more than there is, so it could never start.
            ValueError: its key is there already, or a resource is not known.
        """
        if task.key in self._known or task.key in self._running:
            raise ValueError(f"task {task.key} is there already")
        wants = task.wants
        for name, amount in wants.items():
            if name not in self._capacity:
                raise ValueError(f"task {task.key} needs ‘{name}’, which is not a resource")
            if amount > self._largest[name]:
                raise UsageError(
                    f"{task.guest}: needs {amount} of ‘{name}’, and the limit is "
                    f"{self._largest[name]}",
                    hint="raise that limit, or leave the guest out",
                )
        if task.guest in self._paused:
            self._paused[task.guest].append(task)
            return
        self._numbers += 1
        waiting = _Waiting(task, wants, self._numbers)
        self._known[task.key] = waiting
        if task.not_before > 0:
            insort(self._later, waiting, key=_by_time)
            waiting.queue = self._later
        else:
            self._ready.append(waiting)
            waiting.queue = self._ready

    def start(self, now: float = 0.0) -> list[Task]:
        """Return the tasks that start now, and take what they need."""
        while self._later and self._later[0].task.not_before <= now:
            late = self._later.pop(0)
            self._ready.append(late)
            late.queue = self._ready
        started: list[Task] = []
        if self._urgent is not None and self._short_of(self._urgent) is None:
            started.append(self._begin(self._urgent))
        while candidates := self._candidates():
            for waiting in candidates:
                short = self._short_of(waiting)
                if short is None:
                    started.append(self._begin(waiting))
                elif short != waiting.short_of:
                    self._wait_for(waiting, short)
        return started

    def finish(self, key: Hashable) -> Task:
        """Give back what a running task needed; its guest goes on having what it keeps."""
        task = self._running.pop(key)
        self._give_back(task.needs)
        return task

    def release(self, guest: str) -> None:
        """Give back what a guest keeps: it is done, or has failed."""
        for kept in self._kept.pop(guest, ()):
            self._give_back(kept)

    def withdraw(self, guest: str) -> list[Task]:
        """Take a guest's tasks that have not started out of the queue, and return them."""
        gone = [each for each in self._known.values() if each.task.guest == guest]
        for waiting in gone:
            self._remove(waiting)
        held = self._paused.get(guest, [])
        tasks = [*(each.task for each in gone), *held]
        held.clear()
        return tasks

    def pause(self, guest: str) -> None:
        """Let no more tasks of a guest start; what runs goes on."""
        if guest not in self._paused:
            self._paused[guest] = self.withdraw(guest)

    def resume(self, guest: str) -> None:
        """Let a guest's tasks start again."""
        for task in self._paused.pop(guest, []):
            self.add(task)

    def set_capacity(self, name: str, amount: int) -> None:
        """Change a limit. What runs goes on, even where that is more than the new limit."""
        self._capacity[name] = amount
        self._largest[name] = max(amount, self._largest[name])
        self._freed.add(name)

    @property
    def running(self) -> Mapping[Hashable, Task]:
        """What has started and not ended, by key."""
        return self._running

    def taken(self, name: str) -> int:
        """Return how much of a resource is in use."""
        return self._taken[name]

    def reasons(self) -> dict[Hashable, str]:
        """Return what each task waits for: a resource, ``time``, ``paused``; ``""``: nothing."""
        found = {key: waiting.short_of or "" for key, waiting in self._known.items()}
        found.update((waiting.task.key, "time") for waiting in self._later)
        return found | {task.key: "paused" for held in self._paused.values() for task in held}

    def due(self, key: Hashable) -> float | None:
        """Return when the back-off of a waiting task ends; None: it has none."""
        waiting = self._known.get(key)
        return None if waiting is None else waiting.task.not_before or None

    def limits(self) -> dict[str, tuple[int, int]]:
        """Return how much of each resource is in use, and how much there is."""
        return {name: (self._taken[name], most) for name, most in self._capacity.items()}

    def next_time(self) -> float | None:
        """Return when a task's back-off ends, of the caller's clock; None: none waits for that."""
        return self._later[0].task.not_before if self._later else None

    # Below: one decision.

    def _candidates(self) -> list[_Waiting]:
        """Return by rank who may start: new ones, and the first that wait for what was freed."""
        found = self._ready[:]
        for waiting in found:
            waiting.queue = None  # each of them starts or waits for something before this ends
        self._ready.clear()
        for name in self._freed:
            found += self._waiting[name][:LOOK_BEHIND]
        self._freed.clear()
        return sorted(found, key=_by_place)

    def _short_of(self, waiting: _Waiting) -> str | None:
        """Return a resource of which too little is free for it; None: it can start."""
        urgent = None if self._urgent is waiting else self._urgent
        if urgent is not None and any(n > self._capacity[name] for name, n in urgent.wants.items()):
            urgent = None  # a window is closed to it: nothing is kept free for that long
        for name, amount in waiting.wants.items():
            reserved = urgent.wants.get(name, 0) if urgent is not None else 0
            if self._taken[name] + amount + reserved > self._capacity[name]:
                return name
        return None

    def _wait_for(self, waiting: _Waiting, name: str) -> None:
        """Have it wait beside another resource."""
        self._leave_queue(waiting)
        waiting.short_of = name
        waiting.queue = self._waiting[name]
        insort(waiting.queue, waiting, key=_by_place)

    def _begin(self, waiting: _Waiting) -> Task:
        task = waiting.task
        self._count_overtaken(waiting)
        self._remove(waiting)
        for name, amount in waiting.wants.items():
            self._taken[name] += amount
        self._running[task.key] = task
        if task.keeps:
            self._kept.setdefault(task.guest, []).append(task.keeps)
        return task

    def _count_overtaken(self, started: _Waiting) -> None:
        """Note at the first that waits for each resource taken that somebody came before it."""
        for name in started.wants:
            queue = self._waiting[name]
            if not queue or queue[0].place >= started.place:
                continue
            queue[0].overtaken += 1
            if queue[0].overtaken >= MAX_OVERTAKEN and self._urgent is None:
                self._urgent = queue[0]

    def _remove(self, waiting: _Waiting) -> None:
        del self._known[waiting.task.key]
        self._leave_queue(waiting)
        if waiting is self._urgent:
            self._urgent = None
            self._freed |= waiting.wants.keys()

    def _leave_queue(self, waiting: _Waiting) -> None:
        """Take it out of where it waits; those behind it are looked at then."""
        if waiting.queue is not None:
            waiting.queue.remove(waiting)
            waiting.queue = None
        if waiting.short_of is not None:
            self._freed.add(waiting.short_of)
            waiting.short_of = None

    def _give_back(self, amounts: Mapping[str, int]) -> None:
        for name, amount in amounts.items():
            self._taken[name] -= amount
            self._freed.add(name)
