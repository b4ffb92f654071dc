"""Servers that die or hang under one guest of several, and a supervisor that is killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import anyio
import pytest

from tests.fault.restarting import Restarting, nbdkit
from tests.integration.request_log import read_logs
from tests.integration.servers import MIB, digest
from tests.integration.test_copy_engine import Guests
from tests.waiting import until, wait_until
from v2v_async.copy.endpoint import nbd
from v2v_async.copy.engine import EngineLimits, copy_engine
from v2v_async.copy.job import CopyJob
from v2v_async.copy.remembering import most_unflushed
from v2v_async.events import Event
from v2v_async.options import CopyOptions

pytestmark = pytest.mark.anyio
LIMITS = EngineLimits(bytes_in_flight=16 * MIB, max_connections=8)
SIZE = 48 * MIB


def reader(folder: Path, name: str, size: int = SIZE) -> Restarting:
    socket = folder / f"in{name}"
    return Restarting(nbdkit(socket, "--readonly", "pattern", f"size={size}"), socket)


def job(server: Restarting, target: Path) -> CopyJob:
    with target.open("wb") as file:
        file.truncate(SIZE)
    from v2v_async.copy.endpoint import Endpoint

    return CopyJob(1, nbd(server.uri), Endpoint("file", str(target)), True, max_connections=2)


async def test_a_server_that_dies_fails_its_guest_alone(short_tmp: Path) -> None:
    async with reader(short_tmp, "a") as dies, reader(short_tmp, "b") as lives:
        async with copy_engine(LIMITS) as engine:
            engine.set_rates({"": SIZE})
            async with anyio.create_task_group() as group:
                guests = Guests(engine, group)

                def kill(event: Event) -> None:
                    if event.guest == "a" and event.bytes and event.bytes.landed and dies.is_alive:
                        dies.kill()
                        engine.set_rates({})

                guests.watch = kill
                guests.begin("a", job(dies, short_tmp / "ta"), CopyOptions(retries=1))
                guests.begin("b", job(lives, short_tmp / "tb"), CopyOptions(retries=0))
            assert engine.budget.taken == 0
    assert guests.last() == {"a-1": "failed", "b-1": "finished"}
    assert guests.errors["a-1"].disk == 1
    assert guests.results["b-1"].bytes.copied == SIZE
    assert [event.guest for event in guests.events if event.type == "retrying"] == ["a"]


async def test_a_server_that_hangs_holds_up_its_guest_alone(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("worker", "driver", "opening"):
        monkeypatch.setattr(f"v2v_async.copy.{module}.DRAIN_S", 0.5)
    async with reader(short_tmp, "a") as hangs, reader(short_tmp, "b") as lives:
        assert hangs._process is not None
        pid = hangs._process.pid
        async with copy_engine(LIMITS) as engine:
            engine.set_rates({"slow": SIZE // 4})
            async with anyio.create_task_group() as group:
                guests = Guests(engine, group)

                def stop(event: Event) -> None:
                    if event.guest == "a" and event.bytes and event.bytes.landed:
                        os.kill(pid, signal.SIGSTOP)

                guests.watch = stop
                try:
                    scope = guests.begin(
                        "a", job(hangs, short_tmp / "ta"), CopyOptions(), ("slow",)
                    )
                    await until(lambda: guests.landed("a"), "a’s copy has begun")
                    guests.begin("b", job(lives, short_tmp / "tb"))
                    await until(lambda: "b-1" in guests.results, "b is copied")
                    assert engine.budget.taken > 0
                    scope.cancel()
                    await until(lambda: guests.last()["a-1"] == "cancelled", "a has ended")
                    await until(lambda: not engine.budget.taken, "what it had taken is given back")
                finally:
                    os.kill(pid, signal.SIGCONT)
    assert guests.errors == {}
    assert guests.results["b-1"].bytes.copied == SIZE


# A supervisor that is killed.

DISKS, DISK = 2, 96 * MIB
KILLS = 8
PROGRAM = """
import sys
from pathlib import Path
import anyio
from v2v_async.copy.endpoint import nbd
from v2v_async.copy.engine import EngineLimits, copy_engine
from v2v_async.copy.job import CopyJob
from v2v_async.events import Reporter
from v2v_async.options import CopyOptions

folder, rate = Path(sys.argv[1]), int(sys.argv[2])

async def main():
    limits = EngineLimits(bytes_in_flight=64 << 20, max_connections=16)
    async with copy_engine(limits) as engine, anyio.create_task_group() as group:
        engine.set_rates({"": rate} if rate else {})
        for at in range((len(sys.argv) - 3) // 2):
            source, target = sys.argv[3 + 2 * at : 5 + 2 * at]
            job = CopyJob(at + 1, nbd(source), nbd(target), True, max_connections=4)
            options = CopyOptions(checkpoint=folder / f"ck{at}")
            group.start_soon(engine.copy, job, options, Reporter(lambda event: None, "t"))

anyio.run(main)
"""


@contextmanager
def supervisor(folder: Path, rate: int, ends: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), str(rate), *ends],
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def written(logs: list[Path]) -> int:
    """Return how many bytes the targets were asked to write."""
    return sum(log.read_text().count(" Write ") for log in logs) * (DISK // DISK_REQUESTS)


DISK_REQUESTS = 192  # of 512 KiB


async def test_a_killed_supervisor_copies_little_again(short_tmp: Path) -> None:
    """What is repeated is bounded by bytes for each kill and disk, and far less as a rule."""
    sources, targets, logs, servers = [], [], [], []
    for at in range(DISKS):
        source, target, log = (short_tmp / f"{name}{at}" for name in ("s", "t", "asked"))
        source.write_bytes(random.Random(at).randbytes(DISK))
        with target.open("wb") as file:
            file.truncate(DISK)
        log.touch()
        one, two = short_tmp / f"in{at}", short_tmp / f"out{at}"
        servers += [
            Restarting(nbdkit(one, "--readonly", "file", f"file={source}"), one, is_kept=True),
            Restarting(
                nbdkit(
                    two,
                    "--filter=log",
                    "file",
                    f"file={target}",
                    f"logfile={log}",
                    "logappend=true",
                ),
                two,
                is_kept=True,
            ),
        ]
        sources.append(source)
        targets.append(target)
        logs.append(log)
    ends = [server.uri for server in servers]
    noise = random.Random(7)
    async with servers[0], servers[1], servers[2], servers[3]:
        for _ in range(KILLS):
            before = written(logs)
            enough = noise.randrange(4 * MIB, 32 * MIB)
            with supervisor(short_tmp, 64 * MIB, ends) as process:
                wait_until(
                    partial(lambda least: written(logs) >= least, before + enough),
                    f"{enough} bytes more are written",
                    of=process,
                )
                assert process.poll() is None, process.communicate()
            for server in servers:
                await server.up()
        with supervisor(short_tmp, 0, ends) as process:
            _, said = process.communicate(timeout=60)
            assert process.returncode == 0, said
        # Everything is known to be there now: nothing is copied any more.
        total = written(logs)
        with supervisor(short_tmp, 0, ends) as process:
            process.communicate(timeout=60)
            assert process.returncode == 0
        assert written(logs) == total
    for source, target in zip(sources, targets, strict=True):
        assert digest(source) == digest(target)
    for log in logs:
        assert {request.length for request in read_logs(log).of("Write")} == {512 * 1024}
    again = total - DISKS * DISK
    _, most = most_unflushed(DISK)
    assert again <= KILLS * DISKS * 2 * most
    # A quarter of a second at the rate, a flush, and half of what four lanes had begun.
    assert again <= KILLS * DISKS * 12 * MIB
