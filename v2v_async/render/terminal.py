"""A person at a terminal: what is done scrolls up, what is going on stays below.

::

    ✓ input     0:01                                          printed, scrolls
    ✓ convert   3:12
    debian12   copy  0:07                                      live: one line a guest,
      disk 1   ━━━━━━━━━━━━━━━━━╸────────  67%  1.2/1.8 GiB  250 MiB/s  0:03   one a disk,
      disk 2   ━━━━━━╸───────────────────  23%  …
    whole run  ━━━━━━━━━━━╸──────────────  45%  …               one for the run

rich redraws the live part from a thread of its own, so the state has a lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from v2v_async.events import Event
from v2v_async.render.state import Disk, Guest, RunState
from v2v_async.render.text import clean, clean_lines, lasted, moved, place
from v2v_async.units import format_duration, format_size

_REFRESHES = 8  # a second: smooth for an eye, well under 1 % of a CPU
_LABEL_WIDTH = 18
_NARROW = 64  # below this many columns, only the bar and the percentage fit
_NUMBERS = (4, 18, 9, 5)  # least widths of percentage, bytes, rate, time left: bars keep still
_MARKS = {
    "finished": ("✓", "green"),
    "failed": ("✗", "bold red"),
    "cancelled": ("■", "bold yellow"),
}


class Terminal:
    """Show events on ``console``, which must be a terminal (or record, for a picture)."""

    name = "screen"

    def __init__(
        self,
        console: Console,
        *,
        verbose: bool = False,
        clock: Callable[[], float] = time.time,
        is_animated: bool = True,
    ) -> None:
        self._console = console
        self._verbose = verbose
        self._clock = clock
        self._state = RunState()
        self._lock = Lock()
        self._live = Live(
            console=console,
            get_renderable=self.view,
            auto_refresh=is_animated,
            refresh_per_second=_REFRESHES,
            transient=True,
            vertical_overflow="crop",
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, event: Event) -> None:
        with self._lock:
            self._state.apply(event)
            lines = self._lines(event)
        for line in lines:
            self._console.print(line, soft_wrap=False, highlight=False)

    # What scrolls up.

    def _lines(self, event: Event) -> list[Text]:
        where = place(event, with_guest=len(self._state.guests) > 1)
        if event.type == "warning":
            head = f"warning: {where}: " if where else "warning: "
            return _paragraph(head, event.text or "", "yellow")
        if event.type == "message":
            head = f"{where}: " if event.disk is not None else ""
            return _paragraph(f"  {head}", event.text or "", "")
        if event.type == "retrying":
            return _paragraph(f"  {where}: trying again: ", event.text or "", "yellow")
        if event.type == "debug":
            head = f"  {where}: " if where else "  "
            return _paragraph(head, event.text or "", "dim") if self._verbose else []
        if event.type in _MARKS:
            return self._ended(event, where)
        return []

    def _ended(self, event: Event, where: str) -> list[Text]:
        mark, style = _MARKS[event.type]
        duration = self._state.duration(event)
        if event.disk is not None:
            if event.step not in (None, "copy"):
                return []
        elif event.step is None and event.guest is not None and event.type == "finished":
            return []  # the run's own line follows
        elif event.type == "failed" and not where:
            return []  # the edge prints the error at the end
        line = Text()
        line.append(f"{mark} ", style)
        line.append(f"{where or 'all':<15}")
        if event.type == "finished" and event.disk is not None and event.bytes is not None:
            line.append(f" {moved(event.bytes, duration)}")
        else:
            if event.type != "finished":
                line.append(f" {event.type}", style)
            if duration is not None:
                line.append(f" {lasted(duration):>7}", "cyan")
            if event.type == "finished" and event.text:
                line.append(f"  {clean(event.text)}")
        return [line]

    # What stays.

    def view(self) -> RenderableType:
        """Return the live part. Called from rich's thread: an error here would kill the thread."""
        try:
            with self._lock:
                return self._table(self._clock())
        except Exception as error:
            return Text(f"(the screen could not be drawn: {clean(str(error))})")

    def _table(self, now: float) -> RenderableType:
        state = self._state
        if state.outcome is not None or not state.guests:
            return Text("")
        width = self._console.width
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True, overflow="ellipsis", max_width=_LABEL_WIDTH, min_width=9)
        grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        for column in _NUMBERS[: 1 if width < _NARROW else None]:
            grid.add_column(justify="right", no_wrap=True, min_width=column)
        rows = self._rows(now)
        # One line is left for the shell's prompt, and one for "and more" where it is needed.
        room = max(self._console.height - 2, 1)
        hidden = len(rows) - room + 1 if len(rows) > room else 0
        if hidden:
            rows = [*rows[: room - 2], rows[-1]] if room > 1 else rows[-1:]
        for row in rows:
            grid.add_row(*row[: 3 if width < _NARROW else 6])
        if not hidden or room < 2:
            return grid
        return Group(grid, Text(f"  … and {hidden} more lines", "dim"))

    def _rows(self, now: float) -> list[list[RenderableType]]:
        state = self._state
        rows: list[list[RenderableType]] = []
        for guest in state.guests.values():
            if guest.outcome is not None:
                continue
            if guest.name:  # a copy alone has none
                rows.append(_guest_row(guest, now))
            rows += [
                _disk_row(disk, now)
                for disk in state.disks.values()
                if disk.guest == guest.name and disk.outcome is None
            ]
        rate = sum(d.rate.at(now) or 0.0 for d in state.disks.values() if d.outcome is None)
        run: list[RenderableType] = [Text("whole run", "bold")]
        if state.disks:
            run += _bar(state.fraction, state.has_moved, state.to_move, rate, is_over=False)
        else:
            run.append(Text(format_duration(state.elapsed(now)), "cyan"))
        return [*rows, run]


def _guest_row(guest: Guest, now: float) -> list[RenderableType]:
    step = guest.current
    text = Text()
    if step is not None:
        text.append(clean(step.name))
        text.append(f"  {format_duration(max(now - step.started, 0.0))}", "cyan")
    return [Text(clean(guest.name) or "guest", "bold"), text]


def _disk_row(disk: Disk, now: float) -> list[RenderableType]:
    work = disk.work(now)
    cells = _bar(work.fraction, work.done, work.total, work.rate, is_over=disk.ended is not None)
    return [Text(f"  disk {disk.index} {work.label}".rstrip()), *cells]


def _bar(
    fraction: float, done: int, total: int, rate: float | None, *, is_over: bool
) -> list[RenderableType]:
    """Return the cells bar, percentage, bytes, rate and time left."""
    left = ""
    if rate and not is_over and total:
        left = format_duration(min((total - done) / rate, 359_999))  # 99:59:59 at most
    return [
        ProgressBar(total=1.0, completed=fraction, pulse=False),
        Text(f"{int(fraction * 100):3}%"),
        Text(f"{format_size(done)} of {format_size(total)}" if total else ""),
        Text(f"{format_size(rate)}/s" if rate is not None else "", "magenta"),
        Text(left, "cyan"),
    ]


def _paragraph(head: str, text: str, style: str) -> list[Text]:
    first, *rest = clean_lines(text)
    lines = [Text(head + first, style)]
    return lines + [Text("  " + line, style) for line in rest]
