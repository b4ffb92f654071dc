"""-o qemu with the real Debian: converted, started by -oo qemu-boot, and it boots.

What is on its disks is compared in test_sample_guest.py; unconverted it does not boot on virtio
(there too), so the marker proves that the script gives the guest what it was converted for.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import assert_gone, program, require
from tests.waiting import wait_until
from v2v_async.process import is_same, start_time

pytestmark = [
    pytest.mark.appliance,
    pytest.mark.slow,
    pytest.mark.usefixtures("converting_once"),
]

MARKER = "V2V-ASYNC-GUEST-READY"
BOOT_S = 500.0
"""With the script's trial of KVM, emulated, on a busy machine."""


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="vt.", dir="/var/tmp"))
    yield path
    shutil.rmtree(path)


def test_it_boots_by_its_own_script(folder: Path, sample_guest: Path) -> None:
    """A name and a folder that every quoting rule is needed for, UEFI apart: the guest is BIOS."""
    require("qemu-system-x86_64")
    out = folder / "o,u't $(touch x)"
    out.mkdir()
    name = 'sam\'ple, "1" $(touch y) é'
    sources = [sample_guest / name for name in ("system.img", "data1.qcow2", "data2.img")]
    argv = ["-i", "disk", *map(str, sources), "-o", "qemu", "-os", str(out), "-on", name]
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    done = subprocess.run(
        [*program("virt-v2v-async"), *argv, "-of", "qcow2", "-oo", "qemu-boot"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    match = re.search(r"is booting as process (\d+)", done.stdout + done.stderr)
    assert match is not None, done.stdout + done.stderr
    guest = int(match[1])
    started = start_time(guest)
    assert started is not None, (out / f"{name}.log").read_text(errors="replace")
    try:
        console = wait_for_marker(out / f"{name}.log", guest, started)
    finally:
        if is_same(guest, started):
            os.kill(guest, signal.SIGTERM)
        assert_gone(str(folder))  # its commas are not doubled in what qemu is told
    described = json.loads((sample_guest / "guest.json").read_text())
    for disk in described["disks"]:
        assert disk["payload_sha256"] in console, disk["file"]
    assert "virtio" in console
    made = sorted(path.name for path in out.iterdir())
    assert made == sorted(f"{name}{end}" for end in ("-sda", "-sdb", "-sdc", ".log", ".sh"))
    assert not list(folder.rglob("x")) + list(folder.rglob("y")), "something was run by the shell"


def wait_for_marker(log: Path, pid: int, started: int) -> str:
    """Return what the guest said up to the marker; it fails as soon as the guest has gone."""

    def console() -> str:
        return log.read_text(errors="replace")

    def has_come() -> bool:
        said = console()
        assert is_same(pid, started) or MARKER in said, f"qemu ended: {said[-2000:]}"
        assert "(initramfs)" not in said, said[-2000:]
        return MARKER in said

    wait_until(has_come, lambda: f"the marker is there: {console()[-2000:]}", within_s=BOOT_S)
    return console()
