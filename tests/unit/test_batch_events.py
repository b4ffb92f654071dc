"""What a run tells: the file of its events, its amounts, warnings that are told once."""

from __future__ import annotations

import os
from pathlib import Path

import anyio
import pytest

from tests.waiting import until
from v2v_async.batch.plan.model import GuestPlan, Plan
from v2v_async.batch.record import amounts as amounts_module
from v2v_async.batch.record import folder
from v2v_async.batch.record.amounts import Amounts
from v2v_async.batch.record.event_file import PROGRESS_EVERY_S, EventFile, EventReader
from v2v_async.batch.record.journal import Failure, open_journal
from v2v_async.batch.record.state_events import tell_state
from v2v_async.batch.repeated import once_each
from v2v_async.batch.schedule.needs import Facts
from v2v_async.errors import V2VError
from v2v_async.events import Bytes, Event, Reporter


def event(type_: str, time: float = 0.0, **fields: object) -> Event:
    return Event(time=time, run="r", type=type_, **fields)  # type: ignore[arg-type]


def progress(time: float, copied: int, guest: str = "g", disk: int = 1) -> Event:
    return event(
        "progress", time, guest=guest, disk=disk, step="copy", bytes=Bytes(100, 100, copied=copied)
    )


def test_the_file_has_all_but_frequent_progress(tmp_path: Path) -> None:
    file = EventFile(tmp_path)
    for tenth in range(100):
        file(progress(1000 + tenth / 10, tenth))
        file(progress(1000 + tenth / 10, tenth, disk=2))
    file(event("finished", 1010, guest="g"))
    file.close()
    found = list(EventReader(tmp_path).read())
    assert found[-1].type == "finished"
    assert len(found) == 1 + 2 * 10 / PROGRESS_EVERY_S
    assert file.path.stat().st_mode & 0o777 == 0o600


def test_half_a_line_of_a_supervisor_that_was_killed(tmp_path: Path) -> None:
    file = EventFile(tmp_path)
    file(event("started"))
    os.write(file._fd, event("message", text="cut short").to_json().encode()[:20])
    reader = EventReader(tmp_path)
    assert [each.type for each in reader.read()] == ["started"]
    EventFile(tmp_path)(event("finished"))
    assert [each.type for each in reader.read()] == ["finished"]
    assert list(reader.read()) == []


def test_a_reader_from_the_end_and_of_no_file(tmp_path: Path) -> None:
    assert list(EventReader(tmp_path).read()) == []
    file = EventFile(tmp_path)
    file(event("started"))
    reader = EventReader(tmp_path, None)
    file(event("finished"))
    assert [each.type for each in reader.read()] == ["finished"]


def test_a_file_that_can_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(V2VError, match="can't be written: No such file"):
        EventFile(tmp_path / "absent")


def test_a_disk_that_is_full_ends_no_run(tmp_path: Path) -> None:
    file = EventFile(tmp_path)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, file._fd)
    os.close(full)
    file(event("started"))
    file(event("finished"))
    assert file.problem is not None
    assert file.problem.strerror == "No space left on device"


@pytest.mark.anyio
async def test_amounts_are_noted_now_and_then_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amounts_module, "EVERY_S", 0.01)
    with open_journal(tmp_path / "j.db", create=True) as journal:
        journal.add_guests(["g"])
        amounts = Amounts(journal)
        async with anyio.create_task_group() as group:
            group.start_soon(amounts.keep_noting)
            amounts(progress(1, 10))
            amounts(event("finished", guest="g", step="convert"))
            await until(lambda: journal.guests()[0].disks, "the first amount is noted")
            amounts(progress(2, 100))
            group.cancel_scope.cancel()
        assert journal.guests()[0].disks == (Bytes(100, 100, copied=100),)


def test_what_many_guests_warn_of_is_told_once() -> None:
    events: list[Event] = []
    reporter = once_each(Reporter(events.append, "r"))
    for guest in ("a", "b", "a"):
        reporter.for_guest(guest).for_step("convert").warning("no KVM")
    reporter.for_guest("b").warning("something else")
    reporter.warning("of the batch")
    assert [(each.type, each.guest) for each in events] == [
        ("warning", "a"),
        ("debug", "b"),
        ("warning", "a"),
        ("warning", "b"),
        ("warning", None),
    ]
    assert {each.run for each in events} == {"r"}


def test_the_state_of_a_run_as_events(tmp_path: Path) -> None:
    guests = [GuestPlan(name=name, priority=place) for place, name in enumerate("abc")]
    with open_journal(tmp_path / "j.db", create=True) as journal:
        journal.add_guests("abc")
        journal.begin_attempt("a")
        journal.set_bytes({"a": {2: Bytes(7, 7, copied=3)}})
        journal.reach("a", "copying")
        journal.fail("b", Failure("no route", hint="wait", step="copy", disk=1))
        journal.pause(["c"], is_paused=True)
        records = journal.guests()
    events: list[Event] = []
    facts = {"a": Facts((5, 7))}
    bundle = folder.bundle_path(tmp_path, "b")
    bundle.parent.mkdir(parents=True)
    bundle.touch()
    tell_state(tmp_path, Plan(guests=guests), facts, records, Reporter(events.append, "r"))
    told = [(each.guest, each.type, each.disk) for each in events]
    assert told == [
        ("a", "planned", None),
        ("a", "progress", 2),
        ("b", "planned", None),
        ("b", "failed", None),
        ("c", "planned", None),
        ("c", "paused", None),
    ]
    first = events[0].details
    assert first is not None
    assert (first["disks"], first["phase"], first["attempt"]) == ([5, 7], "copying", 1)
    assert (events[3].text, events[3].hint) == ("no route", "wait")
    failed = {"step": "copy", "disk": 1, "permanent": False, "bundle": str(bundle)}
    assert events[3].details == failed
