"""The engine that the guests of a batch share: limits that hold together, rates, checkpoints."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import anyio
import anyio.abc
import pytest

from tests.integration.request_log import RequestLog, read_logs
from tests.integration.servers import MIB, digest, fragmented, serve
from tests.waiting import until
from v2v_async.copy.endpoint import Endpoint, nbd
from v2v_async.copy.engine import Engine, EngineLimits, copy_engine
from v2v_async.copy.job import CopyJob, DiskResult
from v2v_async.copy.step import copy_disk
from v2v_async.errors import CopyError, UsageError, V2VError
from v2v_async.events import Event, Reporter
from v2v_async.model import SourceDisk, SourceGuest
from v2v_async.options import CopyOptions
from v2v_async.server import Servers, running_servers
from v2v_async.units import KIB
from v2v_async.v2vdir import TargetExport, V2VDir

pytestmark = pytest.mark.anyio
LIMITS = EngineLimits(bytes_in_flight=64 * MIB, max_connections=16)
SLOW = ("rdelay=15ms", "wdelay=15ms")


@dataclass
class Guests:
    """Copies on an engine, each in a task of its own, and what became of them."""

    engine: Engine
    group: anyio.abc.TaskGroup
    events: list[Event] = field(default_factory=list)
    results: dict[str, DiskResult] = field(default_factory=dict)
    errors: dict[str, V2VError] = field(default_factory=dict)
    watch: Callable[[Event], None] = lambda event: None

    def begin(
        self,
        guest: str,
        job: CopyJob,
        options: CopyOptions = CopyOptions(),  # noqa: B008  # frozen
        groups: tuple[str, ...] = (),
    ) -> anyio.CancelScope:
        """Begin to copy a disk; return what cancels it."""
        scope = anyio.CancelScope()
        self.group.start_soon(self._copy, guest, job, options, groups, scope)
        return scope

    async def _copy(
        self,
        guest: str,
        job: CopyJob,
        options: CopyOptions,
        groups: tuple[str, ...],
        scope: anyio.CancelScope,
    ) -> None:
        reporter = Reporter(self._take, "t").for_guest(guest).for_step("copy")
        with scope:
            try:
                result = await self.engine.copy(job, options, reporter, groups=groups)
                self.results[f"{guest}-{job.index}"] = result
            except V2VError as error:
                self.errors[f"{guest}-{job.index}"] = error

    def _take(self, event: Event) -> None:
        self.events.append(event)
        self.watch(event)

    def landed(self, guest: str) -> int:
        """Return the bytes of a guest's first disk that were last said to have landed."""
        told = [e.bytes.landed for e in self.events if e.guest == guest and e.bytes is not None]
        return told[-1] if told else 0

    def last(self) -> dict[str, str]:
        """Return what was told last of each disk."""
        return {f"{event.guest}-{event.disk}": event.type for event in self.events}


async def serve_pair(
    servers: Servers, folder: Path, name: str, size: int, *words: str, filters: tuple[str, ...] = ()
) -> CopyJob:
    """Serve a disk of data and a target that forgets it; both log what they are asked."""
    ends = []
    for side, plugin in (("in", "pattern"), ("out", "null")):
        mine = [word for word in words if side == "in" or word.startswith(("rdelay", "wdelay"))]
        mine.append(f"logfile={folder}/{side}{name}.asked")
        used = ("log", *(each for each in filters if side == "in" or each == "delay"))
        server = await serve(
            servers, f"{side}{name}", folder, plugin, f"size={size}", *mine, filters=used
        )
        ends.append(nbd(server.endpoint))
    return CopyJob(1, ends[0], ends[1], is_known_zero=True)


async def serve_files(servers: Servers, name: str, source: Path, target: Path) -> CopyJob:
    with target.open("wb") as file:
        file.truncate(source.stat().st_size)
    folder = target.parent
    one = await serve(servers, f"in{name}", folder, "file", f"file={source}", read_only=True)
    two = await serve(servers, f"out{name}", folder, "file", f"file={target}")
    return CopyJob(1, nbd(one.endpoint), nbd(two.endpoint), is_known_zero=True)


def asked(folder: Path, *names: str, sides: tuple[str, ...] = ("in",)) -> RequestLog:
    return read_logs(*(folder / f"{side}{name}.asked" for name in names for side in sides))


async def test_disks_of_several_guests_arrive(short_tmp: Path) -> None:
    names = [f"{guest}{disk}" for guest in "abc" for disk in (1, 2)]
    sources = {
        name: fragmented(short_tmp / f"s{name}", 9 * MIB + at, seed=at)
        for at, name in enumerate(names)
    }
    async with running_servers(V2VDir(short_tmp)) as servers:
        jobs = {
            name: await serve_files(servers, name, source, short_tmp / f"t{name}")
            for name, source in sources.items()
        }
        async with copy_engine(LIMITS) as engine:
            async with anyio.create_task_group() as group:
                guests = Guests(engine, group)
                for name, job in jobs.items():
                    guests.begin(name[0], replace(job, index=int(name[1])))
            assert engine.budget.taken == 0
            assert 0 < engine.budget.most_taken <= LIMITS.bytes_in_flight
    assert guests.errors == {}
    assert set(guests.results) == {f"{name[0]}-{name[1]}" for name in names}
    assert set(guests.last().values()) == {"finished"}
    for name, source in sources.items():
        assert digest(short_tmp / f"t{name}") == digest(source)
        assert guests.results[f"{name[0]}-{name[1]}"].bytes.total == source.stat().st_size


async def test_connections_and_bytes_keep_to_the_limits(short_tmp: Path) -> None:
    """Eight disks that want more than there is: never more than 6 connections, nor than 3 MiB."""
    limits = EngineLimits(bytes_in_flight=3 * MIB, max_connections=6)
    names = [str(at) for at in range(8)]
    async with running_servers(V2VDir(short_tmp)) as servers:
        jobs = [
            await serve_pair(servers, short_tmp, name, 6 * MIB, *SLOW, filters=("delay",))
            for name in names
        ]
        async with copy_engine(limits) as engine:
            async with anyio.create_task_group() as group:
                guests = Guests(engine, group)
                for at, job in enumerate(jobs):
                    guests.begin(str(at), replace(job, max_connections=1 + at % 3))
            assert engine.budget.most_taken <= limits.bytes_in_flight
            assert engine.budget.taken == 0
    assert guests.errors == {}
    assert len(guests.results) == 8
    assert asked(short_tmp, *names).most_connections <= 6
    for at, name in enumerate(names):
        assert asked(short_tmp, name).most_connections <= 1 + at % 3
    in_flight = asked(short_tmp, *names, sides=("in", "out")).most_bytes()
    assert MIB <= in_flight <= limits.bytes_in_flight


async def test_less_than_a_request_for_each_is_kept(short_tmp: Path) -> None:
    limits = EngineLimits(bytes_in_flight=256 * KIB, max_connections=8)
    async with running_servers(V2VDir(short_tmp)) as servers:
        jobs = [
            await serve_pair(servers, short_tmp, str(at), 2 * MIB, *SLOW, filters=("delay",))
            for at in range(4)
        ]
        async with copy_engine(limits) as engine:
            async with anyio.create_task_group() as group:
                guests = Guests(engine, group)
                for at, job in enumerate(jobs):
                    guests.begin(str(at), replace(job, max_connections=2))
            assert engine.budget.most_taken <= limits.bytes_in_flight
    assert len(guests.results) == 4
    log = asked(short_tmp, *"0123", sides=("in", "out"))
    assert log.most_bytes() <= limits.bytes_in_flight
    assert {request.length for request in log.of("Read")} == {64 * KIB}


async def test_verifying_keeps_to_the_limit_too(short_tmp: Path) -> None:
    """Comparing needs two buffers for each request."""
    limits = EngineLimits(bytes_in_flight=2 * MIB, max_connections=4)
    source = fragmented(short_tmp / "s", 24 * MIB)
    async with running_servers(V2VDir(short_tmp)) as servers:
        job = await serve_files(servers, "1", source, short_tmp / "t")
        async with copy_engine(limits) as engine:
            with anyio.fail_after(60):
                options = CopyOptions(verify=True, digest="sha256")
                result = await engine.copy(job, options, quiet())
            assert engine.budget.most_taken <= limits.bytes_in_flight
    assert digest(short_tmp / "t") == digest(source)
    assert result.digest is not None


async def test_one_that_fails_touches_no_other(short_tmp: Path) -> None:
    bad = ("error-pread=EPERM", "error-pread-rate=100%")
    async with running_servers(V2VDir(short_tmp)) as servers:
        jobs = {
            "good": await serve_pair(servers, short_tmp, "good", 64 * MIB),
            "bad": await serve_pair(servers, short_tmp, "bad", MIB, *bad, filters=("error",)),
            "gone": CopyJob(1, nbd(str(short_tmp / "nobody")), Endpoint("null")),
        }
        async with copy_engine(LIMITS) as engine:
            async with anyio.create_task_group() as group:
                guests = Guests(engine, group)
                for name, job in jobs.items():
                    guests.begin(name, job, CopyOptions(retries=0))
            assert engine.budget.taken == 0
    assert set(guests.results) == {"good-1"}
    assert guests.results["good-1"].bytes.copied == 64 * MIB
    assert guests.last() == {"good-1": "finished", "bad-1": "failed", "gone-1": "failed"}
    assert guests.errors["bad-1"].disk == guests.errors["gone-1"].disk == 1
    assert guests.errors["bad-1"].offset is not None
    assert "EPERM" in guests.errors["bad-1"].message


async def test_one_that_is_cancelled_touches_no_other(short_tmp: Path) -> None:
    """It is in the middle, and one waits for its connections."""
    limits = EngineLimits(bytes_in_flight=16 * MIB, max_connections=4)
    async with running_servers(V2VDir(short_tmp)) as servers:
        jobs = {
            "long": await serve_pair(
                servers, short_tmp, "long", 1 << 40, "rdelay=5ms", filters=("delay",)
            ),
            "other": await serve_pair(servers, short_tmp, "other", 32 * MIB),
            "waits": await serve_pair(servers, short_tmp, "waits", 32 * MIB),
        }
        async with copy_engine(limits) as engine:
            async with anyio.create_task_group() as group:
                guests = Guests(engine, group)
                scope = guests.begin("long", replace(jobs["long"], max_connections=2))

                def cancel(event: Event) -> None:
                    if event.guest == "long" and event.bytes and event.bytes.landed:
                        assert "waits-1" not in guests.last()
                        scope.cancel()

                guests.begin("other", replace(jobs["other"], max_connections=2), groups=("g",))
                engine.set_rates({"g": MIB})
                await anyio.wait_all_tasks_blocked()
                guests.begin("waits", replace(jobs["waits"], max_connections=2))
                guests.watch = cancel
                await until(lambda: "waits-1" in guests.results, "the one that waits is copied")
                assert guests.last()["long-1"] == "cancelled"
                assert guests.last()["other-1"] in ("started", "progress")
                engine.set_rates({})
            assert engine.budget.taken == 0
        # All requests were answered, and all connections are closed: nothing is in flight.
        assert all(request.ended < 1 << 60 for request in asked(short_tmp, "long").requests)
    assert set(guests.results) == {"other-1", "waits-1"}
    assert guests.errors == {}


async def test_groups_have_their_rates_and_these_may_change(short_tmp: Path) -> None:
    """One to three, until the narrow one has 2 MB; then another ratio, then none."""
    async with running_servers(V2VDir(short_tmp)) as servers:
        jobs = {
            name: await serve_pair(servers, short_tmp, name, 256 * MIB) for name in ("a", "b", "c")
        }
        async with copy_engine(LIMITS) as engine:
            engine.set_rates({"slow": 1_000_000, "fast": 3_000_000})
            async with anyio.create_task_group() as group:
                guests = Guests(engine, group)
                marks: list[dict[str, int]] = []

                def mark(event: Event) -> None:
                    now = {name: guests.landed(name) for name in jobs}
                    if not marks and now["a"] > 2_000_000:
                        marks.append(now)
                        engine.set_rates({"slow": 3_000_000, "": 5_000_000})
                    elif len(marks) == 1 and sum(now.values()) > sum(marks[0].values()) + 9_000_000:
                        marks.append(now)
                        engine.set_rates({})

                guests.watch = mark
                guests.begin("a", replace(jobs["a"], max_connections=4), groups=("slow",))
                guests.begin("b", replace(jobs["b"], max_connections=1), groups=("fast",))
                guests.begin("c", replace(jobs["c"], max_connections=8), groups=("fast",))
            assert engine.budget.taken == 0
    assert len(guests.results) == 3
    first, second = marks
    assert 2.4 < (first["b"] + first["c"]) / first["a"] < 3.6
    # Fair among disks, whatever connections they have.
    assert 0.7 < first["b"] / first["c"] < 1.4
    later = {name: second[name] - first[name] for name in first}
    # The three have equal parts of the total now: none of them as much as its group may have.
    assert all(0.7 < 3 * amount / sum(later.values()) < 1.3 for amount in later.values()), later


async def test_a_rate_of_nothing_is_refused_and_changes_nothing() -> None:
    async with copy_engine(LIMITS) as engine:
        with pytest.raises(ValueError, match="no rate"):
            engine.set_rates({"a": 5, "b": 0})


async def test_a_copy_that_was_done_is_found_done(short_tmp: Path) -> None:
    source = fragmented(short_tmp / "s", 12 * MIB)
    options = CopyOptions(checkpoint=short_tmp / "ck")
    async with running_servers(V2VDir(short_tmp)) as servers, copy_engine(LIMITS) as engine:
        job = await serve_files(servers, "1", source, short_tmp / "t")
        first = await engine.copy(job, options, quiet())
        again = await engine.copy(job, options, quiet())
    assert digest(short_tmp / "t") == digest(source)
    assert first.bytes.resumed == 0
    assert first.bytes.landed == 12 * MIB
    assert (again.bytes.resumed, again.bytes.copied, again.bytes.zero) == (12 * MIB, 0, 0)
    assert '"is_complete":true' in (short_tmp / "ck/disk-1.json").read_text()


async def test_a_cancelled_copy_goes_on_where_it_was(short_tmp: Path) -> None:
    """The second engine copies little again: what was on its way, not what had landed."""
    source = short_tmp / "s"
    source.write_bytes(b"data" * (24 * MIB // 4))
    options = CopyOptions(checkpoint=short_tmp / "ck")
    async with running_servers(V2VDir(short_tmp)) as servers:
        job = await serve_files(servers, "1", source, short_tmp / "t")
        async with copy_engine(LIMITS) as engine:
            engine.set_rates({"": 24 * MIB})
            async with anyio.create_task_group() as group:
                guests = Guests(engine, group)
                scope = guests.begin("a", job, options)
                guests.watch = lambda event: (
                    scope.cancel() if event.bytes and event.bytes.landed > 12 * MIB else None
                )
            landed = guests.landed("a")
        async with copy_engine(LIMITS) as engine:
            result = await engine.copy(job, options, quiet())
    assert digest(short_tmp / "t") == digest(source)
    assert landed > 12 * MIB
    assert result.bytes.resumed + result.bytes.copied == 24 * MIB
    # 2 MiB may wait for a flush, and 0.25 s of the rate; 4 lanes had begun 1 MiB each.
    assert landed - result.bytes.resumed <= 12 * MIB
    assert result.bytes.resumed > 0


async def test_a_target_that_can_not_flush_is_copied_anew(short_tmp: Path) -> None:
    events: list[Event] = []
    options = CopyOptions(checkpoint=short_tmp / "ck")
    script = [f"get_size=echo {MIB}", "pread=exit 1", "pwrite=cat >/dev/null"]
    async with running_servers(V2VDir(short_tmp)) as servers, copy_engine(LIMITS) as engine:
        one = await serve(servers, "in1", short_tmp, "pattern", f"size={MIB}")
        two = await serve(
            servers, "out1", short_tmp, "eval", *script, "can_write=exit 0", "can_flush=exit 3"
        )
        job = CopyJob(1, nbd(one.endpoint), nbd(two.endpoint), is_known_zero=True)
        for _ in range(2):
            result = await engine.copy(job, options, Reporter(events.append, "t"))
            assert result.bytes.copied == MIB
    assert len([e for e in events if "can’t flush" in (e.text or "")]) == 2
    assert not (short_tmp / "ck/disk-1.json").exists()


async def test_a_checkpoint_is_for_one_at_a_time(short_tmp: Path) -> None:
    options = CopyOptions(checkpoint=short_tmp / "ck")
    async with running_servers(V2VDir(short_tmp)) as servers, copy_engine(LIMITS) as engine:
        job = await serve_pair(servers, short_tmp, "1", 64 * MIB)
        engine.set_rates({"": 1_000_000})
        async with anyio.create_task_group() as group:
            guests = Guests(engine, group)
            scope = guests.begin("a", job, options)
            guests.watch = lambda event: started.set() if event.type == "started" else None
            started = anyio.Event()
            await started.wait()
            with pytest.raises(CopyError, match="another run"):
                await engine.copy(job, options, quiet())
            scope.cancel()


async def test_what_can_not_be_shared_is_refused() -> None:
    job = CopyJob(3, Endpoint("stream"), Endpoint("null"))
    async with copy_engine(LIMITS) as engine:
        with pytest.raises(UsageError, match="disk 3"):
            await engine.copy(job, CopyOptions(), quiet())
        job = replace(job, source=Endpoint("null"))
        with pytest.raises(UsageError, match="disk 3"):
            await engine.copy(job, CopyOptions(copier="nbdcopy"), quiet())


async def test_an_engine_passes_on_what_its_block_raises() -> None:
    for error in (CopyError("mine"), ExceptionGroup("mine", [ValueError(), CopyError("one")])):
        with pytest.raises(type(error), match="mine") as caught:
            async with copy_engine(LIMITS):
                raise error
        assert caught.value is error


# A disk of a guest, as a batch copies it.


def guest_of(v2vdir: V2VDir, sizes: list[int]) -> SourceGuest:
    disks = [
        SourceDisk(index=at, source=f"disk{at}.img", format="raw", size=size)
        for at, size in enumerate(sizes, 1)
    ]
    v2vdir.update(targets=[TargetExport(index=at, is_known_zero=True) for at in (1, 2)])
    return SourceGuest(name="web", memory=1 << 30, vcpus=1, disks=disks)


async def test_a_disk_of_a_guest(v2vdir: V2VDir) -> None:
    source = fragmented(v2vdir.path / "s", 8 * MIB)
    target = v2vdir.path / "t"
    target.write_bytes(bytes(8 * MIB))
    guest = guest_of(v2vdir, [8 * MIB, 8 * MIB])
    log = v2vdir.path / "in2.asked"
    events: list[Event] = []
    async with running_servers(v2vdir) as servers, copy_engine(LIMITS) as engine:
        words = (f"file={source}", f"logfile={log}", *SLOW)
        await serve(servers, "in2", v2vdir.path, "file", *words, filters=("log", "delay"))
        await serve(servers, "out2", v2vdir.path, "file", f"file={target}")
        moved = await copy_disk(
            v2vdir, guest, 2, engine, CopyOptions(), Reporter(events.append, "t"), connections=2
        )
    assert digest(target) == digest(source)
    assert moved.landed == moved.total == 8 * MIB
    assert read_logs(log).most_connections <= 2
    assert {event.disk for event in events} == {2}
    said = v2vdir.log("copy", 2).read_text()
    assert "planned" in said
    assert "finished" in said
    assert "progress" not in said


async def test_a_disk_of_a_guest_that_fails(v2vdir: V2VDir) -> None:
    guest = guest_of(v2vdir, [MIB, MIB])
    async with copy_engine(LIMITS) as engine:
        with pytest.raises(V2VError, match="no target for disk 3"):
            await copy_disk(v2vdir, guest, 3, engine, CopyOptions(), quiet())
        v2vdir.log("input", 1).parent.mkdir(exist_ok=True)
        v2vdir.log("input", 1).write_text("nbdkit: error: the host has gone\n")
        with pytest.raises(V2VError) as caught:
            await copy_disk(v2vdir, guest, 1, engine, CopyOptions(retries=0), quiet())
    assert caught.value.disk == 1
    assert caught.value.log == v2vdir.log("copy", 1)
    assert caught.value.hint is not None


# Fifty at once.

SCRIPT = """
import sys, threading
import anyio
from v2v_async.copy.endpoint import Endpoint
from v2v_async.copy.engine import EngineLimits, copy_engine
from v2v_async.copy.job import CopyJob
from v2v_async.copy.endpoint import nbd
from v2v_async.events import Reporter
from v2v_async.options import CopyOptions

socket, count = sys.argv[1], int(sys.argv[2])
threads = []

async def main():
    limits = EngineLimits(bytes_in_flight=64 << 20, max_connections=64)
    async with copy_engine(limits) as engine, anyio.create_task_group() as group:
        for at in range(count):
            job = CopyJob(at + 1, nbd(socket), Endpoint("null"), max_connections=1)
            tell = Reporter(lambda event: threads.append(threading.active_count()), "t")
            group.start_soon(engine.copy, job, CopyOptions(), tell)
    assert engine.budget.taken == 0
    assert engine.budget.most_taken <= 64 << 20

anyio.run(main)
# Not ru_maxrss: that one begins with what the parent had when it started this process.
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")), max(threads))
"""


async def test_memory_does_not_grow_with_fifty_copies(short_tmp: Path) -> None:
    peaks = {}
    async with running_servers(V2VDir(short_tmp)) as servers:
        words = ("size=24M", "rdelay=5ms")
        one = await serve(servers, "in1", short_tmp, "pattern", *words, filters=("delay",))
        for count in (8, 50):
            command = [sys.executable, "-c", SCRIPT, one.endpoint, str(count)]
            done = await anyio.run_process(command, stderr=subprocess.STDOUT)
            peak, threads = (int(word) for word in done.stdout.split())
            peaks[count] = peak * KIB
            assert threads < 80
    assert peaks[50] < 200 * MIB
    # 1 MiB of buffers for each connection, which all of them together may fill.
    assert peaks[50] - peaks[8] < 64 * MIB


def quiet() -> Reporter:
    return Reporter(lambda event: None, "t")
