"""``batch status`` of a run that copies, looked at from other terminals."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time
from pathlib import Path

from tests.batches import TIMEOUT_S, Batch
from tests.integration.servers import MIB
from tests.waiting import wait_until

SLOW = '[limits]\nconversions = 2\nbandwidth = "500kB/s"\n'


def test_a_copying_run_is_seen_from_another_terminal(short_tmp: Path) -> None:
    batch = Batch(short_tmp, 2, disks=2)
    batch.write_plan(SLOW)
    run = batch.begin("run", str(batch.plan), "--name", "r")
    try:
        batch.await_event(run, lambda event: event.type == "progress")
        # Of each disk only one progress in two seconds is kept: the second one makes a rate.
        wait_until(lambda: batch.status()["bytes"]["rate"], "there is a rate", within_s=60, of=run)
        state = batch.status()
        assert state["is_running"] is True
        assert state["limits"]["disks"]["taken"] >= 1
        assert state["limits"]["conversions"]["capacity"] == 2
        assert state["bytes"]["moved"] > 0
        copying = [guest for guest in state["guests"] if guest["phase"] == "copying"]
        assert copying, state
        assert all(guest["running"] and guest["elapsed_s"] > 0 for guest in copying)
        disks = [disk for guest in copying for disk in guest["disks"]]
        assert all(disk["total"] == 8 * MIB for disk in disks if disk["moved"])
        assert any((disk["rate"] or 0) > 0 for disk in disks)
        shown = batch.batch("status", "r").stdout
        assert "copying" in shown
        assert "disks " in shown
        assert_followed(batch)
    finally:
        run.terminate()
        run.communicate(timeout=TIMEOUT_S)


def assert_followed(batch: Batch) -> None:
    """Assert that a terminal which begins to follow shows a disk, and nothing from before."""
    ours, theirs = pty.openpty()
    follower = subprocess.Popen(
        batch.command("status", "r", "--follow"),
        env={**batch.environment, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=batch.folder,
    )
    os.close(theirs)
    seen = b""
    end = time.monotonic() + 60
    try:
        while b"disk 1" not in seen and b"disk 2" not in seen:
            assert time.monotonic() < end, seen
            if select.select([ours], [], [], 1)[0]:
                seen += os.read(ours, 1 << 16)
        assert b"copying" in seen
        assert b"waits for its turn" not in seen
        os.write(ours, b"q")
        while follower.poll() is None:
            assert time.monotonic() < end, seen
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    seen += os.read(ours, 1 << 16)
                except OSError:  # it is gone
                    break
        assert follower.wait(timeout=20) == 0
    finally:
        follower.kill()
        follower.wait()
        os.close(ours)
