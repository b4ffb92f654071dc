"""What a batch has done, written down so that a crash forgets nothing.

One sqlite file (WAL) for each run: the supervisor writes, other processes read while it does. A
method returns when what it wrote is on the disk. They block for as long as that takes, so the
supervisor calls them in a thread.

::

    waiting ─> checking ─> converting ─> converted ─> copying ─> finalizing ─> done
       ↑           └────────────┴──────────┬────────────┴────────────┘
       └──── to be tried again ────────────┴──> failed, cancelled
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from v2v_async.errors import V2VError
from v2v_async.events import Bytes

Phase = Literal[
    "waiting",
    "checking",
    "converting",
    "converted",
    "copying",
    "finalizing",
    "done",
    "failed",
    "cancelled",
]
ENDED: tuple[Phase, ...] = ("done", "failed", "cancelled")

_VERSION = 1
_BUSY_TIMEOUT_S = 30.0

_SCHEMA = f"""
CREATE TABLE run (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE guest (
    name TEXT PRIMARY KEY,
    place INTEGER NOT NULL,
    phase TEXT NOT NULL CHECK (phase IN ({", ".join(f"'{each}'" for each in get_args(Phase))})),
    is_paused INTEGER NOT NULL DEFAULT 0,
    is_cancelled INTEGER NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0,
    failures INTEGER NOT NULL DEFAULT 0,
    not_before REAL NOT NULL DEFAULT 0,
    began REAL,
    ended REAL,
    failure TEXT,
    outputs TEXT NOT NULL DEFAULT '[]'
) STRICT;
CREATE TABLE disk (
    guest TEXT NOT NULL REFERENCES guest (name) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    bytes TEXT NOT NULL,
    PRIMARY KEY (guest, number)
) STRICT;
CREATE TABLE attempt (
    guest TEXT NOT NULL REFERENCES guest (name) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    began REAL NOT NULL,
    ended REAL,
    phase TEXT NOT NULL,
    failure TEXT,
    PRIMARY KEY (guest, number)
) STRICT;
CREATE TABLE request (
    number INTEGER PRIMARY KEY,
    what TEXT NOT NULL,
    guests TEXT NOT NULL,
    answer TEXT
) STRICT;
"""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a guest failed, in the words of a V2VError; ``is_permanent``: always will."""

    message: str
    hint: str | None = None
    step: str | None = None
    disk: int | None = None
    offset: int | None = None
    log: str | None = None
    is_permanent: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """What a person asks of a run that goes on: ``pause``, ``resume``, ``cancel`` of guests."""

    number: int
    what: str
    guests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GuestRecord:
    """A guest as the journal has it. Times are seconds since the epoch; ``disks`` from disk 1 on.

    ``attempts`` are all, also those that a stop or a crash of the supervisor cut short;
    ``failures`` those that failed since it was taken up.
    """

    name: str
    phase: Phase
    is_paused: bool
    attempts: int
    failures: int
    not_before: float
    began: float | None
    ended: float | None
    failure: Failure | None
    disks: tuple[Bytes, ...]
    outputs: tuple[str, ...] = ()
    is_cancelled: bool = False


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """One attempt at a guest: the phase that it reached, and why it failed if it did."""

    number: int
    began: float
    ended: float | None
    phase: Phase
    failure: Failure | None


class JournalError(V2VError):
    """The journal can't be read or written: what is done can't be noted."""


class Journal:
    """The journal of one run; made by :func:`open_journal`."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path
        # One transaction at a time: the threads of a supervisor share the connection.
        self._lock = threading.Lock()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with _named_errors(self._path), self._lock, self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            yield self._connection

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """All that is read in the block is of one moment."""
        with _named_errors(self._path), self._lock, self._connection:
            self._connection.execute("BEGIN")
            yield self._connection

    # What a run is.

    def set(self, name: str, value: Any) -> None:
        """Note something about the whole run (JSON)."""
        with self._transaction() as database:
            database.execute("REPLACE INTO run VALUES (?, ?)", (name, json.dumps(value)))

    def get(self, name: str) -> Any:
        """Return what was noted as ``name``, or None."""
        with self._reading() as database:
            row = database.execute("SELECT value FROM run WHERE name = ?", (name,))
            found = row.fetchone()
        return None if found is None else json.loads(found[0])

    # What becomes of its guests.

    def add_guests(self, names: Iterable[str]) -> None:
        """Note the guests of the plan, in its order; those that are known stay as they are."""
        with self._transaction() as database:
            database.executemany(
                "INSERT OR IGNORE INTO guest (name, place, phase) VALUES (?, ?, 'waiting')",
                [(name, place) for place, name in enumerate(names)],
            )

    def begin_attempt(self, guest: str, phase: Phase = "checking") -> int:
        """Note that a guest is taken up; return the number of the attempt, from 1."""
        now = time.time()
        with self._transaction() as database:
            row = database.execute(
                "UPDATE guest SET attempts = attempts + 1, began = COALESCE(began, ?), "
                "phase = ?, failure = NULL WHERE name = ? RETURNING attempts",
                (now, phase, guest),
            ).fetchone()
            database.execute(
                "INSERT INTO attempt (guest, number, began, phase) VALUES (?, ?, ?, ?)",
                (guest, row[0], now, phase),
            )
        return int(row[0])

    def reach(self, guest: str, phase: Phase) -> None:
        """Note that a guest is in another phase; ``done`` and ``cancelled`` end its attempt."""
        ended = time.time() if phase in ENDED else None
        with self._transaction() as database:
            database.execute(
                "UPDATE guest SET phase = ?, ended = ? WHERE name = ?", (phase, ended, guest)
            )
            database.execute(
                "UPDATE attempt SET phase = ?, ended = ? WHERE guest = ? AND number = "
                "(SELECT attempts FROM guest WHERE name = ?)",
                (phase, ended, guest, guest),
            )

    def fail(
        self,
        guest: str,
        failure: Failure,
        *,
        again_at: float | None = None,
        is_converted: bool = False,
    ) -> None:
        """Note why an attempt failed; ``again_at`` (epoch, seconds) if there will be another.

        ``is_converted``: that one goes on from what this one had converted.
        """
        now = time.time()
        text = json.dumps({each.name: getattr(failure, each.name) for each in fields(Failure)})
        phase, ended = ("failed", now) if again_at is None else ("waiting", None)
        if is_converted and again_at is not None:
            phase = "converted"
        with self._transaction() as database:
            database.execute(
                "UPDATE attempt SET ended = ?, failure = ? WHERE guest = ? AND number = "
                "(SELECT attempts FROM guest WHERE name = ?)",
                (now, text, guest, guest),
            )
            database.execute(
                "UPDATE guest SET phase = ?, failure = ?, ended = ?, not_before = ?, "
                "failures = failures + 1 WHERE name = ?",
                (phase, text, ended, again_at or 0.0, guest),
            )

    def set_outputs(self, guest: str, outputs: Iterable[str]) -> None:
        """Note what has been made of a guest: files, volumes, a domain."""
        with self._transaction() as database:
            database.execute(
                "UPDATE guest SET outputs = ? WHERE name = ?", (json.dumps(list(outputs)), guest)
            )

    def take_up(self, guests: Iterable[str]) -> None:
        """Let guests that failed or were cancelled be tried again, as often as the plan says."""
        with self._transaction() as database:
            database.executemany(
                "UPDATE guest SET phase = 'waiting', failure = NULL, failures = 0, ended = NULL, "
                "not_before = 0, is_paused = 0, is_cancelled = 0 "
                "WHERE name = ? AND phase IN ('failed', 'cancelled')",
                [(name,) for name in guests],
            )

    def pause(self, guests: Iterable[str], *, is_paused: bool) -> None:
        """Note that guests may not go on, or may again."""
        with self._transaction() as database:
            database.executemany(
                "UPDATE guest SET is_paused = ? WHERE name = ?",
                [(int(is_paused), name) for name in guests],
            )

    def cancel(self, guests: Iterable[str]) -> None:
        """Note that guests are to be cancelled; whoever runs them does it."""
        with self._transaction() as database:
            database.executemany(
                "UPDATE guest SET is_cancelled = 1 WHERE name = ?", [(name,) for name in guests]
            )

    def set_bytes(self, guests: Mapping[str, Mapping[int, Bytes]]) -> None:
        """Note how far the copies of guests' disks are (by name, then by number from 1)."""
        with self._transaction() as database:
            database.executemany(
                "REPLACE INTO disk VALUES (?, ?, ?)",
                [
                    (guest, number, json.dumps([getattr(done, name) for name in _BYTES]))
                    for guest, disks in guests.items()
                    for number, done in disks.items()
                ],
            )

    # What is asked of it by other processes.

    def ask(self, what: str, guests: Iterable[str]) -> int:
        """Ask the run's supervisor for something; return the number of the request."""
        with self._transaction() as database:
            made = database.execute(
                "INSERT INTO request (what, guests) VALUES (?, ?) RETURNING number",
                (what, json.dumps(list(guests))),
            ).fetchone()
        return int(made[0])

    def requests(self) -> list[Request]:
        """Return what has been asked and not been answered, the oldest first."""
        with self._reading() as database:
            rows = database.execute(
                "SELECT number, what, guests FROM request WHERE answer IS NULL ORDER BY number"
            ).fetchall()
        return [Request(number, what, tuple(json.loads(guests))) for number, what, guests in rows]

    def answer(self, number: int, text: str) -> None:
        """Answer a request."""
        with self._transaction() as database:
            database.execute("UPDATE request SET answer = ? WHERE number = ?", (text, number))

    def answer_to(self, number: int) -> str | None:
        """Return the answer to a request; None: there is none yet."""
        with self._reading() as database:
            row = database.execute(
                "SELECT answer FROM request WHERE number = ?", (number,)
            ).fetchone()
        return None if row is None else row[0]

    def attempts(self) -> dict[str, list[AttemptRecord]]:
        """Return the attempts at each guest, the first one first."""
        with self._reading() as database:
            rows = database.execute(
                "SELECT guest, number, began, ended, phase, failure FROM attempt "
                "ORDER BY guest, number"
            ).fetchall()
        found: dict[str, list[AttemptRecord]] = {}
        for guest, number, began, ended, phase, failure in rows:
            why = None if failure is None else Failure(**json.loads(failure))
            found.setdefault(guest, []).append(AttemptRecord(number, began, ended, phase, why))
        return found

    def guests(self) -> list[GuestRecord]:
        """Return all guests in the order of the plan, as of one moment."""
        with self._reading() as database:
            rows = database.execute(
                "SELECT name, phase, is_paused, is_cancelled, attempts, failures, not_before, "
                "began, ended, failure, outputs FROM guest ORDER BY place"
            ).fetchall()
            disks: dict[str, list[Bytes]] = {}
            for name, number, text in database.execute(
                "SELECT guest, number, bytes FROM disk ORDER BY guest, number"
            ):
                amounts = dict(zip(_BYTES, json.loads(text), strict=False))
                known = disks.setdefault(name, [])
                known += [Bytes()] * (number - 1 - len(known))  # of those nothing is known yet
                known.append(Bytes(**amounts))
        return [
            GuestRecord(
                name=row[0],
                phase=row[1],
                is_paused=bool(row[2]),
                is_cancelled=bool(row[3]),
                attempts=row[4],
                failures=row[5],
                not_before=row[6],
                began=row[7],
                ended=row[8],
                failure=None if row[9] is None else Failure(**json.loads(row[9])),
                outputs=tuple(json.loads(row[10])),
                disks=tuple(disks.get(row[0], ())),
            )
            for row in rows
        ]


_BYTES = tuple(each.name for each in fields(Bytes))


@contextmanager
def open_journal(path: Path, *, create: bool = False, read_only: bool = False) -> Iterator[Journal]:
    """Open a run's journal, or make it.

    Raises:
        V2VError: it is not there, is there already, is of a later version, or can't be read.
    """
    if create and path.exists():
        raise V2VError(f"the journal ‘{path}’ is there already")
    if not create and not path.exists():
        raise V2VError(
            f"there is no journal ‘{path}’", hint="v2v-async batch status lists the runs"
        )
    with _named_errors(path):
        connection = sqlite3.connect(
            path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        try:
            _prepare(connection, path, create=create, read_only=read_only)
        except BaseException:
            connection.close()
            raise
    try:
        yield Journal(connection, path)
    finally:
        connection.close()


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise JournalError(
            f"the journal ‘{path}’ can't be used: {error}",
            hint="is its disk full, or the file damaged? sqlite3 FILE 'PRAGMA integrity_check'",
        ) from error


def _prepare(connection: sqlite3.Connection, path: Path, *, create: bool, read_only: bool) -> None:
    connection.execute("PRAGMA foreign_keys = ON")
    if read_only:
        connection.execute("PRAGMA query_only = ON")
    else:
        connection.execute("PRAGMA journal_mode = WAL")
        # A commit is on the disk when it returns: what was finished is not done twice.
        connection.execute("PRAGMA synchronous = FULL")
    if create:
        connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version != _VERSION:
        raise V2VError(
            f"the journal ‘{path}’ is of version {version}; this program knows {_VERSION}",
            hint="use the v2v-async that began the run",
        )
