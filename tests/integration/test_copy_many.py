"""Many disks at once: order, connections, failures, and a rate that they share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import anyio
import pytest

from tests.integration.request_log import read_logs
from tests.integration.servers import MIB, digest, fragmented, serve
from v2v_async.copy.endpoint import nbd
from v2v_async.copy.schedule import CopyJob, DiskResult, copy_disks
from v2v_async.errors import CopyError, V2VError, VerifyError
from v2v_async.events import Event, Reporter
from v2v_async.options import CopyOptions
from v2v_async.server import Servers, running_servers
from v2v_async.units import KIB
from v2v_async.v2vdir import V2VDir

pytestmark = pytest.mark.anyio


async def serve_pair(
    servers: Servers, folder: Path, index: int, size: int, *faults: str, delay: str = ""
) -> CopyJob:
    """Serve a disk of data and a target that forgets; both log what they are asked."""
    ends = []
    for name, plugin in ((f"in{index}", "pattern"), (f"out{index}", "null")):
        filters, words = ["log"], [f"size={size}", f"logfile={folder}/{name}.asked"]
        if delay:
            filters.append("delay")
            words.append(f"delay-read={delay}")
        if faults and plugin == "pattern":
            filters.append("error")
            words += faults
        server = await serve(servers, name, folder, plugin, *words, filters=tuple(filters))
        ends.append(nbd(server.endpoint))
    return CopyJob(index, ends[0], ends[1], is_known_zero=True)


@pytest.mark.parametrize("parallel", [None, 1, 2, 4])
async def test_the_longest_first_and_never_too_many(short_tmp: Path, parallel: int | None) -> None:
    sizes = [3 * MIB, 1, 9 * MIB, 5 * MIB + 1, 9 * MIB, 4097]
    events: list[Event] = []
    async with running_servers(V2VDir(short_tmp)) as servers:
        jobs = [
            await serve_pair(servers, short_tmp, index, size) for index, size in enumerate(sizes, 1)
        ]
        results = await copy_disks(
            jobs, Reporter(events.append, "t"), CopyOptions(parallel=parallel)
        )
    assert [result.index for result in results] == [1, 2, 3, 4, 5, 6]
    assert [result.bytes.landed for result in results] == sizes
    started = [event.disk for event in events if event.type == "started"]
    assert started == [3, 5, 4, 1, 6, 2]
    running: set[int | None] = set()
    most = 0
    for event in events:
        if event.type == "started":
            running.add(event.disk)
            most = max(most, len(running))
        elif event.type == "finished":
            running.discard(event.disk)
    assert not running
    assert most == (parallel or len(sizes))


async def test_connections_add_up_and_are_handed_on(short_tmp: Path) -> None:
    """Three short disks and a long one: at the end the long one has all eight connections."""
    sizes = [8 * MIB, 8 * MIB, 8 * MIB, 256 * MIB]
    options = CopyOptions(max_connections=8, requests=2, request_size=256 * KIB)
    async with running_servers(V2VDir(short_tmp)) as servers:
        jobs = [
            await serve_pair(servers, short_tmp, index, size, delay="5ms")
            for index, size in enumerate(sizes, 1)
        ]
        await copy_disks(jobs, quiet(), options)
    sources = [short_tmp / f"in{index}.asked" for index in (1, 2, 3, 4)]
    together = read_logs(*sources)
    assert together.most_connections == 8
    assert together.most_bytes() <= 8 * 2 * 256 * KIB
    last = read_logs(sources[3])
    assert last.most_connections == 8
    # At first the others have one each, and it has what is left.
    begun = [request.connection for request in last.requests[:20] if request.op == "Read"]
    assert len(set(begun)) <= 5


async def test_connections_add_up_when_a_disk_is_admitted_late(short_tmp: Path) -> None:
    """A disk that has grown into all connections gives some back when another one begins."""
    sizes = [96 * MIB, 8 * MIB, 64 * MIB, 64 * MIB]
    options = CopyOptions(max_connections=6, parallel=2, requests=2, request_size=256 * KIB)
    async with running_servers(V2VDir(short_tmp)) as servers:
        jobs = [
            await serve_pair(servers, short_tmp, index, size, delay="5ms")
            for index, size in enumerate(sizes, 1)
        ]
        await copy_disks(jobs, quiet(), options)
    log = read_logs(*(short_tmp / f"in{index}.asked" for index in (1, 2, 3, 4)))
    # All are opened before the first byte moves: each of those that wait holds an idle one.
    assert log.most_connections <= 6 + 2
    assert log.most_bytes() <= 6 * 2 * 256 * KIB


BAD = ("error-pread=EPERM", "error-pread-rate=100%")


async def copy_some(
    folder: Path, bad: Sequence[int], options: CopyOptions, events: list[Event]
) -> list[DiskResult]:
    async with running_servers(V2VDir(folder)) as servers:
        jobs = [
            await serve_pair(servers, folder, index, 16 * MIB, *(BAD if index in bad else ()))
            for index in (1, 2, 3, 4)
        ]
        return await copy_disks(jobs, Reporter(events.append, "t"), options)


def outcomes(events: list[Event]) -> dict[int | None, str]:
    return {event.disk: event.type for event in events if event.disk is not None}


@pytest.mark.parametrize("parallel", [None, 1, 2])
async def test_the_others_finish_when_one_fails(short_tmp: Path, parallel: int | None) -> None:
    events: list[Event] = []
    options = CopyOptions(keep_going=True, parallel=parallel)
    with pytest.raises(CopyError, match="EPERM") as caught:
        await copy_some(short_tmp, [2], options, events)
    assert caught.value.disk == 2
    assert caught.value.offset is not None
    assert outcomes(events) == {1: "finished", 2: "failed", 3: "finished", 4: "finished"}
    failed = next(event for event in events if event.type == "failed")
    assert failed.disk == 2
    assert failed.bytes is not None
    assert failed.bytes.landed == 0


async def test_all_that_fail_are_told(short_tmp: Path) -> None:
    events: list[Event] = []
    async with running_servers(V2VDir(short_tmp)) as servers:
        jobs = [
            await serve_pair(servers, short_tmp, index, 16 * MIB, *(BAD if index in (2, 4) else ()))
            for index in (1, 2, 3, 4)
        ]
        # Caught in here: running_servers() tells only one of several reasons.
        with pytest.raises(ExceptionGroup, match="2 disks failed") as caught:
            await copy_disks(jobs, Reporter(events.append, "t"), CopyOptions(keep_going=True))
    found = caught.value.exceptions
    assert [error.disk for error in found if isinstance(error, V2VError)] == [2, 4]
    assert outcomes(events) == {1: "finished", 2: "failed", 3: "finished", 4: "failed"}


async def test_one_that_fails_stops_the_others(short_tmp: Path) -> None:
    events: list[Event] = []
    with pytest.raises(CopyError, match="EPERM") as caught:
        await copy_some(short_tmp, [2], CopyOptions(parallel=1), events)
    assert caught.value.disk == 2
    # Sizes are equal, so they are begun in order; those after it never are.
    assert outcomes(events) == {1: "finished", 2: "failed", 3: "planned", 4: "planned"}


async def test_a_disk_that_does_not_verify_is_named(short_tmp: Path) -> None:
    """The null target forgets a disk of data, but not one of zeroes."""
    events: list[Event] = []
    with pytest.raises(VerifyError) as caught:
        async with running_servers(V2VDir(short_tmp)) as servers:
            jobs = []
            for index, plugin in ((1, "null"), (2, "pattern"), (3, "null")):
                one = await serve(servers, f"in{index}", short_tmp, plugin, "size=4M")
                two = await serve(servers, f"out{index}", short_tmp, "null", "size=4M")
                jobs.append(CopyJob(index, nbd(one.endpoint), nbd(two.endpoint), True))
            options = CopyOptions(verify=True, keep_going=True)
            await copy_disks(jobs, Reporter(events.append, "t"), options)
    assert caught.value.disk == 2
    # The first word of a pattern is its offset: zero at the beginning of the disk only.
    assert caught.value.ranges == [(0, 4 * MIB)]
    assert outcomes(events) == {1: "finished", 2: "failed", 3: "finished"}


async def test_all_disks_have_their_own_digest(short_tmp: Path) -> None:
    disks = [fragmented(short_tmp / f"s{index}", 5 * MIB + index, seed=index) for index in (1, 2)]
    digests: list[list[str | None]] = []
    for order in (disks, disks[::-1]):
        async with running_servers(V2VDir(short_tmp)) as servers:
            jobs = []
            for index, source in enumerate(order, 1):
                sink = short_tmp / f"t{index}"
                with sink.open("wb") as file:
                    file.truncate(source.stat().st_size)
                one = await serve(servers, f"in{index}", short_tmp, "file", f"file={source}")
                two = await serve(servers, f"out{index}", short_tmp, "file", f"file={sink}")
                jobs.append(CopyJob(index, nbd(one.endpoint), nbd(two.endpoint), True))
            results = await copy_disks(jobs, quiet(), CopyOptions(digest="sha256"))
        digests.append([result.digest for result in results])
        assert [digest(short_tmp / f"t{index}") for index in (1, 2)] == [digest(d) for d in order]
    assert digests[0] == digests[1][::-1]
    assert len(set(digests[0])) == 2


# A rate.


class Meter:
    """Notes how many bytes of all disks had landed, and when."""

    def __init__(self, then: Callable[[int], None] = lambda landed: None) -> None:
        self.landed: dict[int | None, int] = {}
        self.marks: list[tuple[float, int]] = []
        self.then = then

    def __call__(self, event: Event) -> None:
        if event.bytes is None or event.disk is None:
            return
        self.landed[event.disk] = event.bytes.landed
        together = sum(self.landed.values())
        self.marks.append((time.monotonic(), together))
        self.then(together)

    def rates(self, seconds: float) -> list[float]:
        """Return bytes a second in every stretch of about ``seconds`` that lies in the copy."""
        whole = self.marks[-1][1]
        marks = [mark for mark in self.marks if 0 < mark[1] < whole]
        found = []
        for at, (began, before) in enumerate(marks):
            for ended, after in marks[at:]:
                if ended - began >= seconds:
                    found.append((after - before) / (ended - began))
                    break
        return found


async def test_two_disks_share_a_rate(short_tmp: Path) -> None:
    """Time is what is promised here: no more than the rate.

    15% leaves room for when it is looked; how much less it is depends on how busy the machine is.
    """
    rate = 8_000_000
    meter = Meter()
    async with running_servers(V2VDir(short_tmp)) as servers:
        jobs = [
            await serve_pair(servers, short_tmp, index, size)
            for index, size in ((1, 14 * MIB), (2, 16 * MIB))
        ]
        await copy_disks(jobs, Reporter(meter, "t"), CopyOptions(bandwidth=rate))
    rates = meter.rates(3.0)
    assert rates
    assert 0.7 * rate <= max(rates) <= 1.15 * rate
    # Both went on side by side: neither waited for the other one to end.
    half = next(at for at, mark in enumerate(meter.marks) if mark[1] > 15 * MIB)
    assert half > 5


async def test_a_rate_in_a_file_may_change(short_tmp: Path) -> None:
    """At the first rate it would take three hours; without one it takes a moment."""
    file = short_tmp / "rate"
    file.write_text("50kB/s\n")
    size = 512 * MIB
    seen: list[int] = []

    def change(landed: int) -> None:
        if landed and not seen:
            seen.append(landed)
            file.write_text("unlimited\n")

    async with running_servers(V2VDir(short_tmp)) as servers:
        jobs = [await serve_pair(servers, short_tmp, index, size // 2) for index in (1, 2)]
        options = CopyOptions(bandwidth_file=file)
        with anyio.fail_after(60):
            results = await copy_disks(jobs, Reporter(Meter(change), "t"), options)
    assert sum(result.bytes.landed for result in results) == size
    assert seen[0] < MIB


async def test_a_rate_that_is_not_understood_is_told_once(short_tmp: Path) -> None:
    file = short_tmp / "rate"
    file.write_text("50kB/s\n")
    texts: list[str | None] = []

    def watch(event: Event) -> None:
        if event.type == "warning":
            texts.append(event.text)
            file.write_text("unlimited\n")
        elif event.bytes is not None and event.bytes.landed and not texts:
            file.write_text("fast\n")

    async with running_servers(V2VDir(short_tmp)) as servers:
        job = await serve_pair(servers, short_tmp, 1, 64 * MIB)
        with anyio.fail_after(60):
            await copy_disks([job], Reporter(watch, "t"), CopyOptions(bandwidth_file=file))
    assert len(texts) == 1
    assert "‘fast’" in (texts[0] or "")


def quiet() -> Reporter:
    return Reporter(lambda event: None, "t")
