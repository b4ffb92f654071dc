"""A batch of made-up guests, and a clock that jumps from one end of a task to the next."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush

from v2v_async.batch.schedule.order import Work, order, shortest_time
from v2v_async.batch.schedule.scheduler import Scheduler, Task


@dataclass(frozen=True)
class Guest:
    """What converting it takes, then each disk: seconds, and amounts of resources."""

    name: str
    convert_s: float
    needs: Mapping[str, int]
    keeps: Mapping[str, int]
    disks_s: tuple[float, ...]
    disk_needs: Mapping[str, int]
    priority: int = 0

    @property
    def work(self) -> Work:
        """It, as the order of the batch sees it."""
        duration = self.convert_s + max(self.disks_s)
        loads = {name: self.convert_s * amount for name, amount in self.needs.items()}
        for name, amount in self.disk_needs.items():
            loads[name] = loads.get(name, 0.0) + amount * sum(self.disks_s)
        for name, amount in self.keeps.items():
            loads[name] = loads.get(name, 0.0) + amount * duration
        kind = tuple(sorted(name for name in self.disk_needs if name.startswith(("from", "to"))))
        return Work(self.name, duration, loads, kind, self.priority)


@dataclass(frozen=True)
class Batch:
    """Guests, and how much there is of each resource."""

    guests: dict[str, Guest]
    capacities: dict[str, int]

    @property
    def bound_s(self) -> float:
        """No schedule is shorter."""
        return shortest_time([each.work for each in self.guests.values()], self.capacities)


@dataclass
class Result:
    """What a simulated run did."""

    makespan_s: float = 0.0
    started: list[tuple[str, int]] = field(default_factory=list)
    decisions_s: list[float] = field(default_factory=list)
    peak: dict[str, int] = field(default_factory=dict)


def made_batch(seed: int, count: int) -> Batch:
    """Make a batch: one busy host among several, sizes as they are found (log-normal)."""
    chance = random.Random(seed)
    hosts = [f"from{index}" for index in range(chance.randint(1, 8))]
    targets = [f"to{index}" for index in range(chance.randint(1, 4))]
    capacities = {
        "conversions": chance.randint(2, 12),
        "disks": chance.randint(8, 32),
        "memory": chance.randint(16, 64) * 1024,
        "scratch": chance.randint(200, 600),
        **{host: chance.choice([4, 8, 16]) for host in hosts},
        **{target: chance.choice([8, 16, 32]) for target in targets},
    }
    guests = {}
    for index in range(count):
        host = chance.choice(hosts) if chance.random() < 0.7 else hosts[0]
        connections = chance.choice([1, 2, 4])
        guests[f"guest{index}"] = Guest(
            name=f"guest{index}",
            convert_s=chance.uniform(30, 300),
            needs={"conversions": 1, "memory": chance.choice([1024, 2048, 2048, 4096])},
            keeps={"scratch": chance.randint(1, 20)},
            disks_s=tuple(
                chance.lognormvariate(4, 1) for _ in range(chance.choice([1, 1, 1, 2, 2, 3, 8]))
            ),
            disk_needs={"disks": 1, host: connections, chance.choice(targets): connections},
        )
    return Batch(guests, capacities)


def simulate(batch: Batch) -> Result:
    """Run the batch and return what happened; the limits are checked at every step."""
    ranks = order([each.work for each in batch.guests.values()], batch.capacities)
    scheduler = Scheduler(batch.capacities)
    keys: dict[object, tuple[str, int]] = {
        (name, part): (name, part)
        for name, guest in batch.guests.items()
        for part in range(len(guest.disks_s) + 1)
    }
    result = Result(peak=dict.fromkeys(batch.capacities, 0))
    left = {name: len(guest.disks_s) for name, guest in batch.guests.items()}
    for guest in batch.guests.values():
        key = (guest.name, 0)
        scheduler.add(Task(key, guest.name, ranks[guest.name], guest.needs, guest.keeps))
    now = 0.0
    ends: list[tuple[float, tuple[str, int]]] = []
    while True:
        began = time.thread_time()
        started = scheduler.start(now)
        result.decisions_s.append(time.thread_time() - began)
        for name in batch.capacities:
            result.peak[name] = max(result.peak[name], scheduler.taken(name))
        for task in started:
            name, part = keys[task.key]
            guest = batch.guests[name]
            took = guest.disks_s[part - 1] if part else guest.convert_s
            heappush(ends, (now + took, (name, part)))
            result.started.append((name, part))
        if not ends:
            break
        now, key = heappop(ends)
        scheduler.finish(key)
        guest = batch.guests[key[0]]
        if key[1] == 0:
            for index, seconds in enumerate(guest.disks_s, 1):
                rank = (*ranks[guest.name], -seconds)
                scheduler.add(Task((guest.name, index), guest.name, rank, guest.disk_needs))
        else:
            left[guest.name] -= 1
            if left[guest.name] == 0:
                scheduler.release(guest.name)
    assert not any(left.values()), "some tasks never started"
    result.makespan_s = now
    return result
