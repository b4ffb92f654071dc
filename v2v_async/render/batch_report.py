"""A batch's report for a person at a terminal, or for a log."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from rich.console import Console
from rich.table import Table
from rich.text import Text

from v2v_async.batch.report.report import BatchReport, GuestReport
from v2v_async.render.text import clean, clean_lines, lasted
from v2v_async.units import format_rate, format_size

_OUTCOMES = {
    "done": ("all guests are done", "green"),
    "failed": ("ended, with failures", "bold red"),
    "going": ("going on", "yellow"),
    "stopped": ("stopped before all was done", "bold yellow"),
}
_CANCELLED = ("ended: all guests are done or were cancelled", "green")
_ALL_CANCELLED = ("ended: all guests were cancelled", "yellow")
_STYLES = {"done": "green", "failed": "bold red", "cancelled": "yellow"}
_ROOM_FOR_MORE = 110
"""Columns from which the target and the other bytes fit beside the rest."""


def show_report(report: BatchReport, console: Console) -> None:
    """Print the report."""
    console.print(_heading(report), soft_wrap=True)
    for line in totals(report):
        console.print(line, highlight=False)
    console.print()
    console.print(_table(report.guests, is_wide=console.width >= _ROOM_FOR_MORE))
    for guest in report.failed:
        console.print()
        # Whole lines, so that paths can be copied.
        for text in _failure(guest):
            console.print(text, soft_wrap=True)
    if report.next:
        console.print("\nWhat to do next:", style="bold")
        for line in report.next:
            console.print(Text(f"  {clean(line)}"), soft_wrap=True)


def outcome(report: BatchReport) -> tuple[str, str]:
    """Return what became of it, and the style to say it in."""
    phases = report.totals.phases
    if report.outcome == "done" and phases.get("cancelled"):
        return _CANCELLED if phases.get("done") else _ALL_CANCELLED
    return _OUTCOMES[report.outcome]


def totals(report: BatchReport) -> Iterator[str]:
    """Yield lines with the sums."""
    sums = report.totals
    phases = ", ".join(f"{count} {phase}" for phase, count in sums.phases.items())
    guests = "1 guest" if sums.guests == 1 else f"{sums.guests} guests"
    yield f"{guests}: {phases}" if phases else guests
    took = "" if sums.duration_s is None else f" in {lasted(sums.duration_s)}"
    rate = "" if sums.rate is None else f" ({format_rate(sums.rate)})"
    b = sums.bytes
    if (least := least_total(report)) == b.total:
        size = f"{format_size(b.total)} in {sums.disks} disks, {format_size(b.data)} of it data"
    else:
        size = f"at least {format_size(least)} in {sums.disks} disks"
        size += f", up to {format_size(b.data)} of it data"
    yield f"{format_size(b.copied)} copied{took}{rate}; {size}"


def least_total(report: BatchReport) -> int:
    """Return the size of all disks (bytes); of those not begun only what may have to move."""
    disks = (disk for guest in report.guests for disk in guest.disks)
    return sum(disk.total or disk.data for disk in disks)


def steps(guest: GuestReport) -> str:
    """Return how long each step took: ``convert 0:41, copy 2:13``."""
    return ", ".join(f"{clean(step)} {lasted(taken)}" for step, taken in guest.steps_s.items())


def where(guest: GuestReport) -> str:
    """Return where a guest failed: ``step copy, disk 2, offset 4096``."""
    failure = guest.failure
    if failure is None:
        return ""
    told = {"step": failure.step, "disk": failure.disk, "offset": failure.offset}
    return ", ".join(
        f"{name} {clean(str(value))}" for name, value in told.items() if value is not None
    )


def moment(seconds: float | None) -> str:
    """Return a time as people here write it, to the second, with the zone."""
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds).astimezone():%F %T %z}"


def _heading(report: BatchReport) -> Text:
    told, style = outcome(report)
    head = Text.assemble((f"Run {clean(report.run)}", "bold"), ": ", (told, style))
    if report.name != report.run:
        head.append(f" (plan ‘{clean(report.name)}’)")
    return head


def _table(guests: list[GuestReport], *, is_wide: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("guest", overflow="fold", ratio=3)
    table.add_column("phase", no_wrap=True)
    for name in ("tries", "time", "size", "copied"):
        table.add_column(name, justify="right", no_wrap=True)
    if is_wide:
        for name in ("zero", "there", "rate"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("target", overflow="fold", ratio=4)
    for guest in guests:
        b = guest.bytes
        is_known = bool(b.total)
        phase = f"{guest.phase}, paused" if guest.is_paused else guest.phase
        cells: list[Text | str] = [
            Text(clean(guest.name)),
            Text(phase, style=_STYLES.get(guest.phase, "")),
            str(guest.attempts),
            "" if guest.duration_s is None else lasted(guest.duration_s),
            format_size(b.total) if is_known else "",
            format_size(b.copied) if is_known else "",
        ]
        if is_wide:
            cells += [
                format_size(b.zero + b.skipped) if is_known else "",
                format_size(b.resumed) if is_known else "",
                "" if guest.rate is None else format_rate(guest.rate),
                Text(clean(guest.target)),
            ]
        table.add_row(*cells)
    return table


def _failure(guest: GuestReport) -> Iterator[Text]:
    failure = guest.failure
    yield Text.assemble((f"✗ {clean(guest.name)}", "bold red"), f": {where(guest)}".rstrip(": "))
    if failure is None:
        return
    for index, line in enumerate(clean_lines(failure.message)):
        yield Text(f"  {'cause:' if index == 0 else '      '}  {line}")
    told = {"log": failure.log, "hint": failure.hint, "bundle": guest.bundle}
    for name, value in told.items():
        if value is not None:
            yield Text(f"  {name + ':':<7} {clean(value)}")
