"""Which disk goes to which bus and slot of the target.

Fixed disks keep their order on the one bus that the guest has a driver for. A removable drive keeps
its slot where that is free, else it takes the next free one: drives that had a slot choose first.

::

    sata: [1, 2, None, CD]     slot:  0 1 2 3
           └──┴── fixed disks         └ the CD-ROM was in slot 3 of the source
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from v2v_async.model import (
    Controller,
    Guestcaps,
    SourceDisk,
    SourceRemovable,
    TargetBuses,
)

Bus = Literal["virtio-blk", "virtio-scsi", "ide", "sata", "floppy"]


def fixed_bus(guestcaps: Guestcaps) -> Bus:
    """Return the bus of the fixed disks. q35 has no IDE: such a disk is on SATA there."""
    if guestcaps.block_bus == "ide":
        return legacy_bus(guestcaps)
    return guestcaps.block_bus


def legacy_bus(guestcaps: Guestcaps) -> Bus:
    """Return the bus of drives that want IDE (ARM's virt machine has neither IDE nor SATA)."""
    legacy: dict[str, Bus] = {"i440fx": "ide", "q35": "sata", "virt": "virtio-scsi"}
    return legacy[guestcaps.machine]


def assign_buses(
    disks: Sequence[SourceDisk], removables: Sequence[SourceRemovable], guestcaps: Guestcaps
) -> tuple[TargetBuses, list[str]]:
    """Return where everything goes, and a warning for each drive that could not keep its slot.

    In the result ``removables`` have the target's controller and slot.
    """
    bus = fixed_bus(guestcaps)
    fixed: dict[Bus, list[int | None]] = {bus: [disk.index for disk in disks]}
    taken: dict[Bus, set[int]] = {bus: set(range(len(disks)))}
    warnings: list[str] = []
    placed: list[SourceRemovable] = []
    for removable in sorted(removables, key=lambda r: r.slot is None):
        where = _removable_bus(removable, guestcaps)
        slots = taken.setdefault(where, set())
        slot = removable.slot or 0
        while slot in slots:
            slot += 1
        slots.add(slot)
        if removable.slot is not None and slot != removable.slot:
            what = "CD-ROM" if removable.type == "cdrom" else "floppy"
            warnings.append(
                f"the {what} drive of slot {removable.slot} is in slot {slot} of the target: "
                "another disk has its place, and it may have another name in the guest"
            )
        controller: Controller = where
        placed.append(SourceRemovable(type=removable.type, controller=controller, slot=slot))
    return (
        TargetBuses(
            virtio_blk=fixed.get("virtio-blk", []),
            virtio_scsi=fixed.get("virtio-scsi", []),
            ide=fixed.get("ide", []),
            sata=fixed.get("sata", []),
            removables=placed,
        ),
        warnings,
    )


def _removable_bus(removable: SourceRemovable, guestcaps: Guestcaps) -> Bus:
    if removable.type == "floppy":
        return "floppy"
    match removable.controller:
        case "scsi" | "virtio-scsi" | "sata" | "nvme":
            return "virtio-scsi"
        case _:
            # virtio-blk has no removable media: libvirt refuses such a drive.
            return legacy_bus(guestcaps)
