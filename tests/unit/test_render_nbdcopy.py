"""nbdcopy's progress bar and its lines N/100."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from v2v_async.events import Bytes, Event
from v2v_async.render.nbdcopy import ProgressBar, ProgressLines


def event(copied: int, *, total: int = 200, disk: int = 1, type_: str = "progress") -> Event:
    amounts = Bytes(total=total, data=total, copied=copied)
    return Event(time=0.0, run="r", type=type_, disk=disk, bytes=amounts)


def lines(*events: Event, is_done: bool = True) -> list[str]:
    reader, writer = os.pipe()
    shown = ProgressLines(writer)
    for each in events:
        shown(each)
    shown.finish(is_done=is_done)
    os.close(writer)
    with open(reader) as stream:
        return stream.read().splitlines()


def drawn(*events: Event, is_done: bool = True) -> str:
    made: list[str] = []
    bar = ProgressBar(made.append)
    for each in events:
        bar(each)
    bar.finish(is_done=is_done)
    return "".join(made)


def test_lines_rise_and_end_at_100_of_100() -> None:
    assert lines(event(0, type_="planned"), event(0), event(50), event(51), event(200)) == [
        "0/100",
        "25/100",
        "99/100",
        "100/100",
    ]


def test_a_failure_never_shows_100() -> None:
    assert lines(event(200, type_="finished"), is_done=False) == ["99/100"]
    assert "100%" not in drawn(event(200), is_done=False)


def test_all_disks_count_together() -> None:
    assert lines(event(0, total=100), event(0, total=300, disk=2), event(100, total=100)) == [
        "0/100",
        "25/100",
        "100/100",
    ]


def test_a_stream_has_no_length() -> None:
    assert lines(event(0, total=0), event(4096, total=0)) == ["0/100", "100/100"]


def test_events_of_other_things_are_not_progress() -> None:
    assert lines(Event(time=0.0, run="r", type="started", step="copy"), is_done=False) == []


def test_a_reader_that_goes_away_ends_the_lines_and_nothing_else() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    shown = ProgressLines(writer)
    shown(event(0))
    os.close(writer)
    shown(event(100))  # writes nothing: by now the number may be another file's
    shown.finish(is_done=True)


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 200))))
def test_lines_never_fall(steps: list[tuple[int, int]]) -> None:
    numbers = [int(line.split("/")[0]) for line in lines(*(event(n, disk=d) for d, n in steps))]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 100


def test_the_bar_is_drawn_over_itself() -> None:
    frames = drawn(event(0), event(100)).split("\r")
    assert [frame[1:] for frame in frames] == [
        "   0% [" + "-" * 40 + "]",
        "  50% [" + "*" * 20 + "-" * 20 + "]",
        " 100% [" + "*" * 40 + "]\n",
    ]


def test_what_follows_a_bar_has_a_line_of_its_own() -> None:
    assert drawn(event(0), is_done=False).endswith("]\r\n")
    assert drawn(is_done=False) == ""
