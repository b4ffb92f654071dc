"""Prints what is on the file systems of raw disk images, as JSON: run as a program, with guestfs.

For each: what a check of it says, the names of all that is in it, and checksums of its files.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_CHECKED = ("ext2", "ext3", "ext4", "vfat")


def filesystems(*disks: Path) -> list[list[dict[str, Any]]]:
    """Return what is on the file systems of each disk. Starts one appliance for all."""
    argv = [sys.executable, __file__, *map(str, disks)]
    done = subprocess.run(argv, stdout=subprocess.PIPE, check=True, timeout=400)
    found: list[list[dict[str, Any]]] = json.loads(done.stdout)
    return found


def main() -> None:
    """Print it."""
    import guestfs

    handle = guestfs.GuestFS(python_return_dict=True)
    handle.set_backend("direct")
    handle.set_backend_settings(["force_tcg"])
    for disk in sys.argv[1:]:
        handle.add_drive_opts(disk, format="raw", readonly=True)
    handle.launch()
    devices = handle.list_devices()
    found: list[list[dict[str, Any]]] = [[] for _ in devices]
    for device, kind in handle.list_filesystems().items():
        if kind in ("swap", "unknown"):
            continue
        parent = handle.part_to_dev(device) if device[-1].isdigit() else device
        told: dict[str, Any] = {"kind": kind, "number": device.removeprefix(parent)}
        if kind in _CHECKED:
            told["check"] = handle.fsck(kind, device)
        handle.mount_ro(device, "/")
        told["names"] = sorted(handle.find("/"))
        with tempfile.NamedTemporaryFile() as sums:
            handle.checksums_out("sha256", "/", sums.name)
            lines = Path(sums.name).read_text().splitlines()
        told["files"] = {
            name: digest for digest, name in (line.split(maxsplit=1) for line in lines)
        }
        handle.umount_all()
        found[devices.index(parent)].append(told)
    handle.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
