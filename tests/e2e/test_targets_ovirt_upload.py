"""A whole conversion to -o rhv-upload: what virt-v2v 2.2 made of the same guest and options."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import program, require
from tests.ovirt_upload import engine as engine
from tests.ovirt_upload import imageio as imageio
from tests.services.engine import PASSWORD, Engine
from tests.services.imageio import Imageio
from tests.unit.test_output_ovirt import differences

pytestmark = [pytest.mark.appliance, pytest.mark.usefixtures("converting_once")]
RECORDED = Path(__file__).parent.parent / "recorded" / "ovirt-upload"
DISK = "11111111-1111-1111-1111-111111111111"
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def test_the_phony_guest(
    phony_guest: Path, engine: Engine, imageio: Imageio, short_tmp: Path
) -> None:
    require("nbdkit", "qemu-img")
    disk = phony_guest / "system.img"
    before = disk.stat().st_mtime_ns
    (short_tmp / "tmp").mkdir()
    password, authority = short_tmp / "password", short_tmp / "ca.pem"
    password.write_text(PASSWORD + "\n")
    authority.write_bytes(engine.certificate.read_bytes() + imageio.certificate.read_bytes())
    url = engine.url.replace("https://", "https://admin%40internal@")
    argv = [*program("virt-v2v-async"), "-i", "disk", str(disk), "-o", "ovirt-upload"]
    argv += ["-oc", url, "-op", str(password), "-os", "data-1", "-of", "qcow2", "-on", "phony"]
    argv += ["-oo", f"rhv-cafile={authority}", "-oo", "rhv-verifypeer"]
    argv += ["-oo", f"ovirt-disk-uuid={DISK}"]
    environment = {
        "LIBGUESTFS_CACHEDIR": "/var/tmp",
        **os.environ,
        "TMPDIR": str(short_tmp / "tmp"),
    }
    done = subprocess.run(
        argv, env=environment, capture_output=True, text=True, timeout=850, check=False
    )
    assert done.returncode == 0, done.stderr
    [vm] = engine.vms.values()
    assert vm.name == "phony"
    assert differences((RECORDED / "guest.ovf").read_bytes(), vm.ovf.encode()) == []
    [made] = engine.disks.values()
    assert (made.id, made.name, made.format, made.sparse) == (DISK, "phony-000", "cow", True)
    theirs = [line for line in (RECORDED / "requests").read_text().splitlines() if "POST" in line]
    ours = [f"{method} {_UUID.sub('*', path)}" for method, path in engine.requests]
    assert [line for line in ours if not line.startswith("GET")] == theirs
    # The partition table is the source's, what is in the partitions has been converted.
    content = engine.image(DISK, short_tmp / "raw")
    source = disk.read_bytes()
    assert len(content) == len(source)
    assert content[:512] == source[:512]
    assert content != source
    assert made.path.stat().st_blocks * 512 < len(source), "sparse"
    assert disk.stat().st_mtime_ns == before
    assert list((short_tmp / "tmp").iterdir()) == []
    for secret in (PASSWORD, *engine.every_token, *engine.every_ticket):
        assert secret not in done.stdout + done.stderr
