"""A batch's report as CSV: a line for each guest, safe to open in a spreadsheet."""

from __future__ import annotations

import csv
import io
from datetime import UTC, datetime
from typing import Any

from v2v_async.batch.report.report import BatchReport, GuestReport


def as_csv(report: BatchReport) -> str:
    """Return a line for each guest, with a heading; no cell is a formula to a spreadsheet."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(_row(_EXAMPLE)), lineterminator="\r\n")  # RFC 4180
    writer.writeheader()
    for guest in report.guests:
        writer.writerow({name: _cell(value) for name, value in _row(guest).items()})
    return text.getvalue()


def _row(guest: GuestReport) -> dict[str, Any]:
    failure = guest.failure
    return {
        "guest": guest.name,
        "phase": guest.phase,
        "attempts": guest.attempts,
        "group": guest.group,
        "priority": guest.priority,
        "began": _when(guest.began),
        "ended": _when(guest.ended),
        "duration_s": None if guest.duration_s is None else round(guest.duration_s, 1),
        "disks": len(guest.disks),
        **{f"bytes_{name}": value for name, value in guest.bytes.model_dump().items()},
        "rate": None if guest.rate is None else round(guest.rate),
        "source": guest.source,
        "target": guest.target,
        "outputs": " ".join(guest.outputs),
        "failed_step": failure and failure.step,
        "failed_disk": failure and failure.disk,
        "failed_offset": failure and failure.offset,
        "is_permanent": None if failure is None else failure.is_permanent,
        "reason": failure and failure.message,
        "hint": failure and failure.hint,
        "log": failure and failure.log,
        "bundle": guest.bundle,
    }


_EXAMPLE = GuestReport(name="", phase="waiting", source="", target="", attempts=0)

# What a spreadsheet takes for the begin of a formula, in its wide forms too; a tab or a return may
# stand before it. Source: OWASP, "CSV Injection".
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def _cell(value: Any) -> Any:
    """Return a text so that no spreadsheet computes it; numbers stay what they are."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, str):
        return value
    text = value.replace("\0", "")
    return f"'{text}" if text.lstrip(" ").startswith(_FORMULA) else text


def _when(seconds: float | None) -> str | None:
    return (
        None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat("T", "seconds")
    )
