"""-o kubevirt: the YAML against KubeVirt's API, names, and options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.kubevirt_api import VirtualMachine, check
from tests.unit.test_output_domain_xml import source, target
from tests.unit.test_output_qemu import HOSTILE
from v2v_async.errors import UsageError
from v2v_async.events import Event, Reporter
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
from v2v_async.output.kubevirt import KubevirtOutput
from v2v_async.output.kubevirt_yaml import compliant_name, virtual_machine
from v2v_async.secret import Secret


def parse(**fields: Any) -> KubevirtOutput:
    return KubevirtOutput.parse(OutputOptions(**{"mode": "kubevirt", "storage": "/out", **fields}))


def written(guest: TargetGuest, events: list[Event] | None = None) -> VirtualMachine:
    """Return what a reader sees of the file that is written."""
    output = parse()
    paths = output.disk_paths(len(guest.source.disks), guest.name)
    reporter = Reporter((events if events is not None else []).append, "t")
    [document] = output.documents(guest, paths, reporter)
    assert document.final == output.document_path(guest.name)
    return check(yaml.safe_load(document.content))


def test_a_plain_guest() -> None:
    events: list[Event] = []
    machine = written(
        target(nics=[Nic(mac="52:54:00:11:22:33")], inspection=Inspection(osinfo="debian12")),
        events,
    )
    assert machine.metadata.name == "web"
    assert machine.metadata.labels == {"libguestfs.org/osinfo": "debian12"}
    assert machine.spec.runStrategy == "Halted"
    spec = machine.spec.template.spec
    domain = spec.domain
    assert [(d.name, d.disk and d.disk.bus, d.bootOrder) for d in domain.devices.disks] == [
        ("disk-1", "virtio", 1),
        ("disk-2", "virtio", None),
    ]
    assert [v.hostDisk.path for v in spec.volumes] == ["/out/web-sda", "/out/web-sdb"]
    [interface] = domain.devices.interfaces
    assert interface.masquerade is not None
    assert (interface.model, interface.macAddress) == ("virtio", "52:54:00:11:22:33")
    assert spec.networks[0].pod is not None
    assert domain.memory is not None
    assert domain.memory.guest == "2048Mi"
    assert domain.cpu is not None
    assert domain.cpu.cores == 2
    assert domain.firmware is not None
    assert domain.firmware.bootloader is not None
    assert domain.firmware.bootloader.bios is not None
    assert domain.machine is not None
    assert domain.machine.type == "q35"
    assert events == []


def test_hardware_is_the_guests() -> None:
    hardware = source(
        memory=(1 << 30) + 1536,
        vcpus=12,
        cpu_topology=CpuTopology(sockets=2, cores=3, threads=2),
        cpu_model="Haswell",
        sound="ich9",
        tpm=SourceTpm(model="tpm-crb", version="2.0"),
        hypervisor="esx",
        genid="3eb5b6e6-dbe1-4e4e-9bb3-3c6a9c1e3a11",
    )
    caps = Guestcaps(
        virtio_rng=True, virtio_balloon=True, virtio_1_0=False, rtc_utc=False, net_bus="e1000"
    )
    windows = Inspection(type="windows", osinfo="win2k22", product_name="Windows Server: 2022")
    events: list[Event] = []
    guest = target(
        source=hardware,
        guestcaps=caps,
        inspection=windows,
        firmware="uefi",
        secure_boot=True,
        nics=[Nic()],
    )
    machine = written(guest, events)
    domain = machine.spec.template.spec.domain
    assert domain.cpu is not None
    assert (domain.cpu.sockets, domain.cpu.cores, domain.cpu.threads) == (2, 3, 2)
    assert domain.cpu.model == "Haswell"
    assert domain.memory is not None
    assert domain.memory.guest == "1048578Ki"  # 1.5 KiB, rounded up
    assert domain.firmware is not None
    assert domain.firmware.bootloader is not None
    efi = domain.firmware.bootloader.efi
    assert efi is not None
    assert (efi.secureBoot, efi.persistent) == (True, True)
    assert domain.features is not None
    assert domain.features.smm is not None
    assert domain.clock is not None
    assert domain.clock.timer is not None
    devices = domain.devices
    assert devices.rng is not None
    assert devices.tpm is not None
    assert devices.sound is not None
    assert devices.useVirtioTransitional
    assert devices.autoattachMemBalloon
    assert devices.interfaces[0].model == "e1000"
    assert set(machine.metadata.labels.values()) == {"win2k22", "esx", hardware.genid}
    assert machine.metadata.annotations["v2v-async/product-name"] == "Windows Server: 2022"
    assert [event.type for event in events] == ["warning"]
    assert "local time" in (events[0].text or "")


def test_uefi_without_secure_boot_says_so_since_kubevirt_would_have_it() -> None:
    firmware = written(target(firmware="uefi")).spec.template.spec.domain.firmware
    assert firmware is not None
    assert firmware.bootloader is not None
    assert firmware.bootloader.efi is not None
    assert firmware.bootloader.efi.secureBoot is False


def test_buses_that_kubevirt_has_not() -> None:
    events: list[Event] = []
    buses = TargetBuses(
        ide=[2],
        virtio_scsi=[None, 1],
        removables=[SourceRemovable(type="cdrom", controller="ide", slot=1)],
    )
    guest = target(buses=buses, guestcaps=Guestcaps(machine="i440fx"))
    disks = written(guest, events).spec.template.spec.domain.devices.disks
    assert [(d.name, d.disk and d.disk.bus) for d in disks] == [
        ("disk-2", "sata"),
        ("disk-1", "scsi"),
    ]
    said = " ".join(event.text or "" for event in events)
    for part in ("no empty drives", "no IDE", "emulatedMachines"):
        assert part in said


def test_networks() -> None:
    events: list[Event] = []
    nics = [
        Nic(vnet="default"),
        Nic(vnet="pod"),
        Nic(vnet="br0", vnet_type="bridge"),
        Nic(vnet="prod/vlan-7"),
        Nic(vnet='VM Network "1"\n'),
    ]
    spec = written(target(nics=nics), events).spec.template.spec
    assert [n.multus.networkName if n.multus else "(pod)" for n in spec.networks] == [
        "(pod)",
        "pod",
        "br0",
        "prod/vlan-7",
        "vm-network-1",
    ]
    assert len(events) == 4
    assert all("NetworkAttachmentDefinition" in (event.text or "") for event in events)


def test_without_a_nic_the_pods_network_stays_out() -> None:
    spec = written(target(nics=[])).spec.template.spec
    assert spec.domain.devices.autoattachPodInterface is False
    assert spec.networks == []


@pytest.mark.parametrize("name", ["web", "a", "win2k22-dc1", "x" * 63])
def test_names_that_comply_stay(name: str) -> None:
    assert compliant_name(name) == name


@pytest.mark.parametrize(
    "name", [*HOSTILE, "Web", "web_1", "web.example.org", "-", "", "null", "no"]
)
def test_any_name_is_made_to_comply_and_kept_as_an_annotation(name: str) -> None:
    machine = written(target(name=name))
    assert machine.metadata.annotations["v2v-async/original-name"] == name
    made = machine.metadata.name
    assert made == compliant_name(name)
    assert machine.spec.template.spec.volumes[0].hostDisk.path == f"/out/{made}-sda"


def test_readable_and_never_the_same() -> None:
    names = ["Web 1", "web_1", "WEB-1", "web.1", "web-1"]
    made = [compliant_name(name) for name in names]
    assert len(set(made)) == len(names)
    assert all(name.startswith("web-1") for name in made)
    long = [compliant_name("x" * 300), compliant_name("x" * 301)]
    assert len(set(long)) == 2
    assert all(len(name) == 63 for name in long)


@given(st.text(), st.text(min_size=1), st.text())
def test_no_text_makes_a_document_that_is_no_machine(name: str, network: str, other: str) -> None:
    guest = target(
        name=name,
        nics=[Nic(vnet=network), Nic(vnet=other, vnet_type="bridge")],
        inspection=Inspection(osinfo=other, product_name=other),
        source=source(hypervisor=network, cpu_model=other),
    )
    machine = written(guest)
    readable = name.encode(errors="replace").decode()
    assert machine.metadata.annotations["v2v-async/original-name"] == readable


SPEC = "spec.template.spec."
DEVICES = SPEC + "domain.devices."


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("kind", "VirtualMachineInstance"),
        ("metadata.name", "Web"),
        ("metadata.labels", {"libguestfs.org/osinfo": "a b"}),
        ("spec.runStrategy", "Never"),
        ("spec.running", False),
        (SPEC + "domain.cpu.cores", "2"),
        (SPEC + "domain.cpu.thread", 1),
        (SPEC + "domain.memory.guest", "2048 MB"),
        (SPEC + "domain.firmware.bootloader", {"efi": {}}),
        (SPEC + "domain.firmware.bootloader.efi", {"secureBoot": False}),
        (DEVICES + "disks.0.disk.bus", "ide"),
        (DEVICES + "disks.1.bootOrder", 1),
        (DEVICES + "disks.0.name", "other"),
        (DEVICES + "interfaces.0.masquerade", None),
        (DEVICES + "interfaces.0.slirp", {}),
        (SPEC + "networks.0.pod", None),
        (SPEC + "networks.0.multus", {"networkName": "x"}),
        (SPEC + "networks", []),
        (SPEC + "volumes.0.hostDisk.path", "relative"),
        (SPEC + "volumes.0.hostDisk.type", "File"),
        (SPEC + "volumes.0.name", "other"),
    ],
)
def test_the_check_sees_what_the_api_refuses(place: str, value: Any) -> None:
    paths = {1: "/a", 2: "/b"}
    document = yaml.safe_load(yaml.safe_dump(virtual_machine(target(nics=[Nic()]), paths).document))
    check(document)
    *parents, last = place.split(".")
    part = document
    for step in parents:
        part = part[int(step) if step.isdigit() else step]
    part[last] = value
    with pytest.raises(ValidationError):
        check(document)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"storage": None}, "needs a directory"),
        ({"password": Secret("x")}, "takes no -op"),
        ({"options": (("disc", "/x"),)}, "no option ‘-oo disc’"),
        ({"options": (("disk", None),)}, "needs a path"),
        ({"options": (("disk", "/x"), ("disk", "/x"))}, "same file"),
        ({"options": (("create", "false"),)}, "already"),
        ({"options": (("create", "perhaps"),)}, "true or false"),
        (
            {"options": (("create", "no"), ("disk", "/x")), "allocation": "preallocated"},
            "have no meaning",
        ),
    ],
)
def test_wrong_options(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(**fields)


def test_options() -> None:
    output = parse(options=(("disk", "/x"), ("disk", "y"), ("create", "false")))
    assert output.places == (Path("/x"), Path.cwd() / "y")
    assert not output.is_created
    assert parse(options=(("create", None),)).is_created
