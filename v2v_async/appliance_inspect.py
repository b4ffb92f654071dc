"""The program that looks into a guest: ``appliance.py`` starts it, in a process of its own.

It reads a request (JSON) as its only argument and prints what it finds, JSON too. It has no secrets
on its command line: keys are names of files. The disks are attached read-only.
Source: guestfs(3), “INSPECTION”, “ENCRYPTED DISKS”.
"""

from __future__ import annotations

import json
import sys
from typing import Any

ESP_TYPE = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
"""The type of an EFI system partition in a GPT."""

_ENCRYPTED = ("crypto_LUKS", "BitLocker")
_FACTS = (
    "type", "distro", "osinfo", "arch", "major_version", "minor_version", "product_name",
    "product_variant", "package_format", "package_management", "hostname",
)  # fmt: skip


def look(handle: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Return what is in the disks, which are being looked at by a handle that was launched."""
    locked = unlock(handle, request["keys"])
    filesystems = handle.list_filesystems()
    found = {
        "filesystems": filesystems,
        "locked": locked,
        "roots": handle.inspect_os(),
        "has_esp": has_esp(handle),
    }
    root = choose(found["roots"], request["root"])
    if root is not None:
        facts = {"root": root, "mountpoints": handle.inspect_get_mountpoints(root)}
        for name in _FACTS:
            facts[name] = getattr(handle, f"inspect_get_{name}")(root)
        found["system"] = facts
    return found


def choose(roots: list[str], wanted: str) -> str | None:
    """Return the root file system that ``--root`` means, None where it is none or not one."""
    if wanted in ("single", "first"):
        is_one = len(roots) == 1 or (wanted == "first" and roots)
        return roots[0] if is_one else None
    return wanted if wanted in roots else None


def unlock(handle: Any, keys: list[list[str]]) -> list[str]:
    """Open what is encrypted; return the devices that no key opened.

    Each key is [ID, ``file`` or ``clevis``, file]; an ID is a device, a UUID or ``all``.
    """
    locked = []
    encrypted = [device for device in containers(handle) if type_of(handle, device) in _ENCRYPTED]
    for number, device in enumerate(encrypted):
        if not any(
            opens(handle, device, f"v2vinspect{number}", key)
            for key in keys
            if key[0] in ("all", device, handle.vfs_uuid(device))
        ):
            locked.append(device)
    if len(locked) < len(encrypted):
        handle.lvm_scan(True)
    return sorted(locked)


def containers(handle: Any) -> list[str]:
    """Return what may be encrypted; list_filesystems leaves out what is."""
    found = (handle.list_devices(), handle.list_partitions(), handle.lvs())
    return [device for devices in found for device in devices]


def type_of(handle: Any, device: str) -> str:
    """Return the type of what a device holds; empty where that is nothing known."""
    try:
        return str(handle.vfs_type(device))
    except RuntimeError:
        return ""


def opens(handle: Any, device: str, name: str, key: list[str]) -> bool:
    """Open an encrypted device by one key; return whether it was the right one."""
    _, kind, path = key
    try:
        if kind == "clevis":
            handle.clevis_luks_unlock(device, name)
        else:
            with open(path) as file:
                passphrase = file.read()
            handle.cryptsetup_open(device, passphrase.removesuffix("\n"), name)
    except RuntimeError:
        return False
    return True


def has_esp(handle: Any) -> bool:
    """Whether a disk has a GPT with an EFI system partition: the guest boots by UEFI."""
    for device in handle.list_devices():
        try:
            if handle.part_get_parttype(device) != "gpt":
                continue
            numbers = [each["part_num"] for each in handle.part_list(device)]
            if any(handle.part_get_gpt_type(device, each) == ESP_TYPE for each in numbers):
                return True
        except RuntimeError:
            continue  # no partition table
    return False


def main() -> None:
    """Do what the request says."""
    import guestfs

    request = json.loads(sys.argv[1])
    handle = guestfs.GuestFS(python_return_dict=True)
    try:
        for socket in request["sockets"]:
            handle.add_drive_opts(
                "", format="raw", protocol="nbd", server=[f"unix:{socket}"], readonly=True
            )
        handle.launch()
        found = look(handle, request)
        handle.shutdown()
    except (RuntimeError, OSError) as error:
        sys.exit(str(error))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
