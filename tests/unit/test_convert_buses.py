"""Disks and drives on the target's buses."""

from __future__ import annotations

from typing import Any

import pytest

from v2v_async.convert.buses import assign_buses
from v2v_async.model import Guestcaps, SourceDisk, SourceRemovable


def disks(count: int) -> list[SourceDisk]:
    return [
        SourceDisk(index=i, source=f"/{i}", format="raw", size=1, controller="ide")
        for i in range(1, count + 1)
    ]


@pytest.mark.parametrize(
    ("block_bus", "machine", "field"),
    [
        ("virtio-blk", "q35", "virtio_blk"),
        ("virtio-scsi", "q35", "virtio_scsi"),
        ("ide", "i440fx", "ide"),
        ("ide", "q35", "sata"),
        ("ide", "virt", "virtio_scsi"),
    ],
)
def test_fixed_disks_keep_their_order_on_one_bus(block_bus: Any, machine: Any, field: str) -> None:
    buses, warnings = assign_buses(disks(3), [], Guestcaps(block_bus=block_bus, machine=machine))
    assert getattr(buses, field) == [1, 2, 3]
    found = [buses.virtio_blk, buses.virtio_scsi, buses.ide, buses.sata]
    assert sum(map(len, found)) == 3
    assert not warnings


def test_a_cdrom_keeps_its_slot_or_takes_the_next_free_one() -> None:
    caps = Guestcaps(block_bus="ide", machine="i440fx")
    drives = [
        SourceRemovable(type="cdrom", controller="ide"),
        SourceRemovable(type="cdrom", controller="ide", slot=2),
        SourceRemovable(type="cdrom", controller="ide", slot=0),
    ]
    buses, warnings = assign_buses(disks(2), drives, caps)
    assert buses.ide == [1, 2]
    # In order of choosing: slot 2 is free, slot 0 is not (3 is next), then the one without a wish.
    assert [drive.slot for drive in buses.removables] == [2, 3, 4]
    assert len(warnings) == 1
    assert "slot 0" in warnings[0]
    assert "slot 3" in warnings[0]


def test_drives_and_their_controllers() -> None:
    drives = [
        SourceRemovable(type="floppy"),
        SourceRemovable(type="cdrom", controller="virtio-blk"),
        SourceRemovable(type="cdrom", controller="scsi", slot=1),
    ]
    buses, _ = assign_buses(disks(1), drives, Guestcaps())
    assert {(d.type, d.controller, d.slot) for d in buses.removables} == {
        ("floppy", "floppy", 0),
        ("cdrom", "sata", 0),
        ("cdrom", "virtio-scsi", 1),
    }
