"""Guests on real dask workers: where they go, what is said, and what a dead worker leaves."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import anyio
import pytest

from tests.cluster_batch import Batch, assert_in_order
from tests.conftest import ROOT, assert_gone, processes_naming
from tests.waiting import until, wait_until

pytestmark = pytest.mark.anyio
pytest.importorskip("distributed")


async def test_guests_are_spread_and_heard(short_tmp: Path) -> None:
    batch = Batch(short_tmp)
    for index in range(6):
        batch.guest(f"g{index}", flood1="300")
    async with batch.opened() as cluster:
        assert cluster.capacities()["conversions"] == 2
        assert cluster.capacities()["disks"] == 4
        with anyio.fail_after(60):
            await batch.run(cluster)
    assert set(batch.phases.values()) == {"done"}
    workers = Counter(pid for _, what, pid in batch.calls() if what == "convert")
    assert len(workers) == 2
    assert min(workers.values()) >= 2
    for name in batch.orders:
        # One worker has all of a guest.
        assert len({pid for _, _, pid in batch.calls(name)}) == 1
        assert_in_order(batch.events, name)
        lines = [each.text for each in batch.events if each.guest == name and each.disk == 1]
        assert [line for line in lines if line] == [f"line {number}" for number in range(300)]
    assert_gone(str(short_tmp))
    assert not list(short_tmp.glob(".v2v-async-*"))
    logs = "".join(path.read_text() for path in (short_tmp / "dask").glob("*.log"))
    assert "Run out-of-band function" in logs  # those of workers
    assert "v2v_async/batch" not in logs, logs  # dask's own connections may end with a traceback


@pytest.mark.parametrize("step", ["convert", "copy1", "finalize"])
async def test_a_killed_worker_s_guests_go_on_elsewhere(short_tmp: Path, step: str) -> None:
    batch = Batch(short_tmp)
    batch.guest("a", wait=step)
    batch.guest("b", wait="copy2")
    async with batch.opened() as cluster, anyio.create_task_group() as group:
        group.start_soon(batch.run, cluster)
        await batch.reached("b", "copy2")
        pid = await batch.reached("a", step)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: batch.texts("retrying"), "it is told", within_s=5)
        assert_gone(str(short_tmp / "work" / "a" / "held"), within_s=5)
        batch.let_go("a")
        await batch.reached("a", step, times=2)
        batch.let_go("b")
    assert batch.phases == {"a": "done", "b": "done"}
    assert "went away while it worked on this guest" in batch.texts("retrying")[0]
    # Another process went on, with what was kept.
    assert len({pid for _, _, pid in batch.calls("a")}) == 2
    assert batch.steps("a").count("convert") == (2 if step == "convert" else 1)
    assert batch.steps("a").count("reopen") == (0 if step == "convert" else 1)
    assert batch.steps("b").count("servers") == 1
    assert batch.records["a"].attempts == 2
    assert_in_order(batch.events, "b")
    assert_gone(str(short_tmp))


async def test_what_is_not_kept_is_converted_again(short_tmp: Path) -> None:
    batch = Batch(short_tmp)
    batch.guest("a", wait="copy1", lose="once")
    async with batch.opened() as cluster, anyio.create_task_group() as group:
        group.start_soon(batch.run, cluster)
        os.kill(await batch.reached("a", "copy1"), signal.SIGKILL)
        await batch.reached("a", "copy1", times=2)
        batch.let_go("a")
    assert batch.phases == {"a": "done"}
    assert "not there any more" in batch.texts("retrying")[1]
    steps = batch.steps("a")
    assert steps.count("reopen") == 1
    # Not tried again from what is not there.
    assert steps.index("abandon") > steps.index("reopen")
    assert steps.count("convert") == 2


async def test_who_has_come_to_its_end_can_not_be_cancelled(short_tmp: Path) -> None:
    batch = Batch(short_tmp)
    batch.guest("late", wait="finalized")
    batch.guest("early", wait="finalize")
    async with batch.opened() as cluster, anyio.create_task_group() as group:
        group.start_soon(batch.run, cluster)
        await batch.reached("late", "finalized")
        await batch.reached("early", "finalize")
        assert batch.runner is not None
        batch.runner.cancel("late")
        batch.runner.cancel("early")
    assert batch.phases == {"late": "done", "early": "cancelled"}
    assert batch.steps("late")[-2:] == ["no servers", "abandon"]
    assert not batch.texts("warning")


async def test_what_one_guest_meets_touches_no_other(short_tmp: Path) -> None:
    batch = Batch(short_tmp)
    batch.guest("cancelled", wait="copy1")
    batch.guest("served", wait="copy2")
    batch.guest("impossible", fail="prepare")
    batch.guest("fine", password="a password")
    async with batch.opened() as cluster, anyio.create_task_group() as group:
        group.start_soon(batch.run, cluster)
        await batch.reached("cancelled", "copy1")
        assert batch.runner is not None
        batch.runner.cancel("cancelled")
        await batch.reached("served", "copy2")
        (server,) = processes_naming(str(short_tmp / "work" / "served" / "held"))
        os.kill(int(server.partition(":")[0]), signal.SIGTERM)
        await batch.reached("served", "copy2", times=2)
        batch.let_go("served")
    assert batch.phases == {
        "cancelled": "cancelled",
        "served": "done",
        "impossible": "failed",
        "fine": "done",
    }
    # What runs is stopped, then the servers are, and only then is anything removed.
    assert batch.steps("cancelled")[-2:] == ["no servers", "abandon"]
    failure = batch.records["impossible"].failure
    assert failure is not None
    assert (failure.message, failure.hint, failure.step) == (
        "no operating system",
        "there is none",
        "prepare",
    )
    assert failure.is_permanent
    assert batch.steps("impossible")[-2:] == ["no servers", "abandon"]
    (retried,) = batch.texts("retrying")
    assert "the server in1 went away" in retried
    assert batch.steps("served").count("convert") == 1
    password = hashlib.sha256(b"a password").hexdigest()
    assert (short_tmp / "fine.digest").read_text() == password
    assert not batch.texts("warning")
    assert_gone(str(short_tmp))


async def test_a_rate_holds_for_all_workers_together(short_tmp: Path) -> None:
    batch = Batch(short_tmp)
    for name in ("a", "b"):
        batch.guest(name, wait="copy1")

    def last() -> dict[int, int]:
        lines = (short_tmp / "rates").read_text().splitlines()
        return {pid: rates.get("", 0) for pid, rates in map(json.loads, lines)}

    async with batch.opened() as cluster, anyio.create_task_group() as group:
        cluster.set_rates({"": 1000})
        group.start_soon(batch.run, cluster)
        pids = [await batch.reached(name, "copy1") for name in ("a", "b")]
        assert len(set(pids)) == 2
        halves = dict.fromkeys(pids, 500)
        await until(lambda: last() == halves, lambda: f"{last()} are {halves}", within_s=10)
        batch.let_go("a")
        await batch.reached("a", "no servers")
        batch.let_go("b")
    assert set(batch.phases.values()) == {"done"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_local_workers_end_with_their_supervisor(short_tmp: Path, number: signal.Signals) -> None:
    log = short_tmp / "supervisor.log"
    with log.open("wb") as output:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster_batch", str(short_tmp), "local:2", "30"],
            cwd=ROOT,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            batch = Batch(short_tmp)
            anyio.run(batch.reached, "a", "copy1")
            anyio.run(batch.reached, "b", "copy1")
            workers = {pid for _, _, pid in batch.calls()}
            assert len(workers) == 2
            if number is signal.SIGINT:
                os.killpg(supervisor.pid, number)  # as a terminal does
            else:
                supervisor.kill()
            status = supervisor.wait(30)
        finally:
            supervisor.kill()
    assert_gone(str(short_tmp), within_s=5)
    wait_until(
        lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers),
        "no workers are left",
        within_s=5,
    )
    if number is signal.SIGINT:
        assert status in (1, 130, -signal.SIGINT)
        for name in ("a", "b"):
            assert batch.steps(name)[-2:] == ["no servers", "suspend"]
        assert "distributed" not in log.read_text().replace("site-packages/distributed", "")
