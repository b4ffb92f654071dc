"""Copying while converting: the targets are those of a copy that waits, whatever happens.

The conversion is replayed (see ``replay/``), and waits until the copy is as far as a test wants.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from tests.conftest import require
from tests.fault.test_guest_faults import Place, kill_server, quiet, replay, when
from tests.integration.servers import MIB, digest
from tests.waiting import listens, until
from v2v_async import server
from v2v_async.clean import clean
from v2v_async.errors import ServerError, UsageError, V2VError
from v2v_async.events import Bytes, Event, Reporter
from v2v_async.guest import convert_guest
from v2v_async.options import CopyOptions, GuestOptions, OverlapOptions

pytestmark = pytest.mark.anyio
ON = OverlapOptions("on")


@pytest.fixture
def place(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Two disks, of which a conversion will change much."""
    replay(short_tmp, monkeypatch)
    monkeypatch.setenv("V2V_REPLAY_STIRS", "60")
    return Place(short_tmp)


def overlapped(options: GuestOptions, overlay: str | None = None) -> GuestOptions:
    """Return the options of the same with ``--overlap=on``."""
    if overlay is not None:
        given = replace(options.input, options=(("overlay", overlay),))
        options = replace(options, input=given)
    return replace(options, overlap=ON)


class Story:
    """Keeps the events; lets the conversion begin to write once the early copy has done so much."""

    def __init__(self, go: Path, monkeypatch: pytest.MonkeyPatch, *, after: str) -> None:
        monkeypatch.setenv("V2V_REPLAY_AWAITS", str(go))
        self.events: list[Event] = []
        self._go = go
        self._whole: set[int] = set()
        self._after = after
        if after == "at once":
            go.touch()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if event.disk is None or event.bytes is None or event.step != "copy":
            return
        if self._after == "some" and event.bytes.copied:
            self._go.touch()
        if event.bytes.landed == event.bytes.total:
            self._whole.add(event.disk)
        if len(self._whole) == 2:
            self._go.touch()

    def of_disks(self) -> dict[int, list[Event]]:
        found: dict[int, list[Event]] = defaultdict(list)
        for event in self.events:
            if event.disk is not None and event.step == "copy":
                found[event.disk].append(event)
        return found


def digests(place: Place, name: str, image_format: str) -> list[str]:
    return [digest(place.out / f"{name}-{disk}", image_format) for disk in ("sda", "sdb")]


@pytest.mark.parametrize("after", ["at once", "some", "all"])
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("overlay", [None, "qcow2"])
async def test_the_content_is_that_of_a_copy_that_waits(
    place: Place,
    short_tmp: Path,
    monkeypatch: pytest.MonkeyPatch,
    overlay: str | None,
    image_format: str,
    after: str,
) -> None:
    # What is trimmed may read otherwise behind an overlay of another kind.
    options = overlapped(place.options(name="plain", format=image_format), overlay or "kept")
    await convert_guest(replace(options, overlap=OverlapOptions("off")), quiet(), tmpdir=place.tmp)
    story = Story(short_tmp / "go", monkeypatch, after=after)
    await convert_guest(
        overlapped(place.options(format=image_format), overlay),
        Reporter(story, "t"),
        tmpdir=place.tmp,
    )
    assert digests(place, "web", image_format) == digests(place, "plain", image_format)
    for events in story.of_disks().values():
        assert [event.type for event in events].count("started") == 1
        assert events[-1].type == "finished"
        amounts = [event.bytes for event in events if event.bytes is not None]
        assert sorted(each.copied for each in amounts) == [each.copied for each in amounts]
        end = amounts[-1]
        assert end.landed == end.total
        assert end.data == end.copied
        assert min(end.zero, end.skipped, end.wasted) >= 0
        if after == "all":
            assert end.wasted > 0
    place.assert_source_unchanged()
    assert list(place.tmp.iterdir()) == []


@pytest.mark.parametrize("allocation", ["sparse", "preallocated"])
async def test_both_sides_are_compared_with_the_converted_disk(
    place: Place, short_tmp: Path, monkeypatch: pytest.MonkeyPatch, allocation: str
) -> None:
    story = Story(short_tmp / "go", monkeypatch, after="all")
    options = replace(
        overlapped(place.options(allocation=allocation)),
        copy=CopyOptions(verify=True, parallel=1, max_connections=2, bandwidth=200 * MIB),
    )
    await convert_guest(options, Reporter(story, "t"), tmpdir=place.tmp)
    told = [event.text or "" for event in story.events if event.type == "message"]
    assert sum("verified" in text for text in told) == 2


async def test_a_copy_in_vain_waits(
    place: Place, short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is slow until it waits; what the conversion then writes has been copied by that time."""
    monkeypatch.setattr("v2v_async.overlap._LOOK_EVERY_S", 0.01)
    place.disks = place.disks[:1]
    place.disks[0].write_bytes(random.Random(1).randbytes(24 * MIB))
    place.before = place.state()
    rate, go, end = (short_tmp / name for name in ("rate", "go", "end"))
    rate.write_text("2MB/s")
    monkeypatch.setenv("V2V_REPLAY_STIRS", "0")
    monkeypatch.setenv("V2V_REPLAY_AWAITS", str(go))
    monkeypatch.setenv("V2V_REPLAY_ENDS_AFTER", str(end))
    landed: list[int] = []
    waits_at: list[int] = []

    def emit(event: Event) -> None:
        if event.disk == 1 and event.bytes is not None and event.step == "copy":
            landed.append(event.bytes.copied)
            if event.bytes.copied >= 2 * MIB:
                go.touch()
        if "the copy waits for the conversion" in (event.text or ""):
            waits_at.append(landed[-1])
            rate.write_text("2000MB/s")
            end.touch()

    options = replace(
        place.options(),
        copy=CopyOptions(bandwidth_file=rate, max_connections=1),
        overlap=OverlapOptions("on", waste=0),
    )
    await convert_guest(options, Reporter(emit, "t"), tmpdir=place.tmp)
    assert len(waits_at) == 1
    assert waits_at[0] < 24 * MIB < landed[-1]
    wanted = bytearray(place.disks[0].read_bytes())
    wanted[MIB : MIB + 4096] = b"converted" + bytes(4087)
    assert (place.out / "web-sda").read_bytes() == wanted
    place.assert_nothing_left(outputs=("web-sda", "web.xml"))


@pytest.mark.parametrize("after", ["at once", "all"])
async def test_a_conversion_that_fails(
    place: Place, short_tmp: Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    monkeypatch.setenv("V2V_REPLAY_FAILS", "1")
    story = Story(short_tmp / "go", monkeypatch, after=after)
    with pytest.raises(V2VError, match="could not detect") as caught:
        await convert_guest(overlapped(place.options()), Reporter(story, "t"), tmpdir=place.tmp)
    assert caught.value.step == "convert"
    assert caught.value.log is not None
    assert caught.value.log.name == "convert.log"
    place.assert_nothing_left()


async def test_a_copy_that_fails_ends_the_conversion(place: Place, short_tmp: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place.out)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        # It would wait for ever.
        os.environ["V2V_REPLAY_AWAITS"] = str(short_tmp / "never")
        with pytest.raises(V2VError, match="No space left") as caught:
            await convert_guest(overlapped(place.options()), quiet(), tmpdir=place.tmp)
        assert caught.value.step == "copy"
        place.assert_nothing_left()
    finally:
        del os.environ["V2V_REPLAY_AWAITS"]
        subprocess.run(["umount", str(place.out)], check=True)


@pytest.mark.parametrize(
    ("step", "type_"),
    [("output", "started"), ("convert", "started"), ("copy", "started"), ("copy", "finished")],
)
async def test_cancelled(place: Place, step: str, type_: str) -> None:
    with anyio.CancelScope() as scope:
        reporter, events = when(step, scope.cancel, type_)
        await convert_guest(overlapped(place.options()), reporter, tmpdir=place.tmp)
    assert scope.cancelled_caught
    assert events[-1].type == "cancelled"
    place.assert_nothing_left()


@pytest.mark.parametrize("name", ["plain1", "plain2", "in1", "in2", "out2"])
async def test_a_server_killed(
    place: Place, short_tmp: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("V2V_REPLAY_AWAITS", str(short_tmp / "never"))
    reporter, _ = when("copy", lambda: kill_server(place, name))
    with pytest.raises(ServerError, match=f"the server {name}.*SIGKILL"):
        await convert_guest(overlapped(place.options()), reporter, tmpdir=place.tmp)
    place.assert_nothing_left()


async def test_what_a_killed_run_left_is_cleaned(place: Place) -> None:
    """Kill -9 while both go on."""
    script = f"""
import anyio, os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.fault.test_guest_faults import when, _no_kvm, _options
from tests.fault.test_overlap import overlapped
import v2v_async.steps
v2v_async.steps.probe_kvm = _no_kvm
from v2v_async.guest import convert_guest
reporter, _ = when("copy", lambda: os.kill(os.getpid(), signal.SIGKILL))
options = overlapped(_options({list(map(str, place.disks))!r}, {str(place.out)!r}))
anyio.run(lambda: convert_guest(options, reporter, tmpdir=Path({str(place.tmp)!r})))
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    [left] = place.tmp.iterdir()
    assert any(path.name.endswith(".partial") for path in place.out.iterdir())
    assert await clean([left], quiet()) == 1
    place.assert_nothing_left()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"copy": CopyOptions(copier="qemu-img")}, "qemu-img can't copy parts"),
        ({"overlay": "cow"}, "does not tell what the conversion changes"),
        ({"options": (("compressed", None),), "format": "qcow2"}, "compressed twice"),
    ],
)
async def test_what_can_not_be_copied_early_is_refused(
    place: Place, changed: dict[str, object], said: str
) -> None:
    copy = changed.pop("copy", CopyOptions())
    overlay = changed.pop("overlay", None)
    options = replace(place.options(**changed), copy=copy)  # type: ignore[arg-type]
    if overlay is not None:
        place.disks = place.disks[:1]
        place.before = place.state()
        options = replace(
            options,
            input=replace(
                options.input, arguments=(str(place.disks[0]),), options=(("overlay", "cow"),)
            ),
        )
    with pytest.raises(UsageError, match=said):
        await convert_guest(overlapped(options), quiet(), tmpdir=place.tmp)
    assert list(place.tmp.iterdir()) == []
    # Left to itself, it waits.
    events: list[Event] = []
    auto = replace(options, overlap=OverlapOptions("auto"))
    await convert_guest(auto, Reporter(events.append, "t"), tmpdir=place.tmp)
    steps = [event.step for event in events if event.type == "started" and event.disk is None]
    assert steps.index("convert") < steps.index("output") < steps.index("copy")


async def test_a_server_that_takes_one_client(
    place: Place, short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The conversion has it, so that nothing can be copied: it is said why, and nothing is made."""
    require("qemu-nbd")
    monkeypatch.setattr(server, "READY_TIMEOUT_S", 10.0)
    socket = short_tmp / "one"
    argv = ["qemu-nbd", "-t", "-r", "-f", "raw", f"--socket={socket}", str(place.disks[0])]
    alone = subprocess.Popen(argv)
    try:
        await until(lambda: listens(socket), "it serves")
        options = place.options()
        given = replace(options.input, arguments=(f"nbd+unix:///?socket={socket}",), format=None)
        options = overlapped(replace(options, input=given))
        with pytest.raises(ServerError, match="plain1") as caught:
            await convert_guest(options, quiet(), tmpdir=place.tmp)
        assert "one client only" in (caught.value.hint or "")
        place.assert_nothing_left()
    finally:
        alone.kill()
        alone.wait()


@pytest.mark.parametrize("mode", ["local", "qemu", "json", "kubevirt", "null"])
async def test_outputs_that_are_made_here(place: Place, mode: str) -> None:
    options = place.options(mode=mode, storage=None if mode == "null" else str(place.out))
    events: list[Event] = []
    await convert_guest(overlapped(options), Reporter(events.append, "t"), tmpdir=place.tmp)
    steps = [event.step for event in events if event.type == "started" and event.disk is None]
    assert steps == [None, "input", "output", "convert", "copy", "finalize", "cleanup"]
    ends = [event.bytes for event in events if event.type == "finished" and event.disk]
    assert [each.landed == each.total for each in ends if isinstance(each, Bytes)] == [True, True]
