"""The JSON of ``-o json``: one document that says everything of a converted guest.

Keys are those that virt-v2v wrote when it still had this output (1.44), words joined by
hyphens, and a few more; docs/targets-json.md compares the two. The schema is
``docs/schema/target-json.json``. A reader of version 1 must survive unknown keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from v2v_async.model import Guestcaps, Inspection, Nic, SourceDisk, SourceGuest, TargetGuest
from v2v_async.output.uefi import UefiFirmware
from v2v_async.units import drive_letters

Bus = Literal["virtio", "ide", "sata", "scsi", "floppy"]
_MACHINES: Mapping[str, Literal["pc", "q35", "virt"]] = {
    "i440fx": "pc",
    "q35": "q35",
    "virt": "virt",
}
_DISPLAYS = ("window", "sdl", "vnc", "spice")


class _Part(BaseModel):
    model_config = ConfigDict(
        alias_generator=lambda name: name.replace("_", "-"), populate_by_name=True, frozen=True
    )


class Topology(_Part):
    """Sockets, cores of a socket, threads of a core."""

    sockets: int
    cores: int
    threads: int


class Cpu(_Part):
    """What the source said of its processors."""

    vendor: str | None = None
    model: str | None = None
    topology: Topology | None = None


class Uefi(_Part):
    """Firmware on the machine where the guest was converted."""

    code: str
    vars: str = Field(description="the file that the guest's variables begin as a copy of")
    flags: list[Literal["secure_boot_required"]] = []


class FirmwareOfTarget(_Part):
    """``uefi`` is absent where no such firmware was found."""

    type: Literal["bios", "uefi"]
    secure_boot: bool = Field(default=False, description="the source's firmware enforced it")
    uefi: Uefi | None = None


class Disk(_Part):
    """A disk. ``dev`` is its name on the bus: vda, hda, sda."""

    dev: str
    bus: Bus
    format: Literal["raw", "qcow2"]
    file: str = Field(description="absolute")
    size: int = Field(description="virtual size in bytes")
    boot: bool = Field(default=False, description="the guest boots from it")


class Removable(_Part):
    """An empty drive."""

    type: Literal["cdrom", "floppy"]
    dev: str
    bus: Bus


class NicOfTarget(_Part):
    """``vnet`` is after the mapping by -n, -b and --mac."""

    vnet: str
    vnet_type: Literal["network", "bridge"]
    model: str | None = Field(default=None, description="the source's model")
    mac: str | None = None


class Caps(_Part):
    """The virtual hardware that the guest has drivers for."""

    block_bus: str
    net_bus: str
    video: str | None = None
    machine: str
    arch: str
    virtio_rng: bool
    virtio_balloon: bool
    isa_pvpanic: bool
    virtio_socket: bool
    virtio_1_0: bool = Field(alias="virtio-1.0")
    acpi: bool = Field(description="true where nothing is known against it")
    rtc_utc: bool = Field(description="false: the clock is in local time")


class Sound(_Part):
    """A sound card of the source."""

    model: str


class Display(_Part):
    """How the source was shown."""

    type: Literal["window", "sdl", "vnc", "spice"]


class Tpm(_Part):
    """A TPM of the source; what it holds does not come along."""

    model: str | None = None
    version: str | None = None


class Inspect(_Part):
    """What was found inside the guest; null where it is not known."""

    root: str | None
    type: str
    distro: str | None
    osinfo: str | None
    arch: str
    major_version: int
    minor_version: int
    package_format: str | None
    package_management: str | None
    product_name: str | None
    product_variant: str | None


class TargetDocument(_Part):
    """A converted guest."""

    version: Literal[1] = 1
    name: str
    memory: int = Field(description="bytes")
    vcpu: int
    genid: str | None = None
    cpu: Cpu | None = None
    firmware: FirmwareOfTarget
    features: list[str] = Field(description="of the source")
    machine: Literal["pc", "q35", "virt"]
    disks: list[Disk]
    removables: list[Removable]
    nics: list[NicOfTarget]
    guestcaps: Caps
    sound: Sound | None = None
    display: Display | None = None
    tpm: Tpm | None = None
    inspect: Inspect

    def to_json(self) -> bytes:
        """Return the file's content; keys without a value are left out but for ``inspect``."""
        document = self.model_dump(by_alias=True, exclude_none=True)
        document["inspect"] = self.inspect.model_dump(by_alias=True)
        return json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"


def target_document(
    target: TargetGuest,
    paths: Sequence[Path],
    format_: Literal["raw", "qcow2"],
    uefi: UefiFirmware | None,
) -> TargetDocument:
    """Return the document; ``paths``: the disks, in the source's order."""
    source = target.source
    files = {disk.index: (str(path), disk) for disk, path in zip(source.disks, paths, strict=True)}
    disks, removables = _drives(target, files, format_)
    display = (source.display or "").lower().partition(" ")[0]
    return TargetDocument(
        name=target.name,
        memory=source.memory,
        vcpu=source.vcpus,
        genid=source.genid,
        cpu=_cpu(source),
        firmware=_firmware(target, uefi),
        features=source.features,
        machine=_MACHINES[target.guestcaps.machine],
        disks=disks,
        removables=removables,
        nics=[_nic(nic) for nic in target.nics],
        guestcaps=_caps(target.guestcaps),
        sound=Sound(model=source.sound) if source.sound else None,
        display=Display.model_validate({"type": display}) if display in _DISPLAYS else None,
        tpm=Tpm(model=source.tpm.model, version=source.tpm.version) if source.tpm else None,
        inspect=_inspect(target.inspection),
    )


def _cpu(source: SourceGuest) -> Cpu | None:
    topology = source.cpu_topology
    if source.cpu_vendor is None and source.cpu_model is None and topology is None:
        return None
    return Cpu(
        vendor=source.cpu_vendor,
        model=source.cpu_model,
        topology=Topology(**topology.model_dump()) if topology is not None else None,
    )


def _firmware(target: TargetGuest, uefi: UefiFirmware | None) -> FirmwareOfTarget:
    found = None
    if target.firmware == "uefi" and uefi is not None:
        found = Uefi(
            code=uefi.code,
            vars=uefi.variables,
            flags=["secure_boot_required"] if uefi.is_secure else [],
        )
    return FirmwareOfTarget(type=target.firmware, secure_boot=target.secure_boot, uefi=found)


def _drives(
    target: TargetGuest,
    files: Mapping[int, tuple[str, SourceDisk]],
    format_: Literal["raw", "qcow2"],
) -> tuple[list[Disk], list[Removable]]:
    buses = target.buses
    rows: tuple[tuple[str, list[int | None], Bus, str], ...] = (
        ("virtio-blk", buses.virtio_blk, "virtio", "vd"),
        ("ide", buses.ide, "ide", "hd"),
        ("sata", buses.sata, "sata", "sd"),
        ("virtio-scsi", buses.virtio_scsi, "scsi", "sd"),
        ("floppy", [], "floppy", "fd"),
    )
    disks, removables = [], []
    # SATA and SCSI disks share the names sdX: the second bus goes on where the first one ended.
    used: dict[str, int] = {}
    for controller, slots, bus, prefix in rows:
        first = used.get(prefix, 0)
        drives = [drive for drive in buses.removables if drive.controller == controller]
        count = max([len(slots), *((drive.slot or 0) + 1 for drive in drives)])
        used[prefix] = first + count
        for slot, index in enumerate(slots):
            if index is None:
                continue
            path, disk = files[index]
            disks.append(
                Disk(
                    dev=prefix + drive_letters(first + slot),
                    bus=bus,
                    format=format_,
                    file=path,
                    size=disk.size,
                    boot=index == target.boot_disk,
                )
            )
        for drive in drives:
            dev = prefix + drive_letters(first + (drive.slot or 0))
            removables.append(Removable(type=drive.type, dev=dev, bus=bus))
    return disks, removables


def _nic(nic: Nic) -> NicOfTarget:
    return NicOfTarget(vnet=nic.vnet, vnet_type=nic.vnet_type, model=nic.model, mac=nic.mac)


def _caps(caps: Guestcaps) -> Caps:
    return Caps(**{**caps.model_dump(exclude={"default_cpu"}), "acpi": caps.acpi is not False})


def _inspect(inspection: Inspection) -> Inspect:
    def known(value: str | None) -> str | None:
        return None if value == "unknown" else value

    return Inspect(
        root=inspection.root,
        type=inspection.type,
        distro=known(inspection.distro),
        osinfo=known(inspection.osinfo),
        arch=inspection.arch,
        major_version=inspection.major_version,
        minor_version=inspection.minor_version,
        package_format=known(inspection.package_format),
        package_management=known(inspection.package_management),
        product_name=known(inspection.product_name),
        product_variant=known(inspection.product_variant),
    )
