"""The guest that a VMX file describes, without looking at its disks. Pure.

Where virt-v2v 2.2 reads a key, this reads it in the same way. It also keeps what that drops: the
MAC addresses that a person set, disks whose ``deviceType`` is left out (VMware Workstation does
so), SATA and SCSI CD-ROM drives, floppy drives, secure boot and the TPM.
"""

from __future__ import annotations

import re
import struct
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from v2v_async.errors import SourceError
from v2v_async.input.vmx.file import VmxFile
from v2v_async.model import (
    Controller,
    CpuTopology,
    Firmware,
    Nic,
    SourceGuest,
    SourceRemovable,
    SourceTpm,
)
from v2v_async.units import MIB

MAX_VCPUS = 4096
"""ESXi 8 allows 768."""
MAX_MEMORY_MIB = 1 << 32
_NO_MEMORY_MIB = 32  # what VMware assumes where the file says nothing

_Bus = Literal["scsi", "nvme", "sata", "ide"]
_BUSES: tuple[_Bus, ...] = ("scsi", "nvme", "sata", "ide")
"""In the order in which virt-v2v counts their disks."""
_DISK_TYPES = (
    "disk",
    "plaindisk",
    "rawdisk",
    "scsi-harddisk",
    "ata-harddisk",
    "sata-harddisk",
    "nvme-harddisk",
)
_CDROM_TYPES = ("atapi-cdrom", "cdrom-image", "cdrom-raw")
# Devices of one controller; slots count through all controllers of a bus.
_SLOTS: Mapping[_Bus, int] = {"scsi": 16, "nvme": 64, "sata": 30, "ide": 2}
_SOUNDS = {"sb16": "sb16", "es1371": "es1370", "hdaudio": "ich6"}
_CONTROL = re.compile(r"[\0-\x1f\x7f]")
_MAC = re.compile(r"[0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){5}")


@dataclass(frozen=True, slots=True)
class VmxDisk:
    """A disk: ``file_name`` as the VMX file has it, ``key`` where in it (``scsi0:0``)."""

    file_name: str
    controller: Controller
    key: str


@dataclass(frozen=True, slots=True)
class VmxGuest:
    """``guest`` is everything but the disks (``guest.disks`` is empty)."""

    guest: SourceGuest
    disks: list[VmxDisk]
    warnings: list[str] = field(default_factory=list)


def read_guest(vmx: VmxFile, default_name: str) -> VmxGuest:
    """Return what a VMX file describes; ``default_name`` is for one that names no guest.

    Raises:
        SourceError: no guest can be made of it.
    """
    if vmx.get("encryption.data") is not None or vmx.get("encryption.keySafe") is not None:
        raise SourceError(
            f"{vmx.what}: the guest is encrypted",
            hint="remove its encryption in VMware first; a TPM requires it there, so remove that "
            "before",
        )
    warnings = list(vmx.warnings)
    vcpus = _vcpus(vmx)
    guest = SourceGuest(
        name=_name(vmx, default_name, warnings),
        hypervisor="vmware",
        genid=_genid(vmx),
        memory=_memory(vmx),
        vcpus=vcpus,
        cpu_topology=_topology(vmx, vcpus, warnings),
        firmware=_firmware(vmx, warnings),
        secure_boot=vmx.is_true("uefi.secureBoot.enabled"),
        tpm=_tpm(vmx),
        sound=_sound(vmx, warnings),
        disks=[],
        removables=_removables(vmx),
        nics=_nics(vmx, warnings),
    )
    disks = _disks(vmx, warnings)
    if not disks:
        raise SourceError(
            f"{vmx.what} names no disk",
            hint="is it the file of the right guest? Guests without a disk can't be converted",
        )
    return VmxGuest(guest, disks, warnings)


def _name(vmx: VmxFile, default_name: str, warnings: list[str]) -> str:
    name = vmx.get("displayName")
    if not name or not name.strip():
        warnings.append(f"{vmx.what} has no displayName; the guest is named after the file")
        name = default_name
    return _CONTROL.sub("?", name)


def _memory(vmx: VmxFile) -> int:
    mib = vmx.number("memSize")
    if mib is None:
        mib = _NO_MEMORY_MIB
    if not 0 < mib <= MAX_MEMORY_MIB:
        raise SourceError(f"{vmx.what}: the guest can't have {mib} MiB of memory (memSize)")
    return mib * MIB


def _vcpus(vmx: VmxFile) -> int:
    count = vmx.number("numvcpus")
    if count is None:
        return 1
    if not 0 < count <= MAX_VCPUS:
        raise SourceError(f"{vmx.what}: the guest can't have {count} processors (numvcpus)")
    return count


def _topology(vmx: VmxFile, vcpus: int, warnings: list[str]) -> CpuTopology | None:
    cores = vmx.number("cpuid.coresPerSocket")
    if cores is None:
        return None
    if cores < 1 or cores > vcpus:
        warnings.append(
            f"{vmx.what}: {cores} cores of a socket with {vcpus} processors "
            "(cpuid.coresPerSocket) make no sense; ignored"
        )
        return None
    return CpuTopology(sockets=vcpus // cores, cores=cores, threads=1)


def _genid(vmx: VmxFile) -> str | None:
    """Return the generation ID: two signed numbers are the 16 bytes of a Windows GUID."""
    low, high = vmx.number("vm.genid"), vmx.number("vm.genidX")
    if low is None or high is None:
        return None
    try:
        return str(uuid.UUID(bytes_le=struct.pack("<qq", low, high)))
    except struct.error:
        raise SourceError(
            f"{vmx.what}: vm.genid and vm.genidX are not numbers of 64 bits"
        ) from None


def _firmware(vmx: VmxFile, warnings: list[str]) -> Firmware:
    told = vmx.get("firmware")
    if told == "efi":
        return "uefi"
    if told not in (None, "bios"):
        warnings.append(f"{vmx.what}: the firmware ‘{told}’ is not known; BIOS is assumed")
    return "bios"


def _tpm(vmx: VmxFile) -> SourceTpm | None:
    """Return VMware's TPM: there is one kind, 2.0 behind the CRB interface."""
    is_there = vmx.is_true("vtpm.present") or vmx.get("managedVM.autoAddVTPM") == "software"
    return SourceTpm(model="tpm-crb", version="2.0") if is_there else None


def _sound(vmx: VmxFile, warnings: list[str]) -> str | None:
    told = vmx.get("sound.virtualDev")
    if told is not None and told not in _SOUNDS:
        warnings.append(f"{vmx.what}: the sound device ‘{told}’ is not known; ignored")
    return _SOUNDS.get(told or "")


def _disks(vmx: VmxFile, warnings: list[str]) -> list[VmxDisk]:
    disks = []
    for bus in _BUSES:
        for space, _ in vmx.namespaces(rf"{bus}(\d{{1,3}}):(\d{{1,3}})"):
            file_name = vmx.get(f"{space}.fileName")
            kind = (vmx.get(f"{space}.deviceType") or "disk").lower()
            if file_name is None or kind in _CDROM_TYPES:
                continue
            if kind not in _DISK_TYPES:
                warnings.append(
                    f"{vmx.what}: the device {space} (‘{kind}’) is not a disk; it is left out"
                )
                continue
            if not file_name or _CONTROL.search(file_name):
                raise SourceError(f"{vmx.what}: {space}.fileName can't be the name of a file")
            disks.append(VmxDisk(file_name, bus, space))
    return disks


def _removables(vmx: VmxFile) -> list[SourceRemovable]:
    drives = []
    for bus in reversed(_BUSES):
        for space, (controller, unit) in vmx.namespaces(rf"{bus}(\d{{1,3}}):(\d{{1,3}})"):
            if (vmx.get(f"{space}.deviceType") or "").lower() in _CDROM_TYPES:
                slot = controller * _SLOTS[bus] + unit
                drives.append(SourceRemovable(type="cdrom", controller=bus, slot=slot))
    for _, (unit,) in vmx.namespaces(r"floppy(\d)"):
        drives.append(SourceRemovable(type="floppy", controller="floppy", slot=unit))
    return drives


def _nics(vmx: VmxFile, warnings: list[str]) -> list[Nic]:
    nics = []
    for space, _ in vmx.namespaces(r"ethernet(\d{1,3})"):
        is_bridged = (vmx.get(f"{space}.connectionType") or "").lower() == "bridged"
        network = vmx.get(f"{space}.networkName")
        model = vmx.get(f"{space}.virtualDev")
        nics.append(
            Nic(
                mac=_mac(vmx, space, warnings),
                model=model.lower() if model else None,
                vnet=_CONTROL.sub("?", network) if network else space,
                vnet_type="bridge" if is_bridged else "network",
            )
        )
    return nics


def _mac(vmx: VmxFile, space: str, warnings: list[str]) -> str | None:
    """Return the address that a person set, else the one that VMware made."""
    is_static = (vmx.get(f"{space}.addressType") or "").lower() == "static"
    generated, static = vmx.get(f"{space}.generatedAddress"), vmx.get(f"{space}.address")
    mac = static if static and (is_static or not generated) else generated
    if not mac:
        return None
    if not _MAC.fullmatch(mac.strip()):
        warnings.append(f"{vmx.what}: ‘{mac[:40]}’ ({space}) is not a MAC address; ignored")
        return None
    return mac.strip()
