"""What a dead supervisor of a batch has left is ended by the next one: that, and nothing else.

Its servers die with it by themselves; here a process stands for one that did not.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.batches import Batch
from tests.conftest import assert_gone
from tests.integration.servers import MIB
from v2v_async.process import start_time

PLAN = '[limits]\nconversions = 2\nbandwidth = "4MB/s"\n'
SMALL = 2 * MIB  # enough for its copy to be in the middle when it is killed
# Long after every test, and not for ever.
_SLEEP_S = "600"


@contextmanager
def other_process(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    """Have a process of a session of its own, and a child of it, naming ``words``."""
    process = subprocess.Popen(
        ["sh", "-c", f"sleep {_SLEEP_S}; :", "other", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End such a process with its child, where they are still there."""
    if process.poll() is None:  # else its group's number may be somebody else's
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def killed(batch: Batch) -> Path:
    """Run a batch until its first guest is being copied, and kill it; return the v2v directory."""
    batch.write_plan(PLAN)
    run = batch.begin("run", str(batch.plan), "--name", "r")
    batch.await_event(run, lambda event: event.guest == "g1" and event.type == "progress")
    batch.kill(run)
    assert_gone(str(batch.tmp), within_s=20)
    [path] = batch.tmp.glob("v2vb.*/1")
    return path


def note(path: Path, process: subprocess.Popen[bytes], *, late: int = 0) -> None:
    """Put a process into ``state.json``; ``late``: the ticks by which its start is wrong there."""
    started = start_time(process.pid)
    assert started is not None
    state = json.loads((path / "state.json").read_text())
    state["processes"].append(
        {
            "pid": process.pid,
            "started": started + late,
            "program": "nbdkit",
            "argv": ["nbdkit"],
            "socket": str(path / f"in{len(state['processes']) + 1}"),
        }
    )
    (path / "state.json").write_text(json.dumps(state))


def conversions(batch: Batch, guest: str) -> int:
    """Return how often a guest's conversion has begun."""
    return sum(
        event.step == "convert" and event.type == "started" and event.guest == guest
        for event in batch.events()
    )


@pytest.mark.parametrize("command", ["resume", "cancel"])
def test_exactly_what_is_left_is_ended(short_tmp: Path, command: str) -> None:
    batch = Batch(short_tmp, 2, size=SMALL)
    path = killed(batch)
    with other_process(str(path)) as survivor, other_process() as foreign:
        note(path, survivor)
        # Its number was another's, who started before.
        note(path, foreign, late=-1)
        batch.batch(command, "r")
        assert survivor.wait(10) == -signal.SIGTERM
        assert foreign.poll() is None, "a process that is not ours was ended"
        if command == "resume":
            batch.assert_converted(*batch.disks)
            batch.assert_nothing_left(*batch.disks)
            assert set(batch.phases().values()) == {"done"}
            assert conversions(batch, "g1") == 1
        else:
            batch.assert_nothing_left()
            assert set(batch.phases().values()) == {"cancelled"}


@pytest.mark.parametrize("command", ["resume", "cancel"])
def test_after_another_boot_nothing_is_ended(short_tmp: Path, command: str) -> None:
    batch = Batch(short_tmp, 2, size=SMALL)
    path = killed(batch)
    with other_process(str(path)) as stranger:
        note(path, stranger)
        state = json.loads((path / "state.json").read_text())
        assert state["boot_id"]
        state["boot_id"] = "00000000-0000-4000-8000-000000000000"
        (path / "state.json").write_text(json.dumps(state))
        batch.batch(command, "r")
        assert stranger.poll() is None, "its number and start time are those of another boot"
        end(stranger)
        if command == "resume":
            batch.assert_converted(*batch.disks)
            batch.assert_nothing_left(*batch.disks)
            assert set(batch.phases().values()) == {"done"}
            assert conversions(batch, "g1") == 1, "what was converted is kept"
        else:
            batch.assert_nothing_left()
            assert set(batch.phases().values()) == {"cancelled"}


def test_guests_whose_work_folder_is_gone_begin_anew(short_tmp: Path) -> None:
    batch = Batch(short_tmp, 2, size=SMALL)
    work = killed(batch).parent
    begun = {event.guest for event in batch.events() if event.type == "converted"}
    assert "g1" in begun
    shutil.rmtree(work)
    batch.batch("resume", "r")
    batch.assert_converted(*batch.disks)
    assert set(batch.phases().values()) == {"done"}
    told = {
        event.guest: event.type
        for event in batch.events()
        if f"‘{work}’, which is gone: it begins anew" in (event.text or "")
    }
    assert set(told) >= begun
    assert told["g1"] == "warning"  # of others that have the same, it is only for who asks for more
    assert {guest: conversions(batch, guest or "") for guest in begun} == dict.fromkeys(begun, 2)
    assert_gone(str(batch.tmp))
    assert list(batch.tmp.iterdir()) == []
    # Half-made disks of which nothing is known any more may be there too: that has been said.
    made = {path.name for path in batch.out.iterdir()}
    assert made >= {"g1.xml", "g1-sda", "g1-sdb", "g2.xml", "g2-sda", "g2-sdb"}
