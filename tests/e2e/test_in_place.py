"""A real conversion on the guest's own disk: what ``convert`` makes of it, byte for byte."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import program
from tests.e2e.test_convert import Place
from tests.integration.servers import digest
from v2v_async.convert.inspector_xml import parse_inspector_xml

pytestmark = [pytest.mark.appliance, pytest.mark.usefixtures("converting_once")]


@pytest.mark.parametrize("format_", ["raw", "qcow2"])
def test_the_phony_guest(short_tmp: Path, phony_guest: Path, format_: str) -> None:
    place = Place(short_tmp)
    place.environment["XDG_STATE_HOME"] = str(short_tmp / "state")
    system = phony_guest / "system.img"
    disk = short_tmp / "system.disk"
    if format_ == "raw":
        shutil.copy(system, disk)
    else:
        image = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(system), str(disk)]
        subprocess.run(image, check=True)
    before = digest(system)

    made = place.run("-i", "disk", str(system), "-o", "local", "-os", str(place.out), "-on", "made")
    assert made.returncode == 0, made.stderr
    child = place.start("in-place", "-i", "disk", str(disk), "-O", "-", name="v2v-async")
    out, err = child.communicate(timeout=850)
    assert child.returncode == 0, err

    assert digest(system) == before
    compare = ["qemu-img", "compare", "-f", format_, "-F", "raw"]
    compared = subprocess.run(
        [*compare, str(disk), str(place.out / "made-sda")], capture_output=True, text=True
    )
    assert compared.returncode == 0, compared.stdout + compared.stderr
    inspection, firmware = parse_inspector_xml(out.encode())
    assert (inspection.type, inspection.distro, firmware) == ("linux", "debian", "bios")
    place.assert_nothing_left("made-sda", "made.xml")
    assert not any(path.is_file() for path in (short_tmp / "state").rglob("*")), "a journal is left"


def test_a_disk_without_a_system_is_as_it_was(short_tmp: Path, no_os_disk: Path) -> None:
    place = Place(short_tmp)
    place.environment["XDG_STATE_HOME"] = str(short_tmp / "state")
    disk = short_tmp / "data.img"
    shutil.copy(no_os_disk, disk)
    before = digest(disk)
    done = subprocess.run(
        [*program("v2v-async"), "in-place", "-i", "disk", str(disk)],
        env=place.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 1
    assert "operating system" in done.stderr
    assert digest(disk) == before
