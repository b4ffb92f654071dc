"""Which worker takes a guest, and how workers share a bandwidth. Pure.

A guest stays where it began: its servers are there. So the choice is made once for each attempt,
when it begins, and not before a worker has a free place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

CONVERSIONS, COPIES = "conversions", "copies"
"""The resources that workers are started with."""


@dataclass(slots=True)
class Load:
    """A worker: what it has of each resource, and what we have taken of it."""

    address: str
    total: Mapping[str, int]
    taken: Counter[str] = field(default_factory=Counter)
    guests: int = 0

    @property
    def is_suitable(self) -> bool:
        """Whether a guest can be converted and copied there."""
        return all(self.total.get(name, 0) >= 1 for name in (CONVERSIONS, COPIES))

    def has_free(self, resource: str) -> bool:
        """Whether we leave room for one more."""
        return self.taken[resource] < self.total.get(resource, 0)

    def busy(self, resource: str) -> float:
        """Return which part of a resource is taken; more than 1: some wait for it."""
        return self.taken[resource] / max(1, self.total.get(resource, 0))


def choose(loads: Iterable[Load], resource: str | None, among: Collection[str]) -> str | None:
    """Return the worker for a guest that needs ``resource`` at once; None: wait until one is free.

    The least busy one of those in ``among``: first by that resource, then by copies, which are what
    a guest spends most of its time with.
    """
    able = [
        load
        for load in loads
        if load.address in among
        and load.is_suitable
        and (resource is None or load.has_free(resource))
    ]
    if not able:
        return None

    def rank(load: Load) -> tuple[float, float, int, str]:
        first = 0.0 if resource is None else load.busy(resource)
        return first, load.busy(COPIES), load.guests, load.address

    return min(able, key=rank).address


def shares(
    rates: Mapping[str, int], copies: Mapping[str, Counter[str]]
) -> dict[str, dict[str, int]]:
    """Divide rates (bytes a second) among workers by how many copies each has of a group.

    ``copies`` counts by worker, then by group; group ``""`` is all of them. A worker without copies
    gets one share too, for the copy that it begins before it hears of new rates: what all have
    together never exceeds the rate.
    """
    divided: dict[str, dict[str, int]] = {address: {} for address in copies}
    for group, rate in rates.items():
        weights = {address: max(1, counted[group]) for address, counted in copies.items()}
        whole = sum(weights.values())
        for address, weight in weights.items():
            divided[address][group] = max(1, rate * weight // whole)
    return divided
