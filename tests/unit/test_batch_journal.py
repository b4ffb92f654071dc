"""The journal of a run: what was written is there after a kill, and others read meanwhile."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from v2v_async.batch.record.journal import Failure, JournalError, open_journal
from v2v_async.errors import V2VError
from v2v_async.events import Bytes


def test_the_life_of_a_guest(tmp_path: Path) -> None:
    with open_journal(tmp_path / "j.db", create=True) as journal:
        journal.set("plan", {"name": "weekend"})
        journal.add_guests(["b", "a"])
        assert journal.begin_attempt("b") == 1
        journal.reach("b", "converting")
        journal.reach("b", "copying")
        journal.set_bytes(
            {"b": {1: Bytes(total=10, copied=4), 2: Bytes(total=7)}, "a": {2: Bytes(total=1)}}
        )
        journal.fail("b", Failure("no route to host", hint="wait", step="copy"), again_at=99.5)
        (b, a) = journal.guests()
        assert (b.name, b.phase, b.attempts, b.not_before) == ("b", "waiting", 1, 99.5)
        assert b.failure == Failure("no route to host", hint="wait", step="copy")
        assert b.ended is None
        assert b.disks == (Bytes(total=10, copied=4), Bytes(total=7))
        assert (a.phase, a.attempts, a.failure, a.disks) == (
            "waiting",
            0,
            None,
            (Bytes(), Bytes(total=1)),  # nothing is known of disk 1
        )
        assert journal.begin_attempt("b") == 2
        assert journal.guests()[0].failure is None
        journal.reach("b", "done")
        journal.set_outputs("b", ["/out/b-sda", "domain b"])
        journal.pause(["a"], is_paused=True)
        journal.fail("a", Failure("no operating system", is_permanent=True))
    with open_journal(tmp_path / "j.db") as journal:
        assert journal.get("plan") == {"name": "weekend"}
        assert journal.get("absent") is None
        journal.add_guests(["b", "a"])
        b, a = journal.guests()
        assert (b.phase, b.outputs, b.ended is not None) == (
            "done",
            ("/out/b-sda", "domain b"),
            True,
        )
        assert [each.number for each in journal.attempts()["b"]] == [1, 2]
        first, second = journal.attempts()["b"]
        assert first.failure == Failure("no route to host", hint="wait", step="copy")
        assert (second.phase, second.failure) == ("done", None)
        assert (a.phase, a.is_paused, a.ended is not None) == ("failed", True, True)
        assert a.failure is not None
        assert a.failure.is_permanent


def test_what_was_written_outlives_a_kill_and_is_read_meanwhile(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from v2v_async.batch.record.journal import open_journal\n"
        "with open_journal(Path(sys.argv[1]), create=True) as journal:\n"
        "    journal.add_guests(['a'])\n"
        "    print('ready', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    journal.begin_attempt('a')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "j.db"
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert child.stdout is not None
    assert child.stdin is not None
    with child.stdin, child.stdout:
        assert child.stdout.readline() == b"ready\n"
        with open_journal(path, read_only=True) as journal:
            assert journal.guests()[0].phase == "waiting"
            child.stdin.write(b"\n")
            child.stdin.flush()
            assert child.wait(30) == -signal.SIGKILL
            assert journal.guests()[0].phase == "checking"
            with pytest.raises(JournalError, match="readonly"):
                journal.pause(["a"], is_paused=True)


def test_journals_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    with pytest.raises(V2VError, match="there is no journal"), open_journal(path):
        pass
    with open_journal(path, create=True):
        pass
    with pytest.raises(V2VError, match="is there already"), open_journal(path, create=True):
        pass
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 7")
    database.close()
    with pytest.raises(V2VError, match="of version 7"), open_journal(path):
        pass
    path.write_text("this is no database, and never was one")
    with pytest.raises(V2VError, match="can't be used: file is not a database"), open_journal(path):
        pass
