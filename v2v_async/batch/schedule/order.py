"""In which order the guests of a batch begin, so that no resource idles and none is late.

Longest first is right for a few guests. For many it is wrong: those with much to copy would all
come first, wait for each other with their overlays on the scratch disk, and leave nothing to copy
for those that have much to convert. So many guests of one kind (the same hosts and targets) are
spread evenly over the whole time, the light ones among the heavy ones, and each stretch of the
batch asks for every resource in the same proportion; but none begins so late that it ends last::

    begins at   min( even place x length of the batch,  length of the batch - 2 x its own time )
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from v2v_async.batch.schedule.scheduler import Rank

FEW = 16
"""Up to so many guests, the longest goes first."""

_GOLDEN = 0.6180339887498949
"""Multiples of it, without their whole part, are the most evenly spread of all."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a guest will take, as far as it is known.

    ``loads`` is amount times seconds that it takes of each resource; ``duration_s`` how long it
    takes if it waits for nothing; ``kind`` is the same for guests that share hosts and targets.
    Higher ``priority`` goes first.
    """

    guest: str
    duration_s: float
    loads: Mapping[str, float] = field(default_factory=dict)
    kind: tuple[str, ...] = ()
    priority: int = 0


def shortest_time(works: Iterable[Work], capacities: Mapping[str, int]) -> float:
    """Return a number of seconds below which no schedule can be.

    It is the longest that one guest takes, or the time for which the tightest resource is busy.
    """
    loads = dict.fromkeys(capacities, 0.0)
    longest = 0.0
    for work in works:
        longest = max(longest, work.duration_s)
        for name, amount in work.loads.items():
            loads[name] += amount
    return max([longest, *(loads[name] / amount for name, amount in capacities.items() if amount)])


def order(works: Iterable[Work], capacities: Mapping[str, int]) -> dict[str, Rank]:
    """Return each guest's rank."""
    kinds: dict[tuple[int, tuple[str, ...]], list[Work]] = {}
    priorities: dict[int, list[Work]] = {}
    for work in works:
        kinds.setdefault((work.priority, work.kind), []).append(work)
        priorities.setdefault(work.priority, []).append(work)
    lengths = {each: shortest_time(priorities[each], capacities) for each in priorities}
    ranks: dict[str, Rank] = {}
    for (priority, _), alike in kinds.items():
        length = lengths[priority]
        for place, work in enumerate(sorted(alike, key=lambda each: -each.duration_s)):
            many = len(priorities[priority]) > FEW
            even = (place * _GOLDEN % 1.0) * length if many else length
            ranks[work.guest] = (-priority, min(even, length - 2 * work.duration_s))
    return ranks
