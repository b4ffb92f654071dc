"""-o qemu, -o kubevirt, and -o local on a block device, against what virt-v2v 2.2 wrote.

It was the same guest: tests/recorded.

A difference is a mistake here unless it is listed, and docs/targets-*.md give the reasons.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from tests.conftest import ROOT
from tests.e2e.test_against_virt_v2v import ALLOWED, differences
from tests.kubevirt_api import check
from v2v_async.model import (
    Guestcaps,
    Inspection,
    Nic,
    SourceDisk,
    SourceGuest,
    TargetBuses,
    TargetGuest,
)
from v2v_async.output.domain_xml import TargetDisk, domain_xml
from v2v_async.output.kubevirt_yaml import virtual_machine
from v2v_async.output.qemu_script import qemu_script

RECORDED = ROOT / "tests" / "recorded"

# What virt-v2v takes for granted of a guest that is only a disk, and found in this one.
GUEST = TargetGuest(
    name="system",
    source=SourceGuest(
        name="system",
        memory=2 << 30,
        vcpus=1,
        features=["acpi", "apic", "pae"],
        display="window",
        disks=[SourceDisk(index=1, source="/system.img", format="raw", size=1 << 30)],
        nics=[Nic()],
    ),
    guestcaps=Guestcaps(virtio_rng=True, virtio_balloon=True, isa_pvpanic=True, virtio_socket=True),
    inspection=Inspection(type="linux", distro="debian", osinfo="debian12"),
    firmware="bios",
    buses=TargetBuses(virtio_blk=[1]),
    boot_disk=1,
    nics=[Nic()],
)


def options(script: Path, folder: Path) -> set[str]:
    """Return qemu's options with their values, as the script gives them, one string each."""
    fake = folder / "qemu-system-x86_64"
    fake.write_text('#!/bin/sh\nprintf "%s\\0" "$@" >"$NOTED"\n')
    fake.chmod(0o755)
    noted = folder / "noted"
    subprocess.run(
        ["sh", str(script)],
        env={
            "PATH": f"{folder}:{os.environ['PATH']}",
            "NOTED": str(noted),
            "QEMU_ACCEL": "kvm",
            "QEMU_DISPLAY": "gtk",
        },
        check=True,
    )
    words = noted.read_text().split("\0")[:-1]
    found, current = set(), ""
    for word in words:
        if word.startswith("-"):
            found.add(current)
            current = word
        else:
            current += f" {word}"
    return {*found, current} - {""}


def test_the_script(tmp_path: Path) -> None:
    path = "/var/tmp/rec/qemu/system-sda"
    ours = tmp_path / "ours.sh"
    disks = {1: TargetDisk(path, "raw")}
    ours.write_bytes(qemu_script(GUEST, disks, None, tmp_path / "system.vars"))
    mine = options(ours, tmp_path)
    theirs = options(RECORDED / "virt-v2v-2.2-qemu.sh", tmp_path)
    # A machine with vsock gets one in both; which id is its own affair.
    mine = {each for each in mine if not each.startswith("-device vhost-vsock-pci,guest-cid=")}
    assert theirs - mine == {
        "-name system",
        "-machine q35,accel=kvm:tcg",
        "-m 2048",
        f"-drive file={path},format=raw,if=none,id=drive-vblk-0,media=disk",
        "-device virtio-blk-pci,drive=drive-vblk-0",
        "-device virtio-balloon",
        "-device vhost-vsock-pci,guest-cid=4756",
        "-serial stdio",
    }
    assert mine - theirs == {
        "-name guest=system",
        "-machine q35",
        "-accel kvm",
        "-cpu host",
        "-m 2097152k",
        "-smp cpus=1",
        "-rtc base=utc",
        f"-drive if=none,id=disk1,format=raw,file={path}",
        "-device virtio-blk-pci,drive=disk1,bootindex=1",
        "-device virtio-balloon-pci",
        "-usb",
        "-device usb-tablet",
        "-serial mon:stdio",
    }


def test_the_xml_of_a_block_device() -> None:
    """virt-v2v leaves it to the link, and libvirt to find out what is behind it."""
    theirs = (RECORDED / "virt-v2v-2.2-o-local-block.xml").read_bytes()
    ours = domain_xml(GUEST, {1: TargetDisk("/dev/loop0", "raw", is_block=True)}, None)
    found = differences(theirs, ours)
    about_disks = [line for line in found if "/devices/disk" in line and "/boot" not in line]
    assert sorted(about_disks) == [
        "+ /domain/devices/disk device=disk type=block",
        "+ /domain/devices/disk/source dev=/dev/loop0",
        "- /domain/devices/disk device=disk type=file",
        "- /domain/devices/disk/source file=/var/tmp/bd6/out/system-sda",
    ]
    others = [line for line in found if line not in about_disks]
    assert [d for d in others if not any(re.fullmatch(rule, d) for rule, _ in ALLOWED)] == []


def leaves(value: Any, place: str = "") -> dict[str, Any]:
    """Return every scalar and empty container of a document by its place."""
    if isinstance(value, dict) and value:
        pairs = [(f"{place}.{key}" if place else key, inner) for key, inner in value.items()]
    elif isinstance(value, list) and value:
        pairs = [(f"{place}[{number}]", inner) for number, inner in enumerate(value)]
    else:
        return {place: value}
    return {key: leaf for name, inner in pairs for key, leaf in leaves(inner, name).items()}


def test_the_yaml() -> None:
    theirs = yaml.safe_load((RECORDED / "virt-v2v-2.2-kubevirt.yaml").read_text())
    ours = virtual_machine(GUEST, {1: "/var/tmp/rec/kubevirt/system-sda"}).document
    check(ours)
    with pytest.raises(ValidationError):
        check(theirs)
    # The instance that our machine makes is what can be compared.
    mine = leaves({**ours, "spec": ours["spec"]["template"]["spec"]})
    other = leaves(theirs)
    assert {k for k in mine.keys() & other.keys() if mine[k] == other[k]} == {
        "apiVersion",
        "metadata.name",
        "spec.domain.devices.disks[0].disk.bus",
        "spec.volumes[0].hostDisk.path",
        "spec.volumes[0].hostDisk.type",
    }
    different = {
        k: (other.get(k), mine.get(k)) for k in mine | other if mine.get(k) != other.get(k)
    }
    assert {k: v[0] for k, v in different.items() if v[0] is not None} == {
        "kind": "VirtualMachineInstance",
        "spec.domain.devices.disks[0].name": "disk-0",
        "spec.volumes[0].name": "disk-0",
        "spec.domain.resources.requests.memory": "2048Mi",
        "spec.domain.resources.cpu.cores": 1,
        "spec.domain.resources.features.acpi": {},
        "spec.domain.resources.features.apic": {},
        "spec.domain.resources.features.pae": {},
        "spec.terminationGracePeriodSeconds": 0,
    }
    assert {k for k, v in different.items() if v[0] is None} == {
        "metadata.labels.libguestfs.org/osinfo",
        "metadata.annotations.v2v-async/version",
        "metadata.annotations.v2v-async/original-name",
        "metadata.annotations.v2v-async/product-name",
        "spec.architecture",
        "spec.domain.clock.utc",
        "spec.domain.cpu.cores",
        "spec.domain.features.apic",
        "spec.domain.features.acpi.enabled",
        "spec.domain.firmware.bootloader.bios",
        "spec.domain.machine.type",
        "spec.domain.memory.guest",
        "spec.domain.devices.autoattachMemBalloon",
        "spec.domain.devices.inputs[0].name",
        "spec.domain.devices.inputs[0].type",
        "spec.domain.devices.inputs[0].bus",
        "spec.domain.devices.rng",
        "spec.domain.devices.disks[0].bootOrder",
        "spec.domain.devices.interfaces[0].name",
        "spec.domain.devices.interfaces[0].masquerade",
        "spec.domain.devices.interfaces[0].model",
        "spec.networks[0].name",
        "spec.networks[0].pod",
    }
