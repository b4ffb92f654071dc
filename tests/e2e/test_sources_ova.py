"""Guests in OVAs by the real command: converted, the OVA unchanged, nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import anyio
import pytest

from tests import ovas
from tests.conftest import ROOT, assert_gone, program, require
from tests.integration.servers import digest
from v2v_async.kvm import appliance_environment, probe_kvm

pytestmark = [pytest.mark.appliance, pytest.mark.usefixtures("converting_once")]


def run(folder: Path, ova: Path, name: str) -> subprocess.CompletedProcess[str]:
    """Convert the guest; what goes into TMPDIR is seen there."""
    for made in ("tmp", "out"):
        (folder / made).mkdir()
    environment = {
        **os.environ,
        **appliance_environment(anyio.run(probe_kvm)),
        "TMPDIR": str(folder / "tmp"),
    }
    environment.setdefault("LIBGUESTFS_CACHEDIR", "/var/tmp")
    before = (digest(ova), ova.stat().st_mtime_ns)
    argv = ["-i", "ova", str(ova), "-o", "local", "-os", str(folder / "out"), "-on", name]
    done = subprocess.run(
        [*program("virt-v2v-async"), *argv, f"--events={folder / 'events'}"],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (digest(ova), ova.stat().st_mtime_ns) == before
    assert list((folder / "tmp").iterdir()) == []
    assert_gone(str(folder))
    return done


def test_a_guest_in_a_stream_optimised_vmdk(short_tmp: Path, phony_guest: Path) -> None:
    """Read inside the tar, after its manifest has been compared."""
    image = ovas.convert(
        phony_guest / "system.img", short_tmp / "disk1.vmdk", "vmdk", "streamOptimized"
    )
    hardware = ovas.cpu(3) + ovas.memory(3072) + ovas.controller() + ovas.disk()
    hardware += ovas.nic(30, Connection="VM Network", Address="00:50:56:01:02:03")
    files: dict[str, ovas.Content] = {
        "phony.ovf": ovas.ovf(items=hardware),
        "disk1.vmdk": image,
    }
    files = {**files, "phony.mf": ovas.manifest(files)}
    ova = ovas.pack(short_tmp / "phony.ova", files)
    done = run(short_tmp, ova, "converted")
    assert "checking 2 files" in done.stdout
    out = short_tmp / "out"
    assert sorted(path.name for path in out.iterdir()) == ["converted-sda", "converted.xml"]
    xml = (out / "converted.xml").read_text()
    for told in ("<vcpu>3</vcpu>", "00:50:56:01:02:03", "VM Network"):
        assert told in xml
    assert (out / "converted-sda").stat().st_size == (phony_guest / "system.img").stat().st_size
    assert digest(out / "converted-sda") != digest(phony_guest / "system.img")
    events = [json.loads(line) for line in (short_tmp / "events").read_text().splitlines()]
    assert "web" in {event.get("guest") for event in events if event["type"] == "finished"}


@pytest.mark.slow
def test_the_sample_guest_boots(short_tmp: Path, sample_guest: Path) -> None:
    """A real Debian with three disks of three formats, one of them compressed."""
    require("qemu-system-x86_64")
    system = ovas.convert(
        sample_guest / "system.img", short_tmp / "system.vmdk", "vmdk", "streamOptimized"
    )
    hardware = ovas.cpu(1) + ovas.memory(1024) + ovas.controller()
    hardware += "".join(ovas.disk(number) for number in (1, 2, 3))
    hardware += ovas.nic(30, Connection="VM Network", ResourceSubType="E1000")
    files: dict[str, ovas.Content] = {
        "sample/sample.ovf": ovas.ovf(
            "system.vmdk", "data1.qcow2", "data2.img", items=hardware, name="sample"
        ),
        "sample/system.vmdk": system,
        "sample/data1.qcow2": sample_guest / "data1.qcow2",
        "sample/data2.img": sample_guest / "data2.img",
    }
    plain = {name.removeprefix("sample/"): content for name, content in files.items()}
    files = {**files, "sample/sample.mf": ovas.manifest(plain, "SHA512")}
    ova = ovas.pack(short_tmp / "sample.ova", files)
    run(short_tmp, ova, "sample")
    booted = subprocess.run(
        [
            *(str(ROOT / "scripts" / "boot-guest"), "--xml", str(short_tmp / "out" / "sample.xml")),
            *("--timeout", "400", "--json"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert booted.returncode == 0, booted.stdout
    described = json.loads((sample_guest / "guest.json").read_text())
    for disk in described["disks"]:
        assert disk["payload_sha256"] in booted.stdout, disk["file"]
    assert "virtio" in booted.stdout
