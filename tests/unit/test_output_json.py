"""-o json: the document, its schema, and where the disks go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.unit.test_output_domain_xml import OVMF, source, target
from v2v_async.errors import UsageError
from v2v_async.model import (
    CpuTopology,
    Guestcaps,
    Inspection,
    Nic,
    SourceRemovable,
    SourceTpm,
    TargetBuses,
    TargetGuest,
)
from v2v_async.options import OutputOptions
from v2v_async.output.json_file import JsonOutput, expand_pattern
from v2v_async.output.json_model import TargetDocument, target_document
from v2v_async.secret import Secret


def document(guest: TargetGuest, **more: Any) -> dict[str, Any]:
    paths = [Path(f"/out/{guest.name}-{disk.index}") for disk in guest.source.disks]
    made = target_document(guest, paths, "qcow2", more.get("uefi")).to_json()
    found: dict[str, Any] = json.loads(made)
    # Whoever reads it by the model sees all of it.
    assert TargetDocument.model_validate(found).to_json() == made
    check_required(found)
    return found


def check_required(found: dict[str, Any]) -> None:
    """The published schema: no key that it does not have, none missing that it requires."""
    schema = json.loads((ROOT / "docs" / "schema" / "target-json.json").read_text())

    def check(value: Any, part: dict[str, Any]) -> None:
        options = [part, *part.get("anyOf", [])]
        for option in options:
            if "$ref" in option:
                check(value, schema["$defs"][option["$ref"].rpartition("/")[2]])
        if isinstance(value, dict) and "properties" in part:
            assert value.keys() <= part["properties"].keys()
            assert set(part.get("required", ())) <= value.keys()
            for name, inner in value.items():
                check(inner, part["properties"][name])
        if isinstance(value, list):
            for inner in value:
                check(inner, part.get("items", {}))

    check(found, schema)


def test_a_plain_guest() -> None:
    found = document(target(nics=[Nic(mac="52:54:00:11:22:33", model="vmxnet3")]))
    assert found["version"] == 1
    assert (found["name"], found["memory"], found["vcpu"]) == ("web", 2 << 30, 2)
    assert found["firmware"] == {"type": "bios", "secure-boot": False}
    assert found["machine"] == "q35"
    common = {"bus": "virtio", "format": "qcow2", "size": 1}
    assert found["disks"] == [
        {"dev": "vda", "file": "/out/web-1", "boot": True, **common},
        {"dev": "vdb", "file": "/out/web-2", "boot": False, **common},
    ]
    assert found["nics"] == [
        {
            "vnet": "default",
            "vnet-type": "network",
            "model": "vmxnet3",
            "mac": "52:54:00:11:22:33",
        }
    ]
    assert found["inspect"]["distro"] is None
    assert found["guestcaps"]["block-bus"] == "virtio-blk"
    assert found["guestcaps"]["acpi"] is True
    for absent in ("genid", "cpu", "sound", "display", "tpm"):
        assert absent not in found


def test_everything() -> None:
    hardware = source(
        genid="3eb5b6e6-dbe1-4e4e-9bb3-3c6a9c1e3a11",
        cpu_vendor="Intel",
        cpu_model="Haswell",
        cpu_topology=CpuTopology(sockets=1, cores=2, threads=1),
        sound="ich9",
        display="vnc en-us",
        tpm=SourceTpm(model="tpm-crb", version="2.0"),
        features=["acpi", "apic"],
    )
    buses = TargetBuses(
        sata=[2, None],
        virtio_scsi=[1],
        removables=[
            SourceRemovable(type="cdrom", controller="sata", slot=2),
            SourceRemovable(type="floppy", controller="floppy", slot=0),
        ],
    )
    guest = target(
        source=hardware,
        buses=buses,
        firmware="uefi",
        guestcaps=Guestcaps(video="qxl", acpi=False),
        inspection=Inspection(
            root="/dev/sda1", type="linux", distro="debian", osinfo="debian12", arch="x86_64"
        ),
    )
    found = document(guest, uefi=OVMF)
    assert found["firmware"]["uefi"] == {"code": OVMF.code, "vars": OVMF.variables, "flags": []}
    assert found["cpu"] == {
        "vendor": "Intel",
        "model": "Haswell",
        "topology": {"sockets": 1, "cores": 2, "threads": 1},
    }
    # SATA and SCSI disks share the names.
    assert [(d["dev"], d["bus"], d["boot"]) for d in found["disks"]] == [
        ("sda", "sata", False),
        ("sdd", "scsi", True),
    ]
    assert found["removables"] == [
        {"type": "cdrom", "dev": "sdc", "bus": "sata"},
        {"type": "floppy", "dev": "fda", "bus": "floppy"},
    ]
    assert found["display"] == {"type": "vnc"}
    assert found["sound"] == {"model": "ich9"}
    assert found["tpm"] == {"model": "tpm-crb", "version": "2.0"}
    assert found["guestcaps"]["video"] == "qxl"
    assert found["guestcaps"]["acpi"] is False
    assert found["inspect"]["root"] == "/dev/sda1"


def test_keys_that_virt_v2v_had_are_there() -> None:
    """All of virt-v2v 1.44's, but for what this project does not know of a guest."""
    found = document(target(nics=[Nic(mac="52:54:00:11:22:33", model="e1000")]))
    their = {
        "": "version name memory vcpu firmware features machine disks removables nics guestcaps "
        "inspect",
        "guestcaps": "block-bus net-bus machine arch virtio-rng virtio-balloon isa-pvpanic "
        "virtio-socket acpi",
        "inspect": "root type distro osinfo arch major-version minor-version package-format "
        "package-management product-name product-variant",
    }
    for part, keys in their.items():
        assert set(keys.split()) <= (found[part] if part else found).keys()
    assert {"dev", "bus", "format", "file"} <= found["disks"][0].keys()
    assert {"vnet", "vnet-type", "model", "mac"} <= found["nics"][0].keys()


@pytest.mark.parametrize("name", ['we"b\\', "$(touch x)\n", "😀", "x" * 300, "</script>", "\u2028"])
def test_any_name_is_a_string(name: str) -> None:
    assert document(target(name=name))["name"] == name


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("%{GuestName}-%{DiskDeviceName}", "web-sdb"),
        ("%{GuestName}/disk%{DiskNo}.img", "web/disk2.img"),
        ("100%%-%{DiskNo}", "100%-2"),
        ("%%{DiskNo}", "%{DiskNo}"),
        ("50%-%{DiskNo}", "50%-2"),
    ],
)
def test_patterns(pattern: str, expected: str) -> None:
    assert str(expand_pattern(pattern, "web", 1)) == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("%{Disk}", "there is no variable %{Disk}"),
        ("%{}", "there is no variable"),
        ("/abs-%{DiskNo}", "leads out"),
        ("../%{DiskNo}", "names a directory"),
        ("a/../../%{DiskNo}", "names a directory"),
        ("a\n%{DiskNo}", "control character"),
        ("a\0%{DiskNo}", "control character"),
        ("%{DiskNo}/", "names no file"),
        ("", "names no file"),
        (".", "names no file"),
    ],
)
def test_patterns_that_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(options=(("json-disks-pattern", pattern),))


def parse(**fields: Any) -> JsonOutput:
    return JsonOutput.parse(OutputOptions(**{"mode": "json", "storage": "/out", **fields}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"storage": None}, "needs a directory"),
        ({"password": Secret("x")}, "takes no -op"),
        ({"connection": "qemu:///system"}, "takes no -oc"),
        ({"options": (("json-disk-pattern", "x"),)}, "no option ‘-oo json-disk-pattern’"),
        ({"options": (("json-disks-pattern", "a"), ("json-disks-pattern", "b"))}, "once"),
        ({"name": "../x"}, "it has a slash"),
    ],
)
def test_wrong_options(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(**fields)
