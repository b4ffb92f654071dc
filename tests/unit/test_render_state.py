"""What events add up to: fractions, rates, durations, and no order of events that breaks it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from v2v_async.events import Bytes, Event
from v2v_async.render.broadcast import Broadcast, Renderer
from v2v_async.render.jsonl import _line
from v2v_async.render.machine import Machine
from v2v_async.render.plain import Plain
from v2v_async.render.state import Rate, RunState
from v2v_async.render.terminal import Terminal


def event(type_: str, time: float = 0.0, **fields: Any) -> Event:
    return Event(time=time, run="r", type=type_, **fields)


def disk(type_: str, time: float = 0.0, index: int = 1, **counts: int) -> Event:
    fields: dict[str, object] = {"bytes": Bytes(**counts)} if counts else {}
    return event(type_, time, guest="g", step="copy", disk=index, **fields)


def after(*events: Event) -> RunState:
    state = RunState()
    for each in events:
        state.apply(each)
    return state


def test_a_disk_counts_only_what_has_to_move() -> None:
    state = after(
        disk("planned", total=1000, data=100),
        disk("progress", 1.0, total=1000, data=100, copied=50, skipped=0),
    )
    assert state.fraction == pytest.approx(0.5)


def test_a_disk_without_data_counts_what_has_landed() -> None:
    state = after(disk("progress", total=1000, zero=100, skipped=150))
    assert state.fraction == pytest.approx(0.25)


@pytest.mark.parametrize("end", ["failed", "cancelled", "progress"])
def test_only_a_finished_copy_is_whole(end: str) -> None:
    full = {"total": 100, "data": 100, "copied": 100}
    state = after(disk("planned", total=100, data=100), disk(end, 1.0, **full))
    assert state.fraction < 1
    assert state.disks["g", 1].fraction < 1


def test_all_known_disks_finished_is_not_all() -> None:
    events = [disk("planned", total=9, data=9), disk("finished", total=9, data=9, copied=9)]
    assert after(*events).fraction < 1
    assert after(*events, event("finished", guest="g", step="copy")).fraction == 1


def test_disks_of_other_steps_are_no_copies() -> None:
    assert not after(event("started", guest="g", step="input", disk=1)).disks


def test_rate_slides_and_falls_when_nothing_lands() -> None:
    rate = Rate()
    assert rate.at(0) is None
    for second in range(31):
        rate.add(second, min(second, 20) * 100)
    assert rate.at(30) == pytest.approx(0)
    other = Rate()
    other.add(0, 0)
    other.add(10, 1000)
    assert other.at(10) == pytest.approx(100)
    assert other.at(20) == pytest.approx(50)
    other.add(5, 2000)  # from the past: ignored
    assert other.at(10) == pytest.approx(100)


def test_durations() -> None:
    state = after(event("started", 1, guest="g", step="convert"))
    assert state.duration(event("finished", 4, guest="g", step="convert")) == 3
    assert state.duration(event("finished", 4, guest="g", step="convert", duration_s=2)) == 2
    assert state.duration(event("finished", 4, guest="g", step="copy")) is None
    assert state.duration(event("finished", 4)) == 3


class Broken:
    name = "broken"

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.calls = 0

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        raise self.error

    def __call__(self, event: Event) -> None:
        self.calls += 1
        raise self.error


class Kept(Broken):
    name = "kept"

    def __init__(self) -> None:
        super().__init__(ValueError())
        self.events: list[Event] = []

    def __exit__(self, *_: object) -> None: ...

    def __call__(self, event: Event) -> None:
        self.events.append(event)


def test_a_broken_renderer_is_dropped_and_told_once() -> None:
    broken, kept = Broken(OSError(28, "No space left on device")), Kept()
    with Broadcast([broken, kept]) as broadcast:
        for number in range(3):
            broadcast(event("message", number, text="x"))
    assert broken.calls == 1
    assert [e.type for e in kept.events] == ["message", "warning", "message", "message"]
    assert kept.events[1].text is not None
    assert kept.events[1].text.startswith("broken: No space left on device")


def test_all_renderers_broken_is_survived() -> None:
    with Broadcast([Broken(RuntimeError("a")), Broken(RuntimeError("b"))]) as broadcast:
        broadcast(event("message"))
        broadcast(event("message"))


TEXT = st.one_of(
    st.none(), st.text(max_size=20), st.sampled_from(["\x1b[2J", "a\r\nb\x07", "\udcff"])
)
COUNT = st.integers(0, 2**50)
EVENTS = st.lists(
    st.builds(
        Event,
        time=st.floats(0, 1e9),
        run=st.just("r"),
        type=st.sampled_from(
            ["started", "planned", "progress", "finished", "failed", "cancelled", "retrying",
             "warning", "message", "debug", "from-the-future"]
        ),
        guest=st.sampled_from([None, "g", "h\x1b", "\udcff"]),
        step=st.sampled_from([None, "input", "convert", "copy", "later\x1b"]),
        disk=st.sampled_from([None, 1, 2, 3]),
        text=TEXT,
        bytes=st.one_of(
            st.none(),
            st.builds(Bytes, total=COUNT, data=COUNT, zero=COUNT, skipped=COUNT, copied=COUNT,
                      resumed=COUNT, retried=COUNT),
        ),
        duration_s=st.one_of(st.none(), st.floats(0, 1e9)),
    ),
    max_size=25,
)  # fmt: skip


def _terminal(written: list[str], width: int = 80, height: int = 10) -> Terminal:
    console = Console(
        file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None
    )
    return Terminal(console, verbose=True, clock=lambda: 1e9, is_animated=False)


RENDERERS: dict[str, Callable[[list[str]], Renderer]] = {
    "plain": lambda written: Plain(written.append, verbose=True),
    "quiet": lambda written: Plain(written.append, quiet=True),
    "machine": lambda written: Machine(written.append, written.append),
    "terminal": _terminal,
    "narrow": lambda written: _terminal(written, 20, 3),
}


@pytest.mark.parametrize("make", RENDERERS.values(), ids=RENDERERS.keys())
@settings(max_examples=60, deadline=None)
@given(events=EVENTS)
def test_no_order_of_events_breaks_a_renderer(
    make: Callable[[list[str]], Renderer], events: list[Event]
) -> None:
    written: list[str] = []
    renderer = make(written)
    with renderer:
        for each in events:
            renderer(each)
            if isinstance(renderer, Terminal):
                assert "could not be drawn" not in str(renderer.view())
    for text in written:
        assert text.endswith("\n")
        assert text.count("\n") == 1
        assert not any(character in text for character in "\x1b\x07\r")


@settings(max_examples=60, deadline=None)
@given(events=EVENTS)
def test_every_event_is_one_line_of_json(events: list[Event]) -> None:
    for each in events:
        line = _line(each)
        assert line.count(b"\n") == 1
        assert Event.from_json(line.decode()).type == each.type


def test_a_disk_that_is_compared_begins_again_and_is_not_done() -> None:
    state = RunState()
    state.apply(disk("started", 0.0, total=100, data=100))
    state.apply(disk("progress", 1.0, total=100, data=100, copied=100))
    one = state.disks["g", 1]
    assert one.work(1.0).label == ""
    for time, compared in ((2.0, 0), (3.0, 25)):
        details = {"compared": compared, "total": 100}
        state.apply(event("verifying", time, guest="g", disk=1, details=details))
    work = one.work(3.0)
    assert (work.label, work.fraction, work.done, work.total) == ("verifying", 0.25, 25, 100)
    assert work.rate == 25
    assert state.fraction < 1
    state.apply(disk("finished", 5.0, total=100, data=100, copied=100))
    assert one.work(5.0).label == ""
    assert one.fraction == 1
