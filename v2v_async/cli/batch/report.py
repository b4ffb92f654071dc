"""``v2v-async batch report``: from a run's folder to a table, JSON, CSV or HTML."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from v2v_async.batch.record import folder
from v2v_async.batch.record.event_file import NAME as EVENTS
from v2v_async.batch.record.history import read_history
from v2v_async.batch.record.journal import ENDED, GuestRecord, open_journal
from v2v_async.cli.screen import Sink
from v2v_async.errors import UsageError
from v2v_async.events import Bytes

if TYPE_CHECKING:
    from v2v_async.batch.report.report import BatchReport

Format = Literal["rich", "json", "csv", "html"]

_FILE_WIDTH = 120
"""Of a table in a file, where no terminal says how wide it may be."""


def write_report(run: Path, format_: Format, output: Path | None = None) -> None:
    """Write the report of a run to ``output``, or to stdout.

    Raises:
        V2VError: the run's journal can't be read, or ``output`` not be written.
    """
    text = _text(made(run), format_, is_for_file=output is not None)
    if output is None:
        Sink(sys.stdout)(text)
        return
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        with temporary.open("x", encoding="utf-8", newline="") as file:
            file.write(text)
        temporary.replace(output)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(f"‘{output}’ can't be written: {error.strerror}") from error


def made(run: Path) -> BatchReport:
    """Return the report of a run as it is now.

    Raises:
        V2VError: its journal or plan can't be read.
    """
    from v2v_async.batch.report.report import report_of

    with open_journal(run / folder.JOURNAL, read_only=True) as journal:
        records, attempts = journal.guests(), journal.attempts()
        facts: dict[str, list[int]] = journal.get("facts") or {}
    return report_of(
        folder.read_plan(run, (record.name for record in records)),
        [_with_all_disks(record, facts.get(record.name, [])) for record in records],
        run=run.name,
        now=time.time(),
        is_going=folder.is_alive(run),
        history=read_history(run / EVENTS),
        attempts=attempts,
    )


def _with_all_disks(record: GuestRecord, estimates: list[int]) -> GuestRecord:
    """Return a guest under way with the disks of which no copy has begun.

    Their size is not known (0), but the bytes that may have to move are.
    """
    if record.phase in ENDED:
        return record
    disks = list(record.disks)
    for index, estimate in enumerate(estimates):
        if index == len(disks):
            disks.append(Bytes(data=estimate))
        elif not disks[index].total:
            disks[index] = Bytes(data=estimate)
    return replace(record, disks=tuple(disks))


def _text(report: BatchReport, format_: Format, *, is_for_file: bool) -> str:
    match format_:
        case "json":
            from v2v_async.batch.report.report import as_json

            return as_json(report)
        case "csv":
            from v2v_async.batch.report.csv_report import as_csv

            return as_csv(report)
        case "html":
            from v2v_async.render.batch_report_html import as_html

            return as_html(report)
        case "rich":
            from rich.console import Console

            from v2v_async.render.batch_report import show_report

            console = Console(width=_FILE_WIDTH, color_system=None) if is_for_file else Console()
            with console.capture() as captured:
                show_report(report, console)
            return captured.get()
