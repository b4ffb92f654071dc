"""Where runs are kept, and what keeps two of them from the same guest.

::

    ~/.local/state/v2v-async/batch/      $V2V_ASYNC_STATE, $XDG_STATE_HOME
    ├ claims.db                          which run has which source and which target
    └ RUN/
      ├ lock                             held (flock) by the supervisor while it lives
      ├ plan.json                        the plan, patterns and defaults resolved
      ├ journal.db                       journal.py
      ├ events.jsonl                     all events of the run
      └ guests/NAME/                     logs of each attempt
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from pydantic import ValidationError

from v2v_async.batch.plan.mistakes import mistakes_of
from v2v_async.batch.plan.model import Plan
from v2v_async.batch.record.journal import open_journal
from v2v_async.errors import UsageError, V2VError
from v2v_async.statedir import state_dir

JOURNAL = "journal.db"
_PLAN = "plan.json"
_BUSY_TIMEOUT_S = 30.0
_LOCK_TIMEOUT_S = 0.5
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Claim:
    """A guest's source or target, as far as it can be told from another one's."""

    kind: str
    identity: str
    guest: str


@dataclass(frozen=True, slots=True)
class Conflict:
    """A claim that another run has."""

    claim: Claim
    run: str
    other_guest: str


class TakenError(UsageError):
    """Guests or targets of a run are another run's."""

    def __init__(self, conflicts: Sequence[Conflict]) -> None:
        # One line for each guest: a file is claimed by its path and by its inode.
        found = {
            (each.claim.guest, each.run, each.other_guest): each for each in reversed(conflicts)
        }
        lines = [
            f"  {guest}: its {each.claim.kind} {each.claim.identity} is of guest ‘{other}’ in run "
            f"‘{run}’"
            for (guest, run, other), each in reversed(found.items())
        ]
        runs_ = sorted({each.run for each in conflicts})
        super().__init__(
            "another run has what this one needs:\n" + "\n".join(lines),
            hint=f"let it end, or give its guests up: v2v-async batch cancel {runs_[0]}",
        )
        self.conflicts = list(conflicts)


def state_home() -> Path:
    """Return the folder of all runs, which may not exist yet.

    Raises:
        UsageError: there is no home for it.
    """
    return state_dir("batch")


def check_name(name: str) -> None:
    """Refuse what can't be the name of a run.

    Raises:
        UsageError
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"‘{name}’ can't be the name of a run",
            hint="letters, digits, - _ and ., 64 at most: --name weekend-1",
        )


class NameTakenError(UsageError):
    """Another run is named so."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"there is a run ‘{name}’ already",
            hint=f"v2v-async batch resume {name} goes on with it; --name gives this one another",
        )


def create(home: Path, name: str, plan: Plan) -> Path:
    """Make the folder of a new run, with its plan.

    Raises:
        UsageError: the name is taken, or can't be one.
        V2VError: it can't be made.
    """
    check_name(name)
    run = home / name
    made: Path | None = None
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        # A run is there whole or not at all, however early its program is killed.
        made = Path(tempfile.mkdtemp(prefix=".new.", dir=home))
        (made / _PLAN).write_text(
            plan.model_dump_json(by_alias=True, exclude_unset=True, indent=1) + "\n"
        )
        with open_journal(made / JOURNAL, create=True) as journal:
            journal.add_guests(guest.name for guest in plan.guests)
        os.rename(made, run)
    except OSError as error:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        if run.exists():
            raise NameTakenError(name) from None
        raise V2VError(f"‘{run}’ can't be made: {error.strerror}") from error
    return run


def existing(home: Path, name: str) -> Path:
    """Return the folder of a run.

    Raises:
        UsageError: there is none of that name.
        V2VError: it can't be looked into.
    """
    run = home / name
    if not _NAME.fullmatch(name) or not _is_run(run):
        near = get_close_matches(name, runs(home), n=1)
        raise UsageError(
            f"there is no run ‘{name}’ in ‘{home}’",
            hint=f"did you mean {near[0]}?" if near else "v2v-async batch status lists them",
        )
    return run


def read_plan(run: Path, guests: Iterable[str] = ()) -> Plan:
    """Return the plan of a run, as it was when the run began; ``guests`` are those of its journal.

    Raises:
        V2VError: it can't be read, or lacks one of them.
    """
    try:
        plan = Plan.model_validate_json((run / _PLAN).read_bytes())
    except OSError as error:
        raise V2VError(
            f"the plan of run ‘{run.name}’ can't be read: ‘{run / _PLAN}’: {error.strerror}"
        ) from error
    except ValidationError as error:
        place, text = next(mistakes_of(error))
        where = ".".join(str(part) for part in place)
        raise V2VError(
            f"the plan of run ‘{run.name}’, ‘{run / _PLAN}’, is damaged or of another version: "
            f"{f'{where}: ' if where else ''}{text}",
            hint="use the v2v-async that began the run",
        ) from None
    known = {guest.name for guest in plan.guests}
    for guest in guests:
        if guest not in known:
            raise V2VError(
                f"‘{run / _PLAN}’ has no guest ‘{guest}’, which run ‘{run.name}’ began with",
                hint="put the file back as it was: what a run does can't be changed there",
            )
    return plan


def guest_folder(run: Path, guest: str) -> Path:
    """Return the folder of a guest's logs, whatever the guest is called."""
    if _NAME.fullmatch(guest):
        return run / "guests" / guest
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", guest)[:40].lstrip(".")
    digest = hashlib.sha256(guest.encode(errors="surrogatepass")).hexdigest()[:8]
    return run / "guests" / f"{readable}~{digest}"


def bundle_path(run: Path, guest: str) -> Path:
    """Return where a guest's failure bundle is, when it has failed."""
    return guest_folder(run, guest) / "failure.tar.gz"


def runs(home: Path) -> list[str]:
    """Return the names of the runs that are there, the newest last; also of those that are damaged.

    Raises:
        V2VError: their folder can't be read.
    """
    try:
        names = [each for each in os.listdir(home) if _NAME.fullmatch(each)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise V2VError(f"‘{home}’, where runs are, can't be read: {error.strerror}") from error
    found: list[tuple[float, str]] = []
    for name in names:
        for file in (JOURNAL, _PLAN):
            try:
                found.append(((home / name / file).stat().st_mtime, name))
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError:
                found.append((0.0, name))  # who reads it is told why that can't be done
            break
    return [name for _, name in sorted(found)]


def _is_run(run: Path) -> bool:
    try:
        (run / _PLAN).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise V2VError(f"run ‘{run.name}’ can't be read: ‘{run}’: {error.strerror}") from error
    return True


def _lock(descriptor: int) -> None:
    end = time.monotonic() + _LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise
            time.sleep(_LOCK_TIMEOUT_S / 20)  # who only looks (is_alive) has it for a moment
        else:
            return


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold a run: it has one supervisor.

    Raises:
        UsageError: another process has it.
    """
    # The kernel drops the lock with its process, however that ends. It is not handed on to
    # children: a server that outlives a killed supervisor must not hold the run.
    descriptor = os.open(run / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        try:
            _lock(descriptor)
        except BlockingIOError:
            pid = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            raise UsageError(
                f"run ‘{run.name}’ is going on" + (f" (pid {pid})" if pid else ""),
                hint=f"v2v-async batch status {run.name} --follow shows it",
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def is_alive(run: Path) -> bool:
    """Return whether a run has a supervisor now. Many may look at the same time."""
    try:
        descriptor = os.open(run / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        # Gone at once: a supervisor that begins just now tries for longer.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextmanager
def _claims(home: Path) -> Iterator[sqlite3.Connection]:
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        database = sqlite3.connect(
            home / "claims.db", timeout=_BUSY_TIMEOUT_S, isolation_level=None
        )
        try:
            database.execute(
                "CREATE TABLE IF NOT EXISTS claim (kind TEXT, identity TEXT, run TEXT, guest TEXT,"
                " PRIMARY KEY (kind, identity)) STRICT"
            )
            database.execute("BEGIN IMMEDIATE")
            yield database
            database.execute("COMMIT")
        finally:
            database.close()
    except sqlite3.Error as error:
        raise V2VError(f"‘{home / 'claims.db'}’ can't be used: {error}") from error


def claim(home: Path, run: str, wanted: Iterable[Claim]) -> list[Conflict]:
    """Take sources and targets for a run: all of them, or none where some are another run's.

    What a run had whose folder is gone is free.
    """
    found = list(wanted)
    with _claims(home) as database:
        conflicts = _conflicts(database, home, run, found)
        if not conflicts:
            database.executemany(
                "REPLACE INTO claim VALUES (?, ?, ?, ?)",
                [(each.kind, each.identity, run, each.guest) for each in found],
            )
    return conflicts


def conflicts(home: Path, run: str, wanted: Iterable[Claim]) -> list[Conflict]:
    """Return what :func:`claim` would find, and take nothing."""
    if not (home / "claims.db").exists():
        return []
    with _claims(home) as database:
        return _conflicts(database, home, run, wanted)


def _conflicts(
    database: sqlite3.Connection, home: Path, run: str, wanted: Iterable[Claim]
) -> list[Conflict]:
    found: list[Conflict] = []
    for each in wanted:
        row = database.execute(
            "SELECT run, guest FROM claim WHERE kind = ? AND identity = ?",
            (each.kind, each.identity),
        ).fetchone()
        if row is not None and row[0] != run and (home / row[0]).is_dir():
            found.append(Conflict(each, *row))
    return found


def release(home: Path, run: str, guest: str | None = None) -> None:
    """Give back what a run has, or one guest of it."""
    with _claims(home) as database:
        database.execute(
            "DELETE FROM claim WHERE run = ? AND (?2 IS NULL OR guest = ?2)", (run, guest)
        )
