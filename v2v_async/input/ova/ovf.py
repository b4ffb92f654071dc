"""OVF: the description in an OVA, read as virt-v2v reads it.

Elements are known by their local names: VMware, VirtualBox and OVF 2.0 put the same ones into
different namespaces. Where the three say the same thing in different words, the word is noted
beside its constant. Nothing here touches a file; the text may come from anybody.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from lxml import etree

from v2v_async.errors import SourceError
from v2v_async.input.ova.ovf_xml import attribute, children, first_text, local, value_of
from v2v_async.input.xml_source import parse_untrusted
from v2v_async.model import (
    Controller,
    CpuTopology,
    Firmware,
    Nic,
    SourceGuest,
    SourceRemovable,
)
from v2v_async.units import GIB, MIB

MAX_SIZE = 8 * MIB
"""Bytes. Those of real guests are below 100 KiB; an OVF with many pages of licences below 1 MiB."""

# CIM_ResourceAllocationSettingData.ResourceType (DSP8016).
_CPU, _MEMORY, _IDE, _SCSI, _NIC = "3", "4", "5", "6", "10"
_FLOPPY, _CD, _DVD, _DISK, _OTHER_STORAGE = "14", "15", "16", "17", "20"
_ITEMS = ("Item", "StorageItem", "EthernetPortItem")
"""OVF 1 has only Item; 2.0 has the others for disks, drives and NICs."""

_DEFAULT_MEMORY = 1 * GIB  # virt-v2v's, where the OVF says nothing
_MOST_MEMORY = 1 << 50
_MOST_VCPUS = 1 << 16
_MOST_ITEMS = 10_000
_LONGEST_NUMBER = 20
_LARGEST_EXPONENT = 62

_OLD_UNITS = {
    "byte": 1,
    "bytes": 1,
    "kilobytes": 1 << 10,
    "kb": 1 << 10,
    "megabytes": 1 << 20,
    "mb": 1 << 20,
    "gigabytes": 1 << 30,
    "gb": 1 << 30,
}
"""OVF 1.0 drafts; VirtualBox still writes MegaBytes."""
_UNITS = re.compile(r"bytes?((?:\s*\*\s*[0-9]+(?:\s*\^\s*[0-9]+)?)*)", re.IGNORECASE)
_FACTOR = re.compile(r"\*\s*([0-9]+)(?:\s*\^\s*([0-9]+))?")
_HOST_RESOURCE = re.compile(r"(?:ovf:)?/+(disk|file)/(.+)")


@dataclass(frozen=True, slots=True)
class OvfDisk:
    """A disk. ``href`` is None for one that has no file: it is empty; ``capacity`` is in bytes."""

    name: str
    href: str | None
    capacity: int | None = None
    is_gzip: bool = False
    is_chunked: bool = False
    says_vmdk: bool = False
    controller: Controller | None = None


@dataclass(frozen=True, slots=True)
class Ovf:
    """A guest: ``guest`` is everything but name and disks. ``name`` None: the file's is to be."""

    name: str | None
    guest: SourceGuest
    disks: list[OvfDisk] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def parse_ovf(xml: bytes, what: str) -> Ovf:
    """Read an OVF document; ``what`` names it in messages.

    Raises:
        SourceError: it is none, it is dangerous, or a guest can't be made of it.
    """
    root = parse_untrusted(xml, what, MAX_SIZE)
    if local(root) != "Envelope":
        raise SourceError(
            f"{what} is not an OVF: it begins with <{local(root)}>, not with <Envelope>",
            hint="is it the right file?",
        )
    return _Reader(root, what).ovf()


def parse_units(text: str) -> int | None:
    """Return the bytes that an allocation unit is: ``byte * 2^20``, ``MegaBytes``; None: unknown.

    Source: DSP0004, programmatic units.
    """
    text = text.strip()
    if text.lower() in _OLD_UNITS:
        return _OLD_UNITS[text.lower()]
    match = _UNITS.fullmatch(text)
    if match is None or len(text) > 100:
        return None
    size = 1
    for base, exponent in _FACTOR.findall(match[1]):
        if len(base) > _LONGEST_NUMBER or len(exponent) > 2 or int(exponent or 1) > 62:
            return None
        size *= int(base) ** int(exponent or 1)
        if not 0 < size <= 1 << _LARGEST_EXPONENT:
            return None
    return size


class _Reader:
    """One document being read."""

    def __init__(self, root: etree._Element, what: str) -> None:
        self._root = root
        self._what = what
        self._warnings: list[str] = []
        self._system = self._virtual_system()
        self._items = self._hardware()

    def ovf(self) -> Ovf:
        """Return all that it says."""
        memory = self._memory()
        vcpus = self._vcpus()
        guest = SourceGuest(
            name="",
            hypervisor="vmware",  # virt-v2v's word for every OVA
            memory=memory,
            vcpus=vcpus,
            cpu_topology=self._topology(vcpus),
            firmware=self._firmware(),
            secure_boot=self._config("bootOptions.efiSecureBootEnabled") == "true",
            disks=[],
            removables=self._removables(),
            nics=self._nics(),
        )
        names = children(self._system, "Name")
        name = first_text(names[0]) if names else ""
        if not name:
            self._warnings.append(
                f"{self._what} does not name the guest: it is named after the file"
            )
        return Ovf(name or None, guest, self._disks(), self._warnings)

    # Where things are.

    def _virtual_system(self) -> etree._Element:
        found = children(self._root, "VirtualSystem")
        if not found:
            for collection in children(self._root, "VirtualSystemCollection"):
                found += [e for e in collection.iter(etree.Element) if local(e) == "VirtualSystem"]
        if not found:
            raise SourceError(f"{self._what} describes no virtual machine (no <VirtualSystem>)")
        if len(found) > 1:
            raise SourceError(
                f"{self._what} describes {len(found)} virtual machines; one can be converted",
                hint="export each of them on its own",
            )
        return found[0]

    def _hardware(self) -> list[etree._Element]:
        """Return the items that apply: of the default configuration, and no bounds."""
        default = self._default_configuration()
        items: list[etree._Element] = []
        for section in children(self._system, "VirtualHardwareSection")[:1]:
            for item in section.iterchildren(etree.Element):
                if local(item) not in _ITEMS or attribute(item, "bound") in ("min", "max"):
                    continue
                wanted = attribute(item, "configuration")
                if wanted is None or default is None or default in wanted.split():
                    items.append(item)
        if len(items) > _MOST_ITEMS:
            raise SourceError(f"{self._what} has {len(items)} items of hardware, which is absurd")
        return items

    def _default_configuration(self) -> str | None:
        configurations = [
            configuration
            for section in children(self._root, "DeploymentOptionSection")
            for configuration in children(section, "Configuration")
        ]
        for configuration in configurations:
            if attribute(configuration, "default") in ("true", "1"):
                return attribute(configuration, "id")
        return attribute(configurations[0], "id") if configurations else None

    def _of_type(self, *types: str) -> Iterator[etree._Element]:
        for item in self._items:
            # "17" and " 17 " are the same number.
            if (value_of(item, "ResourceType") or "").lstrip("0") in types:
                yield item

    def _number(self, item: etree._Element, name: str, *, of: str) -> int | None:
        text = value_of(item, name)
        if text is None:
            return None
        if not re.fullmatch(r"[+-]?[0-9]+", text) or len(text) > _LONGEST_NUMBER:
            raise SourceError(f"{self._what}: {name} of {of} is ‘{text[:60]}’, which is no number")
        return int(text)

    def _config(self, key: str) -> str | None:
        """Return what VMware's ``<vmw:Config>`` says."""
        for section in children(self._system, "VirtualHardwareSection")[:1]:
            for config in children(section, "Config"):
                if attribute(config, "key") == key:
                    return attribute(config, "value")
        return None

    # Processor, memory, firmware.

    def _memory(self) -> int:
        for item in self._of_type(_MEMORY):
            quantity = self._number(item, "VirtualQuantity", of="the memory")
            if quantity is None:
                continue
            text = value_of(item, "AllocationUnits")
            unit = MIB if text is None else parse_units(text)
            if unit is None:
                self._warnings.append(
                    f"{self._what}: the unit of the memory is ‘{(text or '')[:60]}’, which is "
                    "unknown: taken for MiB"
                )
                unit = MIB
            memory = quantity * unit
            if not 0 < memory <= _MOST_MEMORY:
                raise SourceError(f"{self._what}: a memory of {memory} bytes is absurd")
            return memory
        return _DEFAULT_MEMORY

    def _vcpus(self) -> int:
        for item in self._of_type(_CPU):
            vcpus = self._number(item, "VirtualQuantity", of="the processors")
            if vcpus is not None:
                if not 0 < vcpus <= _MOST_VCPUS:
                    raise SourceError(f"{self._what}: {vcpus} virtual processors are absurd")
                return vcpus
        return 1

    def _topology(self, vcpus: int) -> CpuTopology | None:
        cores = None
        for item in self._of_type(_CPU):
            cores = self._number(item, "CoresPerSocket", of="the processors")
            if cores is not None:
                break
        if cores is None:
            return None
        if not 0 < cores <= vcpus:
            self._warnings.append(
                f"{self._what}: {cores} cores per socket can't be, with {vcpus} virtual "
                "processors: ignored"
            )
            return None
        return CpuTopology(sockets=vcpus // cores, cores=cores, threads=1)

    def _firmware(self) -> Firmware:
        said = self._config("firmware")
        if said is not None:
            if said not in ("efi", "bios"):
                raise SourceError(
                    f"{self._what}: the firmware is ‘{said[:60]}’; only bios and efi are known"
                )
            return "uefi" if said == "efi" else "bios"
        # VirtualBox describes the machine a second time, in its own words.
        for machine in children(self._system, "Machine"):
            for hardware in children(machine, "Hardware"):
                for firmware in children(hardware, "Firmware"):
                    kind = (attribute(firmware, "type") or "").upper()
                    if kind in ("EFI", "EFI32", "EFI64", "EFIDUAL"):
                        return "uefi"
        # VMware and VirtualBox say it where it is EFI, and virt-v2v 2.2 takes silence for BIOS.
        return "bios"

    # Drives and NICs.

    def _controller(self, item: etree._Element, what: str) -> Controller | None:
        parent = self._number(item, "Parent", of=what)
        if parent is None:
            return None
        for candidate in self._items:
            if value_of(candidate, "InstanceID") != str(parent):
                continue
            kind = (value_of(candidate, "ResourceType") or "").lstrip("0")
            if kind == _IDE:
                return "ide"
            if kind == _SCSI:
                return "scsi"
            if kind == _OTHER_STORAGE:
                # VMware: vmware.nvme.controller, vmware.sata.ahci; VirtualBox: AHCI.
                subtype = (value_of(candidate, "ResourceSubType") or "").lower()
                return "nvme" if "nvme" in subtype else "sata"
            self._warnings.append(
                f"{self._what}: {what} is on a controller of unknown type {kind[:20] or '(none)'}"
            )
            return None
        self._warnings.append(f"{self._what}: the controller of {what} is not described")
        return None

    def _disks(self) -> list[OvfDisk]:
        files = self._files()
        described = {
            attribute(disk, "diskId") or "": disk
            for section in children(self._root, "DiskSection")
            for disk in children(section, "Disk")
        }
        items = self._in_order(list(self._of_type(_DISK)))
        return [self._disk(item, number, described, files) for number, item in enumerate(items, 1)]

    def _files(self) -> dict[str, etree._Element]:
        return {
            attribute(file, "id") or "": file
            for section in children(self._root, "References")
            for file in children(section, "File")
        }

    def _in_order(self, items: list[etree._Element]) -> list[etree._Element]:
        """Put the disks of one controller in the order of their addresses.

        Which controller comes first, only the order of the document tells.
        """

        addresses = [value_of(item, "AddressOnParent") or "" for item in items]
        places: dict[str, list[int]] = {}
        for place, item in enumerate(items):
            parent = value_of(item, "Parent")
            if parent is not None and re.fullmatch(r"[0-9]{1,9}", addresses[place]):
                places.setdefault(parent, []).append(place)
        ordered = list(items)
        for mine in places.values():
            by_address = sorted(mine, key=lambda place: int(addresses[place]))
            for place, origin in zip(mine, by_address, strict=True):
                ordered[place] = items[origin]
        return ordered

    def _disk(
        self,
        item: etree._Element,
        number: int,
        described: dict[str, etree._Element],
        files: dict[str, etree._Element],
    ) -> OvfDisk:
        what = f"disk {number}"
        resource = value_of(item, "HostResource") or ""
        match = _HOST_RESOURCE.fullmatch(resource)
        if match is None:
            raise SourceError(
                f"{self._what}: {what} is on ‘{resource[:100]}’; only ovf:/disk/… and ovf:/file/… "
                "are known"
            )
        controller = self._controller(item, what)
        capacity, file_id, says_vmdk = None, match[2], False
        if match[1] == "disk":
            disk = described.get(match[2])
            if disk is None:
                raise SourceError(f"{self._what}: {what} (‘{match[2][:100]}’) is not described")
            capacity = self._capacity(disk)
            if attribute(disk, "parentRef"):
                raise SourceError(
                    f"{self._what}: {what} is only what changed since another disk (parentRef)",
                    hint="export the guest again, after its snapshots have been consolidated",
                )
            says_vmdk = "vmdk" in (attribute(disk, "format") or "").lower()
            file_id = attribute(disk, "fileRef") or ""
            if not file_id:
                if not capacity:
                    raise SourceError(f"{self._what}: {what} has neither a file nor a size")
                return OvfDisk(match[2], None, capacity, controller=controller)
        file = files.get(file_id)
        if file is None or not (href := attribute(file, "href")):
            raise SourceError(
                f"{self._what}: no file is named for {what} (no href for ‘{file_id[:100]}’)"
            )
        compression = attribute(file, "compression") or "identity"
        if compression not in ("identity", "gzip"):
            raise SourceError(
                f"{self._what}: {what} is compressed by ‘{compression[:60]}’; only gzip is known"
            )
        return OvfDisk(
            href.rpartition("/")[2] or href,
            href,
            capacity,
            compression == "gzip",
            attribute(file, "chunkSize") is not None,
            says_vmdk,
            controller,
        )

    def _capacity(self, disk: etree._Element) -> int | None:
        text = (attribute(disk, "capacity") or "").strip()
        unit = parse_units(attribute(disk, "capacityAllocationUnits") or "byte")
        # It may be a ${property} that is chosen when the appliance is deployed.
        if not re.fullmatch(r"[0-9]{1,20}", text) or unit is None:
            return None
        capacity = int(text) * unit
        return capacity if capacity < 1 << 63 else None

    def _removables(self) -> list[SourceRemovable]:
        found = []
        for item in self._of_type(_FLOPPY, _CD, _DVD):
            kind: Literal["floppy", "cdrom"]
            kind = "floppy" if value_of(item, "ResourceType") == _FLOPPY else "cdrom"
            what = f"a {kind} drive"
            found.append(
                SourceRemovable(
                    type=kind,
                    controller=self._controller(item, what),
                    slot=self._number(item, "AddressOnParent", of=what),
                )
            )
        return found

    def _nics(self) -> list[Nic]:
        found = []
        for position, item in enumerate(self._of_type(_NIC)):
            connection = value_of(item, "Connection")
            model = value_of(item, "ResourceSubType")
            found.append(
                Nic(
                    mac=value_of(item, "Address"),
                    model=model.lower() if model else None,
                    vnet=connection or f"eth{position}",
                    vnet_type="bridge" if connection else "network",
                )
            )
        return found
