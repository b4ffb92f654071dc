"""``batch status`` of a run that goes on, was killed, or has just begun."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from v2v_async.batch.plan.model import Plan
from v2v_async.batch.record import folder
from v2v_async.batch.record.event_file import EventFile
from v2v_async.batch.record.journal import open_journal
from v2v_async.batch.record.state_events import tell_state
from v2v_async.batch.schedule.needs import Facts
from v2v_async.cli.batch.main import main
from v2v_async.cli.batch.past import so_far
from v2v_async.errors import UsageError, V2VError
from v2v_async.events import Bytes, Reporter
from v2v_async.render.batch_state import BatchState

PLAN = Plan.model_validate({"guests": [{"name": "web"}, {"name": "db"}, {"name": "old"}]})
SIZE = 100 << 20
BEGAN = 1_700_000_000.0


class Supervisor:
    """Writes what a supervisor does, at times of its own."""

    def __init__(self, run: Path) -> None:
        self.run, self.now = run, BEGAN
        self.file = EventFile(run)
        self.reporter = Reporter(self.file, run.name, clock=lambda: self.now)

    def begin(self) -> None:
        """Say what a supervisor says when it begins."""
        self.reporter.emit("started", details={"batch": self.run.name, "guests": 3})
        facts = {each.name: Facts((SIZE,)) for each in PLAN.guests}
        with open_journal(self.run / folder.JOURNAL) as journal:
            journal.set("facts", {name: each.disks for name, each in facts.items()})
            tell_state(self.run, PLAN, facts, journal.guests(), self.reporter)
        taken = {"taken": {"disks": 1}, "capacities": {"disks": 8}}
        self.reporter.emit("limits", details=taken)

    def copy(self, guest: str, seconds: int) -> None:
        """Copy 10 MiB a second."""
        mine = self.reporter.for_guest(guest)
        with open_journal(self.run / folder.JOURNAL) as journal:
            number = journal.begin_attempt(guest)
            mine.emit("started", details={"attempt": number})
            journal.reach(guest, "copying")
        disk = mine.for_step("copy").for_disk(1)
        for second in range(seconds + 1):
            amounts = Bytes(total=SIZE, data=SIZE, copied=second * (10 << 20))
            disk.emit("progress" if second else "started", bytes=amounts)
            self.now += 1
        with open_journal(self.run / folder.JOURNAL) as journal:
            journal.set_bytes({guest: {1: amounts}})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("V2V_ASYNC_STATE", str(tmp_path))
    monkeypatch.setattr(time, "time", lambda: BEGAN + 10)
    return folder.create(folder.state_home(), "r", PLAN)


@pytest.fixture
def supervisor(run: Path) -> Supervisor:
    """An earlier supervisor began all of them and was killed; this one copies the first."""
    made = Supervisor(run)
    made.now = BEGAN - 1000
    made.begin()
    for name in ("web", "db", "old"):
        made.copy(name, 2)
        made.reporter.for_guest(name).warning("nothing but noise")
    with open_journal(run / folder.JOURNAL) as journal:
        journal.reach("old", "cancelled")
    made.now = BEGAN
    made.begin()
    made.copy("web", 8)
    return made


def snapshot(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["status", "r", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_run_that_goes_on(
    run: Path, supervisor: Supervisor, capsys: pytest.CaptureFixture[str]
) -> None:
    with folder.locked(run):
        state = snapshot(capsys)
        assert main(["status", "r"]) == 0
    assert state["is_running"] is True
    assert state["started"] == BEGAN
    assert state["limits"] == {"disks": {"taken": 1, "capacity": 8}}
    assert state["bytes"]["rate"] == pytest.approx(10 << 20, rel=0.3)
    assert state["bytes"]["eta_s"] is not None
    web, db, old = state["guests"]
    assert (web["phase"], web["running"], web["attempt"], web["elapsed_s"]) == (
        *("copying", True, 2, 10.0),
    )
    assert web["disks"][0]["rate"] == pytest.approx(10 << 20, rel=0.3)
    assert web["disks"][0]["moved"] == 80 << 20
    assert (db["phase"], db["running"]) == ("converted", False), "the other supervisor's"
    assert old["phase"] == "cancelled"
    printed = capsys.readouterr().out
    assert printed.startswith("r: running\n")
    assert "copying" in printed


def test_of_a_killed_one_only_the_journal_counts(
    run: Path, supervisor: Supervisor, capsys: pytest.CaptureFixture[str]
) -> None:
    state = snapshot(capsys)
    assert state["is_running"] is False
    assert (state["limits"], state["bytes"]["rate"]) == ({}, None)
    assert [guest["phase"] for guest in state["guests"]] == ["converted", "converted", "cancelled"]


def test_a_killed_one_has_no_clock(
    run: Path, supervisor: Supervisor, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["status", "r"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("r: stopped")
    (total,) = (line for line in lines if line.startswith("r "))
    assert "0:00" not in total


@pytest.mark.parametrize("has_events", [False, True], ids=["no events", "events of another"])
def test_a_supervisor_that_has_not_said_anything(
    run: Path, capsys: pytest.CaptureFixture[str], has_events: bool
) -> None:
    if has_events:
        earlier = Supervisor(run)
        earlier.begin()
        earlier.copy("web", 2)
        earlier.reporter.emit("cancelled")
        with open_journal(run / folder.JOURNAL) as journal:
            journal.reach("web", "converted")
    with folder.locked(run):
        state = snapshot(capsys)
    assert [guest["running"] for guest in state["guests"]] == [False, False, False]
    assert state["is_running"] is True


def test_old_progress_costs_nothing(run: Path, supervisor: Supervisor) -> None:
    mine = supervisor.reporter.for_guest("db")
    mine.emit("started", details={"attempt": 2})
    mine.for_step("copy").for_disk(1).emit("started")
    for second in range(2000):
        supervisor.now += 2
        amounts = Bytes(total=SIZE, data=SIZE, copied=second * 1024)
        mine.for_step("copy").for_disk(1).emit("progress", bytes=amounts)
    with (run / "events.jsonl").open("a") as file:
        file.write('{"version":1,"ti')
    with folder.locked(run):
        events, reader, _ = so_far(run)
    state = BatchState()
    for event in events:
        state.apply(event)
    web, db = state.guests["web"], state.guests["db"]
    assert (web.moved, db.moved) == (80 << 20, 1999 * 1024), "of each disk the last one is there"
    assert db.rate(supervisor.now) == pytest.approx(512)
    progress = [event for event in events if event.type == "progress" and event.guest == "db"]
    assert 300 < len(progress) < 310
    assert list(reader.read()) == []
    with (run / "events.jsonl").open("a") as file:
        file.write('me":1,"run":"r","type":"message"}\n')
    assert [event.type for event in reader.read()] == ["message"]


def follow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], then: Callable[[], object]
) -> tuple[str, str]:
    """Follow a run; ``then`` is called when all that had happened has been shown."""
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        assert not waits, "it goes on"
        waits.append(seconds)
        then()

    monkeypatch.setattr(time, "sleep", sleep)
    assert main(["status", "r", "--follow"]) == 0
    printed = capsys.readouterr()
    return printed.out, printed.err


def test_following_begins_with_how_far_it_is(
    run: Path,
    supervisor: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def end() -> None:
        supervisor.reporter.for_guest("web").emit("finished", duration_s=3.0)
        supervisor.reporter.emit("finished")

    with folder.locked(run):
        out, errors = follow(monkeypatch, capsys, end)
    assert errors == "", "old warnings are not told again"
    lines = out.splitlines()
    assert len(lines) == 3
    assert "1 cancelled, 2 left of 3 guests" in lines[0]
    assert "MiB/s" in lines[0]
    assert "(1 copying)" in lines[0]
    assert "web: done" in lines[1]


def test_following_what_does_not_go_on(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = follow(monkeypatch, capsys, lambda: None)
    assert out.endswith("v2v-async batch: r: stopped; to go on: v2v-async batch resume r\n")
    with open_journal(run / folder.JOURNAL) as journal:
        for name in ("web", "db", "old"):
            journal.reach(name, "done")
    out, _ = follow(monkeypatch, capsys, lambda: None)
    assert out.endswith("v2v-async batch: r: ended\n")


# Damaged runs.


def spoil(run: Path, how: str) -> None:
    """Damage a run."""
    journal = run / folder.JOURNAL
    if how == "version":
        with closing(sqlite3.connect(journal)) as database:
            database.execute("PRAGMA user_version = 9")
        return
    if how == "plan":
        (run / "plan.json").write_text("{")
        return
    for each in run.glob(f"{folder.JOURNAL}*"):
        each.unlink()
    if how == "directory":
        journal.mkdir()
    elif how != "gone":
        journal.write_bytes({"empty": b"", "damaged": b"no database" * 1000}[how])


DAMAGES = [
    ("version", "is of version 9; this program knows 1"),
    ("plan", "is damaged or of another version"),
    ("directory", "unable to open database file"),
    ("gone", "there is no journal"),
    ("empty", "is of version 0"),
    ("damaged", "file is not a database"),
]


@pytest.mark.parametrize(("how", "told"), DAMAGES)
@pytest.mark.parametrize(
    "words",
    [["status", "r"], ["status", "r", "--json"], ["status", "r", "--follow"], ["report", "r"]],
)
def test_a_damaged_run_is_told(run: Path, how: str, told: str, words: list[str]) -> None:
    spoil(run, how)
    with pytest.raises(V2VError, match=told):
        main(words)


@pytest.mark.parametrize(("how", "told"), [each for each in DAMAGES if each[0] != "plan"])
def test_a_damaged_run_is_a_line_in_the_list(
    run: Path, how: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(run, how)
    for name in ("before", "later"):
        folder.create(run.parent, name, PLAN)
    assert main(["status"]) == 0
    lines = sorted(capsys.readouterr().out.splitlines())
    assert len(lines) == 3
    assert lines[0].startswith("before: 3 waiting")
    assert lines[1].startswith("later: 3 waiting")
    assert lines[2].startswith("r: can't be read: ")
    assert told in lines[2]


def test_no_such_run_names_where_it_was_looked_for(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    monkeypatch.setenv("V2V_ASYNC_STATE", str(other))
    with pytest.raises(UsageError, match=f"there is no run ‘r’ in ‘{other}/batch’"):
        main(["status", "r"])
    assert main(["status"]) == 0
    assert capsys.readouterr().out.startswith(f"no runs yet in ‘{other}/batch’; to begin one: ")


def test_following_is_not_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["status", "r", "--follow", "--json"])
    assert "--json: not allowed with argument --follow" in capsys.readouterr().err
