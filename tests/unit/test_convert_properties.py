"""What is learnt from the debugging output and the -O file, as really printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from v2v_async.convert.inspector_xml import parse_inspector_xml
from v2v_async.convert.properties import (
    read_properties,
    to_firmware,
    to_guestcaps,
    to_inspection,
)

RECORDED = Path(__file__).parent / "recorded"


def lines(name: str) -> list[str]:
    return (RECORDED / name).read_text().splitlines()


def test_windows_with_2_2() -> None:
    found = read_properties(lines("v2v-2.2-windows.stderr"))
    caps = to_guestcaps(found.guestcaps, is_windows=True)
    assert (caps.block_bus, caps.net_bus, caps.machine) == ("ide", "rtl8139", "q35")
    assert caps.acpi is True
    assert caps.default_cpu
    assert not caps.virtio_rng
    assert not caps.rtc_utc, "Windows keeps local time, and 2.2 does not say"
    inspection = to_inspection(found.inspection)
    assert inspection.osinfo == "win2k22"
    assert inspection.product_name == "Windows Server 2022 Standard"
    assert inspection.package_format is None
    assert (inspection.major_version, inspection.minor_version) == (10, 0)
    assert to_firmware(found.firmware) == "bios"


def test_linux_with_2_10_and_its_xml() -> None:
    found = read_properties(lines("v2v-2.10-linux.stderr"))
    caps = to_guestcaps(found.guestcaps, is_windows=False)
    assert (caps.block_bus, caps.net_bus) == ("virtio-blk", "virtio-net")
    assert caps.virtio_rng
    assert caps.isa_pvpanic
    assert caps.default_cpu
    assert caps.rtc_utc
    document = (RECORDED / "v2v-2.10-linux.inspector.xml").read_bytes()
    inspection, firmware = parse_inspector_xml(document)
    assert inspection == to_inspection(found.inspection), "both ways say the same"
    assert inspection.type == "linux"
    assert inspection.root == "/dev/sda1"
    assert firmware == "bios"
    assert to_firmware(found.firmware) == "bios", "without -O, from ‘target firmware’"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("BIOS", "bios"),
        ("UEFI [/dev/sda1]", "uefi"),
        ("uefi", "uefi"),
        ("", "unknown"),
        (None, "unknown"),
        ("coreboot", "unknown"),
    ],
)
def test_firmware(text: str | None, expected: str) -> None:
    assert to_firmware(text) == expected


def test_what_the_guest_prints_in_between_does_not_replace_inspection() -> None:
    said = lines("v2v-2.2-windows.stderr")
    forged = ["i_root = /dev/evil", "i_type = linux", "", "gcaps_machine = virt", ""]
    between = said.index("i_windows_current_control_set = ControlSet001") + 2
    assert between < said.index("gcaps_block_bus = ide")
    found = read_properties([*said[:between], *forged, *said[between:]])
    assert found.inspection["root"] == "/dev/sda1"
    assert found.guestcaps["machine"] == "q35"


def test_the_last_guestcaps_count_and_interrupted_blocks_do_not_mix() -> None:
    found = read_properties(
        [
            "gcaps_block_bus = ide",
            "gcaps_net_bus = e1000",
            "something else",
            "gcaps_block_bus = virtio-scsi",
        ]
    )
    assert found.guestcaps == {"block_bus": "virtio-scsi"}


def test_a_processor_newer_than_qemus_default_is_asked_for() -> None:
    values = {"block_bus": "virtio-blk", "arch_min_version": "2"}
    assert not to_guestcaps(values, is_windows=False).default_cpu


def test_missing_and_unknown_guestcaps_are_errors() -> None:
    with pytest.raises(ValueError, match="did not tell"):
        to_guestcaps({}, is_windows=False)
    with pytest.raises(ValueError, match=r"gcaps_block_bus.*punched-cards"):
        to_guestcaps({"block_bus": "punched-cards"}, is_windows=False)


@pytest.mark.parametrize(
    "document",
    [b"", b"<v2v-inspection>", b"<other/>", b"<v2v-inspection/>"],
    ids=["empty", "cut off", "other", "no system"],
)
def test_bad_inspection_documents(document: bytes) -> None:
    with pytest.raises(ValueError, match="inspection data"):
        parse_inspector_xml(document)


def test_entities_are_not_expanded(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hush")
    document = (
        f'<!DOCTYPE x [<!ENTITY e SYSTEM "file://{secret}">]>'
        "<v2v-inspection><operatingsystem><name>linux</name><product_name>&e;</product_name>"
        "</operatingsystem></v2v-inspection>"
    )
    inspection, _ = parse_inspector_xml(document.encode())
    assert "hush" not in inspection.product_name


@pytest.mark.parametrize("recorded", ["v2v-2.2-windows.stderr", "v2v-2.10-linux.stderr"])
def test_a_block_that_begins_in_the_middle_of_a_line(recorded: str) -> None:
    """The end of the console's line before it comes when it has been printed."""
    said = lines(recorded)
    glued: list[str] = []
    for line in said:
        begins = line.startswith(("i_root = ", "gcaps_block_bus = ", "target firmware: "))
        if begins and glued:
            glued[-1] += line
        else:
            glued.append(line)
    assert len(glued) < len(said)
    whole, found = read_properties(said), read_properties(glued)
    assert (found.inspection, found.guestcaps) == (whole.inspection, whole.guestcaps)
    assert (found.firmware, found.boot_device) == (whole.firmware, whole.boot_device)
    assert found.inspection["root"]
    assert found.guestcaps["block_bus"]
