"""The ``VirtualMachine`` of a target guest, for KubeVirt.

Source: KubeVirt's public API types, core/v1; what is used of them is ``tests/kubevirt_api.py``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from v2v_async import __version__
from v2v_async.model import Nic, SourceGuest, TargetGuest
from v2v_async.output.domain_xml import MACHINES

_LONGEST_NAME = 63  # a label of DNS (RFC 1123); a label's value in Kubernetes too
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_NOT_IN_NAME = re.compile(r"[^a-z0-9]+")
_NOT_IN_LABEL = re.compile(r"[^A-Za-z0-9._-]+")
_MAC = re.compile(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}")
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "s390x": "s390x"}
_MODELS = {"virtio-net": "virtio", "e1000": "e1000", "rtl8139": "rtl8139"}
_POD_NETWORKS = ("default", "pod")
# What Kubernetes itself gives a pod that names nothing is 30 s; Windows takes longer to shut down.
_GRACE_S = 180


@dataclass(frozen=True, slots=True)
class KubeVirtMachine:
    """The document, and what a person should know of it."""

    document: dict[str, Any]
    remarks: tuple[str, ...]


def compliant_name(name: str) -> str:
    """Return ``name``, or what RFC 1123 allows of it with a digest: two guests never share one."""
    if len(name) <= _LONGEST_NAME and _NAME.fullmatch(name):
        return name
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    room = _LONGEST_NAME - len(digest) - 1
    readable = _readable(name)[:room].strip("-") or "guest"
    return f"{readable}-{digest}"


def virtual_machine(target: TargetGuest, paths: Mapping[int, str]) -> KubeVirtMachine:
    """Return the document; ``paths``: of the disks, absolute, by index."""
    remarks: list[str] = []
    name = compliant_name(target.name)
    disks, volumes = _disks(target, paths, remarks)
    interfaces, networks = _nics(target, remarks)
    devices: dict[str, Any] = _devices(target)
    devices["disks"] = disks
    if interfaces:
        devices["interfaces"] = interfaces
    else:
        # Without this a guest that has no network is given the pod's.
        devices["autoattachPodInterface"] = False
    spec: dict[str, Any] = {
        "domain": {**_domain(target, remarks), "devices": devices},
        "terminationGracePeriodSeconds": _GRACE_S,
        "volumes": volumes,
    }
    if networks:
        spec["networks"] = networks
    architecture = _ARCHITECTURES.get(target.guestcaps.arch)
    if architecture is not None:
        spec["architecture"] = architecture
    document = {
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachine",
        "metadata": {
            "name": name,
            "labels": _labels(target),
            "annotations": _annotations(target),
        },
        # As with every output the guest is made, not started: virtctl start NAME.
        "spec": {
            "runStrategy": "Halted",
            "template": {"metadata": {"labels": {"kubevirt.io/domain": name}}, "spec": spec},
        },
    }
    return KubeVirtMachine(document, tuple(remarks))


def _labels(target: TargetGuest) -> dict[str, str]:
    """Return what virt-v2v puts there, under its names: programs that import guests look at it."""
    found = {
        "osinfo": target.inspection.osinfo,
        "source": target.source.hypervisor,
        "genid": target.source.genid,
    }
    labels = {}
    for key, value in found.items():
        allowed = _NOT_IN_LABEL.sub("-", value or "")[:_LONGEST_NAME].strip("._-")
        if allowed:
            labels[f"libguestfs.org/{key}"] = allowed
    return labels


def _annotations(target: TargetGuest) -> dict[str, str]:
    return {
        "v2v-async/version": __version__,
        "v2v-async/original-name": _text(target.name),
        "v2v-async/product-name": _text(target.inspection.product_name),
    }


def _domain(target: TargetGuest, remarks: list[str]) -> dict[str, Any]:
    source, caps = target.source, target.guestcaps
    features: dict[str, Any] = {}
    if caps.arch == "x86_64":
        features["apic"] = {}
        features["acpi"] = {"enabled": caps.acpi is not False}
    bootloader: dict[str, Any] = {"bios": {}}
    if target.firmware == "uefi":
        # Persistent: boot entries and enrolled keys outlive the pod.
        bootloader = {"efi": {"secureBoot": target.secure_boot, "persistent": True}}
        if target.secure_boot:
            features["smm"] = {"enabled": True}
    machine = "q35" if target.secure_boot else MACHINES[caps.machine]
    if machine == "pc":
        remarks.append(
            "the guest wants the machine type ‘pc’, which KubeVirt refuses until "
            "‘emulatedMachines’ of its configuration allows it"
        )
    if not caps.rtc_utc:
        remarks.append(
            "the guest keeps local time, and KubeVirt's clock is UTC: in the YAML replace "
            "‘utc: {}’ of ‘clock’ by ‘timezone: Continent/City’"
        )
    clock: dict[str, Any] = {"utc": {}}
    if target.inspection.type == "windows":
        # What Windows keeps time by under KVM, as libosinfo and KubeVirt's own templates say.
        clock["timer"] = {
            "hpet": {"present": False},
            "hyperv": {"present": True},
            "pit": {"tickPolicy": "delay"},
            "rtc": {"tickPolicy": "catchup"},
        }
    domain: dict[str, Any] = {
        "clock": clock,
        "cpu": _cpu(source, default=caps.default_cpu),
        "firmware": {"bootloader": bootloader},
        "machine": {"type": machine},
        "memory": {"guest": _quantity(source.memory)},
    }
    if features:
        domain["features"] = features
    return domain


def _cpu(source: SourceGuest, *, default: bool) -> dict[str, Any]:
    topology = source.cpu_topology
    cpu: dict[str, Any] = {"cores": source.vcpus}
    if (
        topology is not None
        and topology.sockets * topology.cores * topology.threads == source.vcpus
    ):
        cpu = topology.model_dump()
    if source.cpu_model is not None:
        cpu["model"] = _text(source.cpu_model)
    elif not default:
        cpu["model"] = "host-passthrough"
    return cpu


def _devices(target: TargetGuest) -> dict[str, Any]:
    source, caps = target.source, target.guestcaps
    devices: dict[str, Any] = {"autoattachMemBalloon": caps.virtio_balloon}
    if caps.arch == "x86_64":
        devices["inputs"] = [{"name": "tablet", "type": "tablet", "bus": "usb"}]
    if caps.virtio_rng:
        devices["rng"] = {}
    if not caps.virtio_1_0:
        devices["useVirtioTransitional"] = True
    card = (source.sound or "").lower()
    if card in ("ac97", "ich9"):
        devices["sound"] = {"name": "sound", "model": card}
    if source.tpm is not None:
        devices["tpm"] = {"persistent": True}
    return devices


def _disks(
    target: TargetGuest, paths: Mapping[int, str], remarks: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """KubeVirt has neither IDE nor empty drives; SATA is what is nearest to IDE."""
    buses = target.buses
    if buses.removables:
        remarks.append("KubeVirt has no empty drives: the guest's CD-ROM or floppy is left out")
    if any(index is not None for index in buses.ide):
        remarks.append("KubeVirt has no IDE: the guest's IDE disks are on SATA")
    disks, volumes = [], []
    rows: tuple[tuple[str, Sequence[int | None]], ...] = (
        ("virtio", buses.virtio_blk),
        ("sata", buses.ide),
        ("sata", buses.sata),
        ("scsi", buses.virtio_scsi),
    )
    for bus, slots in rows:
        for index in slots:
            if index is None:
                continue
            disk: dict[str, Any] = {"name": f"disk-{index}", "disk": {"bus": bus}}
            if index == target.boot_disk:
                disk["bootOrder"] = 1
            disks.append(disk)
            host = {"path": paths[index], "type": "Disk"}
            volumes.append({"name": f"disk-{index}", "hostDisk": host})
    return disks, volumes


def _nics(
    target: TargetGuest, remarks: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The pod's network for the first NIC on ``default`` or ``pod``; Multus for all others."""
    interfaces, networks = [], []
    has_pod = False
    for number, nic in enumerate(target.nics):
        interface: dict[str, Any] = {"name": f"net-{number}"}
        network: dict[str, Any] = {"name": f"net-{number}"}
        if nic.vnet_type == "network" and nic.vnet in _POD_NETWORKS and not has_pod:
            has_pod = True
            interface["masquerade"] = {}
            network["pod"] = {}
        else:
            interface["bridge"] = {}
            network["multus"] = {"networkName": _network_name(nic, remarks)}
        interface["model"] = _MODELS.get(target.guestcaps.net_bus, "virtio")
        if nic.mac and _MAC.fullmatch(nic.mac):
            interface["macAddress"] = nic.mac
        interfaces.append(interface)
        networks.append(network)
    return interfaces, networks


def _network_name(nic: Nic, remarks: list[str]) -> str:
    """Return the NetworkAttachmentDefinition, ``NAMESPACE/NAME`` or ``NAME``."""
    parts = nic.vnet.split("/")
    if len(parts) <= 2 and all(len(p) <= _LONGEST_NAME and _NAME.fullmatch(p) for p in parts):
        made = nic.vnet
    else:
        made = _readable(nic.vnet)[:_LONGEST_NAME].strip("-") or "network"
    remarks.append(
        f"a NIC is on the {nic.vnet_type} {_text(nic.vnet)!r}: KubeVirt needs a "
        f"NetworkAttachmentDefinition ‘{made}’ for it"
    )
    return made


def _readable(name: str) -> str:
    return _NOT_IN_NAME.sub("-", name.lower()).strip("-")


def _quantity(size: int) -> str:
    """Return bytes as Kubernetes writes them."""
    return f"{size >> 20}Mi" if size % (1 << 20) == 0 else f"{-(-size // 1024)}Ki"


def _text(value: str) -> str:
    """Return text that UTF-8 can hold."""
    return value.encode(errors="replace").decode()
