"""Folders of runs: one supervisor each, and no guest in two of them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from v2v_async.batch.plan.model import GuestPlan, Plan
from v2v_async.batch.record.folder import (
    Claim,
    claim,
    conflicts,
    create,
    is_alive,
    locked,
    read_plan,
    release,
    runs,
    state_home,
)
from v2v_async.errors import UsageError, V2VError

A = Claim("source", "disk:/vms/a.img", "a")
B = Claim("source", "disk:/vms/b.img", "b")


def test_a_guest_is_in_one_run(tmp_path: Path) -> None:
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
    assert claim(tmp_path, "one", [A]) == []
    assert claim(tmp_path, "one", [A]) == []  # a run that is taken up again
    (conflict,) = claim(tmp_path, "two", [B, Claim("source", A.identity, "other")])
    assert (conflict.run, conflict.other_guest, conflict.claim.guest) == ("one", "a", "other")
    assert claim(tmp_path, "one", [B]) == []  # all or none: two did not get it
    release(tmp_path, "one", "a")
    assert claim(tmp_path, "two", [A]) == []
    assert len(claim(tmp_path, "two", [A, B])) == 1
    release(tmp_path, "one")
    assert claim(tmp_path, "two", [A, B]) == []


def test_what_a_run_had_that_is_gone_is_free(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    assert claim(tmp_path, "gone", [A]) == []
    assert claim(tmp_path, "two", [A]) == []


def test_a_run_has_one_supervisor_and_a_killed_one_leaves_it(tmp_path: Path) -> None:
    assert not is_alive(tmp_path)
    program = (
        "import subprocess, sys\nfrom pathlib import Path\n"
        "from v2v_async.batch.record.folder import locked\n"
        "with locked(Path(sys.argv[1])):\n"
        "    child = subprocess.Popen(['sleep', '1000'], close_fds=False)\n"
        "    print(child.pid, flush=True)\n    sys.stdin.read()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert child.stdin is not None
    assert child.stdout is not None
    with child.stdin, child.stdout:
        orphan = int(child.stdout.readline())
        try:
            assert is_alive(tmp_path)
            with pytest.raises(UsageError, match=rf"is going on \(pid {child.pid}\)"):
                with locked(tmp_path):
                    pass
            child.kill()
            child.wait(30)
            assert not is_alive(tmp_path)
        finally:
            os.kill(orphan, 9)


def test_where_runs_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("V2V_ASYNC_STATE", raising=False)
    assert state_home() == tmp_path / "v2v-async" / "batch"
    monkeypatch.setenv("V2V_ASYNC_STATE", str(tmp_path / "s"))
    assert state_home() == tmp_path / "s" / "batch"
    for index, name in enumerate(("old", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "journal.db").touch()
        os.utime(tmp_path / name / "journal.db", (index, index))
    assert runs(tmp_path) == ["old", "new"]
    monkeypatch.delenv("V2V_ASYNC_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    with pytest.raises(UsageError, match="no place to keep the run"):
        state_home()


def test_who_only_looks_is_in_nobodys_way(tmp_path: Path) -> None:
    with locked(tmp_path):
        content = (tmp_path / "lock").read_text()
        assert is_alive(tmp_path)
        assert (tmp_path / "lock").read_text() == content
    assert not is_alive(tmp_path)
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            is_alive(tmp_path)

    looker = threading.Thread(target=look)
    looker.start()
    try:
        for _ in range(200):
            with locked(tmp_path):
                pass
    finally:
        stop.set()
        looker.join()


def test_a_run_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    plan = Plan(guests=[GuestPlan(name="a")])
    run = create(tmp_path, "r", plan)
    assert read_plan(run) == plan
    assert runs(tmp_path) == ["r"]
    with pytest.raises(UsageError, match="there is a run ‘r’ already"):
        create(tmp_path, "r", plan)
    with pytest.raises(UsageError, match="can't be the name of a run"):
        create(tmp_path, "../r", plan)
    assert {path.name for path in tmp_path.iterdir()} == {"r"}


def test_runs_that_are_damaged_are_listed_too(tmp_path: Path) -> None:
    plan = Plan(guests=[GuestPlan(name="a")])
    for index, name in enumerate(("good", "no-journal", "a-directory")):
        create(tmp_path, name, plan)
        os.utime(tmp_path / name / "journal.db", (index, index))
        os.utime(tmp_path / name / "plan.json", (index, index))
    (tmp_path / "no-journal" / "journal.db").unlink()
    (tmp_path / "a-directory" / "journal.db").unlink()
    (tmp_path / "a-directory" / "journal.db").mkdir()
    (tmp_path / "folder-of-something-else").mkdir()
    (tmp_path / "claims.db").touch()
    assert runs(tmp_path) == ["good", "no-journal", "a-directory"]
    assert runs(tmp_path / "absent") == []
    with pytest.raises(V2VError, match="where runs are, can't be read: Not a directory"):
        runs(tmp_path / "claims.db")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "can't be read: ‘.*plan.json’: No such file or directory$"),
        ("{", "is damaged or of another version: Invalid JSON"),
        ('{"version": 9, "guests": []}', "is damaged or of another version: version: must be 1$"),
        ('{"guests": [{"name": "b"}]}', "has no guest ‘a’, which run ‘r’ began with$"),
    ],
)
def test_a_plan_that_does_not_tell_the_run(tmp_path: Path, text: str | None, told: str) -> None:
    run = create(tmp_path, "r", Plan(guests=[GuestPlan(name="a")]))
    (run / "plan.json").unlink()
    if text is not None:
        (run / "plan.json").write_text(text)
    with pytest.raises(V2VError, match=told):
        read_plan(run, ["a"])


def test_looking_for_conflicts_takes_nothing(tmp_path: Path) -> None:
    wanted = [Claim("disk", "/a", "g")]
    (tmp_path / "one").mkdir()
    assert conflicts(tmp_path, "one", wanted) == []
    assert claim(tmp_path, "two", wanted) == []
    (tmp_path / "two").mkdir()
    assert [each.run for each in conflicts(tmp_path, "one", wanted)] == ["two"]
