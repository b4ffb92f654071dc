"""Prints what is on the file systems of a disk image, as JSON: run as a program, with guestfs.

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


def filesystems(disk: Path, image_format: str) -> dict[str, dict[str, Any]]:
    """Return what is in a disk, by file system. Starts an appliance."""
    argv = [sys.executable, __file__, str(disk), image_format]
    done = subprocess.run(argv, stdout=subprocess.PIPE, check=True, timeout=400)
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


def main() -> None:
    """Print it."""
    import guestfs

    handle = guestfs.GuestFS(python_return_dict=True)
    handle.set_backend("direct")
    handle.set_backend_settings(["force_tcg"])
    handle.add_drive_opts(sys.argv[1], format=sys.argv[2], readonly=True)
    handle.launch()
    found = {}
    for device, kind in handle.list_filesystems().items():
        if kind in ("swap", "unknown"):
            continue
        told: dict[str, Any] = {"kind": kind}
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
        found[device] = told
    handle.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
