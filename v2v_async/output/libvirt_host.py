"""What a libvirt host offers, and a target guest cut down to that.

::

    capabilities ─┐
    domain        ├─> Offer ──┐
    capabilities ─┘           ├─> fit ──> Fitted: the guest, Host and UEFI for the XML, warnings
    TargetGuest, Network ─────┘

A guest is defined with all that the host can give; for the rest a warning says what is missing and
how to get it. What it can't run without is an error.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from lxml import etree

from v2v_async.errors import TargetError
from v2v_async.kvm import probe_kvm
from v2v_async.model import Guestcaps, TargetGuest
from v2v_async.output.domain_xml import Host, display_of, machine_of
from v2v_async.output.libvirt_calls import TargetConnection
from v2v_async.output.uefi import UefiFirmware, find_uefi

NetworkState = Literal["active", "inactive", "absent"]

# Best first.
_TYPES = ("kvm", "qemu")
_TPM_MODELS = ("tpm-crb", "tpm-tis", "tpm-spapr")


@dataclass(frozen=True, slots=True)
class Offer:
    """What a guest of one architecture and machine can have on a host."""

    domain_type: str
    cpu_modes: frozenset[str] = frozenset()
    graphics: frozenset[str] = frozenset()
    has_rng: bool = False
    tpm_models: frozenset[str] = frozenset()
    has_uefi: bool = False
    has_secure_boot: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """What else is known of the host.

    ``networks``: those of the guest; ``absent_bridges``: those of the guest's that are not there.
    ``is_session``: a user's own daemon, which may make no networks.
    """

    is_session: bool = False
    has_vsock: bool = True
    networks: Mapping[str, NetworkState] | None = None
    absent_bridges: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Fitted:
    """A guest as the host can take it, and what is told about it."""

    target: TargetGuest
    host: Host
    uefi: UefiFirmware | None
    warnings: tuple[str, ...]


async def ask_offer(
    connection: TargetConnection, target: TargetGuest, *, is_here: bool = True
) -> Offer:
    """Return what the host, which may be this machine, offers to guests like this one.

    Raises:
        TargetError: it can't run them, or does not tell.
    """
    arch, machine = target.guestcaps.arch, machine_of(target)
    offered = domain_types(await connection.capabilities(), arch)
    for type_ in (each for each in _TYPES if each in offered):
        document = await connection.domain_capabilities(arch, machine, type_)
        if document is None:
            continue
        if type_ == "kvm" and is_here and (await probe_kvm()).state == "broken":
            continue  # libvirt only looks at whether it is there
        return read_offer(document, type_)
    raise TargetError(
        f"{connection.shown} can't run {arch} guests with the machine ‘{machine}’",
        hint="is qemu for that architecture installed there? See: virsh capabilities",
    )


def domain_types(capabilities: bytes, arch: str) -> frozenset[str]:
    """Return the types of whole-system guests of ``arch`` in a capabilities document."""
    root = _parse(capabilities)
    return frozenset(
        domain.get("type", "")
        for guest in root.findall("guest")
        if guest.findtext("os_type") == "hvm"
        for system in guest.findall("arch")
        if system.get("name") == arch
        for domain in system.findall("domain")
    )


def read_offer(domain_capabilities: bytes, domain_type: str) -> Offer:
    """Return what a document of domain capabilities says."""
    root = _parse(domain_capabilities)

    def values(path: str, name: str) -> frozenset[str]:
        found = root.find(path)
        if found is None or found.get("supported") == "no":
            return frozenset()
        enum = found.findall(f"enum[@name='{name}']/value")
        return frozenset(value.text or "" for value in enum)

    cpu_modes = frozenset(
        mode.get("name", "") for mode in root.findall("cpu/mode") if mode.get("supported") == "yes"
    )
    rng = root.find("devices/rng")
    has_emulated_tpm = "emulator" in values("devices/tpm", "backendModel")
    has_uefi = "efi" in values("os", "firmware")
    return Offer(
        domain_type=domain_type,
        cpu_modes=cpu_modes,
        graphics=values("devices/graphics", "type"),
        # Before 8.0 libvirt did not tell of it, and always had it.
        has_rng=rng is None or rng.get("supported") == "yes",
        tpm_models=values("devices/tpm", "model") if has_emulated_tpm else frozenset(),
        has_uefi=has_uefi,
        has_secure_boot=has_uefi and "yes" in values("os/loader", "secure"),
    )


def fit(target: TargetGuest, offer: Offer, place: Place) -> Fitted:
    """Return the guest with nothing that the host can't give.

    Raises:
        TargetError: the host lacks firmware that the guest can't do without.
    """
    warnings: list[str] = []
    caps, source = target.guestcaps, target.source
    if offer.domain_type != "kvm":
        warnings.append(
            f"KVM can't be used for {caps.arch} guests there: the guest is defined with the type "
            f"‘{offer.domain_type}’ and runs emulated, slowly. Where KVM works, change the type "
            "with virsh edit"
        )
    caps = _devices(caps, offer, place, warnings)
    source = source.model_copy(update={"display": _display(target, offer, warnings)})
    host = Host(
        domain_type=offer.domain_type,
        cpu_modes=offer.cpu_modes,
        tpm_model=_tpm(target, offer, warnings),
        user_networks=_user_networks(target, place, warnings),
    )
    for bridge in sorted(place.absent_bridges):
        warnings.append(
            f"there is no bridge ‘{bridge}’ on this host: the guest starts only when there is; "
            "make it, or name another one: -b"
        )
    fitted = target.model_copy(update={"guestcaps": caps, "source": source})
    return Fitted(fitted, host, _uefi(target, offer), tuple(warnings))


def with_uuid(fitted: Fitted, uuid: str) -> Host:
    """Return the host's part of the XML with the UUID that the domain gets."""
    return replace(fitted.host, uuid=uuid)


def _devices(caps: Guestcaps, offer: Offer, place: Place, warnings: list[str]) -> Guestcaps:
    if caps.virtio_socket and not place.has_vsock:
        warnings.append(
            "the host has no vsock (/dev/vhost-vsock): the device is left out. "
            "To have it: modprobe vhost_vsock, then virsh edit"
        )
        caps = caps.model_copy(update={"virtio_socket": False})
    if caps.virtio_rng and not offer.has_rng:
        warnings.append("the host's qemu has no random number device: it is left out")
        caps = caps.model_copy(update={"virtio_rng": False})
    return caps


def _display(target: TargetGuest, offer: Offer, warnings: list[str]) -> str | None:
    display = target.source.display
    kind = display_of(target.source)
    if kind == "sdl":
        # A daemon has no screen that a window could be opened on. ‘window’ is what a guest has of
        # which nothing is known.
        if (display or "").lower().startswith("sdl"):
            warnings.append(
                "the source's display is SDL, a window on the host's own screen, which libvirt's "
                "daemon does not have: the guest gets VNC"
            )
        return "vnc"
    if kind != "vnc" and kind not in offer.graphics:
        warnings.append(f"the host's qemu has no display ‘{kind}’: the guest gets VNC")
        return "vnc"
    return display


def _tpm(target: TargetGuest, offer: Offer, warnings: list[str]) -> str | None:
    tpm = target.source.tpm
    if tpm is None:
        return None
    if not offer.tpm_models:
        warnings.append(
            "the source has a TPM, and the host can emulate none: it is left out. To have one: "
            "apt-get install swtpm swtpm-tools, restart libvirtd, and add it with virsh edit"
        )
        return None
    warnings.append(
        "the guest gets a new, empty TPM 2.0: what was sealed with the source's, such as "
        "BitLocker's key, needs its recovery key once"
    )
    if tpm.model in offer.tpm_models:
        return tpm.model
    known = (model for model in _TPM_MODELS if model in offer.tpm_models)
    return next(known, min(offer.tpm_models))


def _user_networks(target: TargetGuest, place: Place, warnings: list[str]) -> frozenset[str]:
    replaced = set()
    wanted = dict.fromkeys(nic.vnet for nic in target.nics if nic.vnet_type == "network")
    for network in wanted:
        state = (place.networks or {}).get(network, "active")
        if state == "active":
            continue
        what = (
            f"there is no network ‘{network}’"
            if state == "absent"
            else (f"the network ‘{network}’ is not active")
        )
        if place.is_session:
            replaced.add(network)
            warnings.append(
                f"{what}, and a session's daemon can make none: its interfaces get qemu's "
                "user-mode network instead, which leads out but not in"
            )
        elif state == "absent":
            warnings.append(
                f"{what}: the guest starts only when there is; make it, or name another one: -n. "
                "There are: virsh net-list --all"
            )
        else:
            command = shlex.join(["virsh", "net-start", network])
            warnings.append(f"{what}: the guest starts only when it is; start it: {command}")
    return frozenset(replaced)


def _uefi(target: TargetGuest, offer: Offer) -> UefiFirmware | None:
    """None where libvirt is to choose: it knows what the host has, by qemu's descriptors."""
    if target.firmware != "uefi":
        return None
    if offer.has_secure_boot if target.secure_boot else offer.has_uefi:
        return None
    uefi = find_uefi(target.guestcaps.arch, secure=target.secure_boot)
    if uefi is None:
        kind = "UEFI firmware with secure boot" if target.secure_boot else "UEFI firmware"
        raise TargetError(
            f"the guest needs {kind} for {target.guestcaps.arch}, and the host has none",
            hint="install it: apt-get install ovmf (x86-64) or qemu-efi-aarch64, "
            "dnf install edk2-ovmf or edk2-aarch64",
        )
    return uefi


def _parse(document: bytes) -> etree._Element:
    return etree.fromstring(document, etree.XMLParser(resolve_entities=False, no_network=True))
