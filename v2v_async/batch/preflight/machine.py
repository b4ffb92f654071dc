"""Whether this machine can do at once what the limits of a batch let be done at once.

::

    memory                conversions, and the data of copies that is on its way
    open files            of the supervisor: its servers, connections, logs
    processes, threads    appliances, and the servers of the disks
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from v2v_async.batch.plan.model import GuestPlan, Limits, Window
from v2v_async.batch.preflight.problems import Problem
from v2v_async.batch.preflight.room import most_at_once
from v2v_async.units import format_size

# Of the supervisor. Measured with Python 3.11 and 12 disks copied at once over 4 connections each:
# 25 at rest, 6 for a conversion, 12 for a disk with its connections; each rounded up.
_FILES_AT_REST = 96
"""Libraries, the journal and its log, events; a web page and some who look at it."""
_FILES_OF_CONVERSION = 12
_FILES_OF_COPY = 8
"""Checkpoint, log, a witness to each side."""
_FILES_OF_DISK = 3
"""Servers: from Python 3.12 on, one is open for each process that is waited for."""
_SIDES = 2
_CGROUPS = Path("/sys/fs/cgroup")

_TASKS_OF_CONVERSION = 48
"""virt-v2v-in-place, what stands above it, and qemu with its threads."""
_TASKS_OF_COPY = 2 * 64
"""nbdkit has up to 16 threads for a connection, qemu-nbd up to 64 for its disk."""
_TASKS_OF_DISK = 12
"""Up to three servers that wait, and before Python 3.12 a thread that waits for each."""


@dataclass(frozen=True, slots=True)
class Crowd:
    """What there can be at once: disks of guests that have begun, conversions, copies.

    ``connections`` are those to sources; there are as many to targets.
    """

    disks: int
    conversions: int
    copies: int
    connections: int

    @property
    def files(self) -> int:
        """Return how many files the supervisor may have open."""
        return (
            _FILES_AT_REST
            + self.conversions * _FILES_OF_CONVERSION
            + self.copies * _FILES_OF_COPY
            + self.disks * _FILES_OF_DISK
            + self.connections * _SIDES
        )

    @property
    def tasks(self) -> int:
        """Return how many processes and threads there may be."""
        return (
            self.conversions * _TASKS_OF_CONVERSION
            + self.copies * _TASKS_OF_COPY
            + self.disks * _TASKS_OF_DISK
        )


def most(capacities: Mapping[str, int], windows: Iterable[Window], what: str) -> int:
    """Return the most that ``what`` (conversions, disks) is at any time of the week."""
    found = [capacities[what]]
    for window in windows:
        amount: int | None = getattr(window, what)
        if amount is not None and window.group is None:
            found.append(amount)
    return max(found)


def crowd(
    guests: Sequence[GuestPlan],
    disks: Mapping[str, int],
    capacities: Mapping[str, int],
    windows: Sequence[Window],
) -> Crowd:
    """Return what there can be at once; ``disks`` is how many each guest has."""
    at_once = most_at_once(guests, capacities["scratch"])
    counts = sorted((disks.get(guest.name, 1) for guest in guests), reverse=True)
    return Crowd(
        disks=sum(counts[:at_once]),
        conversions=min(most(capacities, windows, "conversions"), len(guests)),
        copies=min(most(capacities, windows, "disks"), sum(counts)),
        connections=capacities["connections"],
    )


def check_memory(
    guests: Sequence[GuestPlan],
    limits: Limits,
    windows: Sequence[Window],
    capacities: Mapping[str, int],
) -> tuple[Problem | None, str | None]:
    """Return what is wrong with the memory, or else what should be known of it."""
    wanted = sorted((guest.memory for guest in guests), reverse=True)
    at_once = sum(wanted[: most(capacities, windows, "conversions")])
    needed = min(at_once, capacities["memory"]) + limits.bytes_in_flight
    total, available = memory()
    told = (
        f"conversions at once may take {format_size(needed - limits.bytes_in_flight)} of memory, "
        f"copies {format_size(limits.bytes_in_flight)}; the machine has {format_size(total)}"
    )
    hint = (
        "lower limits.conversions, limits.memory or limits.bytes_in_flight, or the memory of the "
        "guests where their appliances need less"
    )
    # What nobody asked for is this program's guess: not a reason to refuse a small machine.
    is_chosen = limits.conversions is not None or limits.memory is not None
    if needed > total and is_chosen:
        return Problem(None, told, hint), None
    if needed > available:
        return None, f"{told}, of which {format_size(available)} are free now"
    return None, None


def memory() -> tuple[int, int]:
    """Return the bytes of memory that we may have in all (swap too), and those free now."""
    values: dict[str, int] = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        values[name] = int(rest.split()[0]) * 1024
    total = values["MemTotal"] + values.get("SwapTotal", 0)
    available = values.get("MemAvailable", total) + values.get("SwapFree", 0)
    # What a group uses is mostly pages that it would give back: that says little of what is free.
    for limit, _ in _limits_of_cgroups("memory.max", "memory.current"):
        total, available = min(total, limit), min(available, limit)
    return total, available


def check_files(needed: int) -> tuple[Problem | None, str | None]:
    """Raise our limit of open files where it is too low; return what is wrong, or what was done."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return None, None
    if hard == resource.RLIM_INFINITY or hard >= needed:
        # Not all of the hard limit: what we start inherits it, and some programs close every
        # number below it before they begin.
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        except (OSError, ValueError) as error:
            return Problem(None, f"the limit of open files can't be raised: {error}"), None
        return (
            None,
            f"up to {needed} files may be open at once: the limit was {soft}, and is raised",
        )
    return Problem(
        None,
        f"up to {needed} files may be open at once, and the limit is {hard} (ulimit -Hn)",
        "raise it (LimitNOFILE of a systemd unit, /etc/security/limits.conf), or have fewer guests "
        "at once: limits.scratch, limits.disks, limits.connections",
    ), None


def check_tasks(needed: int) -> Problem | None:
    """Return what is wrong with the number of processes and threads that we may have."""
    room = _tasks_left()
    if room is None or room >= needed:
        return None
    return Problem(
        None,
        f"up to {needed} processes and threads may be there at once, and only {room} more may be "
        "made",
        "raise the limit (ulimit -u; TasksMax of a systemd unit; a container's pids limit), or "
        "lower limits.conversions, limits.disks or limits.scratch",
    )


def _tasks_left() -> int | None:
    """Return how many processes and threads may still be made; None where nothing limits them."""
    found = [limit - used for limit, used in _limits_of_cgroups("pids.max", "pids.current")]
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    # It does not hold for root (setrlimit(2)).
    if soft != resource.RLIM_INFINITY and os.getuid() != 0:
        found.append(soft - _own_tasks())
    return max(0, min(found)) if found else None


def _own_tasks() -> int:
    """Return how many threads this user has."""
    count = 0
    mine = os.getuid()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if folder.stat().st_uid == mine:
                count += len(os.listdir(folder / "task"))
    return count


def _limits_of_cgroups(limit: str, current: str) -> list[tuple[int, int]]:
    """Return (limit, in use) of our control group and those above it, where they limit anything.

    Source: cgroups(7); the files are those of version 2.
    """
    found: list[tuple[int, int]] = []
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if not line.startswith("0::"):
                continue
            own = _CGROUPS / line[3:].lstrip("/")
            for folder in (own, *own.parents):
                if not folder.is_relative_to(_CGROUPS):
                    break
                with suppress(OSError, ValueError):
                    most_ = int((folder / limit).read_text())
                    found.append((most_, int((folder / current).read_text())))
    return found
