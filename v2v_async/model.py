"""The source guest, the target guest, and what conversion learnt about it.

``metadata.in`` is a :class:`SourceGuest`, ``metadata.out`` a :class:`TargetGuest`; both are JSON
with a ``version``. Their JSON Schemas are under ``docs/schema/``. A reader of version 1 must
accept unknown fields.

::

    SourceGuest ── input writes it ──> convert (reads disks, NICs)
        └─> TargetGuest = SourceGuest's hardware + guestcaps + inspection + mapped NICs + buses
                ── convert writes it ──> output (writes libvirt XML and the like from it)
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Firmware = Literal["bios", "uefi", "unknown"]
Controller = Literal["ide", "scsi", "virtio-blk", "virtio-scsi", "sata", "nvme", "floppy"]
BlockBus = Literal["virtio-blk", "virtio-scsi", "ide", "sata"]
VnetType = Literal["network", "bridge"]


class Model(BaseModel):
    """A document other programs read: unknown fields are kept out, not refused."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class SourceDisk(Model):
    """One disk of the source. ``index`` is 1-based and names its socket ``inINDEX``."""

    index: int = Field(ge=1)
    source: str = Field(description="the file, device or URI it is read from, secrets masked")
    format: str = Field(description="as qemu names it: raw, qcow2, vmdk, vpc, vhdx, vdi, nbd")
    size: int = Field(ge=0, description="virtual size in bytes")
    files: list[str] = Field(
        default=[],
        description="local files that its content is read from: itself, then its backing files",
    )
    allocated: int | None = Field(default=None, description="bytes allocated, where known")
    controller: Controller | None = None


class SourceRemovable(Model):
    """A CD-ROM or floppy drive of the source."""

    type: Literal["cdrom", "floppy"]
    controller: Controller | None = None
    slot: int | None = None


class Nic(Model):
    """A network interface, before or after mapping."""

    mac: str | None = None
    model: str | None = Field(default=None, description="the source's model")
    vnet: str = "default"
    vnet_type: VnetType = "network"
    original_vnet: str | None = Field(default=None, description="before -n, -b or --mac mapped it")


class CpuTopology(Model):
    """Sockets, cores of a socket, threads of a core."""

    sockets: int
    cores: int
    threads: int


class SourceTpm(Model):
    """A TPM of the source. ``model`` as libvirt names it: tpm-tis, tpm-crb."""

    model: str | None = None
    version: str | None = Field(default=None, description="1.2 or 2.0, where known")


class SourceGuest(Model):
    """Everything known about the guest before conversion (``metadata.in``)."""

    version: Literal[1] = 1
    name: str
    hypervisor: str | None = None
    genid: str | None = None
    memory: int = Field(description="bytes")
    vcpus: int = Field(ge=1)
    cpu_vendor: str | None = None
    cpu_model: str | None = None
    cpu_topology: CpuTopology | None = None
    features: list[str] = []
    firmware: Firmware = "unknown"
    secure_boot: bool = False
    tpm: SourceTpm | None = None
    display: str | None = Field(default=None, description="as virt-v2v prints it")
    sound: str | None = None
    disks: list[SourceDisk]
    removables: list[SourceRemovable] = []
    nics: list[Nic] = []


class Guestcaps(Model):
    """The virtual hardware that the converted guest has drivers for (virt-v2v's guestcaps)."""

    block_bus: BlockBus = "virtio-blk"
    net_bus: str = Field(default="virtio-net", description="virtio-net, e1000, rtl8139")
    machine: Literal["i440fx", "q35", "virt"] = "q35"
    arch: str = "x86_64"
    virtio_rng: bool = False
    virtio_balloon: bool = False
    isa_pvpanic: bool = False
    virtio_socket: bool = False
    virtio_1_0: bool = True
    rtc_utc: bool = True
    video: str | None = Field(default=None, description="qxl, cirrus, vga where virt-v2v said")
    acpi: bool | None = None
    default_cpu: bool = Field(
        default=True, description="false: the system needs more than qemu's default processor"
    )


class Inspection(Model):
    """What libguestfs found inside the guest."""

    root: str | None = None
    type: str = "unknown"
    distro: str = "unknown"
    osinfo: str | None = Field(default=None, description="libosinfo's short id, as debian12")
    arch: str = "unknown"
    major_version: int = 0
    minor_version: int = 0
    product_name: str = "unknown"
    product_variant: str = "unknown"
    package_format: str | None = None
    package_management: str | None = None


class InspectedDisk(Model):
    """How large a disk is; ``index`` is 1-based."""

    index: int
    size: int = Field(description="bytes")
    allocated: int = Field(description="bytes that its data takes, as its server tells")


class InspectedGuest(Model):
    """What is inside a guest, and how large it is (``v2v-async inspect --json``)."""

    version: Literal[1] = 1
    source: SourceGuest
    disks: list[InspectedDisk]
    firmware: Literal["bios", "uefi"]
    inspection: Inspection
    hostname: str | None = None
    mountpoints: dict[str, str] = Field(description="where a file system belongs: its device")
    filesystems: dict[str, str] = Field(description="all devices that hold something: its type")
    roots: list[str] = Field(description="the file systems that an operating system boots from")
    locked: list[str] = Field(default=[], description="encrypted devices that no --key opened")


class TargetBuses(Model):
    """Where each disk goes: lists of disk indexes (``None``: an empty slot), one list a bus."""

    virtio_blk: list[int | None] = []
    virtio_scsi: list[int | None] = []
    ide: list[int | None] = []
    sata: list[int | None] = []
    removables: list[SourceRemovable] = []


class TargetGuest(Model):
    """Everything an output needs to make the guest (``metadata.out``)."""

    version: Literal[1] = 1
    name: str
    source: SourceGuest
    guestcaps: Guestcaps
    inspection: Inspection
    firmware: Literal["bios", "uefi"]
    secure_boot: bool = False
    buses: TargetBuses
    boot_disk: int | None = Field(default=None, description="index of the disk it boots from")
    nics: list[Nic] = []
