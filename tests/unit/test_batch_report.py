"""The report of a batch: what it says, and that no name or message does harm in any format."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from rich.console import Console

from tests.conftest import ROOT
from v2v_async.batch.plan.model import Plan
from v2v_async.batch.record.history import GuestHistory, last_events, read_history
from v2v_async.batch.record.journal import (
    AttemptRecord,
    Failure,
    GuestRecord,
    Phase,
    open_journal,
)
from v2v_async.batch.report.csv_report import as_csv
from v2v_async.batch.report.report import BatchReport, as_json, report_of
from v2v_async.events import Bytes, Event, Reporter
from v2v_async.render.batch_report import show_report
from v2v_async.render.batch_report_html import as_html
from v2v_async.units import MIB

NOW = 1_700_001_000.0
NASTY = "<script>alert(1)</script>&\x1b[31m\u202e\"'"

PLAN = Plan.model_validate(
    {
        "name": "weekend",
        "guests": [
            {
                "name": "web",
                "group": "front",
                "priority": 3,
                "input": {"type": "disk", "source": ["a.img", "b.img"]},
                "output": {"type": "local", "storage": "/out", "name": "web-new"},
            },
            {
                "name": "db",
                "input": {"source": "db", "connection": "vpx://u:hunter2@vc/DC/esx"},
            },
            {"name": "mail", "input": {"source": "mail"}},
            {"name": "old", "input": {"source": "old"}},
        ],
    }
)
FULL = Failure(
    "write failed: No space left on device (password=hunter2)",
    "free some space in ‘/out’",
    "copy",
    2,
    4096,
    "/logs/copy-2.log",
    is_permanent=True,
)
DISK = Bytes(total=100 * MIB, data=40 * MIB, copied=40 * MIB, zero=10 * MIB, skipped=50 * MIB)


def record(name: str, phase: Phase = "waiting", **changes: Any) -> GuestRecord:
    fields = {
        "is_paused": False,
        "attempts": 0,
        "failures": 0,
        "not_before": 0.0,
        "began": None,
        "ended": None,
        "failure": None,
        "disks": (),
    }
    return GuestRecord(name=name, phase=phase, **{**fields, **changes})


RECORDS = [
    record(
        *("web", "done"),
        attempts=2,
        began=NOW - 1000,
        ended=NOW - 400,
        disks=(DISK, replace(DISK, copied=0, resumed=40 * MIB, data=0)),
        outputs=("/out/web-new-sda",),
    ),
    record("db", "failed", attempts=1, began=NOW - 900, ended=NOW - 100, failure=FULL),
    record("mail", is_paused=True),
    record("old", "cancelled", attempts=1, began=NOW - 900, ended=NOW - 890),
]
HISTORY = {
    "web": GuestHistory({"convert": 60.0, "copy": 100.0}, 80.0, None),
    "db": GuestHistory({"copy": 3.0}, 3.0, "/run/db.tar.gz"),
}


def made(records: list[GuestRecord] = RECORDS, **changes: Any) -> BatchReport:
    return report_of(PLAN, records, run="r1", now=NOW, history=HISTORY, **changes)


def test_what_it_says() -> None:
    tries = {"web": [AttemptRecord(1, NOW - 1000, NOW - 900, "copying", FULL)]}
    report = made(attempts=tries)
    web, db, mail, _ = report.guests
    assert (web.phase, web.attempts, web.duration_s, web.group) == ("done", 2, 600.0, "front")
    assert (web.source, web.target) == ("a.img, b.img", "local /out as web-new")
    assert (web.bytes.total, web.bytes.copied) == (200 * MIB, 40 * MIB)
    assert (web.bytes.resumed, web.bytes.skipped) == (40 * MIB, 100 * MIB)
    assert web.rate == 40 * MIB / 80
    assert web.outputs == ["/out/web-new-sda"]
    assert web.failure is None
    assert web.tries[0].failure is not None
    assert web.tries[0].failure.disk == 2
    assert db.source == "db (vpx://u:***@vc/DC/esx)"
    assert db.failure is not None
    assert (db.failure.step, db.failure.disk, db.failure.offset) == ("copy", 2, 4096)
    assert db.failure.message == "write failed: No space left on device (password=***"
    assert db.bundle == "/run/db.tar.gz"
    assert (mail.duration_s, mail.attempts, mail.rate) == (None, 0, None)
    totals = report.totals
    assert (totals.guests, totals.disks, totals.attempts) == (4, 2, 4)
    assert totals.phases == {"done": 1, "failed": 1, "waiting": 1, "cancelled": 1}
    assert (totals.duration_s, totals.rate) == (1000.0, 40 * MIB / 1000)


@pytest.mark.parametrize(
    ("kept", "is_going", "outcome", "duration"),
    [
        ((0,), False, "done", 600.0),
        ((0, 3), False, "done", 600.0),
        ((0, 1), False, "failed", 900.0),
        ((0, 1, 2), False, "stopped", 1000.0),
        ((0, 2), True, "going", 1000.0),
        ((2,), False, "stopped", None),
    ],
)
def test_outcomes(
    kept: tuple[int, ...], is_going: bool, outcome: str, duration: float | None
) -> None:
    report = made([RECORDS[index] for index in kept], is_going=is_going)
    assert report.outcome == outcome
    assert report.totals.duration_s == duration


@pytest.mark.parametrize(
    ("kept", "told"),
    [
        ((0,), "all guests are done"),
        ((0, 3), "ended: all guests are done or were cancelled"),
        ((3,), "ended: all guests were cancelled"),
        ((1, 3), "ended, with failures"),
    ],
)
def test_cancelled_guests_are_not_done(kept: tuple[int, ...], told: str) -> None:
    report = made([RECORDS[index] for index in kept])
    console = Console(file=io.StringIO(), width=120)
    show_report(report, console)
    assert isinstance(console.file, io.StringIO)
    assert f"Run r1: {told} (plan" in console.file.getvalue()
    assert told in as_html(report)


def test_what_to_do_next() -> None:
    assert made().next == [
        "1 guest is not done: v2v-async batch resume r1",
        "1 guest has failed: mend what is said, then v2v-async batch resume r1 --failed; where "
        "the plan is wrong, a run of another plan",
        "to ask for help, attach a guest's failure bundle: secrets are masked in it",
    ]
    assert made([RECORDS[0]]).next == []
    assert made([RECORDS[0], RECORDS[2]], is_going=True).next == [
        "1 guest is paused: v2v-async batch resume r1 mail"
    ]


def test_many_failures_with_one_hint_are_one_line() -> None:
    names = [f"g{number}" for number in range(20)]
    plan = Plan.model_validate({"guests": [{"name": name} for name in names]})
    failed = [record(name, "failed", failure=FULL) for name in names]
    lines = report_of(plan, failed, run="r", now=NOW).next
    assert lines[0] == "g0, g1, g2, g3, g4 and 15 more: free some space in ‘/out’"
    assert len(lines) == 2


def test_a_clock_that_was_set_back() -> None:
    report = made([replace(RECORDS[2], began=NOW + 50)])
    assert report.guests[0].duration_s == 0.0
    assert report.totals.rate is None


def test_json_is_as_its_schema_says() -> None:
    schema = json.loads((ROOT / "docs" / "schema" / "batch-report.json").read_text())
    Draft202012Validator.check_schema(schema)
    tries = {"web": [AttemptRecord(1, NOW - 1000, None, "copying", None)]}
    for report in (made(attempts=tries), made([]), made([RECORDS[2]])):
        text = as_json(report)
        Draft202012Validator(schema).validate(json.loads(text))
        assert BatchReport.model_validate_json(text) == report
        assert "hunter2" not in text
    assert json.loads(as_json(made()))["version"] == 1


# No harm in any format.

FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "  =1", "＝1", '=HYPERLINK("http://x")']


@pytest.mark.parametrize("text", FORMULAS)
def test_no_cell_is_a_formula(text: str) -> None:
    plan = Plan.model_validate(
        {"guests": [{"name": text, "group": text, "input": {"source": text}}]}
    )
    failure = Failure(text, text, log=text)
    history = {text: GuestHistory(bundle=text)}
    failed = [record(text, "failed", failure=failure, outputs=(text,))]
    made_csv = as_csv(report_of(plan, failed, run="r", now=NOW, history=history))
    [row] = csv.DictReader(io.StringIO(made_csv, newline=""))
    for name in ("guest", "group", "source", "outputs", "reason", "hint", "log", "bundle"):
        assert row[name] == f"'{text}", name


def test_csv_has_a_row_for_each_guest_and_numbers_are_numbers() -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(made()), newline="")))
    assert [row["guest"] for row in rows] == ["web", "db", "mail", "old"]
    web, db, mail, _ = rows
    assert (web["bytes_copied"], web["duration_s"], web["rate"]) == ("41943040", "600.0", "524288")
    assert (web["began"], web["priority"]) == ("2023-11-14T22:13:20+00:00", "3")
    assert (db["failed_step"], db["failed_offset"]) == ("copy", "4096")
    assert db["is_permanent"] == "yes"
    assert (mail["began"], mail["reason"]) == ("", "")
    assert "hunter2" not in as_csv(made())


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.names: set[str] = set()
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.names.update(name for name, _ in attrs)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def nasty() -> BatchReport:
    plan = Plan.model_validate(
        {"name": NASTY, "guests": [{"name": NASTY, "input": {"source": NASTY}}]}
    )
    failure = Failure(f"{NASTY}\nline 2", NASTY, NASTY, 1, log=NASTY)
    history = {NASTY: GuestHistory({NASTY: 1.0}, None, NASTY)}
    failed = [record(NASTY, "failed", failure=failure, disks=(DISK,), outputs=(NASTY,))]
    return report_of(plan, failed, run=NASTY, now=NOW, history=history)


@pytest.mark.parametrize("report", [made(), nasty(), made([])], ids=["usual", "nasty", "none"])
def test_html_is_one_file_without_anything_that_runs(report: BatchReport) -> None:
    text = as_html(report)
    page = Page(text)
    assert page.open == []
    assert not {"script", "img", "link", "iframe", "object", "form", "a", "svg"} & set(page.tags)
    assert page.names <= {
        "lang",
        "charset",
        "http-equiv",
        "content",
        "name",
        "class",
        "style",
        "scope",
    }
    outside = re.findall(r"https?:|url\(|@import", text)
    assert outside == []
    assert "default-src 'none'" in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", text)


def test_html_says_it_all() -> None:
    words = " ".join(" ".join(Page(as_html(made())).words).split())
    for expected in (
        *("Batch r1", "stopped before all was done", "weekend", "What to do next", "Failed"),
        *("step copy, disk 2, offset 4096", "free some space in ‘/out’", "/logs/copy-2.log"),
        *("/run/db.tar.gz", "convert 1:00, copy 1:40", "local /out as web-new"),
        *("/out/web-new-sda", "200 MiB", "4 guests: 1 done, 1 failed, 1 waiting, 1 cancelled"),
        "waiting, paused",
    ):
        assert expected in words, expected
    assert "hunter2" not in words
    assert NASTY.partition("\x1b")[0] in " ".join(Page(as_html(nasty())).words)


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("report", [made(), nasty(), made([])], ids=["usual", "nasty", "none"])
def test_a_terminal_of_any_width(report: BatchReport, width: int) -> None:
    file = io.StringIO()
    show_report(report, Console(file=file, width=width, color_system=None))
    text = file.getvalue()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", text)
    table = text.split("\n\n")[1] if report.guests else ""
    assert all(len(line) <= width for line in table.splitlines())


def test_a_terminal_is_told_what_failed() -> None:
    file = io.StringIO()
    show_report(made(), Console(file=file, width=80, color_system=None))
    text = file.getvalue()
    assert "✗ db: step copy, disk 2, offset 4096\n" in text
    assert "  cause:  write failed: No space left on device (password=***\n" in text
    assert "  bundle: /run/db.tar.gz\n" in text
    assert "40.0 MiB copied in 16:40 (41.0 KiB/s); 200 MiB in 2 disks, 40.0 MiB of it data" in text
    assert "  1 guest is not done: v2v-async batch resume r1\n" in text


# Where it comes from.


def test_from_a_real_journal(tmp_path: Path) -> None:
    with open_journal(tmp_path / "journal.db", create=True) as journal:
        journal.add_guests(["web", "db", "mail", "old"])
        journal.begin_attempt("web")
        journal.reach("web", "done")
        journal.begin_attempt("db")
        journal.fail("db", FULL)
        report = report_of(PLAN, journal.guests(), run="r", now=NOW)
    assert [guest.phase for guest in report.guests] == ["done", "failed", "waiting", "waiting"]
    assert report.failed[0].failure is not None
    assert report.failed[0].failure.hint == FULL.hint


def test_what_the_events_tell(tmp_path: Path) -> None:
    lines: list[str] = []

    def emit(event: Event) -> None:
        lines.append(event.to_json())

    web = Reporter(emit, "r").for_guest("web")
    copying = web.for_step("copy")
    web.for_step("convert").emit("finished", duration_s=5.0)
    copying.emit("failed", "lost", duration_s=7.0)
    web.emit("failed", "lost", details={"bundle": "/b.tar.gz"})
    copying.for_disk(1).emit("progress", bytes=Bytes(total=1))
    copying.for_disk(1).emit("finished", bytes=Bytes(total=1), duration_s=2.5)
    copying.emit("finished", duration_s=3.0)
    web.emit("finished", duration_s=20.0)
    Reporter(emit, "r").emit("finished")
    path = tmp_path / "events.jsonl"
    path.write_text("\n".join([*lines, "not json", "[]", '{"guest": 3}', '{"guest":"we']))
    assert read_history(path) == {
        "web": GuestHistory({"convert": 5.0, "copy": 10.0}, 3.0, "/b.tar.gz")
    }
    assert read_history(tmp_path / "absent") == {}


def test_the_last_events_of_a_guest(tmp_path: Path) -> None:
    lines: list[str] = []
    reporter = Reporter(lambda event: lines.append(event.to_json()), "r")
    for number in range(100):
        reporter.for_guest(f"g{number % 2}").message(f"text {number}")
        reporter.for_guest("g1").for_step("copy").for_disk(1).emit("progress", bytes=Bytes())
    reporter.emit("finished")
    path = tmp_path / "events.jsonl"
    path.write_text("\n".join(lines) + "\n")
    found = last_events(path, "g1", 4, most_bytes=1 << 20)
    assert [event.get("text") for event in found] == ["text 95", "text 97", "text 99", None]
    near = last_events(path, "g1", 400, most_bytes=600)
    assert 0 < len(near) < 8
    assert near[-1]["type"] == "finished"
    assert last_events(path, "g1", 4, most_bytes=10) == []
