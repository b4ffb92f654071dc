"""``batch run`` and ``resume`` without guests: refusals, dry runs, and runs that had not begun."""

from __future__ import annotations

import signal
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from v2v_async.batch.plan.model import Plan
from v2v_async.batch.preflight.preflight import Checked
from v2v_async.batch.preflight.problems import Problem
from v2v_async.batch.record import folder
from v2v_async.batch.record.folder import Claim
from v2v_async.batch.record.journal import Failure, open_journal
from v2v_async.batch.supervisor import Run
from v2v_async.cli.batch import run as module
from v2v_async.cli.batch.main import main
from v2v_async.cli.run import Ending
from v2v_async.errors import UsageError
from v2v_async.options import GuestOptions

PLAN = Plan.model_validate(
    {
        "guests": [
            {"name": name, "input": {"type": "disk", "source": "a"}, "output": {"type": "null"}}
            for name in ("web", "db", "mail", "old")
        ]
    }
)
TEXT = (
    '[[guests]]\nname = "web"\ninput = { type = "disk", source = "a.img" }\noutput.type = "null"\n'
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("V2V_ASYNC_STATE", str(tmp_path))
    return folder.state_home()


@pytest.fixture
def run(home: Path) -> Path:
    """A run: web is paused, db has failed, mail is done, old is cancelled."""
    made = folder.create(home, "r", PLAN)
    with open_journal(made / folder.JOURNAL) as journal:
        journal.pause(["web"], is_paused=True)
        journal.begin_attempt("db")
        journal.fail("db", Failure("no room"))
        journal.reach("mail", "done")
        journal.reach("old", "cancelled")
    return made


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--failed"], "‘db’ can be tried again when the run has ended"),
        (["web", "old", "db"], "‘db’, ‘old’ can be tried again when the run has ended"),
        (["web", "mail"], "nothing is left to do for ‘mail’"),
        (["nobody", "noone"], "no guest ‘nobody’, ‘noone’"),
    ],
)
def test_ended_guests_are_not_taken_up_while_it_goes_on(
    run: Path, words: list[str], told: str
) -> None:
    with folder.locked(run), pytest.raises(UsageError, match=told):
        main(["resume", "r", *words])
    with open_journal(run / folder.JOURNAL) as journal:
        assert [each.is_paused for each in journal.guests()] == [True, False, False, False]
        assert journal.requests() == []


def test_failed_where_none_has(home: Path) -> None:
    run = folder.create(home, "r", PLAN)
    with folder.locked(run), pytest.raises(UsageError, match="none of its guests has failed"):
        main(["resume", "r", "--failed"])


def test_resuming_what_is_not_paused_changes_nothing(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def ask(_: object, what: str, guests: list[str]) -> str:
        asked.append([what, *guests])
        return "1 guest"

    monkeypatch.setattr(module, "ask", ask)
    with folder.locked(run):
        assert main(["resume", "r"]) == 0
        assert capsys.readouterr().out == "v2v-async batch: resumed: 1 guest\n"
        with open_journal(run / folder.JOURNAL) as journal:
            journal.pause(["web"], is_paused=False)
        assert main(["resume", "r"]) == 0
        assert main(["resume", "r", "web"]) == 0
    assert asked == [["resume", "web"]]
    assert capsys.readouterr().out == (
        "v2v-async batch: nothing is paused: the run goes on with 1 guest\n"
        "v2v-async batch: nothing is paused of ‘web’\n"
    )


@pytest.mark.parametrize("is_alive", [True, False], ids=["goes on", "stopped"])
def test_what_is_done_is_not_taken_up(run: Path, is_alive: bool) -> None:
    with ExitStack() as stack:
        if is_alive:
            stack.enter_context(folder.locked(run))
        with pytest.raises(UsageError, match="nothing is left to do for ‘mail’"):
            main(["resume", "r", "web", "mail"])
    with open_journal(run / folder.JOURNAL) as journal:
        assert journal.guests()[0].is_paused, "nothing was changed"


def test_resuming_what_has_ended_says_so(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_supervised", lambda *_: 0)
    assert main(["resume", "r"]) == 0
    assert capsys.readouterr().out == ""
    with open_journal(run / folder.JOURNAL) as journal:
        journal.reach("web", "done")
    assert main(["resume", "r", "--failed"]) == 0
    assert capsys.readouterr().out == "", "one has failed"
    assert main(["resume", "r"]) == 0
    assert capsys.readouterr().out == "", "‘db’ has failed, which is told at the end"
    with open_journal(run / folder.JOURNAL) as journal:
        journal.reach("db", "done")
    assert main(["resume", "r", "--failed"]) == 0
    told = capsys.readouterr().out
    assert "nothing is left to do: all guests of run ‘r’ have ended; one that was cancelled" in told


# Pause and cancel.


@pytest.mark.parametrize("is_alive", [True, False], ids=["goes on", "stopped"])
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["cancel", "r", "old", "mail", "db"],
            "nothing is left to cancel: ‘db’ has failed, ‘mail’ is done, ‘old’ is cancelled",
        ),
        (["pause", "r", "mail"], "nothing is left to pause: ‘mail’ is done"),
        (["pause", "r"], "nothing is left to pause: all guests of run ‘r’ have ended"),
    ],
)
def test_what_has_ended_is_neither_paused_nor_cancelled(
    run: Path, words: list[str], told: str, is_alive: bool
) -> None:
    with open_journal(run / folder.JOURNAL) as journal:
        journal.reach("web", "done")
    with ExitStack() as stack:
        if is_alive:
            stack.enter_context(folder.locked(run))
        with pytest.raises(UsageError, match=f"^{told}$"):
            main(words)


def test_a_pause_of_a_stopped_run_says_how_others_go_on(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pause", "r", "web", "mail"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("v2v-async batch: paused: 1 guest; ‘mail’ is done\n")
    assert "v2v-async batch resume r GUEST" in told


def test_cancelling_in_a_stopped_run_tells_of_the_guests(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cancel", "r"]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.endswith("] web: cancelled")
    assert last == "v2v-async batch: cancelled: 1 guest"


@pytest.mark.parametrize("command", ["pause", "cancel", "resume"])
def test_a_guest_need_not_be_named(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command])
    assert capsys.readouterr().err.endswith("the following arguments are required: RUN\n")


# Dry runs.


def dry_run(monkeypatch: pytest.MonkeyPatch, folder_: Path, checked: Checked, *words: str) -> int:
    async def check(*_: object) -> Checked:
        return checked

    monkeypatch.setattr(module, "check", check)
    plan = folder_ / "plan.toml"
    plan.write_text(TEXT)
    return main(["run", str(plan), "--dry-run", *words])


def checked_with(problems: list[Problem], claims: list[Claim], **more: Any) -> Checked:
    fields: dict[str, Any] = {"warnings": [], "facts": {}, "names": {}, "capacities": {}, **more}
    return Checked(problems=problems, claims=claims, **fields)


def test_a_dry_run_shows_what_is_wrong_where_there_is_no_order(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def forecast(*_: object) -> list[str]:
        raise UsageError("‘web’ needs more memory than there is", hint="raise limits.memory")

    monkeypatch.setattr("v2v_async.batch.schedule.forecast.forecast", forecast)
    found = checked_with([Problem("web", "its disk is gone", "bring it back")], [])
    assert dry_run(monkeypatch, tmp_path, found) == 2
    printed = capsys.readouterr().out
    assert printed == (
        "\n2 things to mend before it can begin:\n"
        "  web: its disk is gone\n      bring it back\n"
        "  ‘web’ needs more memory than there is\n      raise limits.memory\n"
    )


def test_a_dry_run_says_of_which_guest_a_warning_is(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def check(*args: Any) -> Checked:
        args[2].for_guest("web").warning("its firmware is not known")
        return checked_with([Problem(None, "no room")], [])

    monkeypatch.setattr(module, "check", check)
    plan = tmp_path / "plan.toml"
    plan.write_text(TEXT)
    assert main(["run", str(plan), "--dry-run"]) == 2
    told = capsys.readouterr().err
    assert told == "v2v-async batch: warning: web: its firmware is not known\n"


def test_a_dry_run_tells_what_other_runs_have(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder.create(home, "r", PLAN)
    claims = [Claim("source", "/a.img", "web")]
    assert folder.claim(home, "r", claims) == []
    found = checked_with([], claims)
    assert dry_run(monkeypatch, tmp_path, found, "--name", "r") == 2
    printed = capsys.readouterr().out
    assert "  there is a run ‘r’ already\n" in printed
    assert "    web: its source /a.img is of guest ‘web’ in run ‘r’\n" in printed
    folder.release(home, "r")
    assert dry_run(monkeypatch, tmp_path, found, "--name", "other") == 0
    assert folder.claim(home, "r", claims) == [], "a dry run takes nothing"
    assert folder.runs(home) == ["r"]


@pytest.mark.parametrize("name", ["a/b", "", ".hidden", "x" * 65])
@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_name_that_can_be_none(home: Path, tmp_path: Path, name: str, more: list[str]) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(TEXT)
    with pytest.raises(UsageError, match=f"^‘{name}’ can't be the name of a run$") as caught:
        main(["run", str(plan), "--name", name, *more])
    assert caught.value.hint is not None
    assert caught.value.hint.endswith("--name weekend-1")
    assert not home.exists()


# Stopped.


def stopped(run: Path, command: str, capsys: pytest.CaptureFixture[str]) -> str:
    words = Namespace(command=command, verbose=False)
    options: dict[str, GuestOptions] = {}
    ending = Ending(signal=signal.SIGINT)
    assert module._conclude(words, Run(run, PLAN, options), ending) == 130
    return capsys.readouterr().err


def test_stopped_before_anything_had_begun(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = stopped(run, "run", capsys)
    assert told.endswith("stopped by SIGINT; nothing had begun; the run is not kept\n")
    assert "to go on: v2v-async batch resume r" in stopped(run, "resume", capsys)
    with open_journal(run / folder.JOURNAL) as journal:
        journal.set("work", "/var/tmp/v2vb.x")
    assert "to go on: v2v-async batch resume r" in stopped(run, "run", capsys)
