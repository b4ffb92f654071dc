"""What ``--dry-run`` prints of how a batch may go; see :mod:`simulation`."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timedelta

from v2v_async.batch.plan.model import Plan
from v2v_async.batch.preflight.preflight import Checked
from v2v_async.batch.preflight.problems import names
from v2v_async.batch.schedule.needs import BYTES_S, CONVERT_S
from v2v_async.batch.schedule.simulation import Forecast, simulate
from v2v_async.units import format_duration, format_rate, format_size

_WIDEST = 40


def forecast(
    plan: Plan,
    checked: Checked,
    *,
    begin: datetime | None = None,
    converted: frozenset[str] = frozenset(),
    width: int | None = None,
) -> list[str]:
    """Return the lines; guests without facts are left out, and told.

    ``begin`` is local and naive (default: now); ``converted`` only have their copies before them.
    Sentences are broken at ``width`` columns (default: the terminal's, or 80).
    """
    begin = begin or datetime.now()
    width = width or shutil.get_terminal_size((80, 24)).columns
    facts, capacities = checked.facts, checked.capacities
    guests = [guest for guest in plan.guests if guest.name in facts]
    unknown = [guest.name for guest in plan.guests if guest.name not in facts]
    lines: list[str] = []
    if guests:
        found = simulate(guests, facts, capacities, plan, begin, converted=converted)
        guess = (
            "A guess at how it goes, as if each conversion took "
            f"{format_duration(CONVERT_S)} and each copy ran at {format_rate(BYTES_S)}.",
            "Real lengths differ; the order, and what waits for what, are the run's own.",
        )
        lines += [
            *_wrapped(guess, width),
            "",
            *_table(found, begin if plan.windows else None),
            "",
            *_wrapped(_summary(found, capacities, has_windows=bool(plan.windows)), width),
        ]
    if unknown:
        left_out = f"Left out, since nothing is known of their disks: {names(unknown)}."
        lines += _wrapped([left_out], width)
    return lines


def _wrapped(sentences: Iterable[str], width: int) -> Iterator[str]:
    """Yield each sentence in lines of a width. Names stay whole, and numbers with their units."""
    for sentence in sentences:
        lines = textwrap.wrap(
            re.sub(r"(?<=\d) (?=[KMGTPE]?i?B\b)", "\N{NO-BREAK SPACE}", sentence),
            max(width, 20),
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        yield from (line.replace("\N{NO-BREAK SPACE}", " ") for line in lines)


def _table(found: Forecast, begin: datetime | None) -> Iterator[str]:
    """Yield a line for each guest; ``begin``: times are told as the clock will show them."""
    rows = [("guest", "converts", "copies", "data")]
    for each in found.guests:
        copies = list(each.copies.values())
        span = (min(c[0] for c in copies), max(c[1] for c in copies)) if copies else None
        disks = f" ({len(copies)} disks)" if len(copies) > 1 else ""
        rows.append(
            (
                each.name if len(each.name) <= _WIDEST else f"{each.name[: _WIDEST - 1]}…",
                _span(each.conversion, begin),
                _span(span, begin) + disks,
                format_size(each.bytes),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        yield f"  {'  '.join(cells)}  {row[3]:>9}".rstrip()


def _span(span: tuple[float, float] | None, begin: datetime | None) -> str:
    if span is None:
        return "never"
    return f"{_moment(span[0], begin)} – {_moment(span[1], begin)}"


def _moment(seconds: float, begin: datetime | None) -> str:
    if begin is None:
        return format_duration(seconds)
    return (begin + timedelta(seconds=seconds)).strftime("%a %H:%M")


def _summary(found: Forecast, capacities: Mapping[str, int], *, has_windows: bool) -> Iterator[str]:
    if found.guests:
        total = format_size(sum(each.bytes for each in found.guests))
        count = "one guest" if len(found.guests) == 1 else f"{len(found.guests)} guests"
        yield (
            f"About {format_duration(found.makespan_s)} for {count} with up to {total} to move; "
            f"no order is shorter than {format_duration(found.bound_s)}"
            + (", without the windows." if has_windows else ".")
        )
    busiest = sorted(found.busy_s.items(), key=lambda each: -each[1])[:3]
    told = [
        f"‘{name}’{f' ({_capacity(name, capacities)})' if name in capacities else ''} "
        f"{format_duration(seconds)}"
        for name, seconds in busiest
        if seconds > 0
    ]
    if found.bottleneck is not None:
        yield f"What holds it up is ‘{found.bottleneck}’. Busy for at least: {', '.join(told)}."
    elif told:
        yield f"No limit holds it up: the longest guest does. Busy for at least: {', '.join(told)}."
    if found.stuck:
        yield f"Never done, as the limits and windows are: {names(found.stuck)}."


def _capacity(name: str, capacities: Mapping[str, int]) -> str:
    amount = capacities[name]
    return format_size(amount) if name in ("memory", "scratch") else str(amount)
