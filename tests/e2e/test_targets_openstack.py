"""A whole conversion to -o openstack: volumes with what the conversion made, to the byte."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import made_guest, program, require
from tests.openstack_recorded import OPTIONS, TYPE, guest_xml, recorded
from tests.services.openstack import TestCloud
from tests.services.openstack_fixture import cloud as cloud
from tests.services.openstack_fixture import session_cloud as session_cloud

pytestmark = [pytest.mark.appliance, pytest.mark.usefixtures("converting_once")]

# Runs the real one, then keeps what it made of the disks: the overlays are gone in the end.
KEEPING = """\
#!/bin/sh
PATH=$REAL_PATH virt-v2v-in-place "$@" || exit
for last; do :; done
[ -f "$last" ] || exit 0
index=1
for socket in $(grep -o "socket=[^'\\"&]*" "$last"); do
    qemu-img convert -f raw -O raw "nbd+unix:///?$socket" "$KEPT/$index" || exit
    index=$((index + 1))
done
"""


def test_the_two_disks(cloud: TestCloud, short_tmp: Path) -> None:
    require("nbdkit", "qemu-img", "virt-v2v-in-place")
    guest = made_guest("phony-guest", "--kind", "two-disk")
    disks = [guest / name for name in ("system.img", "data1.img")]
    before = [disk.stat().st_mtime_ns for disk in disks]
    for name in ("tmp", "bin", "kept"):
        (short_tmp / name).mkdir()
    (short_tmp / "password").write_text(cloud.password + "\n")
    keeping = short_tmp / "bin" / "virt-v2v-in-place"
    keeping.write_text(KEEPING)
    keeping.chmod(0o755)
    if os.geteuid() == 0 and Path("/dev/loop-control").exists():
        cloud.set_nova(use_loop=True)  # block devices, as in a real appliance
    argv = [*program("virt-v2v-async"), "-i", "libvirtxml"]
    argv += [str(guest_xml(short_tmp, *disks)), "-o", "openstack", "-os", TYPE]
    argv += ["-op", str(short_tmp / "password")]
    for name, value in {**OPTIONS, "dev-disk-by-id": str(cloud.devices)}.items():
        argv += ["-oo", f"{name}={value}"]
    environment = {
        "LIBGUESTFS_CACHEDIR": "/var/tmp",
        **os.environ,
        "TMPDIR": str(short_tmp / "tmp"),
        "REAL_PATH": os.environ["PATH"],
        "PATH": f"{short_tmp / 'bin'}:{os.environ['PATH']}",
        "KEPT": str(short_tmp / "kept"),
    }
    done = subprocess.run(
        argv, env=environment, capture_output=True, text=True, timeout=850, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert cloud.password not in done.stdout + done.stderr
    volumes = cloud.volumes()
    assert [each["name"] for each in volumes] == [each["name"] for each in recorded()["volumes"]]
    for index, (volume, disk) in enumerate(zip(volumes, disks, strict=True), start=1):
        assert (volume["status"], volume["attachments"]) == ("available", [])
        kept = short_tmp / "kept" / str(index)
        size = disk.stat().st_size
        assert kept.stat().st_size == size
        # It has been converted: only the boot sector is the source's.
        with kept.open("rb") as converted, disk.open("rb") as source:
            assert converted.read(512) == source.read(512)
            assert converted.read() != source.read()
        written = short_tmp / "volume"
        with cloud.volume_file(volume["id"]).open("rb") as file, written.open("wb") as first:
            first.write(file.read(size))
        compare = ["qemu-img", "compare", "-f", "raw", "-F", "raw", str(kept), str(written)]
        compared = subprocess.run(compare, capture_output=True, text=True, check=False)
        assert compared.returncode == 0, compared.stdout + compared.stderr
    assert volumes[0]["bootable"] == "true"
    assert [disk.stat().st_mtime_ns for disk in disks] == before
    assert list(cloud.devices.iterdir()) == []
    assert list((short_tmp / "tmp").iterdir()) == []
