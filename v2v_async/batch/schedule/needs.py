"""What each guest takes of the limits. A resource is named after its setting in the plan.

::

    conversions  memory  scratch            for conversions (scratch until the guest is done)
    disks  connections                      for copies
    hosts.NAME.…  datastores.NAME.…  targets.NAME.…  groups.NAME.…    only where the plan has them
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from v2v_async.batch.plan.model import GroupLimits, GuestPlan, Limits, Window
from v2v_async.batch.schedule.order import Work, order
from v2v_async.batch.schedule.scheduler import Rank
from v2v_async.batch.schedule.windows import KINDS
from v2v_async.errors import UsageError
from v2v_async.units import MIB

CONNECTIONS = 4
"""To the source of one disk: what the engine uses for a fast one; fewer where a limit is less."""

CONVERT_S = 120.0
BYTES_S = 100.0 * MIB
"""Guesses, good enough to say which guest is longer than another: seconds of a conversion, and
bytes a second of a disk's copy where nothing limits it."""

_APPLIANCE_MEMORY = 2 << 30
_FOR_EVERYTHING_ELSE = 2 << 30
_SCRATCH_SHARE = 0.9
_NO_LIMIT = 1 << 30  # of what only a window limits


@dataclass(frozen=True, slots=True)
class Needs:
    """What a guest takes of the limits; by disk, from 1, for its copies."""

    rank: Rank
    convert: Mapping[str, int]
    keeps: Mapping[str, int]
    disks: Mapping[int, Mapping[str, int]]
    lengths_s: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a guest before it is taken up: bytes that each disk may have to move."""

    disks: tuple[int, ...]


def source_host(guest: GuestPlan) -> str | None:
    """Return the host that a guest's disks are read from; None: this one."""
    sources = guest.input.source
    first = sources if isinstance(sources, str) else next(iter(sources), "")
    for address in (guest.input.connection, first):
        if address and "://" in address and (host := urlsplit(address).hostname):
            return host
    return None


def target_name(guest: GuestPlan) -> str:
    """Return what ``[limits.targets]`` calls the place that a guest goes to."""
    return guest.output.storage or guest.output.connection or guest.output.type


def capacities(limits: Limits, windows: Iterable[Window], tmpdir: Path) -> dict[str, int]:
    """Return how much there is of each resource; what the plan leaves out is this machine's.

    Raises:
        UsageError: there is no ``tmpdir``.
    """
    memory = limits.memory
    if memory is None:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory = max(_APPLIANCE_MEMORY, physical - _FOR_EVERYTHING_ELSE)
    scratch = limits.scratch
    if scratch is None:
        try:
            scratch = int(shutil.disk_usage(tmpdir).free * _SCRATCH_SHARE)
        except OSError as error:
            raise UsageError(
                f"the temporary directory ‘{tmpdir}’ can't be used: {error.strerror}",
                hint="set TMPDIR to a directory that you can write in",
            ) from error
    conversions = limits.conversions
    if conversions is None:
        processors = os.cpu_count() or 1
        # A conversion waits for its source a third of its time, or for the next program of its
        # appliance: half as many again keep the processors busy (benchmarks/batch_guests.py).
        conversions = max(1, min(processors + -(-processors // 2), memory // _APPLIANCE_MEMORY))
    found = {
        "conversions": conversions,
        "memory": memory,
        "scratch": scratch,
        "disks": limits.disks,
        "connections": limits.connections,
    }
    for kind in KINDS:
        named: dict[str, GroupLimits] = getattr(limits, kind)
        for name, group in named.items():
            for what in ("connections", "conversions", "disks"):
                amount = getattr(group, what)
                if amount is not None:
                    found[f"{kind}.{name}.{what}"] = amount
    for window in windows:
        if window.group is not None:
            for what in ("conversions", "disks"):
                found.setdefault(f"groups.{window.group}.{what}", _NO_LIMIT)
    return found


def needs_of(
    guests: Iterable[GuestPlan],
    facts: Mapping[str, Facts],
    capacity: Mapping[str, int],
) -> dict[str, Needs]:
    """Return what each guest needs, with its rank among them."""
    guests = list(guests)
    places = {guest.name: places_of(guest) for guest in guests}
    works = [_work(guest, facts[guest.name], places[guest.name], capacity) for guest in guests]
    ranks = order(works, capacity)
    return {
        guest.name: Needs(
            rank=ranks[guest.name],
            convert=_convert(guest, places[guest.name], capacity),
            keeps={"scratch": guest.scratch},
            disks={
                number: _copy(places[guest.name], capacity)
                for number in range(1, len(facts[guest.name].disks) + 1)
            },
            lengths_s={
                number: size / BYTES_S for number, size in enumerate(facts[guest.name].disks, 1)
            },
        )
        for guest in guests
    }


def places_of(guest: GuestPlan) -> tuple[str, ...]:
    """Return what a guest's limits may be named after: ``hosts.esx1`` …"""
    named = {
        "hosts": source_host(guest),
        "datastores": guest.datastore,
        "targets": target_name(guest),
        "groups": guest.group,
    }
    return tuple(f"{kind}.{name}" for kind, name in named.items() if name is not None)


def _convert(
    guest: GuestPlan, places: tuple[str, ...], capacity: Mapping[str, int]
) -> dict[str, int]:
    taken = {"conversions": 1, "memory": guest.memory}
    return taken | {
        f"{place}.conversions": 1 for place in places if f"{place}.conversions" in capacity
    }


def _copy(places: tuple[str, ...], capacity: Mapping[str, int]) -> dict[str, int]:
    shared = [f"{place}.connections" for place in places if f"{place}.connections" in capacity]
    shared.append("connections")
    connections = min(CONNECTIONS, *(capacity[name] for name in shared))
    taken = {"disks": 1, **dict.fromkeys(shared, connections)}
    return taken | {f"{place}.disks": 1 for place in places if f"{place}.disks" in capacity}


def _work(
    guest: GuestPlan, facts: Facts, places: tuple[str, ...], capacity: Mapping[str, int]
) -> Work:
    seconds = [size / BYTES_S for size in facts.disks]
    duration = CONVERT_S + max(seconds, default=0.0)
    loads = {name: amount * CONVERT_S for name, amount in _convert(guest, places, capacity).items()}
    for name, amount in _copy(places, capacity).items():
        loads[name] = loads.get(name, 0.0) + amount * sum(seconds)
    loads["scratch"] = guest.scratch * duration
    return Work(guest.name, duration, loads, places, guest.priority)
