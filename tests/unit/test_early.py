"""Leaving out of an early copy what has changed, and deciding whether there is one."""

from __future__ import annotations

from pathlib import Path

import pytest

from v2v_async.copy.disk import DiskCopy
from v2v_async.copy.early import Early, rest_parts
from v2v_async.copy.geometry import Geometry
from v2v_async.copy.ranges import Ranges
from v2v_async.errors import UsageError
from v2v_async.events import Event, Reporter
from v2v_async.model import SourceDisk, SourceGuest
from v2v_async.options import (
    ConvertOptions,
    CopyOptions,
    GuestOptions,
    InputOptions,
    OutputOptions,
    OverlapOptions,
)
from v2v_async.output.registry import parse_output
from v2v_async.overlap import decide
from v2v_async.units import GIB

SIZE = 64


def disk_copy() -> DiskCopy:
    shape = Geometry(
        size=SIZE,
        block=4,
        target_block=4,
        request_size=8,
        largest_request=8,
        zero_size=8,
        sparse=0,
        chunk=8,
    )
    return DiskCopy(1, shape, is_known_zero=True, can_extents=False)


def test_what_has_changed_is_not_claimed() -> None:
    copy, early = disk_copy(), Early()
    early.leave_out([(9, 2)])  # before there is a copy
    early.attach(copy)
    early.leave_out([(0, 3), (40, 24)])
    claimed = []
    while (chunk := copy.claim(100)) is not None:
        claimed.append((chunk.offset, chunk.end))
        chunk.examined = chunk.skipped = chunk.length
        copy.landed(chunk, 0)
    assert claimed == [(4, 8), (12, 40)]
    assert list(early.left_out) == [(0, 4), (8, 4), (40, 24)]
    assert copy.is_complete
    assert copy.remaining == 0
    assert copy.bytes().data == 0


def test_a_paused_copy_has_nothing_to_do_and_is_not_complete() -> None:
    copy, early = disk_copy(), Early()
    early.attach(copy)
    early.pause(True)
    assert copy.claim(8) is None
    assert not copy.has_todo
    assert not copy.is_complete
    early.pause(False)
    assert copy.has_todo


def test_what_was_on_its_way_may_have_been_written() -> None:
    copy, early = disk_copy(), Early()
    early.attach(copy)
    chunk = copy.claim(8)
    assert chunk is not None
    copy.give_back(chunk)
    early.leave_out([(0, SIZE)])
    assert copy.claim(8) is None
    rest = early.rest([], [(0, SIZE)])
    assert rest.parts == ((0, 8, "zero"),)
    assert rest.zeroes == SIZE - 8


def test_zeroes_that_end_within_a_block_are_read() -> None:
    parts, kept = rest_parts(
        [], [(2, 7)], wrote=Ranges(), left_out=Ranges(), is_known_zero=False, block=4, size=64
    )
    assert parts == [(0, 4, "data"), (8, 12, "data")]
    assert list(kept) == [(4, 4)]


def guest_of(*disks: SourceDisk) -> SourceGuest:
    return SourceGuest(name="web", memory=GIB, vcpus=1, disks=list(disks))


LARGE = SourceDisk(index=1, source="/d", format="raw", size=9 * GIB, files=["/d"])
HOLLOW = LARGE.model_copy(update={"allocated": GIB // 2})
FAR = LARGE.model_copy(update={"files": [], "source": "ssh://esx/web.vmdk"})


@pytest.mark.parametrize(
    ("disk", "mode", "is_on", "said"),
    [
        (LARGE, "auto", True, "9.0 GiB"),
        (LARGE, "off", False, "off"),
        (HOLLOW, "auto", False, "only 512 MiB"),
        (HOLLOW, "on", True, "on"),
        (FAR, "auto", False, "not a local file"),
        (FAR, "on", True, "on"),
    ],
)
def test_it_is_decided_by_size_and_place(
    disk: SourceDisk, mode: str, is_on: bool, said: str, tmp_path: Path
) -> None:
    output = OutputOptions(mode="local", storage=str(tmp_path))
    options = GuestOptions(
        InputOptions("disk", ("/d",)),
        ConvertOptions(),
        output,
        overlap=OverlapOptions(mode),  # type: ignore[arg-type]
    )
    decision = decide(options, guest_of(disk), parse_output(output))
    assert decision.is_on == is_on
    assert said in decision.reason
    # What a person asked for need not be told.
    events: list[Event] = []
    decision.tell(Reporter(events.append, "t"))
    assert [event.type for event in events] == ["message" if mode == "auto" else "debug"]
    assert decision.reason in (events[0].text or "")


def test_what_can_not_be_done_is_refused_or_left(tmp_path: Path) -> None:
    output = OutputOptions(mode="local", storage=str(tmp_path))
    source = InputOptions("disk", ("/d",))
    for options, said in (
        (GuestOptions(source, ConvertOptions(), output, CopyOptions(copier="nbdcopy")), "nbdcopy"),
        (
            GuestOptions(
                InputOptions("disk", ("/d",), options=(("overlay", "cow"),)),
                ConvertOptions(),
                output,
            ),
            "overlay=cow",
        ),
    ):
        decision = decide(options, guest_of(LARGE), parse_output(output))
        assert not decision.is_on
        assert said in decision.reason
        on = GuestOptions(
            options.input, options.convert, output, options.copy, OverlapOptions("on")
        )
        with pytest.raises(UsageError, match=said):
            decide(on, guest_of(LARGE), parse_output(output))
