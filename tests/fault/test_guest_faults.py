"""Every step cancelled, every server killed: nothing is left and the source is unchanged.

The conversion is replayed (see ``replay/``), so that the matrix takes seconds; real conversions
that fail or are cancelled are in ``tests/e2e``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from tests.conftest import assert_gone, program
from tests.integration.servers import MIB, digest, fragmented
from v2v_async.clean import clean
from v2v_async.errors import ServerError, TargetError, UsageError, V2VError
from v2v_async.events import Event, Reporter
from v2v_async.guest import convert_guest
from v2v_async.options import (
    ConvertOptions,
    CopyOptions,
    GuestOptions,
    InputOptions,
    OutputOptions,
)
from v2v_async.v2vdir import V2VDir

pytestmark = pytest.mark.anyio
STEPS = ["input", "convert", "output", "copy", "finalize", "cleanup"]
REPLAY = Path(__file__).parent / "replay"


class Place:
    """Two source disks, a directory for the output, one for temporary files."""

    def __init__(self, folder: Path) -> None:
        self.tmp = folder / "tmp"
        self.out = folder / "out"
        self.tmp.mkdir()
        self.out.mkdir()
        self.disks = [fragmented(folder / "web.img", 24 * MIB), folder / "web-2.qcow2"]
        raw = fragmented(folder / "raw", 8 * MIB, seed=9)
        convert = ["qemu-img", "convert", "-O", "qcow2", str(raw), str(self.disks[1])]
        subprocess.run(convert, check=True)
        raw.unlink()
        self.before = self.state()

    def state(self) -> list[tuple[str, int]]:
        return [(digest(disk), disk.stat().st_mtime_ns) for disk in self.disks]

    def options(self, **output: object) -> GuestOptions:
        defaults: dict[str, object] = {"mode": "local", "storage": str(self.out)}
        return GuestOptions(
            InputOptions("disk", tuple(map(str, self.disks))),
            ConvertOptions(),
            OutputOptions(**{**defaults, **output}),  # type: ignore[arg-type]
            CopyOptions(),
        )

    def assert_source_unchanged(self) -> None:
        assert self.state() == self.before

    def assert_nothing_left(self, *, outputs: tuple[str, ...] = ()) -> None:
        assert_gone(str(self.tmp))
        assert_gone(str(self.out))
        assert sorted(path.name for path in self.out.iterdir()) == sorted(outputs)
        for v2vdir in self.tmp.iterdir():  # of a failed run only the logs stay
            assert [path.name for path in v2vdir.iterdir()] == ["log"]
        self.assert_source_unchanged()


@pytest.fixture
def place(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    replay(short_tmp, monkeypatch)
    return Place(short_tmp)


def replay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have conversions replayed."""
    monkeypatch.setenv("PATH", f"{REPLAY}:{os.environ['PATH']}")
    monkeypatch.setenv("V2V_ASYNC_CACHE", str(folder / "cache"))
    # The replay starts no appliance, so that no trial of KVM or of a kernel is needed either.
    monkeypatch.setattr("v2v_async.steps.probe_kvm", _no_kvm)
    monkeypatch.setenv("LIBGUESTFS_HV", "qemu-system-x86_64")


async def _no_kvm() -> object:
    from v2v_async.kvm import KvmStatus

    return KvmStatus("absent", "not looked for")


def when(
    step: str, act: Callable[[], None], type_: str = "started"
) -> tuple[Reporter, list[Event]]:
    """Act as soon as a step says that it begins (or what ``type_`` says)."""
    events: list[Event] = []

    def emit(event: Event) -> None:
        events.append(event)
        if event.type == type_ and event.step == step and event.disk is None:
            act()

    return Reporter(emit, "t"), events


async def test_a_whole_run(place: Place) -> None:
    events: list[Event] = []
    target = await convert_guest(place.options(), Reporter(events.append, "t"), tmpdir=place.tmp)
    assert target.name == "web"
    assert list(place.tmp.iterdir()) == []
    place.assert_nothing_left(outputs=("web-sda", "web-sdb", "web.xml"))
    steps = [event.step for event in events if event.type == "finished" and event.disk is None]
    assert steps == [*STEPS, None]
    assert b"converted" in (place.out / "web-sda").read_bytes()[1 << 20 : (1 << 20) + 9]


@pytest.mark.parametrize(
    "copy",
    [
        CopyOptions(copier="nbdcopy"),
        CopyOptions(copier="qemu-img", parallel=1),
        CopyOptions(verify=True, max_connections=3, bandwidth=200 * MIB, retries=0),
    ],
    ids=["nbdcopy", "qemu-img", "verified"],
)
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_a_whole_run_copied_otherwise(
    place: Place, copy: CopyOptions, image_format: str
) -> None:
    """Whatever moves the bytes, the guest is the same and so are the events."""
    await convert_guest(place.options(name="plain", format=image_format), quiet(), tmpdir=place.tmp)
    events: list[Event] = []
    await convert_guest(
        replace(place.options(format=image_format), copy=copy),
        Reporter(events.append, "t"),
        tmpdir=place.tmp,
    )
    for disk in ("sda", "sdb"):
        plain = digest(place.out / f"plain-{disk}", image_format)
        assert digest(place.out / f"web-{disk}", image_format) == plain
    ends = [event for event in events if event.type == "finished" and event.disk is not None]
    assert {event.disk for event in ends if event.step == "copy"} == {1, 2}
    for event in ends:
        if event.step == "copy":
            assert event.bytes is not None
            assert event.bytes.landed == event.bytes.total > 0
    assert any(event.type == "verifying" for event in events) == copy.verify


async def test_a_disk_that_ends_within_a_cluster_is_compressed(
    place: Place, short_tmp: Path
) -> None:
    """qemu-nbd refuses such an image when it is to compress it."""
    place.disks.append(fragmented(short_tmp / "odd.img", 3 * MIB + 512, seed=5))
    compressed = (("compressed", None),)
    await convert_guest(
        place.options(format="qcow2", options=compressed), quiet(), tmpdir=place.tmp
    )
    raw = short_tmp / "as-raw"
    made = place.out / "web-sdc"
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(made), str(raw)], check=True)
    content = raw.read_bytes()
    # The conversion has changed something in the second MiB.
    assert content[2 * MIB : 3 * MIB + 512] == place.disks[2].read_bytes()[2 * MIB :]
    assert not any(content[3 * MIB + 512 :])
    assert len(content) == 3 * MIB + 65536


@pytest.mark.parametrize("step", STEPS)
async def test_cancelled_in_each_step(place: Place, step: str) -> None:
    (place.out / "web-sda").write_bytes(b"an older conversion")
    (place.out / "other").write_bytes(b"somebody else's")
    with anyio.CancelScope() as scope:
        reporter, events = when(step, scope.cancel)
        await convert_guest(place.options(), reporter, tmpdir=place.tmp)
    assert scope.cancel_called
    if step == "cleanup" and not scope.cancelled_caught:
        place.assert_nothing_left(outputs=("other", "web-sda", "web-sdb", "web.xml"))
        return
    assert events[-1].type == "cancelled"
    place.assert_nothing_left(outputs=("other", "web-sda"))
    assert (place.out / "web-sda").read_bytes() == b"an older conversion"
    assert (place.out / "other").read_bytes() == b"somebody else's"


@pytest.mark.parametrize(
    ("step", "type_", "name"),
    [
        ("input", "finished", "in1"),
        ("convert", "started", "in1"),
        ("convert", "started", "in2"),
        ("convert", "finished", "in2"),
        ("output", "started", "in1"),
        ("output", "finished", "out1"),
        ("copy", "started", "in1"),
        ("copy", "started", "in2"),
        ("copy", "started", "out2"),
    ],
)
async def test_a_server_killed_in_each_step(place: Place, step: str, type_: str, name: str) -> None:
    """In finalize and cleanup there is none any more: they are stopped before."""
    reporter, _ = when(step, lambda: kill_server(place, name), type_)
    with pytest.raises(V2VError) as caught:
        await convert_guest(place.options(), reporter, tmpdir=place.tmp)
    assert isinstance(caught.value, ServerError), caught.value
    assert f"the server {name}" in str(caught.value)
    assert "SIGKILL" in str(caught.value)
    assert caught.value.guest == "web"
    assert caught.value.log is not None
    assert caught.value.log.exists()
    place.assert_nothing_left()


def kill_server(place: Place, name: str) -> None:
    [v2vdir] = place.tmp.iterdir()
    [record] = [
        record
        for record in V2VDir(v2vdir).state.processes
        if Path(record.socket or "").name == name
    ]
    os.kill(record.pid, signal.SIGKILL)


def run_helpers(
    place: Place, mode: str, *argv: str, then: Callable[[list[str]], None] = lambda words: None
) -> None:
    """Convert by the helpers, a process for each step, and clean up as a person would.

    ``argv``: the output's options; ``then`` is called after each step with its words (``setup``).
    """
    v2vdir = V2VDir.create(place.tmp)
    v2vdir.update(owner=None)
    given = ["-i", "disk", *map(str, place.disks), "-o", mode, *argv]
    environment = {
        # With the cache of the machine, which knows whether KVM works: the helpers would try.
        **{name: value for name, value in os.environ.items() if name != "V2V_ASYNC_CACHE"},
        "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg",
        "TMPDIR": str(place.tmp),
    }
    for name, *words in (
        ("helper-v2v-input-disk",),
        ("helper-v2v-convert",),
        (f"helper-v2v-output-{mode}", "setup"),
        ("helper-v2v-copy",),
        (f"helper-v2v-output-{mode}", "final"),
    ):
        done = subprocess.run(
            [*program(name), "--v2vdir", str(v2vdir.path), *words, *given],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"
        then(words)
    assert v2vdir.state.objects == []
    cleaned = subprocess.run(
        [*program("v2v-async"), "clean", str(v2vdir.path)], capture_output=True, text=True
    )
    assert cleaned.returncode == 0, cleaned.stderr
    assert "may have left" not in cleaned.stdout + cleaned.stderr


def run_with_signal(
    place: Place, step: str, number: signal.Signals
) -> subprocess.CompletedProcess[str]:
    """Run the command, which gets a real signal just when that step begins."""
    script = f"""
import os, sys
from v2v_async import events
emit = events.Reporter.emit
def emit_and_send(self, type_, text=None, **fields):
    emit(self, type_, text, **fields)
    if (type_, self.step, self.disk) == ("started", {step!r}, None):
        os.kill(os.getpid(), {int(number)})
events.Reporter.emit = emit_and_send
import v2v_async.steps
from v2v_async.kvm import KvmStatus
async def no_kvm():
    return KvmStatus("absent", "not looked for")
v2v_async.steps.probe_kvm = no_kvm
from v2v_async.cli.main import virt_v2v_async
sys.exit(virt_v2v_async())
"""
    argv = ["-i", "disk", *map(str, place.disks), "-o", "local", "-os", str(place.out)]
    return subprocess.run(
        [sys.executable, "-c", script, *argv],
        env={**os.environ, "TMPDIR": str(place.tmp)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_command_in_each_step(
    place: Place, step: str, number: signal.Signals
) -> None:
    """The whole command line, and a real signal that arrives just when the step begins."""
    done = run_with_signal(place, step, number)
    if step == "cleanup" and done.returncode == 0:  # nothing was left to be interrupted
        place.assert_nothing_left(outputs=("web-sda", "web-sdb", "web.xml"))
        return
    assert done.returncode == 128 + number, done.stderr
    assert "cleaning up" in done.stdout + done.stderr
    assert "all done" not in done.stdout
    outputs = ("web-sda", "web-sdb", "web.xml") if step == "cleanup" else ()
    place.assert_nothing_left(outputs=outputs)
    assert list(place.tmp.iterdir()) == []


async def test_a_failing_conversion(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("V2V_REPLAY_FAILS", "1")
    with pytest.raises(V2VError, match="could not detect") as caught:
        await convert_guest(place.options(), quiet(), tmpdir=place.tmp)
    assert caught.value.step == "convert"
    assert caught.value.guest == "web"
    assert caught.value.log is not None
    assert "could not detect" in caught.value.log.read_text()
    assert caught.value.log.name == "convert.log"
    place.assert_nothing_left()


async def test_a_target_file_system_that_is_full(place: Place) -> None:
    """A tmpfs with less room than the data; ENOSPC arrives in the copy, through the server."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place.out)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        with pytest.raises(V2VError) as caught:
            await convert_guest(place.options(), quiet(), tmpdir=place.tmp)
        assert "No space left" in str(caught.value)
        place.assert_nothing_left()
    finally:
        subprocess.run(["umount", str(place.out)], check=True)


@pytest.mark.parametrize(
    ("output", "error", "said"),
    [
        ({"storage": None}, UsageError, "needs a directory to write to"),
        ({"storage": "/nonexistent/x"}, (TargetError, UsageError), "/nonexistent/x"),
        ({"storage": "/etc/hostname"}, (TargetError, UsageError), "not a directory"),
        ({"mode": "tape"}, UsageError, "there is no such output"),
        ({"mode": "openstack", "storage": None}, UsageError, "which server it runs in"),
        ({"format": "vdi"}, UsageError, "vdi"),
        ({"format": "raw", "options": (("compressed", None),)}, UsageError, "compressed"),
        ({"name": "../x"}, (UsageError, TargetError), "x"),
    ],
)
async def test_a_target_that_can_not_be_used_is_known_before_the_conversion(
    place: Place, output: dict[str, object], error: type[Exception], said: str
) -> None:
    reporter, events = when("convert", lambda: None)
    with pytest.raises(error, match=said):
        await convert_guest(place.options(**output), reporter, tmpdir=place.tmp)
    assert not any(event.step == "convert" for event in events)
    place.assert_nothing_left()


async def test_the_source_is_never_replaced_by_the_target(place: Place) -> None:
    """web-sda makes a guest named web, whose first disk in the same directory is web-sda."""
    source = place.disks[0].rename(place.disks[0].with_name("web-sda"))
    place.disks = [source]
    place.before = place.state()
    with pytest.raises(UsageError, match="would replace what the source's disk 1"):
        await convert_guest(place.options(storage=str(source.parent)), quiet(), tmpdir=place.tmp)
    place.assert_nothing_left()


async def test_nor_is_a_backing_file_of_the_source(place: Place) -> None:
    base = place.disks[0].rename(place.disks[0].with_name("web-sda"))
    middle, top = (place.tmp.parent / name for name in ("middle.qcow2", "web.qcow2"))
    create = ["qemu-img", "create", "-q", "-f", "qcow2"]
    subprocess.run([*create, "-b", str(base), "-F", "raw", str(middle)], check=True)
    subprocess.run([*create, "-b", str(middle), "-F", "qcow2", str(top)], check=True)
    place.disks = [top]
    options = place.options(storage=str(base.parent))
    place.disks = [top, middle, base]
    place.before = place.state()
    with pytest.raises(UsageError, match="would replace what the source's disk 1"):
        await convert_guest(options, quiet(), tmpdir=place.tmp)
    place.assert_nothing_left()


@pytest.mark.parametrize("overlay", ["cow", "qcow2"])
def test_either_overlay_keeps_the_source(place: Place, overlay: str) -> None:
    place.disks = place.disks[:1]
    place.before = place.before[:1]
    argv = ["-i", "disk", str(place.disks[0]), "-io", f"overlay={overlay}", "-o", "null"]
    # With the cache of the machine, which knows whether KVM works: it would start a kernel to see.
    environment = {name: value for name, value in os.environ.items() if name != "V2V_ASYNC_CACHE"}
    done = subprocess.run(
        [*program("virt-v2v-async"), *argv],
        env={**environment, "TMPDIR": str(place.tmp)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    place.assert_nothing_left()


async def test_what_a_killed_run_left_is_cleaned(place: Place) -> None:
    """Kill -9 in the copy: servers die with it, ``clean`` removes the rest and nothing else."""
    script = f"""
import anyio, os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.fault.test_guest_faults import when, _no_kvm, _options
import v2v_async.steps
v2v_async.steps.probe_kvm = _no_kvm
from v2v_async.guest import convert_guest
reporter, _ = when("copy", lambda: os.kill(os.getpid(), signal.SIGKILL))
anyio.run(lambda: convert_guest(_options({list(map(str, place.disks))!r}, {str(place.out)!r}),
    reporter, tmpdir=Path({str(place.tmp)!r})))
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert_gone(str(place.tmp))  # the servers, without anybody's help
    [left] = place.tmp.iterdir()
    assert any(path.name.endswith(".partial") for path in place.out.iterdir())
    (place.out / "other").write_bytes(b"somebody else's")
    assert await clean([left], quiet()) == 1
    assert not left.exists()
    place.assert_nothing_left(outputs=("other",))


async def test_a_living_run_is_not_cleaned(place: Place) -> None:
    v2vdir = V2VDir.create(place.tmp)
    with pytest.raises(UsageError, match="is alive"):
        await clean([v2vdir.path], quiet())
    assert v2vdir.path.exists()
    v2vdir.remove()


async def test_a_directory_of_somebody_else_is_not_cleaned(place: Place) -> None:
    strange = place.tmp / "v2v.strange"
    strange.mkdir()
    with pytest.raises(UsageError, match="not a v2v directory"):
        await clean([strange], quiet())
    assert strange.exists()
    strange.rmdir()


def _options(disks: list[str], out: str) -> GuestOptions:
    return GuestOptions(
        InputOptions("disk", tuple(disks)),
        ConvertOptions(),
        OutputOptions(mode="local", storage=out),
    )


def quiet() -> Reporter:
    return Reporter(lambda event: None, "t")
