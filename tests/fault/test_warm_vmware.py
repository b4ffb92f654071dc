"""Warm migration of a VMware guest from the command line, with a kill -9 in the middle of a pass.

The server, its disks and the conversion are stand-ins; libvirt, pyvmomi, nbdkit and the rest are
real.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import assert_gone, program, require
from tests.fault.test_guest_faults import REPLAY
from tests.fault.test_warm import CONVERTED
from tests.integration.servers import MIB, fragmented
from tests.tracked_machine import Pages, TrackedMachine, tracked_machine
from tests.vcenter import PASSWORD

SIZE = 8 * MIB
# It dies when a pass has opened the source, or when it has copied.
_DIES = """
import os, signal, sys
from v2v_async.warm import migration

async def dies(*_, **__):
    if "POINT" == "copied":
        await copy_ranges(*_, **__)
    os.kill(os.getpid(), signal.SIGKILL)

copy_ranges, migration.copy_ranges = migration.copy_ranges, dies
from v2v_async.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


class Place:
    """A machine that runs, and a migration of it from the command line."""

    def __init__(self, machine: TrackedMachine, folder: Path) -> None:
        self.machine = machine
        self.folder = folder
        self.state = folder / "state"
        self.out = folder / "out"
        self.out.mkdir()
        self.password = folder / "password"
        self.password.write_text(PASSWORD + "\n")
        self.shown: list[str] = []
        environment = machine.installed.environment
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "V2V_ASYNC_CACHE"},
            **environment,
            "PATH": f"{REPLAY}:{environment['PATH']}",
            "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg",
            "TMPDIR": str(folder),
        }

    def run(
        self, command: str, *more: str, dying: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        words = ["warm", command, "--state", str(self.state), *more]
        if command == "start":
            machine = self.machine
            words += ["-i", "libvirt", "-ic", machine.vcenter.uri, "-it", "vddk"]
            words += ["-io", f"vddk-libdir={machine.installed.libdir}", "-ip", str(self.password)]
            words += ["-o", "local", "-os", str(self.out), machine.guest.name]
        argv = [*program("v2v-async")]
        if dying is not None:
            argv = [sys.executable, "-c", _DIES.replace("POINT", dying)]
        done = subprocess.run(
            [*argv, *words], env=self.environment, capture_output=True, text=True, timeout=240
        )
        self.shown.append(done.stdout + done.stderr)
        return done

    def does(self, command: str, *more: str) -> str:
        done = self.run(command, *more)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def last_pass(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.does("status", "--json"))["passes"][-1]
        return found

    def assert_migrated(self) -> None:
        for number, disk in enumerate(self.machine.disks):
            expected = bytearray(disk.path.read_bytes())
            expected[MIB : MIB + len(CONVERTED)] = CONVERTED
            made = self.out / f"g-sd{'ab'[number]}"
            assert made.read_bytes() == expected, f"disk {number + 1}"
        assert sorted(path.name for path in self.out.iterdir()) == ["g-sda", "g-sdb", "g.xml"]
        self.assert_nothing_left()

    def assert_nothing_left(self) -> None:
        assert not self.state.exists()
        assert not self.machine.snapshots
        assert_gone(str(self.state))

    def assert_no_password(self) -> None:
        shown = "".join(self.shown)
        kept = [path for path in self.state.rglob("*") if path.is_file()]
        shown += "".join(path.read_bytes().decode(errors="replace") for path in kept)
        assert PASSWORD not in shown
        assert PASSWORD not in json.dumps(shown)


@pytest.fixture
def place(short_tmp: Path) -> Iterator[Place]:
    require("openssl", "nbdkit", "qemu-nbd", "qemu-img")
    disks = [fragmented(short_tmp / f"{n}.img", SIZE, seed=n) for n in range(2)]
    with tracked_machine(short_tmp, disks) as machine:
        yield Place(machine, short_tmp)


def test_ten_passes(place: Place) -> None:
    """Each copies what was written since the one before; the last when it has been shut down."""
    machine = place.machine
    machine.track(wanted=False)
    machine.pages = Pages(most=2, is_shuffled=True)
    assert "pass 1: everything" in place.does("start")
    assert "ReconfigVM_Task" in machine.calls
    for number in range(2, 10):
        machine.write_here_and_there(3)
        place.does("sync")
        last = place.last_pass()
        assert (last["number"], last["is_all"]) == (number, False)
        assert not machine.snapshots
    machine.write_here_and_there(3)
    assert "the source tells what changes" in place.does("status")
    place.assert_no_password()
    assert place.run("cutover").returncode != 0
    assert "is running" in place.shown[-1]
    assert "ShutdownGuest" not in machine.calls
    place.does("cutover", "--shutdown=1m")
    place.assert_migrated()
    assert not machine.is_tracked
    assert machine.guest.power == "poweredOff"


@pytest.mark.parametrize("point", ["opened", "copied"])
def test_killed_in_a_pass(place: Place, point: str) -> None:
    """The next pass removes its snapshot, and copies what it would have, and what came after."""
    machine = place.machine
    assert place.run("start", dying=point).returncode == -signal.SIGKILL
    assert len(machine.snapshots) == 1
    assert_gone(str(place.state), within_s=30)
    machine.write_here_and_there(3)
    assert "pass 2: everything" in place.does("sync")
    machine.write_here_and_there(3)
    assert place.run("sync", dying=point).returncode == -signal.SIGKILL
    assert len(machine.snapshots) == 1
    assert_gone(str(place.state), within_s=30)
    machine.write_here_and_there(3)
    place.does("sync")
    assert not machine.snapshots
    assert place.last_pass()["is_all"] is False
    machine.write_here_and_there(3)
    machine.guest.power = "poweredOff"
    place.does("cutover")
    place.assert_migrated()
    assert machine.is_tracked  # it was before


def test_aborted(place: Place) -> None:
    """All that it made goes, on both sides; without the password it says what is missing."""
    machine = place.machine
    other = machine.snapshot("of somebody else")
    assert place.run("start", dying="opened").returncode == -signal.SIGKILL
    assert len(machine.snapshots) == 2
    place.password.rename(place.password.with_name("elsewhere"))
    done = place.run("abort")
    assert done.returncode == 2
    assert str(place.password) in done.stderr
    place.password.with_name("elsewhere").rename(place.password)
    place.does("abort")
    assert list(machine.snapshots) == [other]
    assert not place.state.exists()
    assert list(place.out.iterdir()) == []


def test_a_machine_that_is_not_tracked(place: Place) -> None:
    """Passes read all of a snapshot, and compare; that is said before."""
    machine = place.machine
    machine.can_be_tracked = machine.is_tracked = False
    assert "does not tell what changes" in place.does("start")
    machine.write_here_and_there(3)
    place.does("sync")
    assert place.last_pass()["is_all"] is False
    machine.write_here_and_there(3)
    place.does("cutover", "--shutdown")
    place.assert_migrated()


def test_a_password_is_read_from_a_file(place: Place) -> None:
    machine = place.machine
    words = ["warm", "start", "--state", str(place.state), "-i", "libvirt", "-it", "vddk"]
    words += ["-ic", machine.vcenter.uri, "-io", f"vddk-libdir={machine.installed.libdir}"]
    words += ["-o", "local", "-os", str(place.out), machine.guest.name]
    done = subprocess.run(
        [*program("v2v-async"), *words],
        env=place.environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=240,
    )
    assert done.returncode == 2
    assert "-ip" in done.stderr
    assert not place.state.exists()
