"""What the events of a batch add up to: no order breaks it, and sums are those made anew."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v2v_async.events import Bytes, Event, Reporter
from v2v_async.render.batch_state import BatchState

GIB = 1 << 30
BEGAN = 1_700_000_000.0


class Batch:
    """Emits the events of a batch into a state, with a clock of its own."""

    def __init__(self) -> None:
        self.now = BEGAN
        self.state = BatchState()
        self.events: list[Event] = []
        self.run = Reporter(self._take, "r", clock=lambda: self.now)

    def _take(self, event: Event) -> None:
        self.events.append(event)
        self.state.apply(event)

    def begin(self, *names: str, phase: str = "waiting", disks: tuple[int, ...] = (GIB,)) -> Batch:
        self.run.emit("started", details={"batch": "nightly", "guests": len(names)})
        for name in names:
            details = {"disks": list(disks), "phase": phase, "priority": 0, "group": None}
            self.run.for_guest(name).emit("planned", details=details)
        return self

    def start(self, name: str, attempt: int = 1) -> None:
        self.run.for_guest(name).emit("started", details={"attempt": attempt})

    def convert(self, name: str, seconds: float = 100.0, attempt: int = 1) -> None:
        self.start(name, attempt)
        for step in ("input", "convert", "output"):
            self.run.for_guest(name).for_step(step).emit("started")
            self.now += seconds / 3
            self.run.for_guest(name).for_step(step).emit("finished")
        self.run.for_guest(name).emit("converted")

    def disk(self, name: str, type_: str, disk: int = 1, **counts: int) -> None:
        reporter = self.run.for_guest(name).for_step("copy").for_disk(disk)
        reporter.emit(type_, **({"bytes": Bytes(**counts)} if counts else {}))  # type: ignore[arg-type]

    def emit(self, name: str, type_: str, text: str | None = None, **fields: Any) -> None:
        self.run.for_guest(name).emit(type_, text, **fields)  # type: ignore[arg-type]


def test_a_guest_goes_through_its_phases() -> None:
    batch = Batch().begin("a", "b")
    state = batch.state
    assert (state.name, state.to_move, state.has_moved) == ("nightly", 2 * GIB, 0)
    assert +state.counts == Counter(waiting=2)
    batch.emit("a", "waiting", details={"for": "conversions", "until": None})
    assert +state.waits == Counter(conversions=1)
    batch.start("a")
    guest = state.guests["a"]
    assert (guest.phase, guest.attempt, guest.waits_for) == ("checking", 1, None)
    assert list(state.running) == ["a"]
    assert list(state.waiting) == ["b"]
    batch.convert("a")
    assert guest.phase == "converted"
    assert state.unconverted == 1
    batch.emit("a", "waiting", details={"for": "disks"})
    batch.disk("a", "planned", total=4 * GIB, data=4 * GIB)
    batch.disk("a", "started", total=4 * GIB, data=2 * GIB)
    batch.disk("a", "progress", total=4 * GIB, data=2 * GIB, copied=GIB)
    assert guest.phase == "copying"
    assert (state.to_move, state.has_moved, state.copying) == (3 * GIB, GIB, 1)
    batch.disk("a", "finished", total=4 * GIB, data=2 * GIB, copied=2 * GIB, zero=2 * GIB)
    assert state.copying == 0
    finalize = batch.run.for_guest("a").for_step("finalize")
    finalize.emit("started")
    assert (guest.phase, guest.step) == ("finalizing", "finalize")
    finalize.emit("finished")
    batch.emit("a", "finished", duration_s=100.0)
    assert guest.phase == "done"
    assert +state.counts == Counter(done=1, waiting=1)
    assert (state.to_move, state.has_moved) == (3 * GIB, 2 * GIB)
    assert not state.running
    batch.run.emit("finished", details={"done": 1, "failed": 0, "cancelled": 0})
    assert state.outcome == "finished"


def test_what_failed_has_nothing_left_to_move() -> None:
    batch = Batch().begin("a", "b", disks=(GIB, GIB))
    batch.convert("a")
    batch.disk("a", "started", total=GIB, data=GIB)
    batch.disk("a", "progress", total=GIB, data=GIB, copied=100)
    batch.emit(
        "a", "failed", "no luck", hint="try again", details={"step": "copy", "disk": 1}, offset=7
    )
    state = batch.state
    assert (state.to_move, state.has_moved) == (2 * GIB + 100, 100)
    failure = state.guests["a"].failure
    assert failure is not None
    assert (failure.text, failure.hint, failure.step, failure.disk, failure.offset) == (
        "no luck", "try again", "copy", 1, 7,
    )  # fmt: skip
    assert list(state.failed) == ["a"]
    assert state.copying == 0


@pytest.mark.parametrize("phase", ["done", "failed", "cancelled"])
def test_what_ended_before_anybody_looked_took_as_long_as_it_took(phase: str) -> None:
    batch = Batch().begin("a", "b")
    details = {"phase": phase, "began": BEGAN - 500, "ended": BEGAN - 400, "attempt": 1}
    batch.emit("a", "planned", details=details)
    batch.emit("b", "planned", details={**details, "began": None})
    if phase == "failed":
        batch.emit("a", "failed", "no luck")
    a, b = batch.state.snapshot(BEGAN + 1000)["guests"]
    assert (a["phase"], a["elapsed_s"], b["elapsed_s"]) == (phase, 100.0, None)
    batch.start("a", attempt=2)
    batch.now += 10
    batch.emit("a", "finished")
    assert batch.state.guests["a"].elapsed(batch.now) == 510, "since its first attempt began"


def test_a_conversion_that_was_kept_is_not_checked_for_as_long_as_its_copy_waits() -> None:
    batch = Batch().begin("a", phase="copying")
    guest = batch.state.guests["a"]
    batch.start("a", attempt=2)
    for step in ("input", "output"):
        batch.run.for_guest("a").for_step(step).emit("started")
        batch.run.for_guest("a").for_step(step).emit("finished")
    batch.run.for_guest("a").for_disk(1).emit("waiting", details={"for": "disks"})
    assert (guest.phase, guest.is_running, batch.state.unconverted) == ("converted", True, 0)
    batch.run.for_guest("a").for_step("convert").emit("started")
    assert (guest.phase, batch.state.unconverted) == ("converting", 1)


def test_a_retry_waits_for_its_time_and_keeps_the_conversion() -> None:
    batch = Batch().begin("a", "b")
    batch.convert("a")
    batch.start("b")
    at = batch.now + 30
    batch.emit("b", "retrying", "attempt 1 of 3 failed", details={"attempt": 1, "at": at + 5})
    batch.emit("a", "retrying", "attempt 1 of 3 failed", details={"attempt": 1, "at": at})
    state = batch.state
    assert [state.guests[name].phase for name in "ab"] == ["converted", "waiting"]
    assert state.waits["time"] == 2
    assert state.next_time() == at
    batch.start("a", 2)
    assert state.next_time() == at + 5
    assert state.guests["a"].failure is None
    input_ = batch.run.for_guest("a").for_step("input")
    input_.emit("started")
    assert state.guests["a"].phase != "converting"  # it is only served again
    assert state.conversions == 1
    batch.emit("a", "converted")
    assert state.conversions == 1


def test_what_a_dead_supervisor_was_at_does_not_run() -> None:
    batch = Batch().begin("a", phase="copying", disks=(GIB, GIB))
    batch.disk("a", "progress", total=GIB, data=GIB, copied=GIB // 2)
    state = batch.state
    guest = state.guests["a"]
    assert (guest.phase, guest.is_converted, state.copying, state.unconverted) == (
        "converted", True, 0, 0,
    )  # fmt: skip
    assert (state.to_move, state.has_moved, state.moved_now) == (2 * GIB, GIB // 2, 0)
    batch.start("a", 2)
    batch.now += 10
    # The copy goes on from its checkpoint: what is there already has not to move.
    batch.disk("a", "planned", total=GIB, data=GIB // 2, resumed=GIB // 2)
    batch.now += 10
    batch.disk("a", "progress", total=GIB, data=GIB // 2, resumed=GIB // 2, copied=GIB // 4)
    assert state.rate(batch.now) == pytest.approx(GIB / 4 / 10)
    assert guest.disks[1].rate.at(batch.now) == pytest.approx(GIB / 4 / 10)
    assert state.moved_now == GIB // 4
    done = Batch().begin("b", phase="done").state
    assert (done.to_move, done.has_moved, done.left, done.fraction) == (GIB, GIB, 0, 1.0)


def test_a_supervisor_that_follows_a_dead_one_begins_its_guests_anew() -> None:
    batch = Batch().begin("a", "b")
    batch.convert("a")
    batch.disk("a", "started", total=GIB, data=GIB)
    batch.start("b")
    batch.now += 3600
    batch.begin("a", phase="copying").begin("b", phase="converting")
    state = batch.state
    assert not state.running
    assert state.copying == 0
    assert +state.counts == Counter(converted=1, waiting=1)
    assert state.elapsed(batch.now) == 0


def test_pauses_are_counted_beside_the_phases() -> None:
    batch = Batch().begin("a", "b")
    batch.emit("a", "paused")
    batch.emit("a", "paused")
    assert +batch.state.counts == Counter(waiting=2, paused=1)
    batch.emit("a", "cancelled")
    assert +batch.state.counts == Counter(waiting=1, cancelled=1)
    batch.run.emit("paused")
    assert batch.state.is_paused
    batch.run.emit("resumed")
    assert not batch.state.is_paused


def test_a_pause_is_what_a_guest_waits_for_and_ends_with_it() -> None:
    batch = Batch().begin("a", "b", disks=(GIB, GIB))
    state = batch.state
    batch.emit("a", "waiting", details={"for": "conversions", "until": None})
    batch.emit("a", "paused")
    assert +state.reasons == Counter(paused=1)  # before the scheduler gives it as the reason
    assert +state.paused == Counter(waiting=1)
    batch.emit("a", "waiting", details={"for": "paused", "until": None})
    assert +state.reasons == Counter(paused=1)
    batch.convert("b")
    batch.disk("b", "started", total=GIB, data=GIB)
    batch.emit("b", "paused")
    assert +state.paused == Counter(waiting=1, copying=1)
    assert +state.reasons == Counter(paused=1)
    batch.run.for_guest("b").for_disk(2).emit("waiting", details={"for": "paused"})
    assert +state.disk_waits == Counter(paused=1)
    for name in "ab":
        batch.emit(name, "resumed")
    assert not +state.reasons + +state.disk_waits + +state.paused


def test_a_pause_of_a_guest_that_is_to_be_tried_again_has_no_time() -> None:
    batch = Batch().begin("a", "b")
    for name, after in (("a", 30), ("b", 60)):
        batch.start(name)
        batch.emit(name, "retrying", "no", details={"attempt": 1, "at": batch.now + after})
    batch.emit("a", "paused")
    assert batch.state.next_time() == batch.now + 60
    assert +batch.state.reasons == Counter(paused=1, time=1)


def test_who_is_talked_of_before_a_batch_begins_is_no_guest_of_it() -> None:
    batch = Batch()
    batch.run.emit("started", details={"batch": "nightly", "guests": 1})
    batch.run.for_guest("a").warning("careful")
    batch.run.for_guest("a").for_step("input").emit("message", "looking")
    assert not batch.state.guests
    assert batch.state.warnings == 1


@pytest.mark.parametrize(
    ("ended", "is_known"), [(None, True), (BEGAN - 1, True), (BEGAN, False), (BEGAN + 2, False)]
)
def test_a_failure_from_before_is_known(ended: float | None, is_known: bool) -> None:
    batch = Batch().begin()
    batch.now += 3
    details: dict[str, Any] = {"disks": [], "phase": "failed", "ended": ended}
    batch.run.for_guest("a").emit("planned", details=details)
    batch.emit("a", "failed", "no luck")
    guest = batch.state.guests["a"]
    assert guest.is_known_failure is is_known
    assert guest.failure is not None
    batch.start("a", 2)
    batch.emit("a", "failed", "no luck again")
    assert not guest.is_known_failure


def test_a_disk_waits_for_its_own_limit() -> None:
    batch = Batch().begin("a", disks=(GIB, GIB))
    batch.convert("a")
    for disk in (1, 2):
        mine = batch.run.for_guest("a").for_disk(disk)
        mine.emit("waiting", details={"for": "hosts.esx1.connections"})
    assert +batch.state.disk_waits == Counter({"hosts.esx1.connections": 2})
    batch.disk("a", "started", total=GIB, data=GIB)
    assert +batch.state.disk_waits == Counter({"hosts.esx1.connections": 1})
    batch.emit("a", "cancelled")
    assert not +batch.state.disk_waits


def test_limits_are_as_they_were_told_last() -> None:
    batch = Batch().begin("a")
    batch.run.emit("limits", details={"taken": {"disks": 3}, "capacities": {"disks": 8, "x": 1}})
    assert batch.state.limits == {"disks": (3, 8), "x": (0, 1)}
    batch.run.emit("limits", details={"taken": 3, "capacities": None})
    assert batch.state.limits == {"disks": (3, 8), "x": (0, 1)}


# The time that is left.


def copy_evenly(batch: Batch, name: str, seconds: int, rate: int, size: int = GIB) -> None:
    batch.disk(name, "started", total=size, data=size)
    for second in range(1, seconds + 1):
        batch.now += 1
        batch.disk(name, "progress", total=size, data=size, copied=second * rate)


def test_time_left_of_copies_alone() -> None:
    batch = Batch().begin("a", "b", disks=(1000,))
    for name in "ab":
        batch.convert(name)
    assert batch.state.eta(batch.now) is None  # nothing has been copied to tell it from
    copy_evenly(batch, "a", seconds=20, rate=10, size=1000)
    assert batch.state.eta(batch.now) == pytest.approx(1800 / 10)
    # No byte for as long again: twice the time.
    assert batch.state.eta(batch.now + 20) == pytest.approx(1800 / 5)


def test_no_time_is_left_while_everything_left_is_paused() -> None:
    batch = Batch().begin("a", "b", "c", disks=(1000,))
    for name in "ab":
        batch.convert(name)
    batch.emit("c", "cancelled")
    copy_evenly(batch, "a", seconds=20, rate=10, size=1000)
    batch.emit("b", "paused")
    assert batch.state.eta(batch.now) is not None
    batch.emit("a", "paused")
    assert batch.state.eta(batch.now) is None
    batch.emit("b", "resumed")
    assert batch.state.eta(batch.now) is not None
    batch.run.emit("paused")
    assert batch.state.eta(batch.now) is None


def test_time_left_does_not_grow_between_two_copies() -> None:
    batch = Batch().begin("a", "b", disks=(1000,))
    for name in "ab":
        batch.convert(name)
    copy_evenly(batch, "a", seconds=100, rate=10, size=1000)
    batch.disk("a", "finished", total=1000, data=1000, copied=1000)
    batch.emit("a", "finished")
    before = batch.state.eta(batch.now)
    batch.now += 3600
    batch.emit("b", "waiting", details={"for": "disks"})
    assert before == pytest.approx(100)
    assert batch.state.eta(batch.now) == pytest.approx(100)
    assert batch.state.rate(batch.now) is None


def test_time_left_of_conversions_counts_what_they_have_taken() -> None:
    names = [f"g{number}" for number in range(9)]
    batch = Batch().begin(*names, disks=(1000,))
    batch.run.emit("limits", details={"taken": {}, "capacities": {"conversions": 2}})
    batch.convert(names[0], 300)
    copy_evenly(batch, names[0], seconds=10, rate=100, size=1000)
    # Eight are left, of which one is under way for 100 s, two at a time.
    batch.start(names[1])
    batch.now += 100
    expected = (7 * 300 + 200) / 2 + 8000 / 100 / 9
    batch.emit(names[0], "message", "x")
    assert batch.state.eta(batch.now) == pytest.approx(expected, rel=0.15)
    batch.run.emit("finished")
    assert batch.state.eta(batch.now) is None


# Any order, and sums.

PLACES = st.sampled_from(["", "conversions", "disks", "time", "paused", None, 7])
NUMBERS = st.one_of(st.none(), st.integers(-5, 2**40), st.floats(), st.just("x"))
DETAILS = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {},
        optional={
            "for": PLACES,
            "until": NUMBERS,
            "ended": NUMBERS,
            "at": NUMBERS,
            "attempt": NUMBERS,
            "priority": NUMBERS,
            "disks": st.one_of(NUMBERS, st.lists(NUMBERS, max_size=4)),
            "phase": st.sampled_from(
                ["waiting", "converting", "converted", "copying", "done", "failed", "later"]
            ),
            "group": PLACES,
            "batch": PLACES,
            "step": PLACES,
            "disk": NUMBERS,
            "taken": st.one_of(NUMBERS, st.dictionaries(st.sampled_from("ab"), NUMBERS)),
            "capacities": st.one_of(NUMBERS, st.dictionaries(st.sampled_from("ab"), NUMBERS)),
            "compared": st.integers(0, 9),
            "total": st.integers(0, 9),
        },
    ),
)
COUNT = st.integers(0, 2**50)
EVENTS = st.lists(
    st.builds(
        Event,
        time=st.floats(0, 1e6),
        run=st.just("r"),
        type=st.sampled_from(
            ["started", "planned", "progress", "verifying", "finished", "failed", "cancelled",
             "retrying", "waiting", "limits", "paused", "resumed", "converted", "warning",
             "message", "from-the-future"]
        ),
        guest=st.sampled_from([None, "g", "g", "h\x1b"]),
        step=st.sampled_from([None, None, "input", "convert", "copy", "finalize", "later"]),
        disk=st.sampled_from([None, None, 1, 2]),
        text=st.sampled_from([None, "a\x1b[2J"]),
        bytes=st.one_of(
            st.none(),
            st.builds(Bytes, total=COUNT, data=COUNT, zero=COUNT, skipped=COUNT, copied=COUNT,
                      resumed=COUNT, retried=COUNT),
        ),
        details=DETAILS,
    ),
    max_size=40,
)  # fmt: skip


def sums(state: BatchState) -> dict[str, Any]:
    """Return the sums made anew from the guests."""
    guests = list(state.guests.values())
    unconverted = [
        guest
        for guest in guests
        if guest.phase in ("waiting", "checking", "converting") and not guest.is_converted
    ]
    moves = {guest.name: sum(d.to_move for d in guest.disks.values()) for guest in guests}
    moved = {guest.name: sum(d.has_moved for d in guest.disks.values()) for guest in guests}
    has_failed = {guest.name: guest.phase in ("failed", "cancelled") for guest in guests}
    return {
        "counts": Counter(guest.phase for guest in guests)
        + Counter(paused=sum(guest.is_paused for guest in guests)),
        "paused": Counter(guest.phase for guest in guests if guest.is_paused),
        "waits": Counter(guest.waits_for for guest in guests if guest.waits_for is not None),
        "reasons": Counter(guest.reason for guest in guests if guest.reason is not None),
        "disk_waits": Counter(
            disk.waits_for
            for guest in guests
            for disk in guest.disks.values()
            if disk.waits_for is not None
        ),
        "to_move": sum(moved[n] if has_failed[n] else moves[n] for n in moves),
        "has_moved": sum(
            moves[guest.name] if guest.phase == "done" else moved[guest.name] for guest in guests
        ),
        "copying": sum(d.is_copying for guest in guests for d in guest.disks.values()),
        "unconverted": len(unconverted),
        "running": {guest.name for guest in guests if guest.is_running},
        "waiting": {g.name for g in guests if not g.is_running and not g.has_ended},
        "failed": {guest.name for guest in guests if guest.phase == "failed"},
        "timed": {guest.name for guest in guests if guest.waits_until is not None},
    }


@settings(max_examples=200, deadline=None)
@given(events=EVENTS)
def test_sums_are_those_made_anew_after_any_events(events: list[Event]) -> None:
    state = BatchState()
    for event in events:
        state.apply(event)
        made_anew = sums(state)
        told: dict[str, Any] = {name: getattr(state, name) for name in made_anew}
        for name in ("counts", "paused", "waits", "reasons", "disk_waits"):
            told[name] = +told[name]
        for name in ("running", "waiting", "failed", "timed"):
            told[name] = set(told[name])
        assert told == made_anew
        assert all(not (g.is_running and g.has_ended) for g in state.guests.values())
        assert 0 <= state.fraction <= 1
        for now in (event.time, 2e6):
            rate, eta = state.rate(now), state.eta(now)
            assert rate is None or rate >= 0
            assert eta is None or eta >= 0
    # JSON has no word for infinity.
    json.dumps(state.snapshot(2e6), allow_nan=False)


def test_snapshot_tells_all() -> None:
    batch = Batch().begin("a", "b", disks=(GIB, GIB))
    batch.convert("a", 90)
    copy_evenly(batch, "a", seconds=10, rate=1000, size=GIB)
    batch.emit("b", "retrying", "no luck", hint="h", details={"attempt": 1, "at": batch.now + 9})
    batch.run.emit("limits", details={"taken": {"disks": 1}, "capacities": {"disks": 8}})
    told = batch.state.snapshot(batch.now)
    assert json.loads(json.dumps(told)) == told
    first, second = told.pop("guests")
    assert told == {
        "version": 1, "run": "r", "name": "nightly", "now": batch.now, "started": BEGAN,
        "outcome": None, "paused": False, "warnings": 0, "counts": {"copying": 1, "waiting": 1},
        "waits": {"time": 1}, "disk_waits": {},
        "limits": {"disks": {"taken": 1, "capacity": 8}},
        "bytes": {
            "to_move": 4 * GIB, "moved": 10_000, "rate": pytest.approx(1000),
            "eta_s": pytest.approx((4 * GIB - 10_000) / 1000),
        },
    }  # fmt: skip
    assert first["disks"][0] == {
        "number": 1, "total": GIB, "to_move": GIB, "moved": 10_000, "rate": pytest.approx(1000),
        "eta_s": pytest.approx((GIB - 10_000) / 1000), "verified": None, "waits_for": None,
        "outcome": None,
    }  # fmt: skip
    assert (first["phase"], first["running"], first["elapsed_s"]) == (
        "copying", True, pytest.approx(100),
    )  # fmt: skip
    assert second["failure"]["text"] == "no luck"
    assert (second["waits_for"], second["waits_until"]) == ("time", batch.now + 9)
