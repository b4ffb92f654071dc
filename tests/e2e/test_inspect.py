"""``v2v-async inspect`` with a real appliance."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.conftest import CONVERTING_ONCE, assert_gone, program, require
from tests.e2e.test_convert import Place
from tests.integration.servers import digest
from tests.waiting import wait_until
from v2v_async.convert.inspector_xml import parse_inspector_xml
from v2v_async.model import InspectedGuest

pytestmark = pytest.mark.appliance


def inspect(place: Place, *argv: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*program("v2v-async"), "inspect", *argv],
        env=place.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert_gone(str(place.folder))
    return done


def test_the_phony_guest(short_tmp: Path, phony_guest: Path) -> None:
    place = Place(short_tmp)
    disk = phony_guest / "system.img"
    before = digest(disk)
    done = inspect(place, "-i", "disk", str(disk), "--json")
    assert done.returncode == 0, done.stderr
    found = InspectedGuest.model_validate_json(done.stdout)
    assert (found.inspection.type, found.inspection.distro) == ("linux", "debian")
    assert found.inspection.arch == "x86_64"
    assert found.firmware == "bios"
    assert found.roots == [found.inspection.root]
    assert found.mountpoints["/"] == found.inspection.root
    assert found.inspection.root in found.filesystems
    (told,) = found.disks
    assert 0 < told.allocated <= told.size == disk.stat().st_size
    assert digest(disk) == before
    assert list(place.tmp.iterdir()) == []


def test_an_encrypted_guest(short_tmp: Path) -> None:
    """A device that no key opens is named; a key opens it, and is shown nowhere."""
    require("qemu-img")
    place = Place(short_tmp)
    disk = short_tmp / "luks.img"
    passphrase = "open sesame"
    luks = ["--object", f"secret,id=key,data={passphrase}", "-f", "luks", "-o", "key-secret=key"]
    create = ["qemu-img", "create", "-q", *luks, "-o", "iter-time=10", str(disk), "8M"]
    # Where others use the processor it may fail to measure how fast that is.
    wait_until(lambda: subprocess.run(create).returncode == 0, "the disk is encrypted")
    events = short_tmp / "events.jsonl"
    argv = ["-i", "disk", str(disk), "-if", "raw", f"--events={events}"]
    for key, is_open in (("all:key:wrong", False), (f"/dev/sda:key:{passphrase}", True)):
        done = inspect(place, *argv, "--key", key)
        assert done.returncode == 1
        assert "no operating system was found" in done.stderr
        assert ("/dev/sda can't be opened" in done.stderr) is not is_open
        shown = done.stdout + done.stderr + events.read_text()
        shown += "".join(path.read_text() for path in place.tmp.rglob("*") if path.is_file())
        assert passphrase not in shown
        assert "wrong" not in shown


def test_xml_to_a_file(short_tmp: Path, phony_guest: Path) -> None:
    place = Place(short_tmp)
    to = short_tmp / "guest.xml"
    done = inspect(place, "-i", "disk", str(phony_guest / "system.img"), "-O", str(to))
    assert done.returncode == 0, done.stderr
    inspection, firmware = parse_inspector_xml(to.read_bytes())
    assert (inspection.type, inspection.distro, firmware) == ("linux", "debian", "bios")
    assert inspection.osinfo
    assert b"<program>v2v-async inspect</program>" in to.read_bytes()
    assert [path.name for path in short_tmp.glob("*guest.xml*")] == ["guest.xml"]
    # The same that a conversion's inspection says.
    place.environment["PATH"] = f"{CONVERTING_ONCE}:{place.environment['PATH']}"
    made = place.run("-i", "disk", str(phony_guest / "system.img"), "-o", "json",
                     "-os", str(place.out), "-on", "made")  # fmt: skip
    assert made.returncode == 0, made.stderr
    converted = json.loads((place.out / "made.json").read_text())["inspect"]
    for name, value in inspection.model_dump(exclude={"root"}).items():
        told = converted.get(name.replace("_", "-"), converted.get(name))
        if told is not None and name in converted:
            assert str(told) == str(value), name
    assert converted["distro"] == inspection.distro
