"""What ``--print-source`` prints: the labels that programs reading virt-v2v's look for."""

from __future__ import annotations

from v2v_async.model import CpuTopology, Nic, SourceDisk, SourceGuest, SourceRemovable
from v2v_async.render.text import clean


def describe(source: SourceGuest) -> str:
    """Return ``source`` as text, safe for a terminal."""
    pairs = (
        ("source name", source.name),
        ("hypervisor type", source.hypervisor or "unknownhv"),
        ("VM genid", source.genid or ""),
        ("memory", f"{source.memory} (bytes)"),
        ("nr vCPUs", str(source.vcpus)),
        ("CPU vendor", source.cpu_vendor or ""),
        ("CPU model", source.cpu_model or ""),
        ("CPU topology", _topology(source.cpu_topology)),
        ("CPU features", ",".join(sorted(source.features))),
        ("firmware", source.firmware),
        ("display", source.display or ""),
        ("sound", source.sound or ""),
    )
    lines = ["Source guest information (--print-source option):", ""]
    lines += [f"{label:>15}: {clean(value)}" for label, value in pairs]
    for title, rows in (
        ("disks", [_disk(disk) for disk in source.disks]),
        ("removable media", [_removable(drive) for drive in source.removables]),
        ("NICs", [_nic(nic) for nic in source.nics]),
    ):
        # A list without entries leaves an empty line, there as here.
        lines += [f"{title}:", *([f"\t{row}" for row in rows] or [""])]
    return "\n".join(lines) + "\n\n"


def _topology(topology: CpuTopology | None) -> str:
    if topology is None:
        return ""
    return (
        f"sockets: {topology.sockets} cores/socket: {topology.cores} "
        f"threads/core: {topology.threads}"
    )


def _disk(disk: SourceDisk) -> str:
    # virt-v2v counts from 0.
    return f"{disk.index - 1}" + (f" [{disk.controller}]" if disk.controller else "")


def _removable(drive: SourceRemovable) -> str:
    kind = {"cdrom": "CD-ROM", "floppy": "Floppy"}[drive.type]
    controller = f" [{drive.controller}]" if drive.controller else ""
    slot = f" in slot {drive.slot}" if drive.slot is not None else ""
    return f"{kind}{controller}{slot}"


def _nic(nic: Nic) -> str:
    mac = f" mac: {nic.mac}" if nic.mac else ""
    model = f" [{nic.model}]" if nic.model else ""
    return clean(f'{nic.vnet_type.capitalize()} "{nic.vnet}"{mac}{model}')
