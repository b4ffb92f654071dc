"""libvirt's domain XML, as far as a conversion needs it.

Source: libvirt.org/formatdomain.html, and what virt-v2v 2.2 makes of each element (tests compare).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lxml import etree

from v2v_async.errors import SourceError
from v2v_async.input.libvirt.domain_disks import (
    ChecksumFail,
    DomainDisk,
    read_disks,
    read_removables,
)
from v2v_async.input.xml_source import elements, number, parse_xml, text
from v2v_async.model import CpuTopology, Firmware, Nic, SourceGuest, SourceTpm, VnetType
from v2v_async.units import GIB, KIB

__all__ = ["ChecksumFail", "Domain", "DomainDisk", "parse_domain"]

# libvirt's scaled integers: one letter or …iB is 1024, …B is 1000; KiB where there is no unit.
_UNITS = {"b": 1, "byte": 1, "bytes": 1}
for _power, _letter in enumerate("kmgtpe", 1):
    _UNITS |= {_letter: 1024**_power, f"{_letter}ib": 1024**_power, f"{_letter}b": 1000**_power}

MAX_MEMORY = 1 << 52
"""Bytes; x86's physical addresses have 52 bits at most."""
MAX_VCPUS = 65535
"""libvirt's schema holds the count in 16 bits (countCPU)."""
_NO_MEMORY = GIB  # what virt-v2v assumes
_LONGEST_NUMBER = 10**18

_SOUNDS = ("ac97", "es1370", "ich6", "ich9", "pcspk", "sb16", "usb")
_NO_MAC = "00:00:00:00:00:00"  # VMware's word for none
_VMWARE = {"vmware": "http://libvirt.org/schemas/domain/vmware/1.0"}


@dataclass(frozen=True, slots=True)
class Domain:
    """A domain: ``guest`` is everything but its disks (``guest.disks`` is empty).

    ``vmware_datacenter`` and ``vmware_moref`` are what libvirt's esx driver adds.
    """

    guest: SourceGuest
    disks: list[DomainDisk] = field(default_factory=list)
    vmware_datacenter: str | None = None
    vmware_moref: str | None = None
    warnings: list[str] = field(default_factory=list)


def parse_domain(xml: bytes, what: str) -> Domain:
    """Read libvirt domain XML; ``what`` names it in messages.

    Entities, DTDs and the network are off, and the size of what it may become is bounded.

    Raises:
        SourceError: it is no domain XML, or a guest can't be made of it.
    """
    domain = parse_xml(xml, what, "domain")
    warnings: list[str] = []
    hypervisor = text(domain, "@type")
    if not hypervisor:
        raise SourceError(f"{what}: <domain> has no type, which names the hypervisor")
    name = text(domain, "name/text()")
    if not (name and name.strip()):
        raise SourceError(f"{what}: <name> is missing or empty")
    disks = read_disks(domain, what, warnings)
    if not disks:
        told = f" ({'; '.join(warnings)})" if warnings else ""
        raise SourceError(
            f"{what}: this guest has no disks that can be read{told}",
            hint="a guest must have at least one disk of type file, block, volume or network",
        )
    topology, vcpus = _processors(domain, what)
    guest = SourceGuest(
        name=name,
        hypervisor=hypervisor,
        genid=text(domain, "genid/text()") or None,
        memory=_memory(domain, what),
        vcpus=vcpus,
        cpu_vendor=text(domain, "cpu/vendor/text()"),
        cpu_model=text(domain, "cpu/model/text()"),
        cpu_topology=topology,
        features=[etree.QName(node).localname for node in elements(domain, "features/*")],
        firmware=_firmware(domain),
        secure_boot=_secure_boot(domain),
        tpm=_tpm(domain),
        display=_display(domain, what, warnings),
        sound=_sound(domain, what, warnings),
        disks=[],
        removables=read_removables(domain, what, warnings),
        nics=_nics(domain),
    )
    for count, kind in (
        (len(elements(domain, "devices/hostdev")), "host device(s) passed through to it"),
        (
            len(elements(domain, "devices/interface[@type='direct']")),
            "network interface(s) attached directly to one of the host's",
        ),
    ):
        if count:
            warnings.append(f"{what}: this guest has {count} {kind}, which will be left out")
    return Domain(
        guest,
        disks,
        vmware_datacenter=_vmware(domain, "datacenterpath"),
        vmware_moref=_vmware(domain, "moref"),
        warnings=warnings,
    )


def _vmware(domain: etree._Element, name: str) -> str | None:
    found = domain.find(f"vmware:{name}", _VMWARE)
    return (found.text or "").strip() or None if found is not None else None


def _memory(domain: etree._Element, what: str) -> int:
    """Return the memory in bytes."""
    amount = number(domain, "memory/text()", f"{what}: <memory>", least=1, most=_LONGEST_NUMBER)
    if amount is None:
        return _NO_MEMORY
    unit = text(domain, "memory/@unit")
    scale = KIB if not unit else _UNITS.get(unit.lower())
    if scale is None:
        raise SourceError(f"{what}: <memory> has the unknown unit ‘{unit}’")
    memory = amount * scale
    if memory > MAX_MEMORY:
        raise SourceError(f"{what}: <memory> is {memory} bytes, more than any machine has")
    # libvirt counts in KiB, and rounds up to them.
    return -(-memory // KIB) * KIB


def _processors(domain: etree._Element, what: str) -> tuple[CpuTopology | None, int]:
    """Return the topology, where it is told whole, and how many virtual processors there are."""
    told = {
        name: number(
            domain,
            f"cpu/topology/@{name}",
            f"{what}: <topology {name}=…>",
            least=1,
            most=MAX_VCPUS,
        )
        for name in ("sockets", "cores", "threads")
    }
    sockets, cores, threads = told.values()
    topology = None
    if sockets is not None and cores is not None and threads is not None:
        topology = CpuTopology(sockets=sockets, cores=cores, threads=threads)
    vcpus = number(domain, "vcpu/text()", f"{what}: <vcpu>", least=1, most=MAX_VCPUS)
    if vcpus is None:
        vcpus = (sockets or 1) * (cores or 1) * (threads or 1)
        if vcpus > MAX_VCPUS:
            raise SourceError(f"{what}: <topology> makes {vcpus} processors, too many")
    return topology, vcpus


def _firmware(domain: etree._Element) -> Firmware:
    """Return the firmware that libvirt was told to choose, else the one that its loader means."""
    chosen = text(domain, "os/@firmware")
    if chosen is not None:
        return "uefi" if chosen == "efi" else "bios" if chosen == "bios" else "unknown"
    return "uefi" if text(domain, "os/loader/@type") == "pflash" else "unknown"


def _secure_boot(domain: etree._Element) -> bool:
    return text(domain, "os/loader/@secure") == "yes" or bool(
        elements(domain, "os/firmware/feature[@name='secure-boot' and @enabled='yes']")
    )


def _tpm(domain: etree._Element) -> SourceTpm | None:
    if not elements(domain, "devices/tpm"):
        return None
    return SourceTpm(
        model=text(domain, "devices/tpm[1]/@model"),
        version=text(domain, "devices/tpm[1]/backend/@version"),
    )


def _display(domain: etree._Element, what: str, warnings: list[str]) -> str | None:
    """Return the first display in the words that virt-v2v prints; its password is not kept."""
    for display in elements(domain, "devices/graphics")[:1]:
        kind = text(display, "@type")
        if kind not in ("vnc", "spice"):
            if kind is not None:
                warnings.append(f"{what}: the display of type ‘{kind}’ is left out")
            return None
        keymap = text(display, "@keymap")
        return (
            kind
            + (f" {keymap}" if keymap is not None else "")
            + (" with password" if text(display, "@passwd") is not None else "")
            + _listen(display, what, warnings)
        )
    return None


def _listen(display: etree._Element, what: str, warnings: list[str]) -> str:
    """Return where a display listens, in the words that virt-v2v prints."""
    if not elements(display, "listen"):
        address = text(display, "@listen")
        return f" listening on address {address}" if address is not None else ""
    kind = text(display, "listen[1]/@type")
    target = (
        text(display, f"listen[1]/@{kind}") if kind in ("address", "network", "socket") else None
    )
    match kind:
        case "address" | "network":
            return f" listening on {kind} {target}" if target is not None else ""
        case "socket":
            which = "automatically created Unix domain socket"
            return " listening on " + (which if target is None else f"Unix domain socket {target}")
        case "none":
            return " listening on private fd"
        case None:
            return ""
    warnings.append(f"{what}: <listen type='{kind}'> of the display is left out")
    return ""


def _sound(domain: etree._Element, what: str, warnings: list[str]) -> str | None:
    for device in elements(domain, "devices/sound")[:1]:
        model = text(device, "@model")
        if model is None or model in _SOUNDS:
            return model
        warnings.append(f"{what}: the sound card of model ‘{model}’ is left out")
    return None


def _nics(domain: etree._Element) -> list[Nic]:
    nics: list[Nic] = []
    for index, node in enumerate(elements(domain, "devices/interface")):
        kind = text(node, "@type")
        vnet = text(node, "source/@network | source/@bridge")
        if kind not in ("network", "bridge") or vnet is None:
            continue
        vnet_type: VnetType = "network" if kind == "network" else "bridge"
        mac = text(node, "mac/@address")
        nics.append(
            Nic(
                mac=None if mac == _NO_MAC else mac,
                model=text(node, "model/@type"),
                # libvirt's VMware driver leaves it empty.
                vnet=vnet or f"eth{index}",
                vnet_type=vnet_type,
            )
        )
    return nics
