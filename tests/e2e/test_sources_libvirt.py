"""A guest that libvirt's XML describes, by the real command line from its disks to the new ones."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from lxml import etree

from tests.conftest import ROOT, program, require
from tests.e2e.test_convert import Place, domain_is_accepted
from tests.integration.servers import digest

pytestmark = [pytest.mark.appliance, pytest.mark.usefixtures("converting_once")]


@pytest.fixture
def place(short_tmp: Path) -> Place:
    return Place(short_tmp)


def disk(path: Path, dev: str, format_: str = "raw") -> str:
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='{format_}'/>"
        f"<source file='{path}'/><target dev='{dev}' bus='ide'/></disk>"
    )


def domain(name: str, *disks: str, kind: str = "kvm", more: str = "") -> str:
    return (
        f"<domain type='{kind}'><name>{name}</name><memory unit='MiB'>768</memory>"
        "<vcpu>2</vcpu><os><type arch='x86_64'>hvm</type></os><features><acpi/><pae/></features>"
        f"{more}<devices>{''.join(disks)}"
        "<disk type='file' device='cdrom'><target dev='hdc' bus='ide'/></disk>"
        "<interface type='bridge'><mac address='52:54:00:12:34:56'/><source bridge='lan0'/>"
        "<model type='e1000'/></interface><graphics type='spice'/></devices></domain>"
    )


def test_the_phony_guest(place: Place, phony_guest: Path) -> None:
    source = phony_guest / "system.img"
    before = (digest(source), source.stat().st_mtime_ns)
    given = place.folder / "guest.xml"
    namespace = "xmlns:test='http://libvirt.org/schemas/domain/test/1.0'"
    off = f"<test:runstate {namespace}>5</test:runstate>"
    guest = domain("web", disk(source, "hda"), kind="test", more=off)
    given.write_text(f"<node>{guest}</node>")
    words = ["-i", "libvirt", "-ic", f"test://{given}", "web"]
    done = place.run(*words, "-o", "local", "-os", str(place.out), "-b", "lan0:br7")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (digest(source), source.stat().st_mtime_ns) == before
    place.assert_nothing_left("web-sda", "web.xml")
    assert list(place.tmp.iterdir()) == []
    assert digest(place.out / "web-sda") != before[0], "it was converted"
    made = etree.parse(place.out / "web.xml")
    assert made.findtext("name") == "web"
    assert made.findtext("memory") == str(768 * 1024)
    assert made.findtext("vcpu") == "2"
    nic = made.find("devices/interface")
    assert nic is not None
    assert nic.find("mac").get("address") == "52:54:00:12:34:56"  # type: ignore[union-attr]
    assert nic.find("source").get("bridge") == "br7"  # type: ignore[union-attr]
    assert nic.find("model").get("type") == "virtio"  # type: ignore[union-attr]
    assert [d.get("device") for d in made.findall("devices/disk")] == ["disk", "cdrom"]
    domain_is_accepted(place.out / "web.xml")


@pytest.mark.slow
def test_the_sample_guest_boots(place: Place, sample_guest: Path) -> None:
    """Three disks of two formats from one XML; the new guest sees every file by checksum."""
    require("qemu-system-x86_64")
    files = {"system.img": "raw", "data1.qcow2": "qcow2", "data2.img": "raw"}
    sources = [sample_guest / name for name in files]
    before = [(digest(path), path.stat().st_mtime_ns) for path in sources]
    disks = [
        disk(path, f"hd{letter}", format_)
        for path, letter, format_ in zip(sources, "abd", files.values(), strict=True)
    ]
    given = place.folder / "sample.xml"
    given.write_text(domain("sample", *disks))
    argv = ["-i", "libvirtxml", str(given), "-o", "local", "-os", str(place.out)]
    done = subprocess.run(
        [*program("virt-v2v-async"), *argv],
        env=place.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(digest(path), path.stat().st_mtime_ns) for path in sources] == before
    place.assert_nothing_left("sample-sda", "sample-sdb", "sample-sdc", "sample.xml")
    boot = [str(ROOT / "scripts" / "boot-guest"), "--xml", str(place.out / "sample.xml")]
    booted = subprocess.run(
        [*boot, "--timeout", "400", "--json"], stdout=subprocess.PIPE, text=True
    )
    assert booted.returncode == 0, booted.stdout
    for described in json.loads((sample_guest / "guest.json").read_text())["disks"]:
        assert described["payload_sha256"] in booted.stdout, described["file"]
