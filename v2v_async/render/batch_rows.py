"""What is said of a batch, line by line. Pure: from the state to lines of a width.

::

    nightly  12:31   ━━━━━━━╸──────────  43%     1.2 of 2.8 TiB  240 MiB/s  1:32:05
    37 waiting (2 paused)  2 converting  5 copying  55 done  1 failed  of 100
    conversions 2/2  disks 5/8  connections 20/64
    web-01           copying 1:07        61%     3.0 of 4.9 GiB  310 MiB/s     0:06
      disk 1         ━━━━━━━━━━━╸──────  67%     1.2 of 1.8 GiB  250 MiB/s     0:03
      disk 2         waits for hosts.esx1.connections
    db-07            convert 3:12
    mail             ✗ copy, disk 2: the server of the source has gone
    waiting: 30 for conversions, 5 for hosts.esx1.connections,
      2 to try again (next in 0:30), 2 paused
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.cells import cell_len

from v2v_async.render.batch_state import BatchState, DiskView, FailureView, GuestView
from v2v_async.render.line import Line, bar, cut, fit, wide, wrap
from v2v_async.render.text import clean
from v2v_async.units import format_duration, format_size

_NARROW = 64  # below this many columns, only the bar and the percentage fit
_PERCENT, _BYTES, _RATE, _LEFT = 4, 16, 10, 8
_LONGEST_LEFT_S = 359_999  # 99:59:59
_OF_BYTES = ("memory", "scratch")
_OF_WINDOWS = ("conversions", "disks")
# A limit that only a window sets is this much for the rest of the day (batch.needs).
_UNLIMITED = 1 << 30
# Short phases are counted with the long one beside them: a line has no room for nine.
_COUNTED = (
    ("waiting", ("waiting",), ""),
    ("converting", ("checking", "converting"), "cyan"),
    ("converted", ("converted",), "cyan"),
    ("copying", ("copying", "finalizing"), "cyan"),
    ("done", ("done",), "green"),
    ("failed", ("failed",), "bold red"),
    ("cancelled", ("cancelled",), "yellow"),
)


@dataclass(frozen=True, slots=True)
class Columns:
    """Where things stand in a line of ``width`` cells."""

    width: int

    @property
    def label(self) -> int:
        """Cells of a name."""
        return max(8, min(self.width // (3 if self.is_narrow else 4), 32))

    @property
    def numbers(self) -> int:
        """Cells right of the bar, with the spaces before them."""
        return _PERCENT + 1 + (0 if self.is_narrow else _BYTES + _RATE + _LEFT + 3)

    @property
    def middle(self) -> int:
        """Cells of the bar."""
        return max(self.width - self.label - 1 - self.numbers, 0)

    @property
    def is_narrow(self) -> bool:
        """Whether sizes and rates have no room."""
        return self.width < _NARROW

    def numbered(
        self,
        label: tuple[str, str],
        middle: Line,
        fraction: float,
        done: int,
        total: int,
        rate: float | None,
        left_s: float | None,
    ) -> Line:
        """Return a line with numbers at its right.

        ``middle`` has the bar's width; longer words take that of numbers which there are not.
        """
        numbers: Line = [(f" {int(fraction * 100):3}%", "")]
        if not self.is_narrow:
            size = part_of(done, total, " of ") if total else ""
            speed = f"{format_size(rate)}/s" if rate is not None else ""
            left = format_duration(min(left_s, _LONGEST_LEFT_S)) if left_s is not None else ""
            numbers += [(f" {size:>{_BYTES}}", ""), (f" {speed:>{_RATE}}", "magenta")]
            numbers.append((f" {left:>{_LEFT}}", "cyan"))
        room = self.middle
        while wide(middle) > room and not numbers[-1][0].strip():
            room += wide([numbers.pop()])
        line = [(fit(label[0], self.label) + " ", label[1]), *_filled(middle, room), *numbers]
        return cut(line, self.width) if self.is_narrow else line

    def worded(self, label: tuple[str, str], words: Line) -> Line:
        """Return a line with words in the place of the bar and all after it."""
        return cut([(fit(label[0], self.label) + " ", label[1]), *words], self.width)


# The batch.


def total_line(state: BatchState, now: float, columns: Columns) -> Line:
    """Return the line of the whole batch."""
    name = clean(state.name or "batch")
    elapsed = ""
    if state.elapsed(now) > 0:  # what is known of a stopped run is of one moment
        elapsed = " " + format_duration(state.elapsed(now))
    label = fit(name, max(columns.label - len(elapsed), 1)) + elapsed
    return columns.numbered(
        (label, "bold"),
        bar(state.fraction, columns.middle),
        state.fraction,
        state.has_moved,
        state.to_move,
        state.rate(now),
        state.eta(now),
    )


def counts_lines(state: BatchState, columns: Columns, most: int) -> list[Line]:
    """Return how many guests are in which phase, in at most so many lines."""
    pieces: Line = []
    if state.is_paused:
        pieces.append(("PAUSED", "bold yellow"))
    for word, phases, style in _COUNTED:
        if count := sum(state.counts[phase] for phase in phases):
            paused = sum(state.paused[phase] for phase in phases)
            part = f" ({paused} paused)" if paused else ""
            if word == "failed" and state.failed_before:
                part = f" ({state.failed_before} before)"
            pieces.append((f"{count} {word}{part}", style))
    pieces.append((f"of {len(state.guests)}", "bright_black"))
    warnings: Line = [(counted(state.warnings, "warning"), "yellow")]
    # Those scroll by anyway: they are worth no line of their own.
    if state.warnings and sum(wide([piece]) + 2 for piece in pieces + warnings) <= columns.width:
        pieces += warnings
    return _flowed(pieces, columns.width, most)


def limit_lines(state: BatchState, columns: Columns, most: int) -> list[Line]:
    """Return the limits in use, in at most so many lines. What is all taken is marked."""
    pieces: Line = []
    for name, (taken, capacity) in state.limits.items():
        if "." in name and not taken and not state.waits[name] and not state.disk_waits[name]:
            continue  # of one host or target of many
        of_bytes = name.rpartition(".")[2] in _OF_BYTES
        if of_bytes:
            shown = part_of(taken, capacity, "/")
        else:
            shown = f"{taken}/{capacity}" if capacity < _UNLIMITED else str(taken)
        is_closed = capacity == 0 and name.rpartition(".")[2] in _OF_WINDOWS
        if is_closed:
            shown = "closed by a window" + (f" ({taken} running)" if taken else "")
        style = "yellow" if is_closed or taken >= capacity > 0 else "bright_black"
        pieces.append((f"{clean(name)} {shown}", style))
    return _flowed(pieces, columns.width, most)


def waits_lines(state: BatchState, now: float, columns: Columns, most: int) -> list[Line]:
    """Return what waits for what, grouped, in at most so many lines; none if nothing does."""
    again = sum(guest.failure is not None and not guest.is_paused for guest in state.timed.values())
    reasons = [
        (count, name)
        for name, count in state.reasons.most_common()
        if count > 0 and name not in ("time", "paused")
    ]
    said = [f"{count} for {clean(name)}" for count, name in reasons]
    silent = len(state.waiting) - sum((+state.reasons).values())
    if silent > 0:
        said.append(f"{silent} for their turn")
    due = state.next_time()
    if timed := state.reasons["time"]:
        what = "to try again" if again == timed else "for their time"
        after = f" (next in {format_duration(max(due - now, 0.0))})" if due is not None else ""
        said.append(f"{timed} {what}{after}")
    if paused := state.reasons["paused"]:
        said.append(f"{paused} paused")
    disks = [
        f"{count} for {clean(name)}"
        for name, count in state.disk_waits.items()
        if count > 0 and name != "paused"
    ]
    if paused := state.disk_waits["paused"]:
        disks.append(f"{paused} paused")
    lists = [_listed("waiting", said)] if said else []
    lists += [_listed("disks waiting", disks)] if disks else []
    whole: Line = []
    for pieces in lists:
        whole += [("  " * bool(whole) + pieces[0][0], ""), *((f" {t}", s) for t, s in pieces[1:])]
    if most == 1 or wide(whole) <= columns.width:
        return _flowed(whole, columns.width, 1, gap=0) if whole else []
    rows: list[Line] = []
    for number, pieces in enumerate(lists, 1):
        flowed = _flowed(pieces, columns.width - 2, most - len(rows) - len(lists) + number, gap=1)
        rows += [*flowed[:1], *([("  ", ""), *row] for row in flowed[1:])]
    return rows


# A guest.


def running_line(guest: GuestView, now: float, columns: Columns, *, is_folded: bool) -> Line:
    """Return the line of a guest that has its turn; folded, it stands for its disks too."""
    label = (guest.name, "bold")
    if guest.phase != "copying" or not guest.moves:
        return columns.worded(label, _activity(guest, now))
    rate = guest.rate(now) if guest.copying else None
    left_s = (guest.moves - guest.moved) / rate if rate else None
    middle = _activity(guest, now)
    if guest.is_paused:
        # It does not go on to its end, which has no time then; that is worth more than a rate.
        if columns.is_narrow:
            return columns.worded(label, middle)
        left_s = None
        rate = rate if wide(middle) <= columns.middle + 1 + _LEFT else None
    elif is_folded and guest.copying:
        middle = bar(guest.fraction(), columns.middle)
    return columns.numbered(label, middle, guest.fraction(), guest.moved, guest.moves, rate, left_s)


def _activity(guest: GuestView, now: float) -> Line:
    word, since = guest.step or guest.phase, guest.step_started or guest.phase_since
    if guest.phase == "copying":
        word, since = "copying", guest.phase_since
    waits = {disk.waits_for for disk in guest.disks.values()} - {None}
    line: Line = []
    is_held = guest.phase in ("converted", "copying") and waits and not guest.copying
    if is_held and guest.is_paused:
        line.append(("paused", "yellow"))
    elif is_held:
        line.append((f"waits for {clean(', '.join(sorted(filter(None, waits))))}", "yellow"))
    else:
        line.append((clean(word), ""))
        if since is not None:
            line.append((f" {format_duration(max(now - since, 0.0))}", "cyan"))
    if guest.attempt > 1:
        line.append((f" attempt {guest.attempt}", "yellow"))
    if guest.is_paused and not is_held and guest.phase != "finalizing":
        line.append((", then paused", "yellow"))
    return line


def disk_line(disk: DiskView, now: float, columns: Columns) -> Line:
    """Return the line of a disk, below its guest's."""
    label = (f"  disk {disk.index}", "")
    if disk.waits_for == "paused":
        return columns.worded(label, [("paused", "yellow")])
    if disk.waits_for is not None:
        return columns.worded(label, [(f"waits for {clean(disk.waits_for)}", "yellow")])
    if disk.outcome in ("failed", "cancelled"):
        return columns.worded(label, [(disk.outcome, "red")])
    if not disk.bytes.total and disk.compared is None:
        estimate = f"  {format_size(disk.estimate)}" if disk.estimate else ""
        return columns.worded(label, [(f"not begun{estimate}", "bright_black")])
    work = disk.work(now)
    rate = work.rate if disk.is_copying else None
    if work.label:
        label = (f"  disk {disk.index} {work.label}", "")
    left_s = (work.total - work.done) / rate if rate else None
    middle = bar(work.fraction, columns.middle)
    return columns.numbered(label, middle, work.fraction, work.done, work.total, rate, left_s)


def failed_line(guest: GuestView, columns: Columns) -> Line:
    """Return the line of a guest that has failed, with the reason as far as it fits."""
    failure = guest.failure
    words: Line = [("✗ ", "bold red")]
    if failure is not None:
        where = place_of(failure)
        words.append(((f"{where}: " if where else "") + clean(failure.text), "red"))
    return columns.worded((guest.name, ""), words)


def waiting_line(guest: GuestView, now: float, columns: Columns) -> Line:
    """Return the line of a guest that waits, and for what."""
    due = guest.waits_until
    words: Line
    if guest.reason == "paused":
        words = [("paused", "yellow")]
    elif guest.waits_for == "time" and due is not None:
        what = "tries again" if guest.failure is not None else "begins"
        words = [(f"{what} in {format_duration(max(due - now, 0.0))}", "yellow")]
        if guest.failure is not None:
            words.append((f": {clean(guest.failure.text)}", ""))
    else:
        words = [(f"waits for {clean(guest.waits_for or 'its turn')}", "bright_black")]
    if guest.is_converted:
        words.insert(0, ("converted, ", "bright_black"))
    return columns.worded((guest.name, ""), words)


def failure_lines(guest: GuestView, columns: Columns) -> list[Line]:
    """Return all that is known of why a guest failed."""
    failure = guest.failure
    head: Line = [("✗ ", "bold red"), (clean(guest.name), "bold")]
    if failure is None:
        return [cut(head, columns.width)]
    if where := place_of(failure):
        head.append((f"  {where}", ""))
    if guest.attempt > 1:
        head.append((f"  attempt {guest.attempt}", "bright_black"))
    lines = [cut(head, columns.width)]
    for label, text in (
        ("", failure.text),
        ("hint: ", failure.hint),
        ("log: ", failure.log),
        ("bundle: ", failure.bundle),
    ):
        if text:
            style = "" if not label else "bright_black"
            parts = wrap(label + text, columns.width - 4)
            lines += [cut([(f"    {part}", style)], columns.width) for part in parts]
    return lines


def place_of(failure: FailureView) -> str:
    """Return where it failed: ``copy, disk 2``."""
    parts = [clean(failure.step)] if failure.step else []
    if failure.disk is not None:
        parts.append(f"disk {failure.disk}")
    return ", ".join(parts)


def part_of(part: int, whole: int, between: str) -> str:
    """Return ``1.2 of 14.3 GiB``, both in the unit of the whole."""
    shown = format_size(whole)
    number, _, unit = shown.partition(" ")
    scale = whole / float(number) if whole else 1.0
    digits = 1 if "." in number else 0
    return f"{part / scale:.{digits}f}{between}{number} {unit}"


def counted(count: int, what: str) -> str:
    """Return ``1 guest``, ``2 guests``."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def _filled(line: Line, cells: int) -> Line:
    """Return ``line`` in exactly so many cells."""
    kept = cut(line, cells)
    return [*kept, (" " * (cells - wide(kept)), "")]


def _listed(head: str, items: list[str]) -> Line:
    """Return the pieces of ``head: item, item``, between which a line may end."""
    return [
        ((f"{head}: " if number == 1 else "") + item + ("," if number < len(items) else ""), "")
        for number, item in enumerate(items, 1)
    ]


def _flowed(pieces: Line, cells: int, most: int, *, gap: int = 2) -> list[Line]:
    """Return pieces ``gap`` spaces apart, in at most so many lines; what has no room is counted."""
    rows: list[Line] = []
    left = 0
    for number, piece in enumerate(pieces):
        needed = cell_len(piece[0]) + gap
        if rows and needed <= left:
            rows[-1].append(piece)
            left -= needed
        elif len(rows) < most:
            rows.append([piece])
            left = cells - needed + gap
        else:
            rows[-1] = _counted_off(rows[-1], len(pieces) - number, cells, gap)
            break
    return [cut(_spaced(row, gap), cells) for row in rows]


def _counted_off(row: Line, others: int, cells: int, gap: int) -> Line:
    """Return ``row`` with how many others there are, for which some of it may have to go."""
    while True:
        counted_off = [*row, (f"{'' if gap else ' '}… and {others} more", "bright_black")]
        if wide(_spaced(counted_off, gap)) <= cells or len(row) < 2:
            return counted_off
        row, others = row[:-1], others + 1


def _spaced(row: Line, gap: int) -> Line:
    return [part for piece in row for part in ((" " * gap, ""), piece)][1:]
