"""A guest that goes on writing while it is migrated: the target has every record that it wrote."""

from __future__ import annotations

import re
import subprocess
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import require
from tests.fault.test_warm import CONVERTED, Place
from tests.integration.servers import MIB
from tests.waiting import wait_until
from tests.warm_guest import warm_guest
from tests.writing_guest import make_system, records


def raw(path: Path, image_format: str, folder: Path) -> bytes:
    plain = folder / "read"
    argv = ["qemu-img", "convert", "-f", image_format, "-O", "raw", str(path), str(plain)]
    subprocess.run(argv, check=True)
    return plain.read_bytes()


@pytest.mark.slow
def test_every_record_is_there(short_tmp: Path) -> None:
    """Ten passes, some killed, then a shutdown by its power button."""
    require("libvirtd", "qemu-system-x86_64", "qemu-nbd", "busybox", "cpio", "modprobe")
    (short_tmp / "system").mkdir()
    system = make_system(short_tmp / "system")
    with warm_guest(short_tmp, system=system) as guest:
        guest.start()
        serial = short_tmp / "serial"

        def written() -> int:
            found = re.findall(r"WRITTEN (\d+)", serial.read_text(errors="replace"))
            return int(found[-1]) if found else 0

        def writes_on(since: int) -> bool:
            return written() > since

        def say() -> str:
            return f"it writes on: {serial.read_text(errors='replace')[-400:]}"

        wait_until(written, say, within_s=300)
        place = Place(guest)
        place.does("start")
        for where in (None, "half copied", None, "opened", None, "copied", None, "noted", None):
            before = written()
            wait_until(partial(writes_on, before), say, within_s=120)
            if where is None:
                place.does("sync")
            else:
                place.killed("sync", where)
        assert "asked to shut down" not in place.does("cutover", "--shutdown")
        assert not guest.domain.isActive()
        last = int(re.findall(r"LAST (\d+)", serial.read_text(errors="replace"))[-1])
        source = raw(guest.paths[0], "qcow2", short_tmp)
        found = records(source)
        assert found[-1] == last
        assert found == list(range(found[0], last + 1)), "none is missing"
        target = bytearray((place.out / "g-sda").read_bytes())
        assert target[MIB : MIB + len(CONVERTED)] == CONVERTED
        target[MIB : MIB + len(CONVERTED)] = source[MIB : MIB + len(CONVERTED)]
        assert target == source
        assert records(bytes(target)) == found
        place.assert_nothing_left()
        del place.guest
