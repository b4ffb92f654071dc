"""A batch's report as one HTML file: to be mailed, printed, or kept. No script, nothing from
outside; whatever a guest is named is text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from v2v_async.batch.report.report import BatchReport, BytesReport, GuestReport
from v2v_async.render.batch_report import least_total, moment, outcome, steps, totals, where
from v2v_async.render.text import clean, clean_lines, lasted
from v2v_async.units import format_rate, format_size

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --good: #1a7f37; --bad: #c62828; --odd: #9a6700 }
@media (prefers-color-scheme: dark) {
  :root { --good: #56d364; --bad: #ff7b72; --odd: #e3b341 }
}
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem }
h2 { font-size: 1.1rem; margin-top: 2rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem;
         border-bottom: 1px solid var(--line) }
td.number, th.number { text-align: right; white-space: nowrap }
td.text { overflow-wrap: anywhere; min-width: 6rem }
.done { color: var(--good) } .failed { color: var(--bad); font-weight: 600 }
.cancelled, .going, .stopped { color: var(--odd) }
.bar { display: flex; height: .9rem; border: 1px solid var(--line); margin: .6rem 0 }
.copied { background: #1f6feb } .zero { background: #8b949e } .resumed { background: #a371f7 }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em }
code { font: 13px/1.4 ui-monospace, monospace; overflow-wrap: anywhere }
@media print {
  @page { size: landscape; margin: 12mm }
  body { font-size: 8pt; margin: 0; max-width: none }
  code { font-size: 7pt }
  .scroll { overflow: visible }
  thead { display: table-header-group }
  tr { break-inside: avoid }
  .bar div, .key { print-color-adjust: exact; -webkit-print-color-adjust: exact }
}
"""

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<p><strong class="{outcome}">{told}</strong> · plan ‘{name}’ · report of {made}</p>
{sums}
{bar}
{next}
{failed}
<h2>Guests</h2>
{guests}
</body>
</html>
"""


def as_html(report: BatchReport) -> str:
    """Return the page."""
    return _PAGE.format(
        title=f"Batch {_text(report.run)}",
        style=_STYLE,
        outcome=report.outcome,
        told=outcome(report)[0],
        name=_text(report.name),
        made=moment(report.made),
        sums="\n".join(f"<p>{_text(line)}</p>" for line in totals(report)),
        bar=_bar(report.totals.bytes, least_total(report)),
        next=_next(report.next),
        failed=_failed(report.failed),
        guests=_guests(report.guests),
    )


def _text(value: object) -> str:
    return escape(clean(str(value)))


def _bar(amounts: BytesReport, total: int) -> str:
    """Return how the disks' bytes came to be on the target, as a bar with its key."""
    if not total:
        return ""
    parts = {
        "copied": ("copied", amounts.copied),
        "zero": ("zero", amounts.zero + amounts.skipped),
        "resumed": ("there from earlier attempts", amounts.resumed),
    }
    pieces = "".join(
        f'<div class="{name}" style="width: {100 * size / total:.3f}%"></div>'
        for name, (_, size) in parts.items()
    )
    key = "".join(
        f'<span class="key {name}"></span>{told}: {format_size(size)}'
        for name, (told, size) in parts.items()
    )
    return f'<div class="bar">{pieces}</div>\n<p>{key}</p>'


def _next(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{_text(line)}</li>" for line in lines)
    return f"<h2>What to do next</h2>\n<ul>{items}</ul>" if items else ""


def _failed(guests: Sequence[GuestReport]) -> str:
    if not guests:
        return ""
    rows = []
    for guest in guests:
        failure = guest.failure
        if failure is None:
            continue
        rows.append(
            (
                _cell(guest.name, "text"),
                _cell(where(guest), "text"),
                f'<td class="text">{_lines(failure.message)}</td>',
                _cell(failure.hint or "", "text"),
                f'<td class="text">{_codes((failure.log, guest.bundle))}</td>',
            )
        )
    return "<h2>Failed</h2>\n" + _table(
        ("guest", "where", "reason", "what to do", "log, failure bundle"), (), rows
    )


def _guests(guests: Iterable[GuestReport]) -> str:
    rows = []
    for guest in guests:
        b = guest.bytes
        sizes = (b.total, b.data, b.copied, b.zero, b.skipped, b.resumed)
        rows.append(
            (
                _cell(guest.name, "text"),
                _cell(f"{guest.phase}, paused" if guest.is_paused else guest.phase, guest.phase),
                _cell(guest.attempts, "number"),
                _cell("" if guest.duration_s is None else lasted(guest.duration_s), "number"),
                *(_cell(format_size(size) if b.total else "", "number") for size in sizes),
                _cell("" if guest.rate is None else format_rate(guest.rate), "number"),
                _cell(steps(guest), "text"),
                f'<td class="text">{_text(guest.target)}{_codes(guest.outputs)}</td>',
            )
        )
    numbers = ("tries", "time", "size", "data", "copied", "zero", "skipped", "there", "rate")
    return _table(("guest", "phase", *numbers, "steps", "target"), numbers, rows)


def _table(heads: Sequence[str], numbers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(
        f'<th scope="col" class="number">{name}</th>'
        if name in numbers
        else f'<th scope="col">{name}</th>'
        for name in heads
    )
    body = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return (
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n'
        "</tbody>\n</table></div>"
    )


def _cell(value: object, name: str = "") -> str:
    return f'<td class="{name}">{_text(value)}</td>'


def _lines(text: str) -> str:
    return "<br>".join(escape(line) for line in clean_lines(text))


def _codes(values: Iterable[str | None]) -> str:
    return "".join(f"<div><code>{_text(value)}</code></div>" for value in values if value)
