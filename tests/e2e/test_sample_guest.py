"""The real Debian with three disks: converted, compared with virt-v2v's work, and booted.

The unconverted guest must *not* boot on virtio: so the marker proves the conversion.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import anyio
import pytest

from tests.conftest import ROOT, made_guest, program, require
from tests.integration.servers import digest
from v2v_async.cachedir import cache_dir
from v2v_async.kvm import appliance_environment, probe_kvm

pytestmark = [pytest.mark.appliance, pytest.mark.slow]

# What two conversions of the same guest by the same virt-v2v differ in; full matches of paths.
VARIES = (
    r"/boot/initrd\.img-[^/]*",  # made anew by the conversion: it holds the times of its files
    r"/etc/machine-id",  # random where the conversion makes one
    r"/var/lib/(urandom|systemd)/random-seed",  # random, that is its purpose
)
PARTITION = 1 << 20
"""Where the system disk's only partition begins."""


@dataclass
class Conversion:
    out: Path
    events: list[dict[str, object]]

    @property
    def disks(self) -> list[Path]:
        return [self.out / f"sample-sd{letter}" for letter in "abc"]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="vt.", dir="/var/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def converted(folder: Path, sample_guest: Path) -> Conversion:
    """What virt-v2v-async makes of it; the sources are the same before and after."""
    sources = [sample_guest / name for name in ("system.img", "data1.qcow2", "data2.img")]
    before = [(digest(path), path.stat().st_mtime_ns) for path in sources]
    out = folder / "ours"
    out.mkdir()
    events = folder / "events.jsonl"
    argv = ["-i", "disk", *map(str, sources), "-o", "local", "-os", str(out), "-on", "sample"]
    done = subprocess.run(
        [*program("virt-v2v-async"), *argv, f"--events={events}"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(digest(path), path.stat().st_mtime_ns) for path in sources] == before
    return Conversion(out, [json.loads(line) for line in events.read_text().splitlines()])


@pytest.fixture(scope="module")
def reference(sample_guest: Path) -> Path:
    """What the installed virt-v2v makes of it; cached, since it takes minutes."""
    require("virt-v2v", "debugfs")
    version = subprocess.run(["virt-v2v", "--version"], capture_output=True, text=True, check=True)
    key = hashlib.sha256((sample_guest.name + version.stdout).encode()).hexdigest()[:16]
    parent = cache_dir() or Path(tempfile.gettempdir())
    cached = parent / f"reference-{key}"
    if cached.exists():
        return cached
    making = Path(tempfile.mkdtemp(prefix="reference.", dir=parent))
    try:
        # virt-v2v 2.2 refuses disks of different formats.
        data1 = making / "data1.img"
        qcow2 = sample_guest / "data1.qcow2"
        subprocess.run(["qemu-img", "convert", "-O", "raw", str(qcow2), str(data1)], check=True)
        disks = [sample_guest / "system.img", data1, sample_guest / "data2.img"]
        argv = ["virt-v2v", "-i", "disk", *map(str, disks), "-o", "local", "-os", str(making)]
        done = subprocess.run([*argv, "-on", "sample"], env=tcg(), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        data1.unlink()
        making.rename(cached)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return cached


def tcg() -> dict[str, str]:
    return {**os.environ, **appliance_environment(anyio.run(probe_kvm))}


def test_it_boots_on_virtio_from_its_own_xml(converted: Conversion, sample_guest: Path) -> None:
    """And sees every file that was on the source's disks, by checksum."""
    done = subprocess.run(
        [
            *(str(ROOT / "scripts" / "boot-guest"), "--xml", str(converted.out / "sample.xml")),
            *("--timeout", "400", "--json"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    told = done.stdout
    described = json.loads((sample_guest / "guest.json").read_text())
    for disk in described["disks"]:
        assert disk["payload_sha256"] in told, disk["file"]
    assert "virtio" in told


def test_unconverted_it_does_not_boot_on_virtio(sample_guest: Path) -> None:
    done = subprocess.run(
        [
            str(ROOT / "scripts" / "boot-guest"),
            *("--bus", "virtio", "--timeout", "400"),
            *(str(sample_guest / name) for name in ("system.img", "data1.qcow2", "data2.img")),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "V2V-ASYNC-GUEST-READY" not in done.stdout
    assert "root file system" in done.stdout + done.stderr  # it said why, rather than hang


def test_the_disks_hold_what_virt_v2v_makes(
    converted: Conversion, reference: Path, folder: Path
) -> None:
    """Every file of all file systems: name, kind, mode, owner, content; but for VARIES.

    Bytes can't be compared: mounting a file system writes the time into it, and new files may get
    other blocks. So both are unpacked by debugfs(8), which needs no mount, and then compared.
    """
    different = []
    for path, offset in zip(converted.disks, (PARTITION, 0, 0), strict=True):
        ours = manifest(path, offset, folder / "unpacked-ours")
        theirs = manifest(reference / path.name, offset, folder / "unpacked-theirs")
        assert len(ours) > (1000 if offset else 2), path.name
        different += [
            f"{path.name}: {name}"
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name)
            and not any(re.fullmatch(known, name) for known in VARIES)
        ]
    assert different == []


def manifest(image: Path, offset: int, unpacked: Path) -> dict[str, tuple[object, ...]]:
    """Return what is in an ext4 file system: path to (mode, uid, gid, content)."""
    unpacked.mkdir()
    try:
        where = f"{image}?offset={offset}"
        dump = subprocess.run(
            ["debugfs", "-R", f"rdump / {unpacked}", where], capture_output=True, text=True
        )
        assert dump.returncode == 0, dump.stderr
        found: dict[str, tuple[object, ...]] = {}
        for path in unpacked.rglob("*"):
            status = path.lstat()
            if path.is_symlink():
                content = os.readlink(path)
            elif path.is_file():
                content = digest(path)
            else:
                content = ""
            name = "/" + str(path.relative_to(unpacked))
            found[name] = (status.st_mode, status.st_uid, status.st_gid, content)
        return found
    finally:
        shutil.rmtree(unpacked)


def test_unused_blocks_are_not_copied(converted: Conversion, reference: Path) -> None:
    """Trimmed and sparse: no more is allocated than by virt-v2v, give or take a few blocks."""
    for path in converted.disks:
        ours = path.stat().st_blocks * 512
        theirs = (reference / path.name).stat().st_blocks * 512
        assert path.stat().st_size == (reference / path.name).stat().st_size
        assert ours <= theirs * 1.02 + (1 << 20), path.name
    finished = [e for e in converted.events if e["type"] == "finished" and "disk" in e]
    assert len(finished) == 3


def test_libvirt_defines_it(converted: Conversion) -> None:
    require("virsh")
    xml = str(converted.out / "sample.xml")
    virsh = ["virsh", "-q", "-c", "test:///default", "define", "--validate", xml]
    done = subprocess.run(virsh, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_guest_was_made_by_the_script(sample_guest: Path) -> None:
    """The second time it is found, not made again."""
    assert made_guest("sample-guest") == sample_guest
    data1 = json.loads(
        subprocess.run(
            ["qemu-img", "info", "--output=json", str(sample_guest / "data1.qcow2")],
            capture_output=True,
            check=True,
        ).stdout
    )
    assert data1["format"] == "qcow2"
    assert data1["actual-size"] < data1["virtual-size"] / 10  # mostly empty
    fragments = (sample_guest / "data2.img").stat()
    assert fragments.st_blocks * 512 < fragments.st_size / 2  # fragmented, not full
