"""In-place conversion when things go wrong: the disks have all of it, or are as they were."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from lxml import etree

from tests.conftest import ROOT, assert_gone, program, require
from tests.fault.test_guest_faults import REPLAY
from tests.integration.servers import MIB, digest, fragmented
from tests.waiting import listens, wait_until

pytestmark = pytest.mark.usefixtures("_installed")
BLOCK = 65536


@pytest.fixture
def _installed() -> None:
    require("nbdkit", "qemu-nbd", "qemu-img")


class Place:
    """A guest of a raw and a qcow2 disk, and what a recorded conversion changes of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tmp, self.state, self.recorded = folder / "tmp", folder / "state", folder / "recorded"
        self.tmp.mkdir()
        self.recorded.mkdir()
        self.disks = [fragmented(folder / "web.img", 24 * MIB), folder / "web-2.qcow2"]
        plain = fragmented(folder / "plain", 8 * MIB, seed=9)
        self.wanted = [self._changed(1, self.disks[0]), self._changed(2, plain)]
        convert = ["qemu-img", "convert", "-O", "qcow2", str(plain), str(self.disks[1])]
        subprocess.run(convert, check=True)
        plain.unlink()
        self.before = self.stamps()
        self.environment = {
            # With the cache of the machine, which knows whether KVM works: each run would try.
            **{name: value for name, value in os.environ.items() if name != "V2V_ASYNC_CACHE"},
            "PATH": f"{REPLAY}:{os.environ['PATH']}",
            "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg",
            "V2V_REPLAY_CHANGES": str(self.recorded),
            "V2V_ASYNC_STATE": str(self.state),
            "TMPDIR": str(self.tmp),
        }

    def _changed(self, number: int, plain: Path) -> bytes:
        """Record a conversion of a disk, here and there; return what it makes of it."""
        noise = random.Random(number)
        content = bytearray(plain.read_bytes())
        places = sorted(noise.sample(range(len(content) // BLOCK), 20))
        ranges = [(at * BLOCK + noise.randrange(4096), noise.choice([1, 5000])) for at in places]
        with (self.recorded / f"disk-{number}").open("wb") as file:
            for offset, length in ranges:
                # Some of it is made zero.
                new = noise.randbytes(length) if noise.random() < 0.7 else bytes(length)
                file.write(new)
                content[offset : offset + length] = new
        listed = self.recorded / "changes.json"
        known = json.loads(listed.read_text()) if listed.exists() else []
        listed.write_text(json.dumps([*known, ranges]))
        return bytes(content)

    def stamps(self) -> list[tuple[str, int, int]]:
        """What the files are, byte for byte."""
        return [(digest(disk), disk.stat().st_mtime_ns, disk.stat().st_ino) for disk in self.disks]

    def contents(self) -> list[bytes]:
        """What a guest would read."""
        found = []
        for disk, image_format in zip(self.disks, ("raw", "qcow2"), strict=True):
            plain = self.folder / "read"
            argv = ["qemu-img", "convert", "-f", image_format, "-O", "raw", str(disk), str(plain)]
            subprocess.run(argv, check=True)
            found.append(plain.read_bytes())
        return found

    def command(self, *words: str) -> list[str]:
        disks = map(str, self.disks)
        return [*program("v2v-async"), "in-place", "-i", "disk", *words, *disks]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words),
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def clean(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*program("v2v-async"), "clean"],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def journals(self) -> list[Path]:
        folder = self.state / "in-place"
        return list(folder.iterdir()) if folder.exists() else []

    def assert_untouched(self) -> None:
        assert self.stamps() == self.before
        assert self.journals() == []
        assert_gone(str(self.folder))

    def assert_converted(self) -> None:
        assert self.contents() == self.wanted
        assert self.journals() == []
        assert_gone(str(self.folder))


@pytest.fixture
def place(short_tmp: Path) -> Place:
    return Place(short_tmp)


def test_both_disks_land(place: Place) -> None:
    done = place.run("-O", "found.xml")
    assert done.returncode == 0, done.stdout + done.stderr
    place.assert_converted()
    assert list(place.tmp.iterdir()) == []
    assert "landed on 2 disks" in done.stdout
    assert [disk.stat().st_ino for disk in place.disks] == [each[2] for each in place.before]
    root = etree.parse(place.folder / "found.xml").getroot()
    assert root.tag == "v2v-inspection"
    assert root.findtext("operatingsystem/osinfo") == "debian12"
    sizes = [element.text for element in root.iterfind("disks/disk/virtual-size")]
    assert sizes == [str(24 * MIB), str(8 * MIB)]


def test_only_what_changed_is_written(place: Place) -> None:
    """Twenty places of a few KiB in 24 MiB: no more than their blocks."""
    place.disks = place.disks[:1]
    place.wanted = place.wanted[:1]
    listed = json.loads((place.recorded / "changes.json").read_text())
    (place.recorded / "changes.json").write_text(json.dumps(listed[:1]))
    holes = place.disks[0].stat().st_blocks
    done = place.run()
    assert done.returncode == 0, done.stderr
    assert place.disks[0].read_bytes() == place.wanted[0]
    # What was a hole and is none of the twenty places is a hole still.
    assert place.disks[0].stat().st_blocks <= holes + 20 * 2 * BLOCK // 512


def test_the_document_on_standard_output_stands_alone(place: Place) -> None:
    done = place.run("-O", "-")
    assert done.returncode == 0, done.stderr
    assert etree.fromstring(done.stdout.encode()).tag == "v2v-inspection"


def test_a_conversion_that_fails(place: Place) -> None:
    place.environment["V2V_REPLAY_FAILS"] = "1"
    done = place.run("-O", "found.xml")
    assert done.returncode == 1
    assert "step convert" in done.stderr
    place.assert_untouched()
    assert not (place.folder / "found.xml").exists()


def start_and_wait(place: Place, mark: str, *words: str) -> subprocess.Popen[str]:
    """Start it with a conversion that hangs, and wait until it says ``mark``."""
    place.environment["V2V_REPLAY_HANGS_S"] = "60"
    run = subprocess.Popen(
        place.command(*words), env=place.environment, stdout=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    assert any(mark in line for line in run.stdout), f"it ended before ‘{mark}’"
    return run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_converts(place: Place, number: signal.Signals) -> None:
    with start_and_wait(place, "Converting") as run:
        run.send_signal(number)
        run.communicate(timeout=60)
    assert run.returncode == 128 + number
    place.assert_untouched()


def test_killed_while_it_converts(place: Place) -> None:
    """The next run begins anew, and tidies up."""
    with start_and_wait(place, "Converting") as run:
        run.kill()
        run.communicate(timeout=60)
    assert_gone(str(place.folder), within_s=30)
    assert place.stamps() == place.before
    assert len(place.journals()) == 1
    del place.environment["V2V_REPLAY_HANGS_S"]
    done = place.run()
    assert done.returncode == 0, done.stderr
    place.assert_converted()


# It dies when the first disk has landed and the second has a part.
_DIES = """
import os, signal, sys
from v2v_async.input import changes
real = changes.restore
async def dying(endpoint, data, zero, path):
    if endpoint.endswith("out1"):
        await real(endpoint, data, zero, path)
    else:
        await real(endpoint, data[: len(data) // 2], [], path)
        {act}
changes.restore = dying
from v2v_async.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
_KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def killed_while_landing(place: Place, *words: str) -> None:
    argv = [sys.executable, "-c", _DIES.replace("{act}", _KILL), *place.command(*words)[1:]]
    done = subprocess.run(
        argv, env=place.environment, cwd=place.folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    assert place.stamps() != place.before
    assert place.contents() != place.wanted
    assert len(place.journals()) == 1


def test_killed_while_it_lands_and_cleaned(place: Place) -> None:
    killed_while_landing(place, "-O", "found.xml")
    done = place.clean()
    assert done.returncode == 0, done.stderr
    assert "completing the in-place conversion of" in done.stdout
    place.assert_converted()
    assert etree.parse(place.folder / "found.xml").getroot().tag == "v2v-inspection"
    assert list(place.tmp.iterdir()) == []


def test_killed_while_it_lands_and_completed_by_the_next_run(place: Place) -> None:
    """Of another guest, with its own mistake: what was begun is completed all the same."""
    killed_while_landing(place)
    argv = [*program("v2v-async"), "in-place", "-i", "disk", "there-is-none.img"]
    done = subprocess.run(argv, env=place.environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    place.assert_converted()


def test_killed_again_while_it_is_completed(place: Place) -> None:
    killed_while_landing(place)
    argv = [sys.executable, "-c", _DIES.replace("{act}", _KILL), "clean"]
    done = subprocess.run(argv, env=place.environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(place.journals()) == 1
    assert place.clean().returncode == 0
    place.assert_converted()


def test_it_is_not_completed_over_another_file(place: Place) -> None:
    killed_while_landing(place)
    second = place.disks[1]
    kept = second.with_suffix(".kept")
    second.rename(kept)
    shutil.copyfile(kept, second)
    done = place.clean()
    assert "is another file than the one" in done.stdout + done.stderr
    assert len(place.journals()) == 1
    kept.rename(second)
    assert place.clean().returncode == 0
    place.assert_converted()


def test_a_write_that_fails_keeps_what_has_to_land(place: Place) -> None:
    act = "from v2v_async.errors import NbdError; raise NbdError('No space left on device')"
    argv = [sys.executable, "-c", _DIES.replace("{act}", act), *place.command()[1:]]
    done = subprocess.run(argv, env=place.environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "v2v-async clean" in done.stderr
    assert len(place.journals()) == 1
    assert place.clean().returncode == 0
    place.assert_converted()


def opened(place: Place) -> Callable[[], None]:
    """Have qemu-nbd open the second disk for writing, as a guest that runs does."""
    socket = place.folder / "other"
    argv = ["qemu-nbd", "-t", "-f", "qcow2", f"--socket={socket}", str(place.disks[1])]
    server = subprocess.Popen(argv)
    wait_until(lambda: listens(socket), "it serves", of=server)

    def close() -> None:
        server.terminate()
        server.wait(30)

    return close


def test_a_disk_that_a_guest_has_open(place: Place) -> None:
    close = opened(place)
    try:
        before = [digest(disk) for disk in place.disks]
        done = place.run()
        assert done.returncode == 1
        assert "lock" in done.stderr
        assert [digest(disk) for disk in place.disks] == before
    finally:
        close()
    assert place.journals() == []


def test_a_disk_that_is_written_meanwhile(place: Place) -> None:
    place.environment["V2V_REPLAY_HANGS_S"] = "3"
    run = subprocess.Popen(
        place.command(),
        env=place.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with run:
        assert run.stdout is not None
        assert any("Converting" in line for line in run.stdout)
        with place.disks[0].open("r+b") as disk:
            disk.write(b"somebody else")
        before = place.stamps()
        _, err = run.communicate(timeout=60)
    assert run.returncode == 1
    assert "was written or replaced during the conversion" in err
    assert place.stamps() == before
    assert place.journals() == []


def test_no_room_for_what_changed(place: Place) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    place.state.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place.state)]
    subprocess.run(argv, check=True)
    try:
        done = place.run()
        assert done.returncode == 1
        assert "the disks are as they were" in done.stderr
        assert "No space left on device" in done.stderr
        place.assert_untouched()
    finally:
        subprocess.run(["umount", str(place.state)], check=True)


def test_directly(place: Place) -> None:
    done = place.run("--direct", "-O", "found.xml")
    assert done.returncode == 0, done.stderr
    assert "leaves the disks in an unknown state" in done.stdout + done.stderr
    place.assert_converted()
    assert (place.folder / "found.xml").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-i", "disk", "-o", "local", "a.img"), "in-place takes no -o"),
        (("-i", "disk", "--parallel", "2", "a.img"), "in-place takes no --parallel"),
        (("-i", "ova", "a.ova"), "‘-i ova’ has none"),
        (("-i", "disk", "-io", "overlay=cow", "a.img"), "overlay=cow does not tell"),
        (("-i", "disk"), "no disk was named"),
        (("-i", "disk", "nbd://localhost:1/x"), "nbd://localhost:1"),
        (("-i", "disk", "missing.img"), "missing.img"),
    ],
)
def test_mistakes(place: Place, words: tuple[str, ...], said: str) -> None:
    argv = [*program("v2v-async"), "in-place", *words]
    done = subprocess.run(argv, env=place.environment, capture_output=True, text=True, timeout=60)
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    place.assert_untouched()


def test_it_needs_disks_that_it_can_write(place: Place) -> None:
    odd = place.folder / "odd.img"
    odd.write_bytes(b"x" * 1000)
    argv = [*program("v2v-async"), "in-place", "-i", "disk", "-if", "raw", str(odd)]
    done = subprocess.run(argv, env=place.environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "ends in the middle of a sector" in done.stderr
    assert "truncate --size=%512" in done.stderr
    place.assert_untouched()


def test_help_names_what_it_takes(place: Place) -> None:
    done = subprocess.run(
        [*program("v2v-async"), "in-place", "--help"],
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0
    assert "-O FILE" in done.stdout
    assert "--direct" in done.stdout
    assert "-oo" not in done.stdout
