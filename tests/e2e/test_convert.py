"""The command on guests that really convert, and on one that does not; signals in between."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, assert_gone, processes_naming, program, require
from tests.integration.servers import digest
from tests.waiting import wait_until

pytestmark = pytest.mark.appliance


class Place:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tmp = folder / "tmp"
        self.out = folder / "out"
        self.before = abandoned_sockets()
        self.tmp.mkdir()
        self.out.mkdir()
        self.environment = {**os.environ, "TMPDIR": str(self.tmp)}
        # The appliance is shared: it must not be built anew in each test's TMPDIR.
        self.environment.setdefault("LIBGUESTFS_CACHEDIR", "/var/tmp")

    def start(self, *argv: str, name: str = "virt-v2v-async") -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*program(name), *argv],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        child = self.start(*argv)
        out, err = child.communicate(timeout=850)
        return subprocess.CompletedProcess(argv, child.returncode, out, err)

    def assert_nothing_left(self, *outputs: str) -> None:
        assert_gone(str(self.folder))
        assert sorted(path.name for path in self.out.iterdir()) == sorted(outputs)
        # Another test's may be made or removed just now.
        wait_until(
            lambda: not abandoned_sockets() - self.before,
            lambda: f"nothing is left in /tmp: {abandoned_sockets() - self.before}",
            within_s=60,
        )


def abandoned_sockets() -> set[Path]:
    """Return the folders of libguestfs' sockets that no process uses: other tests have appliances.

    libguestfs makes them in /tmp, whatever TMPDIR says.
    """
    folders = set(Path("/tmp").glob("libguestfs*"))
    used = Path("/proc/net/unix").read_text()
    return {folder for folder in folders if f" {folder}/" not in used}


@pytest.fixture
def place(short_tmp: Path) -> Place:
    return Place(short_tmp)


def read_until(child: subprocess.Popen[str], phase: str) -> None:
    """Read what it says until it says that the conversion has come to ``phase``."""
    assert child.stdout is not None
    assert any(phase in line for line in child.stdout), f"it ended before ‘{phase}’"


def wait_for_appliance(place: Place) -> None:
    """Wait until libguestfs has told where its socket is.

    Only it knows the name, and one that is killed before it tells leaves that folder in /tmp
    (docs/conversion.md).
    """
    wait_until(
        lambda: any(
            "guestfsd.sock" in log.read_text(errors="replace")
            for log in place.tmp.glob("v2v.*/log/convert.log")
        ),
        "the appliance is started",
        within_s=300,
    )


def domain_is_accepted(xml: Path) -> None:
    """libvirt's test driver checks what a real one would."""
    require("virsh")
    define = ["virsh", "-q", "-c", "test:///default", "define", "--validate", str(xml)]
    done = subprocess.run(define, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_three_disks_of_two_formats(place: Place, three_disk_guest: Path) -> None:
    """All six steps with real parts: qcow2 out, compressed, renamed, events, a second run over."""
    disks = [three_disk_guest / name for name in ("system.img", "data1.img", "data2.qcow2")]
    before = [digest(disk) for disk in disks]
    events = place.folder / "events.jsonl"
    (place.out / "web-sda").write_text("an older conversion, to be overwritten")
    argv = ["-i", "disk", *map(str, disks), "-o", "local", "-os", str(place.out), "-on", "web"]
    argv += ["-of", "qcow2", "-oo", "compressed", f"--events={events}", "--parallel", "2"]
    done = place.run(*argv, "-n", "default:lan")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [digest(disk) for disk in disks] == before
    place.assert_nothing_left("web-sda", "web-sdb", "web-sdc", "web.xml")
    assert list(place.tmp.iterdir()) == []
    for name in ("web-sda", "web-sdb", "web-sdc"):
        path = place.out / name
        check = subprocess.run(["qemu-img", "check", "-f", "qcow2", str(path)], capture_output=True)
        assert check.returncode == 0, check.stdout
    assert (place.out / "web-sdb").stat().st_size < (three_disk_guest / "data1.img").stat().st_size
    xml = (place.out / "web.xml").read_text()
    assert 'dev="vda" bus="virtio"' in xml
    assert 'network="lan"' in xml
    assert "debian.org/debian/12" in xml
    domain_is_accepted(place.out / "web.xml")

    told = [json.loads(line) for line in events.read_text().splitlines()]
    steps = [e["step"] for e in told if e["type"] == "finished" and "disk" not in e and "step" in e]
    assert steps == ["input", "convert", "output", "copy", "finalize", "cleanup"]
    finished = {e["disk"]: e["bytes"] for e in told if e["type"] == "finished" and "disk" in e}
    assert set(finished) == {1, 2, 3}
    for landed in finished.values():
        assert landed["copied"] + landed["zero"] + landed["skipped"] == landed["total"]
        assert landed["copied"] < landed["total"] / 2  # trimmed, sparse: unused blocks stay
    # One appliance, not two: the converter started once and nothing else did.
    assert sum(e.get("text") == "Opening the source" for e in told) == 1


def test_a_disk_without_an_operating_system(place: Place, no_os_disk: Path) -> None:
    before = digest(no_os_disk)
    done = place.run("-i", "disk", str(no_os_disk), "-o", "local", "-os", str(place.out))
    assert done.returncode == 1
    assert "step convert" in done.stderr
    assert "hint:" in done.stderr
    log = next(line for line in done.stderr.splitlines() if line.strip().startswith("log:"))
    assert Path(log.split(":", 1)[1].strip()).read_text()
    assert digest(no_os_disk) == before
    place.assert_nothing_left()


@pytest.mark.parametrize(
    ("number", "phase"),
    [(signal.SIGINT, "Opening the source"), (signal.SIGTERM, "Inspecting the source")],
)
def test_a_signal_while_the_appliance_runs(
    place: Place, phony_guest: Path, number: signal.Signals, phase: str
) -> None:
    """While it starts, and when the guest's disks are open in it."""
    disk = phony_guest / "system.img"
    before = digest(disk)
    child = place.start("-i", "disk", str(disk), "-o", "local", "-os", str(place.out))
    with child:
        read_until(child, phase)
        wait_for_appliance(place)
        child.send_signal(number)
        _, err = child.communicate(timeout=120)
    assert child.returncode == 128 + number, err
    assert digest(disk) == before
    place.assert_nothing_left()
    assert list(place.tmp.iterdir()) == []


def test_the_supervisor_killed_during_the_conversion(place: Place, phony_guest: Path) -> None:
    """Kill -9: qemu and all that the conversion started end by themselves; clean does the rest."""
    disk = phony_guest / "system.img"
    child = place.start("-i", "disk", str(disk), "-o", "local", "-os", str(place.out))
    with child:
        read_until(child, "Inspecting the source")
        wait_for_appliance(place)
        [log] = place.tmp.glob("v2v.*/log/convert.log")
        sockets = set(re.findall(r"(/tmp/libguestfs\w+)/guestfsd\.sock", log.read_text()))
        assert sockets
        assert not sockets & abandoned_sockets(), "in use"
        running = processes_naming(str(place.tmp))
        assert any("qemu-system" in line for line in running)
        child.kill()
        child.communicate(timeout=60)
    assert_gone(str(place.tmp), within_s=30)
    [left] = place.tmp.iterdir()
    clean = subprocess.run([*program("v2v-async"), "clean", str(left)], env=place.environment)
    assert clean.returncode == 0
    assert list(place.tmp.iterdir()) == []
    # Only libguestfs itself knows its socket's folder, and it was killed: see docs/conversion.md.
    for folder in sockets:
        shutil.rmtree(folder, ignore_errors=True)
    place.assert_nothing_left()


def test_a_server_killed_during_the_conversion(place: Place, phony_guest: Path) -> None:
    disk = phony_guest / "system.img"
    before = digest(disk)
    child = place.start("-i", "disk", str(disk), "-o", "local", "-os", str(place.out))
    with child:
        read_until(child, "Opening the source")
        wait_for_appliance(place)
        [server] = [p for p in processes_naming(str(place.tmp)) if "nbdkit" in p and "cow" in p]
        os.kill(int(server.split(":")[0]), signal.SIGKILL)
        _, err = child.communicate(timeout=120)
    assert child.returncode == 1
    assert "the server in1 (nbdkit) went away: killed by SIGKILL" in err
    assert "step convert" in err
    assert digest(disk) == before
    place.assert_nothing_left()


def test_the_supervisor_in_thirty_lines_of_shell(place: Place, phony_guest: Path) -> None:
    """scripts/v2v-by-hand.sh: each step a program of its own, meeting in the directory."""
    script = ROOT / "scripts" / "v2v-by-hand.sh"
    code = [line for line in script.read_text().splitlines() if line.strip(" #")]
    assert len([line for line in code if not line.startswith("#")]) <= 35
    disk = phony_guest / "system.img"
    before = digest(disk)
    done = subprocess.run(
        [str(script), "-i", "disk", str(disk), "-o", "local", "-os", str(place.out)],
        env={**place.environment, "V2V_BIN": str(Path(sys.executable).parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert digest(disk) == before
    place.assert_nothing_left("system-sda", "system.xml")
    assert list(place.tmp.iterdir()) == []
    domain_is_accepted(place.out / "system.xml")
    assert (place.out / "system-sda").stat().st_size == disk.stat().st_size
    assert hashlib.sha256((place.out / "system-sda").read_bytes()).hexdigest() != before


def test_the_shell_supervisor_cleans_up_after_a_failure(place: Place, no_os_disk: Path) -> None:
    done = subprocess.run(
        [
            str(ROOT / "scripts" / "v2v-by-hand.sh"),
            *("-i", "disk", str(no_os_disk), "-o", "local", "-os", str(place.out)),
        ],
        env={**place.environment, "V2V_BIN": str(Path(sys.executable).parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    place.assert_nothing_left()
    assert list(place.tmp.iterdir()) == []
