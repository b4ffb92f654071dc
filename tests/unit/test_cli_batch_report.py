"""batch report: from a run's folder to each format, on stdout or in a file."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import get_args

import pytest

from v2v_async.batch.plan.model import Plan
from v2v_async.batch.record import folder
from v2v_async.batch.record.journal import Failure, open_journal
from v2v_async.cli.batch.report import Format, write_report
from v2v_async.errors import UsageError, V2VError
from v2v_async.events import Bytes, Reporter

FORMATS: tuple[Format, ...] = get_args(Format)
PLAN = Plan.model_validate({"name": "weekend", "guests": [{"name": "web"}, {"name": "db"}]})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run: one guest done, one failed."""
    made = folder.create(tmp_path / "home", "r1", PLAN)
    with open_journal(made / folder.JOURNAL) as journal:
        journal.begin_attempt("web")
        journal.set_bytes({"web": {1: Bytes(total=4096, data=4096, copied=4096)}})
        journal.reach("web", "done")
        journal.begin_attempt("db")
        journal.fail("db", Failure("no operating system", "look inside", "convert"))
    with (made / "events.jsonl").open("w") as file:
        reporter = Reporter(lambda event: print(event.to_json(), file=file), "r1")
        reporter.for_guest("web").for_step("copy").emit("finished", duration_s=2.0)
        reporter.for_guest("db").emit("failed", "x", details={"bundle": "/b/db.tar.gz"})
    return made


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("is_file", [False, True], ids=["stdout", "file"])
def test_each_format(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], format_: Format, is_file: bool
) -> None:
    output = tmp_path / "out" if is_file else None
    if output is not None:
        output.write_text("an older report")
    write_report(run, format_, output)
    printed = capsys.readouterr().out
    text = printed if output is None else output.read_bytes().decode()
    assert (printed == "") == is_file
    for expected in ("web", "db", "no operating system", "look inside", "/b/db.tar.gz"):
        assert expected in text
    match format_:
        case "json":
            report = json.loads(text)
            assert report["outcome"] == "failed"
            assert report["guests"][0]["rate"] == 2048
        case "csv":
            assert [row["phase"] for row in csv.DictReader(io.StringIO(text, newline=""))] == [
                *("done", "failed")
            ]
            assert "\r\n" in text
        case "html":
            assert text.startswith("<!DOCTYPE html>")
        case "rich":
            assert "\x1b" not in text
    assert sorted(each.name for each in tmp_path.iterdir()) == ["home", *(["out"] * is_file)]


def test_a_run_that_goes_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with folder.locked(run):
        write_report(run, "json")
    assert json.loads(capsys.readouterr().out)["outcome"] == "going"


def test_disks_that_are_not_begun_count_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = folder.create(tmp_path / "home", "r1", PLAN)
    with open_journal(made / folder.JOURNAL) as journal:
        journal.set("facts", {"web": [4096, 8192], "db": [100]})
        journal.begin_attempt("web")
        journal.set_bytes({"web": {1: Bytes(total=16384, data=4096, copied=1024)}})
        journal.begin_attempt("db")
        journal.reach("db", "cancelled")
    write_report(made, "json")
    report = json.loads(capsys.readouterr().out)
    assert report["totals"]["disks"] == 2, "what was cancelled has none to come"
    assert [(disk["total"], disk["data"]) for disk in report["guests"][0]["disks"]] == [
        (16384, 4096),
        (0, 8192),
    ]
    write_report(made, "rich")
    told = " ".join(capsys.readouterr().out.split())
    assert "at least 24.0 KiB in 2 disks, up to 12.0 KiB of it data" in told
    write_report(made, "html")
    assert "at least 24.0 KiB in 2 disks" in capsys.readouterr().out


def test_where_it_can_not_be_written(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can't be written: No such file"):
        write_report(run, "html", tmp_path / "absent" / "out")


def test_a_run_without_journal(tmp_path: Path) -> None:
    with pytest.raises(V2VError, match="there is no journal"):
        write_report(tmp_path, "json")
