"""A real guest, small enough for TCG, that writes numbered records with checksums until it is off.

Its kernel is that of this machine, its system a RAM disk with busybox. It turns itself off as a
guest does that is asked to: by its power button.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

RECORD = 4096
SLOTS = 1500
"""Records are written round and round in so many places."""

_MODULES = ("ata_piix", "sd_mod", "evdev", "button")
_INIT = """#!/bin/busybox sh
bin=/bin/busybox
$bin mkdir -p /proc /sys /dev /run
$bin mount -t proc proc /proc
$bin mount -t sysfs sysfs /sys
$bin mount -t devtmpfs devtmpfs /dev
exec </dev/console >/dev/ttyS0 2>&1
for module in MODULES; do $bin insmod /modules/$module; done
while [ ! -b /dev/sda ]; do $bin sleep 0.1; done
for event in /dev/input/event*; do
    ( $bin dd if=$event of=/dev/null bs=24 count=1 2>/dev/null; : >/run/stop ) &
done
echo WRITING
n=0
while [ ! -e /run/stop ]; do
    n=$((n + 1))
    sum=$(echo "record $n" | $bin sha256sum)
    echo "record $n ${sum%% *}" |
        $bin dd of=/dev/sda bs=4096 seek=$((n % SLOTS)) conv=sync,notrunc 2>/dev/null
    # As a database does, now and then.
    if [ $((n % 16)) = 0 ]; then $bin sync; echo "WRITTEN $n"; fi
done
$bin sync
echo "LAST $n"
$bin poweroff -f
"""


def make_system(folder: Path) -> tuple[Path, Path]:
    """Make kernel and RAM disk in ``folder``, for everybody to read; return both."""
    kernel = sorted(Path("/boot").glob("vmlinuz-*"))[-1]
    release = kernel.name.partition("-")[2]
    root = folder / "root"
    (root / "bin").mkdir(parents=True)
    (root / "modules").mkdir()
    shutil.copy("/usr/bin/busybox", root / "bin")
    names: list[str] = []
    for module in _MODULES:
        argv = ["modprobe", "-S", release, "--show-depends", module]
        said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        for path in map(Path, re.findall(r"^insmod (\S+)", said, re.MULTILINE)):
            if path.name not in names and "pclmul" not in path.name:
                names.append(path.name)
                shutil.copy(path, root / "modules")
    init = _INIT.replace("MODULES", " ".join(names)).replace("SLOTS", str(SLOTS))
    (root / "init").write_text(init)
    (root / "init").chmod(0o755)
    made = folder / "initrd", folder / "kernel"
    with made[0].open("wb") as out:
        listed = "\n".join(str(path.relative_to(root)) for path in [root, *root.rglob("*")])
        argv = ["cpio", "--quiet", "-o", "-H", "newc"]
        subprocess.run(argv, cwd=root, input=listed.encode(), stdout=out, check=True)
    shutil.copy(kernel, made[1])
    for path in made:
        path.chmod(0o644)
    shutil.rmtree(root)
    return made[1], made[0]


def records(disk: bytes) -> list[int]:
    """Return the numbers of the records on a disk, sorted; each is whole."""
    found = []
    for slot in range(SLOTS):
        text = disk[slot * RECORD : (slot + 1) * RECORD].rstrip(b"\0").decode()
        if not text:
            continue
        word, number, said = text.split()
        expected = hashlib.sha256(f"record {number}\n".encode()).hexdigest()
        assert (word, said) == ("record", expected), f"slot {slot}: {text!r}"
        assert int(number) % SLOTS == slot
        found.append(int(number))
    return sorted(found)
