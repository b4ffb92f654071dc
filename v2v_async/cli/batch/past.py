"""What has happened in a run before anybody looked.

::

    journal (planned, ended, paused) ─┐
    events.jsonl: … started … ────────┴─> events, for a screen ──> what comes next (EventReader)
                      └ of the supervisor that lives, from here on

Of a run that does not go on only the journal tells what holds: the last events may be those of a
supervisor that was killed.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

from v2v_async.batch.record import folder
from v2v_async.batch.record.event_file import NAME as EVENTS
from v2v_async.batch.record.event_file import EventReader
from v2v_async.batch.record.journal import Journal, open_journal
from v2v_async.batch.record.state_events import tell_state
from v2v_async.batch.schedule.needs import Facts
from v2v_async.events import Event, Reporter

_ENDINGS = ("finished", "failed", "cancelled")
_FREQUENT = re.compile(
    rb'{"version":\d+,"time":([\d.e+]+),[^{}]*"type":(?P<place>"(?:progress|verifying)".*?)'
    rb',"(?:bytes|details)":'
)
_RECENT_S = 600.0
"""Progress that rates and the time left are of: five times the longest window of them."""


def so_far(path: Path) -> tuple[list[Event], EventReader, bool]:
    """Return what has happened, what reads on from there, and whether the run goes on.

    Raises:
        V2VError: the journal or the plan can't be read.
    """
    is_alive = folder.is_alive(path)
    events, reader = _of_supervisor(path) if is_alive else ([], EventReader(path, None))
    if any(map(is_ending, events)):
        events = []  # it has just ended, or the next supervisor has not said that it began
    # Their time is that of the events that follow: a rate is of times that go on.
    began = events[0].time if events else time.time()
    with open_journal(path / folder.JOURNAL, read_only=True) as journal:
        return [*_told(path, journal, began), *events], reader, is_alive


def is_ending(event: Event) -> bool:
    """Whether a supervisor says with it how its run ended."""
    return _is_of_run(event) and event.type in _ENDINGS


def _is_of_run(event: Event) -> bool:
    return event.guest is None and event.step is None and event.disk is None


def _told(path: Path, journal: Journal, now: float) -> list[Event]:
    """Return what the journal knows, as events of one moment."""
    found: list[Event] = []
    reporter = Reporter(found.append, path.name, clock=lambda: now)
    records = journal.guests()
    plan = folder.read_plan(path, (each.name for each in records))
    facts = {name: Facts(tuple(disks)) for name, disks in (journal.get("facts") or {}).items()}
    reporter.emit("started", details={"batch": path.name, "guests": len(plan.guests)})
    tell_state(path, plan, facts, records, reporter)
    return found


def _of_supervisor(path: Path) -> tuple[list[Event], EventReader]:
    """Return the events since the last supervisor began, and what reads those after them.

    Nearly all lines of a weekend's run are progress, which would take many seconds to parse: of
    what is long ago only the last of each disk is.
    """
    lines: list[bytes] = []
    offset = 0
    has_begun = False
    try:
        with (path / EVENTS).open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break  # it is being written
                offset += len(line)
                if b'"type":"started"' in line:
                    event = _parsed(line)
                    if event is not None and _is_of_run(event):
                        lines, has_begun = [], True
                if has_begun:
                    lines.append(line)
    except OSError:
        lines = []
    found = (_parsed(line) for line in _telling(lines))
    return [event for event in found if event is not None], EventReader(path, offset)


def _telling(lines: list[bytes]) -> list[bytes]:
    """Return the lines without progress that is neither recent nor the last of its disk."""
    kept: list[bytes] = []
    known: set[bytes] = set()
    latest: float | None = None
    for line in reversed(lines):
        found = _FREQUENT.match(line)
        if found is not None:
            moment, place = float(found[1]), found["place"]
            latest = moment if latest is None else latest
            if place in known and moment < latest - _RECENT_S:
                continue
            known.add(place)
        kept.append(line)
    return kept[::-1]


def _parsed(line: bytes) -> Event | None:
    try:
        return Event.from_json(line.decode(errors="replace"))
    except ValueError:  # half a line of a supervisor that was killed
        return None
