"""Limits, counted where they matter: at the servers, in the buffers and in the process."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest

from tests.integration.request_log import RequestLog, read_logs
from tests.integration.servers import MIB, digest, fragmented, serve
from v2v_async.copy import engine, schedule
from v2v_async.copy.endpoint import nbd
from v2v_async.copy.geometry import LARGEST_REQUEST, REQUEST_SIZE
from v2v_async.copy.schedule import CopyJob, copy_disks
from v2v_async.copy.shares import Budget
from v2v_async.copy.worker import Worker
from v2v_async.events import Event, Reporter
from v2v_async.options import CopyOptions
from v2v_async.server import Servers, running_servers
from v2v_async.units import KIB
from v2v_async.v2vdir import V2VDir

pytestmark = pytest.mark.anyio
# Long enough that all requests that may be on their way are so at the same time; where servers are
# near, lanes do not use all that they may (copy/blocking.py).
SLOW = ("rdelay=15ms", "wdelay=15ms")
MEMORY_LIMIT = 200 * MIB


@dataclass
class Asked:
    """What the servers of both sides were asked."""

    source: RequestLog
    target: RequestLog
    both: RequestLog


async def logged_pair(servers: Servers, folder: Path, index: int, size: int) -> CopyJob:
    """Serve a slow disk of data and a slow target; both log what they are asked."""
    ends = []
    for name, plugin in ((f"in{index}", "pattern"), (f"out{index}", "null")):
        words = (f"size={size}", *SLOW, f"logfile={folder}/{name}.asked")
        server = await serve(servers, name, folder, plugin, *words, filters=("log", "delay"))
        ends.append(nbd(server.endpoint))
    return CopyJob(index, ends[0], ends[1], is_known_zero=True)


async def copy_slow(folder: Path, options: CopyOptions, *, disks: int = 1, size: int) -> Asked:
    """Copy disks of data between servers that take 5 ms for an answer."""
    async with running_servers(V2VDir(folder)) as servers:
        jobs = [await logged_pair(servers, folder, at + 1, size) for at in range(disks)]
        results = await copy_disks(jobs, quiet(), options)
    assert [result.bytes.copied for result in results] == [size] * disks
    source, target = (
        [folder / f"{side}{at + 1}.asked" for at in range(disks)] for side in ("in", "out")
    )
    return Asked(read_logs(*source), read_logs(*target), read_logs(*source, *target))


@pytest.mark.parametrize(
    ("options", "depth"),
    [
        (CopyOptions(connections=1, requests=1, request_size=256 * KIB), 1),
        (CopyOptions(connections=2, requests=3, request_size=256 * KIB), 3),
        (CopyOptions(connections=4, requests=8, request_size=128 * KIB), 8),
        (CopyOptions(connections=2, request_size=256 * KIB, queue_size=MIB), 4),
        (CopyOptions(connections=2, requests=8, request_size=256 * KIB, queue_size=512 * KIB), 2),
        (CopyOptions(connections=2, request_size=256 * KIB, queue_size=1), 1),
        (CopyOptions(max_connections=3, requests=2, request_size=64 * KIB), 2),
    ],
    ids=["1x1", "2x3", "4x8", "queue", "queue-and-requests", "small-queue", "max"],
)
async def test_requests_and_connections_keep_to_the_options(
    short_tmp: Path, options: CopyOptions, depth: int
) -> None:
    lanes = options.connections or options.max_connections
    assert lanes is not None
    assert options.request_size is not None
    # About 24 requests for each of those that may be on their way.
    size = min(24 * lanes * depth * options.request_size, 48 * MIB)
    asked = await copy_slow(short_tmp, options, size=max(size, 12 * lanes * MIB))
    assert asked.source.most_connections == lanes
    # One more flushes and proves that it is the same server (copy/driver.py, the witness).
    assert asked.target.most_connections <= lanes + 1
    for log in (asked.source, asked.target):
        assert log.most_at_once() <= depth
        assert {r.length for r in log.of("Read", "Write")} == {options.request_size}
    assert asked.source.most_at_once() >= min(depth, 4), "the limit was not reached"
    in_flight = asked.both.most_bytes()
    assert in_flight <= lanes * depth * options.request_size
    assert in_flight >= lanes * depth * options.request_size // 2, "the limit was not reached"


async def test_all_disks_together_keep_to_max_connections(short_tmp: Path) -> None:
    options = CopyOptions(max_connections=4, requests=2, request_size=128 * KIB)
    asked = await copy_slow(short_tmp, options, disks=4, size=8 * MIB)
    assert asked.source.most_connections == 4
    assert asked.source.most_at_once() <= 2
    assert asked.both.most_bytes() <= 4 * 2 * 128 * KIB


@pytest.mark.parametrize(
    "options",
    [
        CopyOptions(),
        CopyOptions(requests=64, request_size=MIB),
        CopyOptions(connections=8, requests=64),
        CopyOptions(request_size=32 * MIB),
    ],
    ids=["default", "deep", "wide", "large"],
)
async def test_buffers_keep_to_the_budget(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch, options: CopyOptions
) -> None:
    budgets: list[Budget] = []

    def make(limit: int) -> Budget:
        budgets.append(Budget(limit))
        return budgets[-1]

    monkeypatch.setattr(engine, "Budget", make)
    await copy_slow(short_tmp, options, disks=3, size=64 * MIB)
    assert budgets[0].limit == schedule.MAX_BYTES_IN_FLIGHT
    # Each lane has one buffer whatever the others hold, or it might wait for ever.
    first_ones = engine.MAX_LANES * (options.request_size or LARGEST_REQUEST)
    assert MIB < budgets[0].most_taken < schedule.MAX_BYTES_IN_FLIGHT + first_ones
    assert budgets[0].taken == 0


async def test_a_small_budget_is_kept(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "MAX_BYTES_IN_FLIGHT", 4 * MIB)
    options = CopyOptions(connections=2, requests=16, request_size=512 * KIB)
    asked = await copy_slow(short_tmp, options, disks=2, size=48 * MIB)
    # Without it 32 MiB may be on their way; with it 4, and a first buffer for each of 4 lanes.
    assert 3 * MIB <= asked.both.most_bytes() <= 6 * MIB


@pytest.mark.parametrize(
    ("options", "most"),
    [
        (CopyOptions(), engine.MAX_THREADS),
        (CopyOptions(threads=1), 1),
        (CopyOptions(threads=3), 3),
        (CopyOptions(threads=1000), engine.MAX_LANES),
        (CopyOptions(synchronous=True), 1),
    ],
    ids=["default", "one", "three", "too-many", "synchronous"],
)
async def test_threads(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch, options: CopyOptions, most: int
) -> None:
    polling: set[int] = set()
    seen: list[int] = []

    class Counted(Worker):
        def run(self) -> None:
            polling.add(threading.get_ident())
            seen.append(len(polling))
            try:
                super().run()
            finally:
                polling.discard(threading.get_ident())

    monkeypatch.setattr(engine, "Worker", Counted)
    threads: list[int] = []
    async with running_servers(V2VDir(short_tmp)) as servers:
        jobs = [await logged_pair(servers, short_tmp, at, 8 * MIB) for at in (1, 2, 3, 4)]
        # Python 3.11 waits for each of the servers in a thread.
        before = threading.active_count()
        await copy_disks(
            jobs, Reporter(lambda e: threads.append(threading.active_count()), "t"), options
        )
    assert max(seen) == most
    assert not polling
    # Beside those that poll, one for each lane that does not, and a few of the event loop's that
    # connect and flush: one for each disk.
    assert max(threads) - before <= most + engine.MAX_LANES + len(jobs) + 2


async def test_synchronous_is_one_request_at_a_time_in_order(short_tmp: Path) -> None:
    source = fragmented(short_tmp / "s", 12 * MIB)
    target = short_tmp / "t"
    target.write_bytes(b"\xaa" * (12 * MIB))
    logs = []
    async with running_servers(V2VDir(short_tmp)) as servers:
        ends = []
        for name, path in (("in1", source), ("out1", target)):
            logs.append(short_tmp / f"{name}.asked")
            words = (f"file={path}", *SLOW, f"logfile={logs[-1]}")
            server = await serve(servers, name, short_tmp, "file", *words, filters=("log", "delay"))
            ends.append(nbd(server.endpoint))
        options = CopyOptions(synchronous=True, connections=8, requests=64)
        await copy_disks([CopyJob(1, ends[0], ends[1])], quiet(), options)
    assert digest(target) == digest(source)
    for log in (read_logs(path) for path in logs):
        moves = log.of("Read", "Write", "Zero", failed=True)
        assert log.most_connections == 1
        assert [request.offset for request in moves] == sorted(request.offset for request in moves)
    both = read_logs(*logs).of("Read", "Write", failed=True)
    assert len(both) > 20
    assert all(one.ended < other.began for one, other in pairwise(both))


@dataclass(frozen=True)
class Sizes:
    """What a server says of its block sizes."""

    minimum: int = 1
    preferred: int = 4096
    maximum: int = 32 * MIB

    @property
    def words(self) -> tuple[str, ...]:
        return (
            f"blocksize-minimum={self.minimum}",
            f"blocksize-preferred={self.preferred}",
            f"blocksize-maximum={self.maximum}",
            "blocksize-error-policy=error",
        )


PLAIN = Sizes()


@pytest.mark.parametrize(
    ("source", "target", "request_size", "largest"),
    [
        (PLAIN, PLAIN, None, REQUEST_SIZE),
        (PLAIN, PLAIN, 100_000, 100_000),
        (PLAIN, PLAIN, 100_001, 100_001),
        (PLAIN, replace(PLAIN, minimum=4096), 100_000, 24 * 4096),
        (replace(PLAIN, minimum=512), PLAIN, 100_000, 195 * 512),
        (replace(PLAIN, minimum=512), replace(PLAIN, minimum=4096), 100_000, 24 * 4096),
        (PLAIN, replace(PLAIN, maximum=64 * KIB), None, 64 * KIB),
        (replace(PLAIN, maximum=64 * KIB), PLAIN, None, 64 * KIB),
        (PLAIN, Sizes(4096, 4096, 12288), None, 12288),
        (PLAIN, Sizes(64 * KIB, 64 * KIB, 32 * MIB), 4096, 64 * KIB),
        (Sizes(64 * KIB, 64 * KIB, 64 * KIB), PLAIN, None, 64 * KIB),
        (PLAIN, Sizes(1, 4 * MIB, 32 * MIB), None, 4 * MIB),
        (PLAIN, PLAIN, 8 * MIB, 8 * MIB),
        (PLAIN, replace(PLAIN, maximum=2 * MIB), 8 * MIB, 2 * MIB),
    ],
)
@pytest.mark.parametrize("zeroes", ["zeroes", "none"])
async def test_requests_keep_to_the_block_sizes(
    short_tmp: Path,
    source: Sizes,
    target: Sizes,
    request_size: int | None,
    largest: int,
    zeroes: str,
) -> None:
    size = 17 * MIB + 64 * KIB
    content = fragmented(short_tmp / "s", size)
    with content.open("r+b") as file:
        file.write(b"!" * (9 * MIB))
    sink = short_tmp / "t"
    sink.write_bytes(b"\xaa" * size)
    ends = []
    async with running_servers(V2VDir(short_tmp)) as servers:
        for name, path, sizes in (("in1", content, source), ("out1", sink, target)):
            log = f"logfile={short_tmp}/{name}.asked"
            filters = ["log", "blocksize-policy"]
            if name == "out1" and zeroes == "none":
                filters.append("nozero")
            words = (f"file={path}", log, *sizes.words)
            server = await serve(servers, name, short_tmp, "file", *words, filters=tuple(filters))
            ends.append(nbd(server.endpoint))
        await copy_disks(
            [CopyJob(1, ends[0], ends[1])], quiet(), CopyOptions(request_size=request_size)
        )
    assert digest(sink) == digest(content)
    for name, sizes in (("in1", source), ("out1", target)):
        asked = read_logs(short_tmp / f"{name}.asked").of("Read", "Write", "Zero", failed=True)
        assert not [request for request in asked if request.error]
        for request in asked:
            assert request.offset % sizes.minimum == 0
            assert request.length % sizes.minimum == 0
            assert 0 < request.length <= sizes.maximum
        moved = [request.length for request in asked if request.op != "Zero"]
        assert max(moved) == largest


SCRIPT = """
import sys
import anyio
from v2v_async.copy.endpoint import nbd
from v2v_async.copy.schedule import CopyJob, copy_disks
from v2v_async.events import Reporter

sockets = sys.argv[1:]
jobs = [
    CopyJob(at // 2 + 1, nbd(sockets[at]), nbd(sockets[at + 1]), True)
    for at in range(0, len(sockets), 2)
]
anyio.run(copy_disks, jobs, Reporter(lambda event: None, "t"))
# Not ru_maxrss: that one begins with what the parent had when it started this process.
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


@pytest.mark.parametrize(
    ("size", "filters", "words"),
    [(96 * MIB, (), ()), (32 * MIB, ("delay",), ("rdelay=30ms",))],
    ids=["fast", "slow"],
)
async def test_memory_of_sixteen_disks_at_once(
    short_tmp: Path, size: int, filters: tuple[str, ...], words: tuple[str, ...]
) -> None:
    import anyio

    async with running_servers(V2VDir(short_tmp)) as servers:
        sockets = []
        for index in range(1, 17):
            one = await serve(
                servers, f"in{index}", short_tmp, "pattern", f"size={size}", *words, filters=filters
            )
            two = await serve(servers, f"out{index}", short_tmp, "null", f"size={size}")
            sockets += [one.endpoint, two.endpoint]
        command = [sys.executable, "-c", SCRIPT, *sockets]
        done = await anyio.run_process(command, stderr=subprocess.STDOUT)
    peak = int(done.stdout) * KIB
    assert 20 * MIB < peak < MEMORY_LIMIT


def quiet() -> Reporter:
    def ignore(event: Event) -> None:
        pass

    return Reporter(ignore, "t")
