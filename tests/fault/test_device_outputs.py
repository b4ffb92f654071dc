"""-o local and its kin with block devices for disks, all steps with a replayed conversion.

A device is full of something else before: nothing of that may be left within the disk, and all of
it behind the disk's end.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from tests.block_devices import filled, loop_device
from tests.conftest import program
from tests.fault.test_guest_faults import (
    STEPS,
    Place,
    kill_server,
    quiet,
    run_helpers,
    run_with_signal,
    when,
)
from tests.fault.test_guest_faults import place as place
from tests.integration.servers import MIB
from v2v_async.clean import clean
from v2v_async.errors import ServerError, TargetError, UsageError
from v2v_async.events import Event, Reporter
from v2v_async.guest import convert_guest
from v2v_async.options import OverlapOptions
from v2v_async.v2vdir import V2VDir

pytestmark = pytest.mark.anyio
SIZE = 24 * MIB  # of the first disk of Place
TAIL = MIB
SUFFIXES = {"local": ".xml", "qemu": ".sh", "json": ".json", "kubevirt": ".yaml"}


@pytest.fixture
def backing(place: Place, short_tmp: Path) -> Iterator[Path]:
    """What is behind the device that the first disk's name links to."""
    path = filled(short_tmp / "backing", SIZE + TAIL)
    with loop_device(path) as device:
        (place.out / "web-sda").symlink_to(device)
        yield path
        assert (place.out / "web-sda").readlink() == device
        assert path.stat().st_size == SIZE + TAIL


def device_of(place: Place) -> Path:
    return (place.out / "web-sda").readlink()


def held(place: Place, backing: Path) -> bytes:
    subprocess.run(["blockdev", "--flushbufs", str(device_of(place))], check=True)
    return backing.read_bytes()


def converted(disk: Path) -> bytes:
    """What the replay makes of a raw source."""
    content = bytearray(disk.read_bytes())
    content[MIB : MIB + 4096] = b"converted" + bytes(4087)
    return bytes(content)


@pytest.mark.parametrize("mode", SUFFIXES)
async def test_a_whole_run(place: Place, backing: Path, mode: str) -> None:
    await convert_guest(place.options(mode=mode), quiet(), tmpdir=place.tmp)
    content = held(place, backing)
    assert content[:SIZE] == converted(place.disks[0])
    assert content[SIZE:] == b"\xaa" * TAIL
    place.assert_nothing_left(outputs=("web-sda", "web-sdb", f"web{SUFFIXES[mode]}"))
    assert str(device_of(place)) in (place.out / f"web{SUFFIXES[mode]}").read_text()


def warnings(events: list[Event]) -> list[str]:
    return [event.text or "" for event in events if event.type == "warning"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("mode", ["local", "json"])
async def test_cancelled_in_each_step(place: Place, backing: Path, mode: str, step: str) -> None:
    with anyio.CancelScope() as scope:
        reporter, events = when(step, scope.cancel)
        await convert_guest(place.options(mode=mode), reporter, tmpdir=place.tmp)
    assert scope.cancel_called
    told = [text for text in warnings(events) if "may hold part of the guest" in text]
    if step == "cleanup" and not scope.cancelled_caught:
        place.assert_nothing_left(outputs=("web-sda", "web-sdb", f"web{SUFFIXES[mode]}"))
        assert told == []
        return
    place.assert_nothing_left(outputs=("web-sda",))
    content = held(place, backing)
    assert content[SIZE:] == b"\xaa" * TAIL
    if step in ("input", "convert"):
        assert content == b"\xaa" * len(content)
        assert told == []
    if step in ("copy", "finalize"):
        assert len(told) == 1
        subprocess.run(told[0].rpartition("it with: ")[2], shell=True, check=True)
        assert held(place, backing) == bytes(SIZE + TAIL)


async def test_a_server_killed_in_the_copy(place: Place, backing: Path) -> None:
    reporter, events = when("copy", lambda: kill_server(place, "out1"))
    with pytest.raises(ServerError, match="out1"):
        await convert_guest(place.options(), reporter, tmpdir=place.tmp)
    place.assert_nothing_left(outputs=("web-sda",))
    assert sum("may hold part of the guest" in text for text in warnings(events)) == 1
    assert held(place, backing)[SIZE:] == b"\xaa" * TAIL


async def test_a_document_that_can_not_be_written(
    place: Place, backing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is whole by then, and the guest is not."""
    rename = os.rename

    def fail(source: str, target: str) -> None:
        if str(target).endswith(".xml"):
            raise PermissionError(1, os.strerror(1))
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    events: list[Event] = []
    with pytest.raises(TargetError, match="can't rename"):
        await convert_guest(place.options(), Reporter(events.append, "t"), tmpdir=place.tmp)
    place.assert_nothing_left(outputs=("web-sda",))
    assert sum("may hold part of the guest" in text for text in warnings(events)) == 1


async def test_the_device_is_looked_at_before_the_conversion(
    place: Place, backing: Path, short_tmp: Path
) -> None:
    small = filled(short_tmp / "small", 1 * MIB)
    reporter, events = when("convert", lambda: None)
    with loop_device(small) as device:
        (place.out / "web-sdb").symlink_to(device)
        with pytest.raises(TargetError, match="of the source has 8.0 MiB"):
            await convert_guest(place.options(), reporter, tmpdir=place.tmp)
    assert not any(event.step == "convert" for event in events)
    assert small.read_bytes() == b"\xaa" * MIB
    assert held(place, backing) == b"\xaa" * (SIZE + TAIL)


async def test_what_a_killed_run_left_is_told(place: Place, backing: Path) -> None:
    """``clean`` takes away the hidden file of the second disk, and leaves device and link."""
    v2vdir = V2VDir.create(place.tmp)
    v2vdir.update(owner=None)
    argv = ["-i", "disk", *map(str, place.disks), "-o", "local", "-os", str(place.out)]
    for name, *phase in (("helper-v2v-input-disk",), ("helper-v2v-output-local", "setup")):
        done = subprocess.run(
            [*program(name), "--v2vdir", str(v2vdir.path), *phase, *argv],
            env={**os.environ, "TMPDIR": str(place.tmp)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    events: list[Event] = []
    assert await clean([v2vdir.path], Reporter(events.append, "t")) == 1
    place.assert_nothing_left(outputs=("web-sda",))
    [said] = warnings(events)
    assert f"half-written disk ‘{device_of(place)}’" in said
    assert f"blkdiscard --force --zeroout {device_of(place)}" in said


def test_setup_and_final_by_the_helpers(place: Place, backing: Path) -> None:
    """Two processes, with only the v2v directory between them."""
    run_helpers(place, "local", "-os", str(place.out))
    assert held(place, backing)[:SIZE] == converted(place.disks[0])
    place.assert_nothing_left(outputs=("web-sda", "web-sdb", "web.xml"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_command_in_the_copy(
    place: Place, backing: Path, number: signal.Signals
) -> None:
    """The person is told, at the terminal, which device holds part of a guest."""
    done = run_with_signal(place, "copy", number)
    assert done.returncode == 128 + number, done.stderr
    assert f"blkdiscard --force --zeroout {device_of(place)}" in done.stdout + done.stderr
    place.assert_nothing_left(outputs=("web-sda",))


async def test_it_is_not_written_before_the_conversion_has_gone_well(
    place: Place, backing: Path
) -> None:
    """A failed conversion would otherwise cost what was there."""
    early = replace(place.options(), overlap=OverlapOptions("on"))
    with pytest.raises(UsageError, match="is written in place, and only when the conversion"):
        await convert_guest(early, quiet(), tmpdir=place.tmp)
    assert list(place.tmp.iterdir()) == []
