"""Whether there is room for all that a batch will have on file systems of this machine at once.

::

    overlays       what the limit ‘scratch’ lets be there at once ──┐
    target disks   all of them, in the end                          ├─> by file system: free?
    -o glance      disks on their way, of as many guests as can be ─┘

What is on a source that tells only its size may be far less than that: then it is a warning.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from v2v_async.batch.plan.model import GuestPlan
from v2v_async.batch.preflight.problems import Problem, of_guests
from v2v_async.batch.preflight.target_files import TargetFiles
from v2v_async.model import SourceDisk
from v2v_async.output import files
from v2v_async.units import format_size


def bytes_of(disk: SourceDisk) -> int:
    """Return how many bytes of a disk may have to move: what is allocated, where that is known.

    Of an image with backing files it is at least what they and it take together.
    """
    if disk.allocated is None:
        return disk.size
    blocks = 0
    for file in disk.files:
        with suppress(OSError):
            blocks += os.stat(file).st_blocks * 512
    return min(disk.size, max(disk.allocated, blocks))


@dataclass(frozen=True, slots=True)
class Demand:
    """What somebody needs in a folder. ``likely`` bytes are needed; ``most`` may be.

    ``what`` names it for people, in the plural: ‘overlays’.
    """

    folder: Path
    what: str
    likely: int
    most: int
    guests: tuple[str, ...]


@dataclass(slots=True)
class _FileSystem:
    folder: Path
    demands: list[Demand] = field(default_factory=list)


def scratch_demand(guests: Sequence[GuestPlan], limit: int, tmpdir: Path) -> list[Demand]:
    """Return what the overlays of guests need, of which as many are there as the limit lets."""
    wanted = min(limit, sum(guest.scratch for guest in guests))
    if not wanted:
        return []
    return [Demand(tmpdir, "overlays", wanted, wanted, tuple(guest.name for guest in guests))]


def target_demands(
    guests: Iterable[GuestPlan], targets: dict[str, TargetFiles], limit: int
) -> list[Demand]:
    """Return what the target disks of guests need; ``limit`` is that of scratch.

    Those that are here only until they have been uploaded are there for as many guests at once as
    have room for their overlays.
    """
    found: list[Demand] = []
    passing: list[Demand] = []
    at_once = most_at_once(guests, limit)
    for guest, target in targets.items():
        by_folder: dict[Path, list[SourceDisk]] = {}
        for folder, disk in target.room:
            by_folder.setdefault(folder, []).append(disk)
        for folder, disks in by_folder.items():
            demand = _disk_demand(guest, folder, disks, target)
            (passing if target.is_passing else found).append(demand)
    passing.sort(key=lambda each: -each.most)
    return found + passing[:at_once]


def most_at_once(guests: Iterable[GuestPlan], limit: int) -> int:
    """Return how many guests can have overlays at once: the small ones, where they differ."""
    count, left = 0, limit
    for amount in sorted(guest.scratch for guest in guests):
        left -= amount
        if left < 0:
            break
        count += 1
    return max(1, count)


def _disk_demand(
    guest: str, folder: Path, disks: Sequence[SourceDisk], target: TargetFiles
) -> Demand:
    whole = sum(disk.size for disk in disks)
    if target.is_preallocated:
        return Demand(folder, "disks", whole, whole, (guest,))
    most = sum(bytes_of(disk) for disk in disks)
    known = sum(bytes_of(disk) for disk in disks if disk.allocated is not None)
    # How far it can be compressed nobody knows.
    return Demand(folder, "disks", 0 if target.is_compressed else known, most, (guest,))


def check_room(demands: Iterable[Demand]) -> tuple[list[Problem], list[Problem]]:
    """Return what has no room, and what may have none."""
    systems: dict[int, _FileSystem] = {}
    problems: list[Problem] = []
    warnings: list[Problem] = []
    for demand in demands:
        folder = _existing(demand.folder)
        if folder is not None:
            device = folder.stat().st_dev
            systems.setdefault(device, _FileSystem(folder)).demands.append(demand)
    for system in systems.values():
        free = files.free_space(system.folder)
        likely = sum(each.likely for each in system.demands)
        most = sum(each.most for each in system.demands)
        if likely > free:
            problems.append(_short(system, free, likely, "needs"))
        elif most > free:
            warnings.append(_short(system, free, most, "may need"))
    return problems, warnings


def _existing(folder: Path) -> Path | None:
    """Return a folder, or that in which it will be made."""
    return next((each for each in (folder, *folder.parents) if each.is_dir()), None)


def _short(system: _FileSystem, free: int, amount: int, verb: str) -> Problem:
    sums: dict[str, int] = {}
    guests: dict[str, dict[str, None]] = {}
    folders: dict[Path, None] = {}
    for each in system.demands:
        needed = each.likely if verb == "needs" else each.most
        if needed:
            sums[each.what] = sums.get(each.what, 0) + needed
            guests.setdefault(each.what, {}).update(dict.fromkeys(each.guests))
            folders[each.folder] = None
    parts = [
        f"{format_size(size)} for {what} of "
        + ("one guest" if len(guests[what]) == 1 else f"{len(guests[what])} guests")
        for what, size in sums.items()
    ]
    where = ", ".join(f"‘{folder}’" for folder in list(folders)[:3])
    message = (
        f"the file system of {where} has {format_size(free)} left, and the batch {verb} "
        f"{format_size(amount)} there: {', '.join(parts)}"
    )
    hint = (
        "free space there, send some guests elsewhere (output.storage), have fewer overlays at "
        "once (limits.scratch), or leave guests for another batch"
    )
    return of_guests((), message, hint, is_permanent=False)
