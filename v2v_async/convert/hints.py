"""What to do next, for the ways in which virt-v2v-in-place is known to fail."""

from __future__ import annotations

import re

_HINTS: tuple[tuple[str, str], ...] = (
    (
        r"could not detect the source guest|no root device found|no operating system",
        "give all disks of the guest, the one it boots from first; ‘v2v-async inspect’ says what "
        "is in them",
    ),
    (r"multi-?boot", "choose one of its systems: --root first, or --root /dev/sdXN"),
    (r"root device .* not found|could not find .*root", "choose another one: --root first"),
    (
        r"LUKS|[Cc]levis|encrypted|--key",
        "give its passphrase: --key all:file:FILENAME, or /dev/sdXN:file:FILENAME for one device",
    ),
    (
        r"[Hh]ibernat|Fast Restart|[Ff]ast [Ss]tartup",
        "start the guest on its source, turn hibernation off (powercfg /h off), shut it down "
        "completely and convert it again",
    ),
    (
        r"not enough (free space|available inodes)",
        "make room on that file system in the guest and convert it again",
    ),
    (
        r"unable to convert this guest type",
        "virt-v2v-support(1) lists the systems that can be converted",
    ),
    (r"[Ff]ilesystem.*(dirty|unclean)|e2fsck|xfs_repair", "check the file system in the guest"),
    (r"No space left on device", "free space in TMPDIR (default /var/tmp): the overlays are there"),
    (
        r"appliance|could not start|libguestfs.*launch|supermin",
        "‘v2v-async doctor’ finds out why libguestfs does not start here",
    ),
    (r"qemu-nbd did not start|nbdkit did not start", "a server of a source disk does not answer"),
)


def hint_for(errors: str) -> str | None:
    """Return what a person can do about ``errors``; None when that is not known."""
    for pattern, hint in _HINTS:
        if re.search(pattern, errors):
            return hint
    return None
