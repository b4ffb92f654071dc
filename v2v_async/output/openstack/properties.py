"""What OpenStack is told of a guest: image properties, of Glance's images and of Cinder's volumes.

Names and values are virt-v2v's; docs/targets-openstack.md lists what is added.

Source: OpenStack's useful image properties, https://docs.openstack.org/glance/latest/admin/
useful-image-properties.html
"""

from __future__ import annotations

from v2v_async.errors import UsageError
from v2v_async.model import TargetGuest
from v2v_async.output.domain_xml import MACHINES

_BUSES = {"virtio-blk": "virtio", "virtio-scsi": "scsi", "ide": "ide", "sata": "sata"}
_NET_MODELS = {"virtio-net": "virtio"}
_VIDEO_MODELS = ("vga", "cirrus", "qxl", "virtio", "bochs")
# Nova and libosinfo know these by other names than libguestfs.
_DISTROS = {"archlinux": "arch", "sles": "sled"}
_LONGEST = 255  # of a name and of a property's value, in characters


def check_name(name: str, suffix: str) -> None:
    """Refuse a name that an image or volume can't have; ``suffix``: the longest that is added.

    Raises:
        UsageError: it says why.
    """
    problem = None
    if not name.strip():
        problem = "it is empty"
    elif not name.isprintable():
        problem = "it has a control character"
    elif len(name) + len(suffix) > _LONGEST:
        problem = f"with ‘{suffix}’ added it has more than {_LONGEST} characters"
    elif any(ord(character) > 0xFFFF for character in name):
        problem = "it has a character beyond U+FFFF (an emoji), which Glance and Cinder refuse"
    if problem is not None:
        raise UsageError(
            f"{name!r} can't be a name in OpenStack: {problem}", hint="give another: -on NAME"
        )


def image_properties(target: TargetGuest) -> dict[str, str]:
    """Return the properties that Nova and people want to know of the disk that is booted."""
    caps, source, found = target.guestcaps, target.source, target.inspection
    properties = {
        "architecture": caps.arch,
        "hypervisor_type": "kvm",
        "vm_mode": "hvm",
        "hw_disk_bus": _BUSES[caps.block_bus],
        "hw_vif_model": _NET_MODELS.get(caps.net_bus, caps.net_bus),
        "hw_video_model": caps.video if caps.video in _VIDEO_MODELS else "vga",
        "hw_machine_type": MACHINES[caps.machine],
        "os_type": found.type,
        "os_distro": _DISTROS.get(found.distro, found.distro),
    }
    if caps.block_bus == "virtio-scsi":
        # Without it Nova gives the guest an old controller that it has no driver for.
        properties["hw_scsi_model"] = "virtio-scsi"
    topology = source.cpu_topology
    if topology is None:
        properties |= {"hw_cpu_sockets": "1", "hw_cpu_cores": str(source.vcpus)}
    else:
        properties |= {
            "hw_cpu_sockets": str(topology.sockets),
            "hw_cpu_cores": str(topology.cores),
            "hw_cpu_threads": str(topology.threads),
        }
    if found.major_version or found.minor_version:
        minor = f".{found.minor_version}" if found.minor_version else ""
        properties["os_version"] = f"{found.major_version}{minor}"
    if caps.virtio_rng:
        properties["hw_rng_model"] = "virtio"
    if target.firmware == "uefi":
        properties["hw_firmware_type"] = "uefi"
        if target.secure_boot:
            # ‘required’ would keep it from every host that can't.
            properties["os_secure_boot"] = "optional"
    return properties


def remarks(target: TargetGuest, set_property: str) -> list[str]:
    """Return what the guest had and does not get; ``set_property``: the command that changes it."""
    found = []
    if target.source.tpm is not None:
        found.append(
            "the source has a TPM; the new guest gets one only where the cloud has emulated TPMs: "
            f"{set_property.replace('PROPERTY', 'hw_tpm_model=tpm-crb')} and "
            f"{set_property.replace('PROPERTY', 'hw_tpm_version=2.0')}"
        )
    return found
