"""Warm migration of a libvirt guest that runs and writes, with a kill -9 wherever it may hurt.

After the cutover the target holds what the source held when it was shut down, and what the
conversion changed (it is replayed); nothing of the migration is left on either side.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema  # type: ignore[import-untyped]
import pytest

from tests import libvirtd
from tests.conftest import ROOT, assert_gone, program, require
from tests.fault.test_guest_faults import REPLAY
from tests.integration.servers import MIB
from tests.warm_guest import WarmGuest, warm_guest

CONVERTED = b"converted" + bytes(4087)  # what the replay writes at 1 MiB


class Place:
    """A guest that runs, and a migration of it from the command line."""

    def __init__(self, guest: WarmGuest) -> None:
        self.guest = guest
        self.folder = guest.folder
        self.state = self.folder / "state"
        self.out = self.folder / "out"
        self.out.mkdir()
        self.format = "raw"
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "V2V_ASYNC_CACHE"},
            "PATH": f"{REPLAY}:{os.environ['PATH']}",
            "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg",
            "TMPDIR": str(self.folder),
        }

    def words(self, command: str, *more: str) -> list[str]:
        words = ["warm", command, "--state", str(self.state), *more]
        if command == "start":
            words += ["-i", "libvirt", "-ic", self.guest.uri, "-o", "local", "-os", str(self.out)]
            words += ["-of", self.format, "--socket-dir", str(self.folder / "sockets"), "g"]
        return words

    def run(
        self, command: str, *more: str, dying: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        argv = [*program("v2v-async")]
        if dying is not None:
            argv = [sys.executable, "-c", _DIES.replace("POINT", dying)]
        return subprocess.run(
            [*argv, *self.words(command, *more)],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=240,
        )

    def does(self, command: str, *more: str) -> str:
        done = self.run(command, *more)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def killed(self, command: str, where: str) -> None:
        """It is killed there, and all that it had started has gone with it."""
        done = self.run(command, dying=where)
        assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
        assert_gone(str(self.state), within_s=30)

    def status(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.does("status", "--json"))
        return found

    def assert_migrated(self) -> None:
        for number, content in enumerate(self.guest.contents):
            expected = bytearray(content)
            expected[MIB : MIB + len(CONVERTED)] = CONVERTED
            plain = self.folder / "read"
            path = self.out / f"g-sd{'ab'[number]}"
            argv = ["qemu-img", "convert", "-f", self.format, "-O", "raw", str(path), str(plain)]
            subprocess.run(argv, check=True)
            assert plain.read_bytes() == expected, f"disk {number + 1}"
        assert sorted(path.name for path in self.out.iterdir()) == ["g-sda", "g-sdb", "g.xml"]
        self.assert_nothing_left()

    def assert_nothing_left(self) -> None:
        assert not self.state.exists()
        assert self.guest.checkpoints() == []
        assert len(list((self.folder / "images").iterdir())) == 2
        assert list((self.folder / "sockets").iterdir()) == []
        if self.guest.domain.isActive():
            assert not self.guest.has_job()
            self.guest.stop()
        assert self.guest.bitmaps() == []
        assert_gone(str(self.state))


# POINT is one of these names.
_DIES = """
import os, signal, sys
from v2v_async.input import changes
from v2v_async.output import files
from v2v_async.warm import cutover, migration
from v2v_async.warm.from_libvirt import LibvirtChanges

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

async def dies(*_, **__):
    die()

def after(real):
    async def call(*given, **more):
        result = await real(*given, **more)
        die()
    return call

async def half(v2vdir, source, endpoints, ranges, options, reporter):
    # The last disk is not copied, and of the others every second range.
    from v2v_async.copy.ranges import Ranges
    some = {index: Ranges(list(found)[::2]) for index, found in ranges.items()}
    source = source.model_copy(update={"disks": source.disks[:1]})
    await copy_ranges(v2vdir, source, endpoints, some, options, reporter)
    die()

async def half_landed(endpoint, data, zero, path):
    if endpoint.endswith("out1"):
        await restore(endpoint, data, zero, path)
        die()

def half_made(v2vdir, made, *, is_last=True):
    publish(v2vdir, made[:1], is_last=False)
    die()

copy_ranges, restore, publish = migration.copy_ranges, changes.restore, files.publish
Migration = migration.Migration
match "POINT":
    case "begun": Migration._open = dies
    case "opened": migration.copy_ranges = dies
    case "half copied": migration.copy_ranges = half
    case "copied": migration.copy_ranges = after(copy_ranges)
    case "noted": Migration._forget_older = dies
    case "converting": cutover.run_convert = dies
    case "converted": cutover.save_changes = dies
    case "half landed": changes.restore = half_landed
    case "landed": migration._LandingJournal.remove = die
    case "before it is made": cutover._finalize = dies
    case "half made": files.publish = half_made
    case "made": LibvirtChanges.forget = dies
    case _: sys.exit("no such point")
from v2v_async.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
PASS = ["begun", "opened", "half copied", "copied", "noted"]
CUTOVER = [
    *("converting", "converted", "half landed", "landed", "before it is made", "half made", "made"),
]


@pytest.fixture
def place(short_tmp: Path) -> Iterator[Place]:
    require("libvirtd", "qemu-system-x86_64", "qemu-nbd", "qemu-img", "nbdkit")
    with warm_guest(short_tmp) as guest:
        guest.start()
        made = Place(guest)
        yield made
        del made.guest


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_ten_passes(place: Place, image_format: str) -> None:
    """Each copies what was written since the one before it, and little else."""
    place.format = image_format
    said = place.does("start")
    assert "pass 1: everything" in said
    for number in range(2, 10):
        place.guest.write_here_and_there(2)
        place.does("sync")
        assert len(place.guest.checkpoints()) == 1
        last = place.status()["passes"][-1]  # type: ignore[index]
        assert last["number"] == number
        assert 0 < sum(disk["changed"] for disk in last["disks"]) <= 8 * 3 * 65536
    place.guest.write_here_and_there()
    place.guest.stop()
    place.does("cutover")
    place.assert_migrated()


def test_what_cutover_and_status_say(place: Place) -> None:
    place.does("start")
    assert "known after the next sync" in place.does("status")
    place.guest.write(0, 0, 65536)
    assert "a cutover now would copy about" in place.does("sync")
    told = place.does("status")
    for said in ("2 disks, the source tells what changes", "pass 1", "pass 2", "disk 1: "):
        assert said in told
    schema = json.loads((ROOT / "docs" / "schema" / "warm-status.json").read_text())
    status = place.status()
    jsonschema.validate(status, schema)
    assert status["is_busy"] is False
    assert len(status["forecast"]["disks"]) == 2  # type: ignore[index]
    refused = place.run("cutover")
    assert refused.returncode == 1
    assert "the guest ‘g’ is running" in refused.stderr
    refused = place.run("cutover", "--shutdown=2s")
    assert refused.returncode == 1
    assert "is not off after 2 s" in refused.stderr
    place.guest.stop()
    place.does("cutover")
    place.assert_migrated()


@pytest.mark.parametrize("where", PASS)
def test_killed_in_the_first_pass(place: Place, where: str) -> None:
    place.killed("start", where)
    place.guest.write_here_and_there()
    assert "pass 2" in place.does("sync")
    place.guest.write_here_and_there()
    place.guest.stop()
    place.does("cutover")
    place.assert_migrated()


@pytest.mark.parametrize("where", PASS)
def test_killed_in_a_later_pass(place: Place, where: str) -> None:
    """What had changed before it, and while nobody looked, is copied by the next."""
    place.does("start")
    place.guest.write_here_and_there()
    place.killed("sync", where)
    place.guest.write_here_and_there()
    place.killed("sync", where)
    place.guest.write_here_and_there(2)
    place.does("sync")
    assert not place.status()["passes"][-1]["is_all"]  # type: ignore[index]
    assert len(place.guest.checkpoints()) == 1
    place.guest.stop()
    place.does("cutover")
    place.assert_migrated()


@pytest.mark.parametrize("where", [*PASS, *CUTOVER])
def test_killed_in_the_cutover(place: Place, where: str) -> None:
    place.does("start")
    place.guest.write_here_and_there()
    place.does("sync")
    place.guest.write_here_and_there()
    place.guest.stop()
    place.killed("cutover", where)
    said = place.does("cutover")
    if where in CUTOVER:
        assert "pass " not in said, "nothing is copied twice"
    place.assert_migrated()


def test_a_conversion_that_fails_costs_no_second_copy(place: Place) -> None:
    """The targets are the plain copy still: the guest may even run on, and is synced again."""
    place.does("start")
    place.guest.write_here_and_there()
    place.killed("sync", "copied")
    place.guest.write_here_and_there()
    place.guest.stop()
    place.environment["V2V_REPLAY_FAILS"] = "1"
    failed = place.run("cutover")
    assert failed.returncode == 1
    assert "step convert" in failed.stderr
    assert place.status()["phase"] == "copied"
    place.guest.start()
    place.guest.write_here_and_there(2)
    place.does("sync")
    assert not place.status()["passes"][-1]["is_all"]  # type: ignore[index]
    place.guest.stop()
    failed = place.run("cutover")
    assert failed.returncode == 1
    del place.environment["V2V_REPLAY_FAILS"]
    assert "pass " not in place.does("cutover")
    place.assert_migrated()


@pytest.mark.parametrize("where", [None, "opened", "copied"])
def test_abort(place: Place, where: str | None) -> None:
    place.does("start")
    if where is not None:
        place.killed("sync", where)
        place.killed("abort", "made")
    place.does("abort")
    assert list(place.out.iterdir()) == []
    place.assert_nothing_left()
    assert place.run("abort").returncode == 2


def test_a_qemu_that_is_killed_between_passes(place: Place) -> None:
    """Its bitmaps are lost: everything is copied again, aloud."""
    place.does("start")
    place.guest.kill()
    place.guest.start()
    place.guest.write_here_and_there()
    said = place.run("sync")
    assert "everything is copied again" in said.stdout + said.stderr
    place.guest.stop()
    place.does("cutover")
    place.assert_migrated()


def test_a_guest_that_is_shut_down_in_the_middle_of_a_pass(place: Place) -> None:
    """The pass fails, and the next one copies from its images."""
    place.does("start")
    place.guest.write(0, 0, 15 * MIB)
    place.guest.write(1, 0, 5 * MIB)
    words = place.words("sync", "--bandwidth", "1MiB/s", "--retries", "0")
    argv = [*program("v2v-async"), *words]
    with subprocess.Popen(
        argv, env=place.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        assert any("disk 1:" in line for line in running.stdout)
        place.guest.stop()
        running.communicate(timeout=120)
    assert running.returncode == 1
    place.does("cutover")
    place.assert_migrated()


def test_a_pass_that_is_verified(place: Place) -> None:
    place.does("start", "--verify")
    place.guest.write_here_and_there()
    assert "verif" in place.does("sync", "--verify").lower()
    place.does("abort")
    place.assert_nothing_left()


def test_a_guest_that_was_changed_or_is_gone(place: Place) -> None:
    place.does("start")
    place.guest.stop()
    with libvirtd.connection(place.guest.uri) as connection:
        xml = place.guest.domain.XMLDesc(0)
        moved = place.guest.paths[1].with_name("elsewhere.qcow2")
        shutil.copyfile(place.guest.paths[1], moved)
        place.guest.domain.undefineFlags(16)  # with the checkpoints
        connection.defineXML(xml.replace("disk1.qcow2", "elsewhere.qcow2"))
        done = place.run("sync")
        assert done.returncode == 1
        assert "has other disks than when the migration began" in done.stderr
        moved.unlink()
        connection.lookupByName("g").undefine()
        assert "has no guest ‘g’" in place.run("sync").stderr
        place.does("abort")
        place.guest.domain = connection.defineXML(xml)
    assert list(place.out.iterdir()) == []
    place.assert_nothing_left()


def test_what_is_refused(place: Place) -> None:
    place.does("start")
    again = place.run("start")
    assert again.returncode == 2
    assert "is not empty" in again.stderr
    cleaned = subprocess.run(
        [*program("v2v-async"), "clean", str(place.state)],
        env=place.environment,
        capture_output=True,
        text=True,
    )
    assert cleaned.returncode == 2
    assert "v2v-async warm abort" in cleaned.stderr
    place.does("abort")
    place.assert_nothing_left()


def test_until_little_changes(place: Place) -> None:
    place.does("start")
    place.guest.write(0, 0, 65536)
    said = place.does("sync", "--until-below", "1M")
    assert said.count("that had changed") == 1
    said = place.does("sync", "--until-below", "1h")
    assert said.count("that had changed") == 1
    place.does("abort")
    place.assert_nothing_left()


def test_a_signal_between_two_passes(place: Place) -> None:
    place.does("start")
    argv = [*program("v2v-async"), *place.words("sync", "--every", "1h")]
    with subprocess.Popen(
        argv, env=place.environment, stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        assert any("pass 2" in line for line in running.stdout)
        busy = place.run("sync")
        assert busy.returncode == 2
        assert "another v2v-async is at" in busy.stderr
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGINT
    place.does("abort")
    place.assert_nothing_left()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "no command"),
        (("strat",), "no command ‘strat’"),
        (("start", "g"), "no folder was named"),
        (("sync", "--state", "absent"), "there is no warm migration"),
        (("cutover", "--state", "absent"), "there is no warm migration"),
        (("abort", "--state", "absent"), "there is no warm migration"),
        (("status", "--state", "absent"), "there is no warm migration"),
        (("sync", "--state", "x", "-o", "local"), "warm sync takes no -o"),
        (("start", "--state", "x", "--root", "first", "g"), "given to v2v-async warm cutover"),
        (("start", "--state", "x", "--run", "ls", "g"), "given to v2v-async warm cutover"),
        (("start", "--state", "x", "-op", "file", "g"), "takes no password"),
        (("sync", "--state", "x", "--copier", "nbdcopy"), "takes no --copier"),
        (("cutover", "--state", "x", "--overlap=on"), "takes no --overlap"),
        (("start", "--state", "x", "--shutdown", "g"), "warm start takes no --shutdown"),
        (("sync", "--state", "x", "g"), "‘g’ is too much"),
        (("cutover", "--state", "x", "--shutdown=soon"), "a time such as 5m"),
        (
            (
                "start",
                "--state",
                "x",
                "-o",
                "local",
                "-os",
                ".",
                "-of",
                "qcow2",
                "-oo",
                "compressed",
                "g",
            ),
            "can't be written again",
        ),
        (
            (
                "start",
                "--state",
                "x",
                "-ic",
                "qemu+ssh://far/system",
                "-o",
                "local",
                "-os",
                ".",
                "g",
            ),
            "is another machine",
        ),
        (("sync", "--state", "x", "--every", "often"), "a time such as 10m"),
        (("sync", "--state", "x", "--until-below", "soon"), "neither a size such as 1G nor"),
        (("start", "--state", "x", "-i", "disk", "-o", "null", "a.img"), "-o null"),
    ],
)
def test_mistakes(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    argv = [*program("v2v-async"), "warm", *words]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["", "start", "sync", "cutover", "status", "abort"])
def test_help(command: str) -> None:
    argv = [*program("v2v-async"), "warm", *([command] if command else []), "--help"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert "--state DIR" in done.stdout
