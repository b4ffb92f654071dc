"""A batch in plain lines: what is told, how often, and what --quiet leaves."""

from __future__ import annotations

import re

import pytest

from tests.batch_screens import GIB, pausing, screen_of, text, whole_batch
from tests.unit.test_render_batch_state import BEGAN, Batch
from v2v_async.events import Event
from v2v_async.render.batch_plain import BatchPlain
from v2v_async.render.batch_view import BatchView


def plain_of(events: list[Event], *, quiet: bool = False) -> tuple[list[str], list[str]]:
    out: list[str] = []
    warnings: list[str] = []
    with BatchPlain(out.append, warnings.append, quiet=quiet) as renderer:
        for event in events:
            renderer(event)
    return out, warnings


def test_plain_tells_what_becomes_of_each_guest() -> None:
    batch = Batch().begin("a", "b")
    batch.convert("a", 60)
    batch.disk("a", "started", total=GIB, data=GIB)
    batch.start("b")
    batch.now += 5
    batch.emit("b", "retrying", "attempt 1 of 3 failed: no luck; the next begins in 30 s",
               hint="have some", details={"attempt": 1, "at": batch.now + 30})  # fmt: skip
    batch.disk("a", "finished", total=GIB, data=GIB, copied=GIB)
    batch.emit("a", "finished", duration_s=65.0)
    batch.now += 30
    batch.start("b", 2)
    batch.emit("b", "failed", "no luck", details={"step": "input", "disk": None})
    batch.run.for_guest("b").warning("careful")
    batch.run.emit("failed", details={"done": 1, "failed": 1, "cancelled": 0})
    out, warnings = plain_of(batch.events)
    assert [line.rstrip("\n") for line in out if " left of" not in line] == [
        "[   0.0] a: attempt 1 begins",
        "[  60.0] a: converted in 1:00",
        "[  60.0] b: attempt 1 begins",
        "[  65.0] b: attempt 1 of 3 failed: no luck; the next begins in 30 s",
        "         hint: have some",
        "[  65.0] a: done in 1:05, 1.0 GiB copied",
        "[  95.0] b: attempt 2 begins",
        "[  95.0] b: failed: input: no luck",
        "[  95.0] batch: 1 done, 1 failed of 2 guests, in 1:35",
    ]
    assert warnings == ["v2v-async: warning: b: careful\n"]
    quiet, warnings = plain_of(batch.events, quiet=True)
    assert [line.split("] ")[-1] for line in quiet] == ["b: failed: input: no luck\n"]
    assert len(warnings) == 1


def test_a_batch_that_is_refused_says_nothing_of_guests() -> None:
    for ended in ("failed", "cancelled"):
        batch = Batch()
        batch.run.emit("started", details={"batch": "nightly", "guests": 3})
        batch.run.for_guest("a").warning("careful")
        batch.run.for_guest("a").emit("debug", "looked at")
        batch.run.emit(ended, details={"done": 0, "failed": 0, "cancelled": 0})
        for quiet in (False, True):
            out, warnings = plain_of(batch.events, quiet=quiet)
            assert out == []
            assert len(warnings) == 1
        assert screen_of(batch.events, 80, 24).shown == ["! a                 careful"]


def taken_up() -> Batch:
    """Return a batch that goes on, with one failure from before, and one found in looking."""
    batch = Batch().begin("fine")
    for name, ended in (("old", BEGAN - 60), ("wrong", BEGAN + 1)):
        details = {"disks": [GIB], "phase": "failed", "ended": ended}
        batch.now = BEGAN + 2
        batch.run.for_guest(name).emit("planned", details=details)
        batch.emit(name, "failed", "no luck", hint="have some", details={"step": "copy"})
    return batch


@pytest.mark.parametrize("quiet", [False, True])
def test_a_failure_from_before_is_not_told_as_a_new_one(quiet: bool) -> None:
    batch = taken_up()
    out, _ = plain_of(batch.events, quiet=quiet)
    assert out == ["[   2.0] wrong: failed: copy: no luck\n", "         hint: have some\n"]
    shown = "\n".join(screen_of(batch.events, 80, 24).shown)
    assert "✗ wrong             failed: copy: no luck" in shown
    assert not re.search("^✗ old", shown, re.MULTILINE)
    # It is kept: the list has it, and the counts say that it is from before.
    live = text(BatchView(batch.state).lines(batch.now, 79, 20))
    assert live[1] == "1 waiting  2 failed (1 before)  of 3"
    assert any(re.fullmatch("old +✗ copy: no luck", line) for line in live)
    batch.start("old", 2)
    batch.emit("old", "failed", "no luck again")
    out, _ = plain_of(batch.events, quiet=quiet)
    assert out[-1].endswith("old: failed: no luck again\n")
    assert "before" not in text(BatchView(batch.state).lines(batch.now, 79, 20))[1]


def test_plain_says_how_many_are_paused() -> None:
    batch = pausing()
    batch.now += 60
    batch.emit("new", "waiting", details={"for": "conversions", "until": None})
    out, _ = plain_of(batch.events)
    assert "6 left (4 paused) of 6 guests: " in out[-1]


def test_plain_sums_up_every_half_minute_however_many_events() -> None:
    events = whole_batch(20, conversion_s=30.0)
    seconds = events[-1].time - BEGAN
    out, _ = plain_of(events)
    sums = [line for line in out if " left of " in line]
    assert seconds / 40 < len(sums) <= seconds / 30
    assert re.search(r"\d+% .* of .*GiB, .*iB/s, .* left \(2 converting, \d copying\)", sums[3])
    assert len(out) < 20 * 8 + seconds / 30


def test_a_clock_that_jumps_is_one_summary() -> None:
    batch = Batch().begin("a")
    batch.now += 86_400
    batch.start("a")
    out, _ = plain_of(batch.events)
    assert sum(" left of " in line for line in out) <= 1
