"""What ``--print-source`` prints: the labels that programs reading virt-v2v's look for."""

from __future__ import annotations

from v2v_async.model import CpuTopology, Nic, SourceDisk, SourceGuest, SourceRemovable
from v2v_async.render.text import clean


def describe(source: SourceGuest) -> str:
    """Return ``source`` as text, safe for a terminal."""
    pairs = (
        ("source name", source.name),
        ("hypervisor type", source.hypervisor or "unknown"),
        ("VM genid", source.genid or ""),
        ("memory", f"{source.memory} (bytes)"),
        ("nr vCPUs", str(source.vcpus)),
        ("CPU vendor", source.cpu_vendor or ""),
        ("CPU model", source.cpu_model or ""),
        ("CPU topology", _topology(source.cpu_topology)),
        ("CPU features", ",".join(source.features)),
        ("firmware", source.firmware),
        ("display", source.display or ""),
        ("sound", source.sound or ""),
    )
    lines = ["Source guest information (--print-source option):", ""]
    lines += [f"{label:>15}: {clean(value)}".rstrip() for label, value in pairs]
    lines += ["disks:", *(f"\t{_disk(disk)}" for disk in source.disks)]
    lines += ["removable media:", *(f"\t{_removable(drive)}" for drive in source.removables)]
    lines += ["NICs:", *(f"\t{_nic(nic)}" for nic in source.nics)]
    return "\n".join(lines) + "\n"


def _topology(topology: CpuTopology | None) -> str:
    if topology is None:
        return ""
    return f"sockets: {topology.sockets} cores: {topology.cores} threads: {topology.threads}"


def _disk(disk: SourceDisk) -> str:
    controller = f" [{disk.controller}]" if disk.controller else ""
    return clean(f"{disk.index} {disk.source} ({disk.format}, {disk.size} bytes)") + controller


def _removable(drive: SourceRemovable) -> str:
    controller = f" [{drive.controller}]" if drive.controller else ""
    slot = f" in slot {drive.slot}" if drive.slot is not None else ""
    return f"{drive.type}{controller}{slot}"


def _nic(nic: Nic) -> str:
    mac = f" mac: {nic.mac}" if nic.mac else ""
    model = f" [{nic.model}]" if nic.model else ""
    return clean(f'{nic.vnet_type.capitalize()} "{nic.vnet}"{mac}{model}')
