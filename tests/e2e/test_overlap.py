"""A real conversion of a guest that is copied meanwhile: the disks are those of one that waits."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.conftest import CONVERTING_ONCE
from tests.e2e.filesystems import filesystems
from tests.e2e.test_convert import Place
from tests.integration.servers import digest

pytestmark = pytest.mark.appliance


def test_what_a_filesystem_check_and_checksums_see(short_tmp: Path, phony_guest: Path) -> None:
    """Two conversions: what one of them works on is copied meanwhile; the other may be kept."""
    place = Place(short_tmp)
    given = ["-i", "disk", str(phony_guest / "system.img"), "-o", "local", "-os", str(place.out)]
    done = place.run(*given, "-on", "on", "--overlap=on")
    assert done.returncode == 0, done.stderr
    place.environment["PATH"] = f"{CONVERTING_ONCE}:{place.environment['PATH']}"
    done = place.run(*given, "-on", "off", "--overlap=off")
    assert done.returncode == 0, done.stderr
    [on, off] = filesystems(place.out / "on-sda", place.out / "off-sda")
    assert on == off
    assert {each.get("check", 0) for each in on} == {0}
    assert sum(len(each["files"]) for each in on) > 10


@pytest.mark.usefixtures("converting_once")
@pytest.mark.parametrize("format_", ["raw", "qcow2"])
def test_the_phony_guest(short_tmp: Path, phony_guest: Path, format_: str) -> None:
    place = Place(short_tmp)
    disk = phony_guest / "system.img"
    before = digest(disk)
    if format_ == "qcow2":
        disk = short_tmp / "system.qcow2"
        image = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2"]
        subprocess.run([*image, str(phony_guest / "system.img"), str(disk)], check=True)
    given = ["-i", "disk", str(disk), "-o", "local", "-os", str(place.out)]
    waits = place.run(*given, "-on", "waits", "--overlap=off")
    assert waits.returncode == 0, waits.stderr
    events = short_tmp / "events"
    made = place.run(
        *given, "-on", "made", "--overlap=on", "--verify", f"--events={events}", "-of", "qcow2"
    )
    assert made.returncode == 0, made.stderr

    assert digest(phony_guest / "system.img") == before
    assert digest(place.out / "made-sda", "qcow2") == digest(place.out / "waits-sda")
    told = [json.loads(line) for line in events.read_text().splitlines()]
    steps = [each["step"] for each in told if each["type"] == "started" and "step" in each]
    assert steps[:2] == ["input", "output"]
    [end] = [each["bytes"] for each in told if each["type"] == "finished" and "disk" in each]
    landed = end["copied"] + end["zero"] + end["skipped"] + end["resumed"]
    assert landed == end["total"] + end["wasted"]
    place.assert_nothing_left("waits-sda", "waits.xml", "made-sda", "made.xml")
