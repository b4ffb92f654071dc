"""What goes wrong in the middle of a copy: each row says the outcome, and nothing is left."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import anyio
import pytest

from tests.integration.servers import MIB, digest, fragmented, serve
from tests.waiting import until
from v2v_async.copy.endpoint import nbd
from v2v_async.copy.schedule import CopyJob, copy_disks
from v2v_async.errors import CopyError, ServerExitedError, V2VError
from v2v_async.events import Event, Reporter
from v2v_async.server import running_servers
from v2v_async.v2vdir import V2VDir

pytestmark = pytest.mark.anyio


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that hangs, and will for ever, is waited for only a second."""
    for module in ("worker", "opening", "driver"):
        monkeypatch.setattr(f"v2v_async.copy.{module}.DRAIN_S", 1.0)


@pytest.mark.parametrize(
    ("side", "fault", "code", "said"),
    [
        ("in1", ["error-pread=EIO", "error-pread-rate=100%"], "EIO", "reading"),
        ("out1", ["error-pwrite=ENOSPC", "error-pwrite-rate=100%"], "ENOSPC", "writing"),
        ("out1", ["error-pwrite=EPERM", "error-pwrite-rate=60%"], "EPERM", "writing"),
        ("out1", ["error-zero=EIO", "error-zero-rate=100%"], "EIO", "ing of"),
    ],
)
async def test_a_request_that_fails_names_disk_and_offset(
    short_tmp: Path, side: str, fault: list[str], code: str, said: str
) -> None:
    source = fragmented(short_tmp / "s", 64 * MIB)
    with pytest.raises(CopyError, match=code) as caught:
        async with running_servers(V2VDir(short_tmp)) as servers:
            in_faults = fault if side == "in1" else []
            out_faults = fault if side == "out1" else []
            one = await serve(
                servers,
                "in1",
                short_tmp,
                "file",
                f"file={source}",
                *in_faults,
                filters=("error",) if in_faults else (),
            )
            two = await serve(
                servers,
                "out1",
                short_tmp,
                "memory",
                "size=64M",
                *out_faults,
                filters=("error",) if out_faults else (),
            )
            await copy_disks([CopyJob(2, nbd(one.endpoint), nbd(two.endpoint))], quiet([]))
    assert caught.value.disk == 2
    assert caught.value.offset is not None
    assert said in str(caught.value)


async def test_extents_that_can_not_be_had_are_data(short_tmp: Path) -> None:
    source = fragmented(short_tmp / "s", 20 * MIB)
    sink = short_tmp / "t"
    with sink.open("wb") as file:
        file.truncate(20 * MIB)
    async with running_servers(V2VDir(short_tmp)) as servers:
        one = await serve(
            servers,
            "in1",
            short_tmp,
            "file",
            f"file={source}",
            "error-extents=EIO",
            "error-extents-rate=100%",
            filters=("error",),
        )
        two = await serve(servers, "out1", short_tmp, "file", f"file={sink}")
        await copy_disks([CopyJob(1, nbd(one.endpoint), nbd(two.endpoint), True)], quiet([]))
    assert digest(sink) == digest(source)


async def test_a_full_disk(short_tmp: Path) -> None:
    """nbdkit's full plugin reads as zeroes and has no room for anything."""
    source = fragmented(short_tmp / "s", 20 * MIB)
    with pytest.raises(CopyError, match="ENOSPC"):
        async with running_servers(V2VDir(short_tmp)) as servers:
            one = await serve(servers, "in1", short_tmp, "file", f"file={source}")
            two = await serve(servers, "out1", short_tmp, "full", "size=20M")
            await copy_disks([CopyJob(1, nbd(one.endpoint), nbd(two.endpoint), True)], quiet([]))


@pytest.mark.parametrize("victim", ["in1", "out1"])
async def test_a_server_killed_in_mid_copy_is_the_reason(short_tmp: Path, victim: str) -> None:
    events: list[Event] = []
    with pytest.raises(ServerExitedError, match=f"{victim} .*SIGKILL"):
        async with running_servers(V2VDir(short_tmp)) as servers:
            # Large enough to be in the middle: it copies until it is killed.
            one = await serve(
                servers, "in1", short_tmp, "pattern", "size=1T", "rdelay=20ms", filters=("delay",)
            )
            two = await serve(servers, "out1", short_tmp, "null", "size=1T")
            dies = one if victim == "in1" else two

            def watch(event: Event) -> None:
                is_first = not any(e.bytes is not None and e.bytes.landed > 0 for e in events)
                events.append(event)
                if event.bytes is not None and event.bytes.landed > 0 and is_first:
                    os.kill(dies.process.pid, signal.SIGKILL)

            await copy_disks(
                [CopyJob(1, nbd(one.endpoint), nbd(two.endpoint), True)], Reporter(watch, "t")
            )
    assert events[-1].type in ("failed", "cancelled")
    assert events[-1].bytes is not None
    assert events[-1].bytes.landed < 1 << 40


async def test_a_cancelled_copy_drains_and_leaves_the_servers_well(short_tmp: Path) -> None:
    """nbdkit 1.32 aborts when a client vanishes with requests in flight: we must not."""
    events: list[Event] = []
    async with running_servers(V2VDir(short_tmp)) as servers:
        one = await serve(
            servers, "in1", short_tmp, "pattern", "size=1G", "rdelay=250ms", filters=("delay",)
        )
        two = await serve(servers, "out1", short_tmp, "null", "size=1G")
        with anyio.CancelScope() as scope:

            def watch(event: Event) -> None:
                events.append(event)
                if event.bytes is not None and event.bytes.landed > 0:
                    scope.cancel()

            await copy_disks(
                [CopyJob(1, nbd(one.endpoint), nbd(two.endpoint), True)], Reporter(watch, "t")
            )
        assert scope.cancelled_caught
        assert one.process.returncode is None
        assert two.process.returncode is None
        again = await copy_disks(
            [CopyJob(1, nbd(two.endpoint), nbd(two.endpoint), True)], quiet([])
        )
        assert again[0].bytes.landed == 1 << 30
    assert events[-1].type == "cancelled"


@pytest.mark.usefixtures("impatient")
async def test_a_server_that_hangs_does_not_hold_a_cancelled_copy(short_tmp: Path) -> None:
    async with running_servers(V2VDir(short_tmp)) as servers:
        one = await serve(servers, "in1", short_tmp, "pattern", "size=1G")
        two = await serve(servers, "out1", short_tmp, "null", "size=1G")

        def watch(event: Event) -> None:
            if event.type == "started":
                os.kill(one.process.pid, signal.SIGSTOP)
                scope.cancel()

        with anyio.fail_after(60), anyio.CancelScope() as scope:
            await copy_disks(
                [CopyJob(1, nbd(one.endpoint), nbd(two.endpoint), True)], Reporter(watch, "t")
            )
        assert scope.cancelled_caught
        os.kill(one.process.pid, signal.SIGCONT)


@pytest.mark.usefixtures("impatient")
async def test_an_error_beside_a_connection_that_hangs_still_ends(short_tmp: Path) -> None:
    """One lane is told EIO while another waits for an answer that never comes."""
    # A read in the first chunk never ends; the lanes that have the others are told an error.
    answer = 'if [ "$4" -lt 4194304 ]; then sleep 1000; else echo EIO >&2; exit 1; fi'
    with pytest.raises(CopyError, match="EIO"), anyio.fail_after(60):
        async with running_servers(V2VDir(short_tmp)) as servers:
            one = await serve(
                servers,
                "in1",
                short_tmp,
                "eval",
                "get_size=echo 512M",
                f"pread={answer}",
                "can_multi_conn=exit 0",
                "thread_model=echo parallel",
            )
            two = await serve(servers, "out1", short_tmp, "null", "size=512M")
            await copy_disks([CopyJob(1, nbd(one.endpoint), nbd(two.endpoint), True)], quiet([]))


@pytest.mark.usefixtures("impatient")
async def test_a_flush_that_hangs_does_not_hold_a_cancelled_copy(short_tmp: Path) -> None:
    async with running_servers(V2VDir(short_tmp)) as servers:
        one = await serve(servers, "in1", short_tmp, "null", "size=1M")
        flush = ["can_write=exit 0", "can_flush=exit 0", f"flush=touch {short_tmp}/f; sleep 1000"]
        two = await serve(
            servers, "out1", short_tmp, "eval", "get_size=echo 1M", "pwrite=cat >/dev/null", *flush
        )

        async def cancel_in_flush(scope: anyio.CancelScope) -> None:
            await until((short_tmp / "f").exists, "the flush has begun")
            scope.cancel()

        with anyio.fail_after(60), anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(cancel_in_flush, scope)
                await copy_disks(
                    [CopyJob(1, nbd(one.endpoint), nbd(two.endpoint), True)], quiet([])
                )
        assert scope.cancelled_caught


@pytest.mark.parametrize("when", range(0, 40, 4))
async def test_cancellation_at_any_await(short_tmp: Path, when: int) -> None:
    """Cancel after so many rounds of the event loop; servers and descriptors are well after it."""
    source = fragmented(short_tmp / "s", 8 * MIB)
    async with running_servers(V2VDir(short_tmp)) as servers:
        one = await serve(servers, "in1", short_tmp, "file", f"file={source}")
        two = await serve(servers, "out1", short_tmp, "memory", "size=8M")
        job = CopyJob(1, nbd(one.endpoint), nbd(two.endpoint), True)

        async def cancel_later(scope: anyio.CancelScope) -> None:
            for _ in range(when):
                await anyio.lowlevel.checkpoint()
            scope.cancel()

        async with anyio.create_task_group() as group:
            with anyio.CancelScope() as scope:
                group.start_soon(cancel_later, scope)
                await copy_disks([job], quiet([]))
        done = await copy_disks([job], quiet([]))
        assert done[0].bytes.landed == 8 * MIB
        assert one.process.returncode is None
        assert two.process.returncode is None


async def test_connections_of_a_disk_that_is_cancelled_while_it_opens_more(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another disk has failed meanwhile. What was open is closed: see the fixture, and nbdkit,
    which does not end before its clients have gone."""
    opens = short_tmp / "opens"
    # To see whether it is there, for the first lane and the second; the next is not had in time.
    slow = f"echo . >>{opens}; [ $(wc -l <{opens}) -lt 4 ] || sleep 1"
    monkeypatch.setattr("v2v_async.copy.driver._OPEN_AHEAD_S", 60.0)
    async with running_servers(V2VDir(short_tmp)) as servers:
        one = await serve(
            servers,
            "in1",
            short_tmp,
            "eval",
            f"open={slow}",
            "get_size=echo 1T",
            "pread=head -c $3 /dev/zero",
            "can_multi_conn=exit 0",
            "thread_model=echo parallel",
        )
        two = await serve(servers, "out1", short_tmp, "null", "size=1T")

        async def cancel_in_open(scope: anyio.CancelScope) -> None:
            await until(lambda: opens.read_text().count(".") == 4, "the fourth one is being opened")
            scope.cancel()

        with anyio.fail_after(60), anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(cancel_in_open, scope)
                await copy_disks(
                    [CopyJob(1, nbd(one.endpoint), nbd(two.endpoint), True)], quiet([])
                )
        assert scope.cancelled_caught


async def test_one_bad_disk_stops_the_others_and_is_named(short_tmp: Path) -> None:
    events: list[Event] = []
    with pytest.raises(V2VError) as caught:
        async with running_servers(V2VDir(short_tmp)) as servers:
            jobs = []
            for index in (1, 2, 3):
                faults = ["error-pread=EIO", "error-pread-rate=100%"] if index == 2 else []
                one = await serve(
                    servers,
                    f"in{index}",
                    short_tmp,
                    "pattern",
                    "size=1T",
                    *faults,
                    filters=("error",) if faults else (),
                )
                two = await serve(servers, f"out{index}", short_tmp, "null", "size=1T")
                jobs.append(CopyJob(index, nbd(one.endpoint), nbd(two.endpoint), True))
            await copy_disks(jobs, quiet(events))
    assert caught.value.disk == 2
    last = {event.disk: event.type for event in events}
    assert last == {1: "cancelled", 2: "failed", 3: "cancelled"}


def quiet(events: list[Event]) -> Reporter:
    return Reporter(events.append, "t")
