"""The conversion at the end of a warm migration is the one that ``convert`` does."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from lxml import etree

from tests.conftest import assert_gone, program


@pytest.mark.appliance
@pytest.mark.usefixtures("converting_once")
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_the_same_guest_as_convert_makes(
    phony_guest: Path, short_tmp: Path, image_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(short_tmp))
    disk = str(phony_guest / "system.img")
    where = ["-i", "disk", disk, "-o", "local", "-of", image_format, "-on", "g"]
    state = ["--state", str(short_tmp / "state")]
    warm = [*program("v2v-async"), "warm"]
    for folder in ("warm", "cold"):
        (short_tmp / folder).mkdir()
    network = ["-n", "default:inner"]
    for argv in (
        [*warm, "start", *state, *where, "-os", str(short_tmp / "warm")],
        [*warm, "cutover", *state, *network],
        [*program("virt-v2v-async"), *where, "-os", str(short_tmp / "cold"), *network],
    ):
        done = subprocess.run(argv, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
    made = [short_tmp / folder / "g-sda" for folder in ("warm", "cold")]
    compare = ["qemu-img", "compare", "-f", image_format, "-F", image_format, *map(str, made)]
    subprocess.run(compare, check=True)
    warm_xml, cold_xml = (etree.parse(path.with_name("g.xml")).getroot() for path in made)
    for root, path in ((warm_xml, made[0]), (cold_xml, made[1])):
        source = root.find("devices/disk[@device='disk']/source")
        assert source is not None
        assert source.get("file") == str(path)
        source.set("file", "disk")
    assert etree.tostring(warm_xml) == etree.tostring(cold_xml)
    assert not (short_tmp / "state").exists()
    assert_gone(str(short_tmp / "state"))
