"""Every target stopped in every way, all steps with a replayed conversion: nothing is left.

What is special about one target is beside its other tests; here all are held to the same.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import anyio
import pytest

from tests.fault.test_guest_faults import STEPS, Place, kill_server, quiet, when
from tests.fault.test_guest_faults import place as place
from tests.integration.test_output_libvirt import POOL, Host
from tests.integration.test_output_libvirt import daemon as daemon
from tests.integration.test_output_libvirt import host as host
from tests.integration.test_output_ovirt import export as export
from tests.integration.test_output_ovirt import tree
from tests.integration.test_targets_and_back import rhv, vdsm
from v2v_async.clean import clean
from v2v_async.errors import ServerError, V2VError
from v2v_async.events import Event, Reporter
from v2v_async.guest import convert_guest
from v2v_async.options import GuestOptions, OutputOptions
from v2v_async.output.libvirt_calls import TargetConnection

pytestmark = pytest.mark.anyio
DIRECTORIES = ["local", "qemu", "json", "kubevirt"]
TYPES = [*DIRECTORIES, "libvirt", "rhv", "vdsm", "null"]


@dataclass
class Target:
    """A target with something of somebody else's on it."""

    output: OutputOptions
    look: Callable[[], list[str]]
    folder: Path
    """Where its disks go."""

    def __post_init__(self) -> None:
        self.before = self.look()

    def assert_nothing_left(self, place: Place) -> None:
        assert self.look() == self.before
        place.assert_source_unchanged()
        for v2vdir in place.tmp.iterdir():  # of a failed run only the logs stay
            assert [path.name for path in v2vdir.iterdir()] == ["log"]

    def words(self) -> list[str]:
        """The command line of it."""
        options = self.output
        words = ["-o", options.mode]
        words += ["-oc", options.connection] if options.connection else []
        words += ["-os", options.storage] if options.storage else []
        words += ["-of", options.format] if options.format else []
        return words + [w for name, value in options.options for w in ("-oo", f"{name}={value}")]


@pytest.fixture
def target(request: pytest.FixtureRequest, place: Place) -> Target:
    type_: str = request.param
    if type_ == "libvirt":
        host: Host = request.getfixturevalue("host")
        (host.pool / "other").write_text("somebody else's")

        def look() -> list[str]:
            return [*host.domains(), *tree(host.pool)]

        return Target(OutputOptions("libvirt", connection=host.uri, storage=POOL), look, host.pool)
    if type_ in ("rhv", "vdsm"):
        export: Path = request.getfixturevalue("export")
        output = (rhv if type_ == "rhv" else vdsm)(export)
        [domain] = [path for path in export.iterdir() if path.name != "ovf"]
        return Target(output, lambda: tree(export), domain / "images")
    (place.out / "web-sda").write_text("an earlier guest's")
    storage = None if type_ == "null" else str(place.out)
    return Target(OutputOptions(type_, storage=storage), lambda: tree(place.out), place.out)


def every(*types: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("target", types, indirect=True)


def options(place: Place, target: Target) -> GuestOptions:
    return replace(place.options(), output=target.output)


@every(*TYPES)
async def test_a_conversion_that_fails(
    place: Place, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("V2V_REPLAY_FAILS", "1")
    with pytest.raises(V2VError, match="could not detect"):
        await convert_guest(options(place, target), quiet(), tmpdir=place.tmp)
    target.assert_nothing_left(place)


@every("libvirt", "null")  # of the others in the tests beside this
@pytest.mark.parametrize("step", STEPS)
async def test_cancelled_in_each_step(place: Place, target: Target, step: str) -> None:
    with anyio.CancelScope() as scope:
        reporter, _ = when(step, scope.cancel)
        await convert_guest(options(place, target), reporter, tmpdir=place.tmp)
    assert scope.cancel_called
    if step == "cleanup":  # the guest was whole before that
        assert (target.look() == target.before) == (target.output.mode == "null")
        return
    target.assert_nothing_left(place)


@every("qemu", "json", "kubevirt", "libvirt", "null")
async def test_a_server_killed_in_the_copy(place: Place, target: Target) -> None:
    reporter, _ = when("copy", lambda: kill_server(place, "out2"))
    with pytest.raises(ServerError, match="out2"):
        await convert_guest(options(place, target), reporter, tmpdir=place.tmp)
    target.assert_nothing_left(place)


@every("libvirt", "rhv", "vdsm")
async def test_a_file_system_that_is_full(place: Place, target: Target) -> None:
    """ENOSPC comes in the copy, through the server."""
    # The tmpfs hides what was there, folders of VDSM's too; they are made again in it.
    folders = [
        path.relative_to(target.folder) for path in target.folder.rglob("*") if path.is_dir()
    ]
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=777", "tmpfs", str(target.folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        for folder in folders:
            (target.folder / folder).mkdir(parents=True)
        there = target.look()
        with pytest.raises(V2VError, match="No space left"):
            await convert_guest(options(place, target), quiet(), tmpdir=place.tmp)
        assert target.look() == there
    finally:
        subprocess.run(["umount", str(target.folder)], check=True)
    target.assert_nothing_left(place)


RUN_AND = """
import os, sys
from v2v_async import events
emit = events.Reporter.emit
def emit_and_act(self, type_, text=None, **fields):
    emit(self, type_, text, **fields)
    if (type_, self.step, self.disk) == ("started", {step!r}, None):
        os.kill(os.getpid(), {number})
events.Reporter.emit = emit_and_act
import v2v_async.steps
from v2v_async.kvm import KvmStatus
async def no_kvm():
    return KvmStatus("absent", "not looked for")
v2v_async.steps.probe_kvm = no_kvm
{more}
from v2v_async.cli.main import virt_v2v_async
sys.exit(virt_v2v_async())
"""


def run_command(place: Place, target: Target, script: str) -> subprocess.CompletedProcess[str]:
    argv = ["-i", "disk", *map(str, place.disks), *target.words()]
    return subprocess.run(
        [sys.executable, "-c", script, *argv],
        env={**os.environ, "TMPDIR": str(place.tmp)},
        capture_output=True,
        text=True,
    )


@every(*TYPES[1:])  # -o local with every step and SIGTERM too: test_guest_faults.py
@pytest.mark.parametrize("step", ["output", "copy", "finalize"])
def test_ctrl_c(place: Place, target: Target, step: str) -> None:
    """The whole command line, and a real SIGINT just when the step begins."""
    script = RUN_AND.format(step=step, number=int(signal.SIGINT), more="")
    done = run_command(place, target, script)
    if (target.output.mode, step) == ("null", "finalize"):
        assert done.returncode == 0  # there is nothing in it that could be interrupted
        return
    assert done.returncode == 128 + signal.SIGINT, done.stdout + done.stderr
    target.assert_nothing_left(place)
    assert list(place.tmp.iterdir()) == []


@every("qemu", "json", "kubevirt", "libvirt", "rhv", "vdsm")
async def test_kill_9_in_the_copy_and_clean(place: Place, target: Target) -> None:
    """``clean`` removes the files, and tells the commands for the rest, which then do it."""
    killed = run_command(
        place, target, RUN_AND.format(step="copy", number=int(signal.SIGKILL), more="")
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert any(".partial" in row for row in target.look())
    await clean_and_do_what_is_told(place)
    target.assert_nothing_left(place)


async def clean_and_do_what_is_told(place: Place) -> list[str]:
    events: list[Event] = []
    [left] = place.tmp.iterdir()
    assert await clean([left], Reporter(events.append, "t")) == 1
    told = [event.text or "" for event in events if event.type == "warning"]
    commands = [text.rpartition("undo it with: ")[2] for text in told if "undo it" in text]
    for command in reversed(commands):
        subprocess.run(["sh", "-ec", command], check=True, capture_output=True)
    return commands


@every("libvirt")
@pytest.mark.parametrize("moment", ["refresh_pool", "define"])
async def test_kill_9_when_disks_have_their_names(
    place: Place, target: Target, moment: str
) -> None:
    """By then they can't be told from somebody's; only state.json knows."""
    more = f"""
from v2v_async.output.libvirt_calls import TargetConnection
real = TargetConnection.{moment}
async def after(self, *given):
    await real(self, *given)
    os.kill(os.getpid(), 9)
TargetConnection.{moment} = after
"""
    killed = run_command(place, target, RUN_AND.format(step="never", number=0, more=more))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert any(row.endswith("web-sdb") for row in target.look())
    assert ("web" in target.look()) == (moment == "define")
    events: list[Event] = []
    [left] = place.tmp.iterdir()
    assert await clean([left], Reporter(events.append, "t")) == 1
    told = [event.text or "" for event in events if event.type == "warning"]
    commands = [text.rpartition("undo it with: ")[2] for text in told]
    assert len(commands) == 3
    for command in commands:
        is_needless = "undefine" in command and moment != "define"
        subprocess.run(["sh", "-c", command], check=not is_needless, capture_output=True)
    target.assert_nothing_left(place)


@every(*DIRECTORIES, "libvirt", "rhv", "vdsm")
async def test_what_is_written_is_on_the_disk_before_it_has_a_name(
    place: Place, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file is flushed before it is renamed, and all that before the guest is defined."""
    flushed: set[str] = set()
    named: list[str] = []
    defined: list[list[str]] = []
    fsync, rename = os.fsync, os.rename
    define = TargetConnection.define

    def noting_fsync(descriptor: int) -> None:
        fsync(descriptor)
        flushed.add(os.readlink(f"/proc/self/fd/{descriptor}"))

    def noting_rename(source: str, final: str) -> None:
        assert source in flushed, source
        rename(source, final)
        named.append(re.sub(r"[0-9a-f-]{36}", "UUID", Path(final).name))

    async def noting_define(self: TargetConnection, xml: bytes) -> None:
        defined.append(list(named))
        await define(self, xml)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "rename", noting_rename)
    monkeypatch.setattr(TargetConnection, "define", noting_define)
    await convert_guest(options(place, target), quiet(), tmpdir=place.tmp)
    expected: dict[str, Sequence[str]] = {
        "local": ["web-sda", "web-sdb", "web.xml"],
        "qemu": ["web-sda", "web-sdb", "web.sh"],
        "json": ["web-sda", "web-sdb", "web.json"],
        "kubevirt": ["web-sda", "web-sdb", "web.yaml"],
        "libvirt": ["web-sda", "web-sdb"],
        "rhv": ["UUID", "UUID", "UUID.meta", "UUID.meta", "UUID.ovf"],
        "vdsm": ["UUID", "UUID", "UUID.meta", "UUID.meta", "UUID.ovf"],
    }
    assert named == expected[target.output.mode], "what describes the disks comes last"
    assert defined == ([named] if target.output.mode == "libvirt" else [])
