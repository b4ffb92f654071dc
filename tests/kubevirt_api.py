"""The part of KubeVirt's API, v1, that -o kubevirt uses: fields, types, what is required.

Written from the comments of KubeVirt's public API types (staging/src/kubevirt.io/api/core/v1,
schema.go at commit 0154a7e4), and from Kubernetes' rules for names, labels and annotations; no
cluster has been asked. A field that is not here is refused, even where KubeVirt has it: then this
file is to be extended first.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Label = Annotated[str, StringConstraints(max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
"""A DNS label (RFC 1123)."""
LabelValue = Annotated[
    str,
    StringConstraints(max_length=63, pattern=r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$"),
]
Key = Annotated[
    str,
    StringConstraints(
        pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
    ),
]
Quantity = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]*(Ki|Mi|Gi)?$")]
Mac = Annotated[str, StringConstraints(pattern=r"^[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}$")]
Path = Annotated[str, StringConstraints(pattern=r"^/.+$")]
Positive = Annotated[int, Field(ge=1, strict=True)]


class Api(BaseModel):
    """Unknown fields are refused: the API server drops them, and then they have no effect."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Empty(Api):
    """A choice without fields: ``masquerade: {}``."""


def one_of(model: BaseModel, *fields: str) -> None:
    """Raise ValueError unless exactly one of the fields is set."""
    given = [name for name in fields if getattr(model, name) is not None]
    if len(given) != 1:
        raise ValueError(f"exactly one of {fields} is to be set, not {given}")


class FeatureState(Api):
    enabled: bool | None = None


class Features(Api):
    acpi: FeatureState | None = None
    apic: FeatureState | None = None
    smm: FeatureState | None = None


class EFI(Api):
    secureBoot: bool | None = None  # true where it is absent
    persistent: bool | None = None


class Bootloader(Api):
    bios: Empty | None = None
    efi: EFI | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        one_of(self, "bios", "efi")
        return self


class Firmware(Api):
    bootloader: Bootloader | None = None


class PresentTimer(Api):
    present: bool | None = None


class PitTimer(Api):
    tickPolicy: Literal["delay", "catchup", "discard"] | None = None
    present: bool | None = None


class RtcTimer(Api):
    tickPolicy: Literal["delay", "catchup"] | None = None
    track: Literal["guest", "wall"] | None = None
    present: bool | None = None


class Timer(Api):
    hpet: PresentTimer | None = None
    hyperv: PresentTimer | None = None
    kvm: PresentTimer | None = None
    pit: PitTimer | None = None
    rtc: RtcTimer | None = None


class Utc(Api):
    offsetSeconds: int | None = None


class Clock(Api):
    utc: Utc | None = None
    timezone: str | None = None
    timer: Timer | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        one_of(self, "utc", "timezone")
        return self


class CPU(Api):
    cores: Positive | None = None
    sockets: Positive | None = None
    threads: Positive | None = None
    model: str | None = None


class Memory(Api):
    guest: Quantity


class Machine(Api):
    type: str


class DiskTarget(Api):
    bus: Literal["virtio", "sata", "scsi", "usb"] | None = None


class Disk(Api):
    name: Label
    disk: DiskTarget | None = None
    bootOrder: Positive | None = None


class Interface(Api):
    name: Annotated[str, StringConstraints(pattern=r"^[-A-Za-z0-9_]+$")]
    model: Literal["e1000", "e1000e", "igb", "ne2k_pci", "pcnet", "rtl8139", "virtio"] | None = None
    masquerade: Empty | None = None
    bridge: Empty | None = None
    macAddress: Mac | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        one_of(self, "masquerade", "bridge")
        return self


class Input(Api):
    name: str
    type: Literal["tablet", "keyboard"]
    bus: Literal["usb", "virtio"] | None = None


class Sound(Api):
    name: str
    model: Literal["ich9", "ac97"] | None = None


class Tpm(Api):
    enabled: bool | None = None
    persistent: bool | None = None


class Devices(Api):
    disks: list[Disk] = Field(default=[], max_length=256)
    interfaces: list[Interface] = Field(default=[], max_length=256)
    inputs: list[Input] = []
    rng: Empty | None = None
    sound: Sound | None = None
    tpm: Tpm | None = None
    autoattachMemBalloon: bool | None = None
    autoattachPodInterface: bool | None = None
    useVirtioTransitional: bool | None = None


class DomainSpec(Api):
    devices: Devices
    clock: Clock | None = None
    cpu: CPU | None = None
    features: Features | None = None
    firmware: Firmware | None = None
    machine: Machine | None = None
    memory: Memory | None = None

    @model_validator(mode="after")
    def _secure_boot(self) -> Self:
        efi = self.firmware and self.firmware.bootloader and self.firmware.bootloader.efi
        if efi and efi.secureBoot is not False:
            smm = self.features.smm if self.features else None
            if smm is None or smm.enabled is False:
                raise ValueError("EFI with secure boot requires SMM")
        return self


class HostDisk(Api):
    path: Path
    type: Literal["Disk", "DiskOrCreate"]


class Volume(Api):
    name: Label
    hostDisk: HostDisk


class Multus(Api):
    networkName: Annotated[
        str,
        StringConstraints(
            max_length=127,
            pattern=r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?/)?[a-z0-9]([-a-z0-9.]*[a-z0-9])?$",
        ),
    ]


class Network(Api):
    name: str
    pod: Empty | None = None
    multus: Multus | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        one_of(self, "pod", "multus")
        return self


class InstanceSpec(Api):
    domain: DomainSpec
    volumes: list[Volume] = Field(default=[], max_length=256)
    networks: list[Network] = Field(default=[], max_length=256)
    terminationGracePeriodSeconds: Annotated[int, Field(ge=0)] | None = None
    architecture: Literal["amd64", "arm64", "s390x"] | None = None

    @model_validator(mode="after")
    def _references(self) -> Self:
        """What KubeVirt's admission webhook checks."""
        devices = self.domain.devices
        for what, first, second in (
            ("volume", [d.name for d in devices.disks], [v.name for v in self.volumes]),
            ("network", [i.name for i in devices.interfaces], [n.name for n in self.networks]),
        ):
            if sorted(first) != sorted(set(second)) or len(second) != len(set(second)):
                raise ValueError(f"each device needs one {what} of its name: {first}, {second}")
        if sum(network.pod is not None for network in self.networks) > 1:
            raise ValueError("more than one interface is connected to the pod's network")
        pods = {network.name for network in self.networks if network.pod is not None}
        if any(i.masquerade is not None and i.name not in pods for i in devices.interfaces):
            raise ValueError("masquerade is for the pod's network only")
        orders = [disk.bootOrder for disk in devices.disks if disk.bootOrder is not None]
        if len(orders) != len(set(orders)):
            raise ValueError("a boot order is given twice")
        return self


class ObjectMeta(Api):
    name: Label | None = None
    labels: dict[Key, LabelValue] = {}
    annotations: dict[Key, str] = {}


class Template(Api):
    metadata: ObjectMeta | None = None
    spec: InstanceSpec


class VirtualMachineSpec(Api):
    runStrategy: Literal["Always", "Halted", "Manual", "RerunOnFailure", "Once"]
    template: Template


class VirtualMachine(Api):
    apiVersion: Literal["kubevirt.io/v1"]
    kind: Literal["VirtualMachine"]
    metadata: ObjectMeta
    spec: VirtualMachineSpec


def check(document: Any) -> VirtualMachine:
    """Return the machine that the API would see.

    Raises:
        pydantic.ValidationError: it is not one.
    """
    machine = VirtualMachine.model_validate(document)
    assert machine.metadata.name is not None
    return machine
