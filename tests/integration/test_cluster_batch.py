"""``v2v-async batch run --cluster local:2``: real servers and copies in dask's worker processes."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.batches import Batch
from tests.conftest import assert_gone
from tests.waiting import wait_until
from v2v_async.events import Event

pytest.importorskip("distributed")

PLAN = '[limits]\nconversions = 2\nbandwidth = "{}"\n[retries]\ndelay = 0.1\n'
CLUSTER = ["--cluster", "local:2"]


def worker_of(v2vdir: Path) -> int:
    """Return the pid of the worker whose servers run for a v2v directory."""
    record = json.loads((v2vdir / "state.json").read_text())["processes"][0]
    status = Path(f"/proc/{record['pid']}/status").read_text()
    parent = re.search(r"^PPid:\s*(\d+)", status, re.MULTILINE)
    assert parent is not None
    return int(parent[1])


def landed(amount: int) -> Callable[[Event], bool]:
    """Return what tells whether a disk has so much."""
    return lambda event: bool(event.disk and event.bytes and event.bytes.copied > amount)


def test_a_killed_worker_s_guests_go_on(short_tmp: Path) -> None:
    batch = Batch(short_tmp, 2, disks=1)
    batch.write_plan(PLAN.format("1MB/s"))
    process = batch.begin("run", str(batch.plan), "--name", "r", *CLUSTER)
    batch.await_event(process, landed(1 << 20))
    kept = wait_until(
        lambda: list(batch.tmp.glob("*/*/checkpoint-1/disk-1.json")), "there is a checkpoint"
    )
    worker = worker_of(kept[0].parent.parent)
    assert process.pid != worker
    os.kill(worker, signal.SIGKILL)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    batch.assert_converted(*batch.disks)
    batch.assert_nothing_left(*batch.disks)
    assert_gone(str(short_tmp))
    events = batch.events()
    retried = {each.guest for each in events if each.type == "retrying"}
    assert retried
    assert any("went away while" in (each.text or "") for each in events)
    for guest in retried:
        mine = [each for each in events if each.guest == guest]
        # What was converted is kept, and what had been copied is not copied again.
        assert [each.step for each in mine if each.type == "started"].count("convert") == 1
        ends = [each.bytes for each in mine if each.type == "finished" and each.disk]
        assert [each for each in ends if each is not None and each.resumed > 0]
    logs = batch.run() / "cluster"
    assert {path.name for path in logs.iterdir()} == {"dask.log", "worker-0.log", "worker-1.log"}
    assert "distributed" not in output


def test_a_killed_supervisor_is_followed_by_one_without_a_cluster(short_tmp: Path) -> None:
    batch = Batch(short_tmp, 2, disks=1)
    batch.write_plan(PLAN.format("2MB/s"))
    process = batch.begin("run", str(batch.plan), "--name", "r", *CLUSTER)
    batch.await_event(process, landed(1 << 20))
    batch.kill(process)
    assert_gone(str(batch.tmp), within_s=20)
    batch.batch("resume", "r")
    batch.assert_converted(*batch.disks)
    batch.assert_nothing_left(*batch.disks)
    steps = [each.step for each in batch.events() if each.type == "started"]
    assert steps.count("convert") == 2
