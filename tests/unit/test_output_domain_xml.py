"""The libvirt domain of a target guest."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from lxml import etree

from tests.conftest import require
from v2v_async.model import (
    CpuTopology,
    Guestcaps,
    Inspection,
    Nic,
    SourceDisk,
    SourceGuest,
    SourceRemovable,
    TargetBuses,
    TargetGuest,
)
from v2v_async.output.domain_xml import TargetDisk, domain_xml, name_problem
from v2v_async.output.osinfo import os_id
from v2v_async.output.uefi import UefiFirmware, find_uefi

OVMF = UefiFirmware("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd")
SECURE = UefiFirmware("/fw/CODE.secboot.fd", "/fw/VARS.fd", is_secure=True)


def source(**changes: Any) -> SourceGuest:
    fields: dict[str, Any] = {
        "name": "web",
        "memory": 2 << 30,
        "vcpus": 2,
        "disks": [SourceDisk(index=i, source=f"/{i}", format="raw", size=1) for i in (1, 2)],
    }
    return SourceGuest(**{**fields, **changes})


def target(**changes: Any) -> TargetGuest:
    fields: dict[str, Any] = {
        "name": "web",
        "source": source(),
        "guestcaps": Guestcaps(),
        "inspection": Inspection(),
        "firmware": "bios",
        "buses": TargetBuses(virtio_blk=[1, 2]),
        "boot_disk": 1,
    }
    return TargetGuest(**{**fields, **changes})


def document(guest: TargetGuest, uefi: UefiFirmware | None = None) -> etree._Element:
    disks = {i: TargetDisk(f"/out/{guest.name}-sd{i}", "qcow2") for i in (1, 2)}
    return etree.fromstring(domain_xml(guest, disks, uefi))


def only(root: etree._Element, path: str) -> etree._Element:
    found = root.findall(path)
    assert len(found) == 1, (path, found)
    return found[0]


def test_disks_in_order_with_one_that_boots() -> None:
    root = document(target())
    assert root.xpath("devices/disk/source/@file") == ["/out/web-sd1", "/out/web-sd2"]
    assert root.xpath("devices/disk/target/@dev") == ["vda", "vdb"]
    assert root.xpath("devices/disk/target/@bus") == ["virtio", "virtio"]
    assert [len(d.findall("boot")) for d in root.findall("devices/disk")] == [1, 0]
    assert only(root, "currentMemory").text == only(root, "memory").text == str(2 << 20)


def test_sata_and_scsi_disks_share_the_letters() -> None:
    buses = TargetBuses(
        sata=[1, 2], removables=[SourceRemovable(type="cdrom", controller="virtio-scsi", slot=1)]
    )
    root = document(target(buses=buses, guestcaps=Guestcaps(block_bus="ide")))
    names = [t.get("dev") for t in root.findall("devices/disk/target")]
    assert names == ["sda", "sdb", "sdd"], "slot 0 of the SCSI bus is empty"
    assert only(root, "devices/controller[@type='scsi']").get("model") == "virtio-scsi"


def test_an_i440fx_guest_with_a_cdrom_and_a_floppy() -> None:
    buses = TargetBuses(
        ide=[1, 2],
        removables=[
            SourceRemovable(type="cdrom", controller="ide", slot=3),
            SourceRemovable(type="floppy", controller="floppy", slot=0),
        ],
    )
    caps = Guestcaps(block_bus="ide", machine="i440fx", net_bus="rtl8139", acpi=False)
    root = document(target(buses=buses, guestcaps=caps, nics=[Nic(mac="52:54:00:00:00:01")]))
    assert only(root, "os/type").get("machine") == "pc"
    assert root.xpath("devices/disk/@device") == ["disk", "disk", "cdrom", "floppy"]
    assert root.xpath("devices/disk/target/@dev") == ["hda", "hdb", "hdd", "fda"]
    assert only(root, "devices/interface/model").get("type") == "rtl8139"
    assert only(root, "devices/memballoon").get("model") == "none"
    assert root.find("features/acpi") is None


def test_a_guest_with_old_virtio_drivers_on_q35() -> None:
    caps = Guestcaps(virtio_1_0=False, virtio_rng=True, virtio_balloon=True)
    root = document(target(guestcaps=caps, nics=[Nic()]))
    assert only(root, "devices/disk[1]").get("model") == "virtio-transitional"
    for path in ("interface/model[@type]", "rng[@model]", "memballoon[@model]"):
        element = only(root, f"devices/{path}")
        assert "virtio-transitional" in element.attrib.values()


@pytest.mark.parametrize(
    ("uefi", "secure_boot", "expected"),
    [
        (OVMF, False, {"loader": OVMF.code, "secure": None, "firmware": None, "smm": False}),
        (SECURE, False, {"loader": SECURE.code, "secure": "yes", "firmware": None, "smm": True}),
        (None, False, {"loader": None, "secure": None, "firmware": "efi", "smm": False}),
        (None, True, {"loader": None, "secure": "yes", "firmware": "efi", "smm": True}),
    ],
)
def test_uefi(uefi: UefiFirmware | None, secure_boot: bool, expected: dict[str, Any]) -> None:
    root = document(target(firmware="uefi", secure_boot=secure_boot), uefi)
    loader = root.find("os/loader")
    found = {
        "loader": None if loader is None else loader.text,
        "secure": None if loader is None else loader.get("secure"),
        "firmware": only(root, "os").get("firmware"),
        "smm": root.find("features/smm") is not None,
    }
    assert found == expected


def test_a_bios_guest_has_no_loader_even_where_firmware_is_there() -> None:
    assert document(target(), OVMF).find("os/loader") is None


def test_processor() -> None:
    assert only(document(target()), "cpu").get("mode") == "host-model"
    needy = target(guestcaps=Guestcaps(default_cpu=False))
    assert only(document(needy), "cpu").get("mode") == "host-passthrough"
    known = source(
        cpu_model="Haswell",
        cpu_vendor="Intel",
        cpu_topology=CpuTopology(sockets=1, cores=2, threads=1),
    )
    root = document(target(source=known))
    assert only(root, "cpu").get("match") == "minimum"
    assert only(root, "cpu/model").text == "Haswell"
    assert only(root, "cpu/topology").get("cores") == "2"


@pytest.mark.parametrize(
    ("display", "kind"),
    [
        (None, "vnc"),
        ("window", "sdl"),
        ("vnc", "vnc"),
        ("spice", "spice"),
        ("spice listening on address ::1", "spice"),
        ("teletype", "vnc"),
    ],
)
def test_graphics(display: str | None, kind: str) -> None:
    root = document(target(source=source(display=display)))
    assert only(root, "devices/graphics").get("type") == kind


def test_sound_only_where_qemu_has_the_card() -> None:
    assert document(target(source=source(sound="ich6"))).find("devices/sound") is not None
    assert document(target(source=source(sound="sb16"))).find("devices/sound") is None


def test_networks_and_bridges() -> None:
    nics = [Nic(vnet="net<1>"), Nic(vnet="br0", vnet_type="bridge", mac="52:54:00:00:00:01")]
    root = document(target(nics=nics))
    first, second = root.findall("devices/interface")
    assert (first.get("type"), only(first, "source").get("network")) == ("network", "net<1>")
    assert first.find("mac") is None
    assert (second.get("type"), only(second, "source").get("bridge")) == ("bridge", "br0")


HOSTILE = [
    "a<b>&\"c'",
    "]]> <!-- --> <?x?>",
    "<name><os>",
    "&e;",
    "café 仮想 😀",
    "..x",
    "-on",
    " web ",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_stays_text(name: str) -> None:
    root = document(target(name=name))
    assert root.findtext("name") == name
    assert only(root, "devices/disk[1]/source").get("file") == f"/out/{name}-sd1"
    assert len(root.findall("os")) == 1


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", "a/b", "../../etc/passwd", "a\0b", "a\nb", "a\x1bb", "\ufffe"]
)
def test_names_that_no_guest_can_have(name: str) -> None:
    assert name_problem(name) is not None
    with pytest.raises(ValueError, match="can't be the name"):
        document(target(name=name))


def test_control_characters_elsewhere_do_not_fail_a_converted_guest() -> None:
    root = document(target(nics=[Nic(vnet="a\x01b")]))
    assert only(root, "devices/interface/source").get("network") == "a_b"


@pytest.mark.parametrize(
    ("guest", "uefi"),
    [
        (target(), None),
        (target(name="a<b>&\"c'"), None),
        (target(firmware="uefi"), OVMF),
        (target(firmware="uefi"), None),
        (target(firmware="uefi", secure_boot=True), None),
        (
            target(
                guestcaps=Guestcaps(
                    virtio_1_0=False,
                    virtio_rng=True,
                    virtio_balloon=True,
                    isa_pvpanic=True,
                    virtio_socket=True,
                    rtc_utc=False,
                ),
                inspection=Inspection(osinfo="win2k22", type="windows"),
                source=source(sound="ich9", display="spice", cpu_model="Haswell"),
            ),
            None,
        ),
        (
            target(
                guestcaps=Guestcaps(block_bus="ide", machine="i440fx"),
                buses=TargetBuses(
                    ide=[1, 2],
                    removables=[
                        SourceRemovable(type="cdrom", controller="ide", slot=2),
                        SourceRemovable(type="cdrom", controller="virtio-scsi", slot=0),
                        SourceRemovable(type="floppy", controller="floppy", slot=0),
                    ],
                ),
            ),
            None,
        ),
    ],
    ids=["plain", "hostile name", "uefi", "uefi chosen", "secure", "everything", "removables"],
)
def test_libvirt_takes_it(guest: TargetGuest, uefi: UefiFirmware | None, tmp_path: Path) -> None:
    require("virsh")
    disks = {i: TargetDisk(f"/out/{i}", "raw") for i in (1, 2)}
    file = tmp_path / "guest.xml"
    file.write_bytes(domain_xml(guest, disks, uefi))
    # --validate: against libvirt's schema as well.
    done = subprocess.run(
        ["virsh", "-c", "test:///default", "define", "--validate", str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("short", "uri"),
    [
        ("debian12", "http://debian.org/debian/12"),
        ("debian6.0", "http://debian.org/debian/6"),
        ("ubuntu22.04", "http://ubuntu.com/ubuntu/22.04"),
        ("centos7", "http://centos.org/centos/7.0"),
        ("centos-stream9", "http://centos.org/centos-stream/9"),
        ("rhel9.4", "http://redhat.com/rhel/9.4"),
        ("sles12sp5", "http://suse.com/sles/12.5"),
        ("sle15sp4", "http://suse.com/sle/15.4"),
        ("win2k8r2", "http://microsoft.com/win/2k8r2"),
        ("win2k22", "http://microsoft.com/win/2k22"),
        ("win11", "http://microsoft.com/win/11"),
        ("plan9", None),
        ("debian12/../x", None),
    ],
)
def test_os_id(short: str, uri: str | None) -> None:
    assert os_id(Inspection(osinfo=short)) == uri


def test_os_id_without_a_short_name() -> None:
    ubuntu = Inspection(type="linux", distro="ubuntu", major_version=8, minor_version=4)
    assert os_id(ubuntu) == "http://ubuntu.com/ubuntu/8.04"
    assert os_id(Inspection()) is None


def test_find_uefi() -> None:
    there = {OVMF.code, OVMF.variables, "/usr/share/OVMF/OVMF_CODE.secboot.fd"}
    assert find_uefi("x86_64", exists=there.__contains__) == OVMF
    secure = find_uefi("x86_64", secure=True, exists=there.__contains__)
    assert secure is not None
    assert secure.is_secure
    assert find_uefi("x86_64", exists=lambda path: path == OVMF.code) is None
    assert find_uefi("vax", exists=lambda path: True) is None
