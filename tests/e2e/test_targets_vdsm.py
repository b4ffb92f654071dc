"""A whole conversion to -o vdsm: the OVF that virt-v2v 2.2 wrote for the same guest and options."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import program, require
from tests.unit.test_output_ovirt import RECORDED, differences

pytestmark = [pytest.mark.appliance, pytest.mark.usefixtures("converting_once")]
DOMAIN = "4e6a7b1c-0d2f-4a61-9b4e-1f0a6f7b2c11"
IMAGE, VOLUME = "11111111-1111-1111-1111-111111111111", "22222222-2222-2222-2222-222222222222"
VM = "33333333-3333-3333-3333-333333333333"


def test_the_phony_guest(phony_guest: Path, short_tmp: Path) -> None:
    require("nbdkit", "qemu-img")
    domain = short_tmp / DOMAIN
    image = domain / "images" / IMAGE
    image.mkdir(parents=True)
    for name in ("tmp", "ovf"):
        (short_tmp / name).mkdir()
    disk = phony_guest / "system.img"
    before = disk.stat().st_mtime_ns
    options = {
        "image-uuid": IMAGE,
        "vol-uuid": VOLUME,
        "vm-uuid": VM,
        "ovf-output": str(short_tmp / "ovf"),
        "ovf-flavour": "ovirt",
    }
    argv = [*program("virt-v2v-async"), "-i", "disk", str(disk), "-o", "vdsm", "-os", str(domain)]
    argv += ["-oa", "preallocated"]
    argv += [word for name, value in options.items() for word in ("-oo", f"vdsm-{name}={value}")]
    environment = {
        "LIBGUESTFS_CACHEDIR": "/var/tmp",
        **os.environ,
        "TMPDIR": str(short_tmp / "tmp"),
    }
    done = subprocess.run(
        argv, env=environment, capture_output=True, text=True, timeout=850, check=False
    )
    assert done.returncode == 0, done.stderr
    theirs, ours = RECORDED / "vdsm.ovf", short_tmp / "ovf" / f"{VM}.ovf"
    assert differences(theirs.read_bytes(), ours.read_bytes()) == []
    assert sorted(path.name for path in image.iterdir()) == [VOLUME, f"{VOLUME}.meta"]
    volume = image / VOLUME
    assert volume.stat().st_blocks * 512 >= volume.stat().st_size == disk.stat().st_size
    # The partition table is the source's, what is in the partitions has been converted.
    compared = subprocess.run(
        ["qemu-img", "compare", "-f", "raw", "-F", "raw", str(disk), str(volume)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert compared.returncode == 1, compared.stdout
    assert volume.read_bytes()[:512] == disk.read_bytes()[:512]
    assert disk.stat().st_mtime_ns == before
    assert list((short_tmp / "tmp").iterdir()) == []
