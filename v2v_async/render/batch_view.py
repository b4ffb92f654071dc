"""Which lines of a batch are on the screen: what is active first, then what failed and what waits.

::

    totals, counts, limits        always
    running guests, their disks   a list that the keys move through; only what is seen of it is
    failed guests                 made, however many guests there are (the rest of the running
    waiting guests                ones comes after those that failed, should they fill a page)
    … and 480 more                where it is cut
    what waits for what           always
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Literal

from v2v_async.render.batch_rows import (
    Columns,
    counts_lines,
    disk_line,
    failed_line,
    failure_lines,
    limit_lines,
    running_line,
    total_line,
    waiting_line,
    waits_lines,
)
from v2v_async.render.batch_state import BatchState, FailureView, GuestView
from v2v_async.render.line import Line, cut

_HELP = (
    ("j k ↓ ↑", "move by a line"),
    ("PgDn PgUp", "move by a page (also space and b)"),
    ("g G", "to the beginning, to the end"),
    ("f", "only failures, with all that is known of them; again: everything"),
    ("d", "disks of each guest: as many as fit, all, none"),
    ("?", "these keys; again: back"),
)
_MOVES = {"j": 1, "down": 1, "k": -1, "up": -1}
_PAGES = {"pgdn": 1, " ": 1, "pgup": -1, "b": -1}
_ENDS = {"g": 0, "home": 0, "G": 1 << 60, "end": 1 << 60}
_FOLDINGS: tuple[Literal["fit", "all", "none"], ...] = ("fit", "all", "none")

# Lines of the list, not made yet: how many, and what makes those from one to another.
Block = tuple[int, Callable[[int, int], list[Line]]]


class BatchView:
    """The lines for a state, and where in them a person is. Not locked: its owner does that."""

    def __init__(
        self, state: BatchState, *, has_keys: bool = False, can_leave: bool = False
    ) -> None:
        self._state = state
        self.has_keys = has_keys
        self._can_leave = can_leave
        self._shows: Literal["all", "failures", "help"] = "all"
        self._folding = 0
        self._offset = 0
        self._room = 1
        self._failures: dict[str, tuple[FailureView | None, int, list[Line]]] = {}

    def press(self, key: str) -> bool:
        """Take in a key; return whether there is something else to see."""
        if key in _MOVES:
            self._offset += _MOVES[key]
        elif key in _PAGES:
            self._offset += _PAGES[key] * max(self._room - 1, 1)
        elif key in _ENDS:
            self._offset = _ENDS[key]
        elif key in ("f", "?"):
            wanted: Literal["failures", "help"] = "failures" if key == "f" else "help"
            self._shows = "all" if self._shows == wanted else wanted
            self._offset = 0
        elif key == "escape":
            self._shows, self._offset = "all", 0
        elif key == "d":
            self._folding = (self._folding + 1) % len(_FOLDINGS)
        else:
            return False
        self._offset = max(self._offset, 0)
        return True

    def lines(self, now: float, width: int, height: int) -> list[Line]:
        """Return at most ``height`` lines of at most ``width`` cells; none when all is over."""
        state = self._state
        if state.outcome is not None or not state.guests or height < 1 or width < 1:
            return []
        columns = Columns(width)
        most = 1 if height < 16 else 2
        head = [total_line(state, now, columns)]
        if height >= 3:
            head += counts_lines(state, columns, most)
        if height >= 7:
            head += limit_lines(state, columns, most)
        foot = waits_lines(state, now, columns, most) if height >= 5 else []
        room = height - len(head) - len(foot)
        return [*head, *self._list(now, columns, room), *foot][:height]

    # The list.

    def _list(self, now: float, columns: Columns, room: int) -> list[Line]:
        if room < 1:
            return []
        if self._shows == "help":
            return self._help(columns)[:room]
        blocks = self._blocks(now, columns, room)
        total = sum(size for size, _ in blocks)
        # The last line tells the keys, and what is cut.
        has_last = self.has_keys and room > 2
        if has_last or total > room:
            blocks = self._blocks(now, columns, room - 1)
            total = sum(size for size, _ in blocks)
        seen = room - 1 if has_last or total > room else room
        self._room = seen
        self._offset = max(0, min(self._offset, total - seen))
        lines = _slice(blocks, self._offset, seen)
        if has_last or total > seen:
            lines.append(self._more(total, self._offset, len(lines), columns))
        return lines

    def _more(self, total: int, above: int, shown: int, columns: Columns) -> Line:
        line: Line = []
        if below := total - above - shown:
            line.append((f"… and {below} more", ""))
        if above:
            line.append((f"{', ' if line else '… '}{above} above", ""))
        if self.has_keys:
            lead = "  " if line else ""
            other = "f everything" if self._shows == "failures" else "f failures"
            line.append((f"{lead}j k move  {other}  d disks  ? keys", "bright_black"))
            if self._can_leave:
                line.append(("  q leave", "bright_black"))
        return cut(line, columns.width)

    def _blocks(self, now: float, columns: Columns, room: int) -> list[Block]:
        state = self._state
        if self._shows == "failures":
            return self._failure_blocks(columns)
        running = sorted(state.running.values(), key=_is_idle)
        unfolded = self._unfolded(running, room)
        blocks = [_running(guest, now, columns, guest.name not in unfolded) for guest in running]
        # However many run, something of what failed is on the first page.
        page = max(room - _kept_for_failures(state, room), 0)
        newest = _each(
            reversed(state.failed.values()),
            len(state.failed),
            lambda guest: failed_line(guest, columns),
        )
        blocks.insert(_blocks_within(blocks, page), newest)
        blocks.append(
            _each(
                state.waiting.values(),
                len(state.waiting),
                lambda guest: waiting_line(guest, now, columns),
            )
        )
        return blocks

    def _unfolded(self, running: list[GuestView], room: int) -> set[str]:
        """Return the guests whose disks are shown below them."""
        folding = _FOLDINGS[self._folding]
        if folding == "none":
            return set()
        if folding == "all":
            return {guest.name for guest in running if guest.disks}
        # All guests first, and something of the failures; disks with what is left of the room.
        spare = room - len(running) - _kept_for_failures(self._state, room)
        unfolded = set()
        for guest in running:
            if 1 < len(guest.disks) <= spare and guest.phase in ("converted", "copying"):
                unfolded.add(guest.name)
                spare -= len(guest.disks)
        return unfolded

    def _failure_blocks(self, columns: Columns) -> list[Block]:
        failed = self._state.failed
        if not failed:
            nothing = cut([("no guest has failed", "bright_black")], columns.width)
            return [_of([nothing])]
        blocks = []
        for guest in failed.values():
            known = self._failures.get(guest.name)
            if known is None or known[0] is not guest.failure or known[1] != columns.width:
                lines = failure_lines(guest, columns)
                known = self._failures[guest.name] = guest.failure, columns.width, lines
            blocks.append(_of(known[2]))
        return blocks

    def _help(self, columns: Columns) -> list[Line]:
        keys = [*_HELP]
        if self._can_leave:
            keys.append(("q", "leave: the batch goes on"))
        else:
            keys.append(("Ctrl-C", "stop the batch; batch resume goes on with it"))
        return [cut([(f"  {key:<11}", "bold"), (what, "")], columns.width) for key, what in keys]


def _kept_for_failures(state: BatchState, room: int) -> int:
    """Return how many lines of the first page failures have at least."""
    return min(len(state.failed), max(room // 8, 1))


def _blocks_within(blocks: list[Block], count: int) -> int:
    """Return how many of ``blocks`` fit into so many lines."""
    passed = 0
    for number, (size, _) in enumerate(blocks):
        passed += size
        if passed > count:
            return number
    return len(blocks)


def _of(lines: list[Line]) -> Block:
    return len(lines), lambda first, last: lines[first:last]


def _each(guests: Iterable[GuestView], count: int, make: Callable[[GuestView], Line]) -> Block:
    """Return a block of one line for each guest."""
    return count, lambda first, last: [make(guest) for guest in islice(guests, first, last)]


def _running(guest: GuestView, now: float, columns: Columns, is_folded: bool) -> Block:
    def make(first: int, last: int) -> list[Line]:
        lines = [running_line(guest, now, columns, is_folded=is_folded)]
        if not is_folded:
            lines += [disk_line(disk, now, columns) for _, disk in sorted(guest.disks.items())]
        return lines[first:last]

    return 1 if is_folded else 1 + len(guest.disks), make


def _is_idle(guest: GuestView) -> bool:
    """Whether a guest that has its turn only waits for those of its disks."""
    return guest.phase in ("converted", "copying") and not guest.copying


def _slice(blocks: Iterable[Block], offset: int, count: int) -> list[Line]:
    """Return the lines from ``offset``; what is not among them is not made."""
    passed = 0
    found: list[Line] = []
    for size, make in blocks:
        if passed >= offset + count:
            break
        if size and passed + size > offset:
            found += make(max(offset - passed, 0), min(offset + count - passed, size))
        passed += size
    return found
