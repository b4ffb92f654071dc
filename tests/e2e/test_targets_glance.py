"""A whole conversion to -o glance: the properties that virt-v2v 2.2 gave, and back as a source."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import program, require
from tests.services.openstack import TestCloud
from tests.services.openstack_fixture import cloud as cloud
from tests.services.openstack_fixture import session_cloud as session_cloud
from tests.unit.test_output_openstack import RECORDED

pytestmark = [pytest.mark.appliance, pytest.mark.usefixtures("converting_once")]


def test_the_three_disks(three_disk_guest: Path, cloud: TestCloud, short_tmp: Path) -> None:
    require("nbdkit", "qemu-img")
    disks = [three_disk_guest / name for name in ("system.img", "data1.img", "data2.qcow2")]
    before = [disk.stat().st_mtime_ns for disk in disks]
    (short_tmp / "tmp").mkdir()
    (short_tmp / "password").write_text(cloud.password + "\n")
    argv = [*program("virt-v2v-async"), "-i", "disk", *map(str, disks), "-o", "glance"]
    argv += ["-of", "qcow2", "-on", "rec", "-op", str(short_tmp / "password")]
    environment = {
        "LIBGUESTFS_CACHEDIR": "/var/tmp",
        **os.environ,
        "TMPDIR": str(short_tmp / "tmp"),
    }
    done = subprocess.run(
        argv, env=environment, capture_output=True, text=True, timeout=850, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert cloud.password not in done.stdout + done.stderr
    images = cloud.images()
    recorded = json.loads(RECORDED.read_text())
    assert [image["name"] for image in images] == [each["name"] for each in recorded]
    for image, theirs in zip(images, recorded, strict=True):
        # -i disk knows of one processor; the recorded guest had two.
        theirs["properties"]["hw_cpu_cores"] = 1
        for name, value in theirs["properties"].items():
            assert image[name] == str(value)
        for name in ("disk_format", "container_format", "visibility", "protected"):
            assert image[name] == theirs[name]
        assert image["min_disk"] == 1
        assert image["min_ram"] == 2048
    # And back: what is in the image is a guest that can be read.
    stored = cloud.image_file(images[0]["id"])
    shown = subprocess.run(
        [*program("virt-v2v-async"), "-i", "disk", "-if", "qcow2", str(stored), "--print-source"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    raw = short_tmp / "raw"
    convert = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(stored), str(raw)]
    subprocess.run(convert, check=True)
    # The partition table is the source's, what is in the partitions has been converted.
    assert raw.stat().st_size == disks[0].stat().st_size
    with raw.open("rb") as ours, disks[0].open("rb") as source:
        assert ours.read(512) == source.read(512)
    # Data disks were mounted to be looked at, so their superblocks differ, but for the ext4 UUID.
    subprocess.run([*convert[:6], str(cloud.image_file(images[1]["id"])), str(raw)], check=True)
    assert raw.stat().st_size == disks[1].stat().st_size
    with raw.open("rb") as ours, disks[1].open("rb") as source:
        uuids = []
        for file in (ours, source):
            file.seek(1024 + 0x68)
            uuids.append(file.read(16))
    assert uuids[0] == uuids[1] != bytes(16)
    assert [image["virtual_size"] for image in images] == [128 << 20, 64 << 20, 256 << 20]
    assert [disk.stat().st_mtime_ns for disk in disks] == before
    assert list((short_tmp / "tmp").iterdir()) == []
