"""What goes wrong while another program copies: the outcome of each, and nothing is left."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import anyio
import pytest

from tests.conftest import assert_gone, processes_naming, require
from tests.integration.servers import MIB, fragmented, serve
from tests.waiting import until
from v2v_async.copy.endpoint import Endpoint, nbd
from v2v_async.copy.external import copy_disk_external
from v2v_async.errors import (
    CopyError,
    ServerExitedError,
    SizeMismatchError,
    SourceError,
    TargetError,
    UsageError,
    V2VError,
    most_telling,
)
from v2v_async.events import Bytes, Emit, Event, Reporter
from v2v_async.options import Copier, CopyOptions
from v2v_async.server import running_servers
from v2v_async.v2vdir import V2VDir

pytestmark = pytest.mark.anyio
COPIERS: tuple[Copier, ...] = ("nbdcopy", "qemu-img")
SLOW = ("size=64G", "rdelay=20ms")


@pytest.fixture(autouse=True)
def _installed() -> None:
    require("nbdcopy", "qemu-img", "nbdkit")


async def copy(
    source: Endpoint, target: Endpoint, copier: Copier, emit: Emit, *, flush: bool = True
) -> Bytes:
    # Few requests at a time, so that a slow source stays slow.
    options = CopyOptions(copier=copier, flush=flush, connections=1, requests=2)
    reporter = Reporter(emit, "t").for_disk(2)
    return await copy_disk_external(2, source, target, options, reporter, is_known_zero=False)


def file(path: Path) -> Endpoint:
    return Endpoint("file", str(path))


@pytest.mark.parametrize("copier", COPIERS)
async def test_a_full_disk(short_tmp: Path, copier: Copier) -> None:
    source = fragmented(short_tmp / "s", 8 * MIB)
    events: list[Event] = []
    with pytest.raises(CopyError, match="No space left on device") as caught:
        async with running_servers(V2VDir(short_tmp)) as servers:
            out = await serve(servers, "out1", short_tmp, "full", "size=8M")
            await copy(file(source), nbd(out.endpoint), copier, events.append)
    assert caught.value.disk == 2
    assert caught.value.offset is not None
    assert f"{copier} failed (exit status 1)" in caught.value.message
    last = events[-1]
    assert (last.type, last.text) == ("failed", caught.value.message)
    assert last.bytes is not None
    assert last.bytes.landed < last.bytes.total
    assert last.details is not None
    assert any("No space" in line for line in last.details["last_words"])


@pytest.mark.parametrize("copier", COPIERS)
async def test_a_target_that_is_too_small(short_tmp: Path, copier: Copier) -> None:
    source = fragmented(short_tmp / "s", 8 * MIB)
    with pytest.raises(SizeMismatchError, match="smaller"):
        async with running_servers(V2VDir(short_tmp)) as servers:
            out = await serve(servers, "out1", short_tmp, "memory", "size=7M")
            await copy(file(source), nbd(out.endpoint), copier, ignore)


@pytest.mark.parametrize("copier", COPIERS)
async def test_a_flush_that_fails_is_a_failure(short_tmp: Path, copier: Copier) -> None:
    """qemu-img 7.2 itself exits with 0; later ones flush, and fail, whatever they are told."""
    source = fragmented(short_tmp / "s", MIB)
    plugin = (
        *("eval", "get_size=echo 1M", "can_write=exit 0", "can_flush=exit 0", "pread=exit 1"),
        *("pwrite=cat >/dev/null", "flush=echo EIO no >&2; exit 1"),
    )
    async with running_servers(V2VDir(short_tmp)) as servers:
        out = await serve(servers, "out1", short_tmp, *plugin)
        events: list[Event] = []
        with pytest.raises(CopyError, match="flush"):
            await copy(file(source), nbd(out.endpoint), copier, events.append)
        assert events[-1].type == "failed"
        if copier == "nbdcopy":
            await copy(file(source), nbd(out.endpoint), copier, events.append, flush=False)
            assert events[-1].type == "finished"


@pytest.mark.parametrize("copier", COPIERS)
@pytest.mark.parametrize("victim", ["in1", "out1"])
async def test_a_server_killed_in_mid_copy(short_tmp: Path, copier: Copier, victim: str) -> None:
    events: list[Event] = []
    with pytest.raises(ServerExitedError, match=f"{victim} .*SIGKILL"):
        async with running_servers(V2VDir(short_tmp)) as servers:
            one = await serve(servers, "in1", short_tmp, "pattern", *SLOW, filters=("delay",))
            two = await serve(servers, "out1", short_tmp, "null", "size=64G")
            dies, other = (one, two) if victim == "in1" else (two, one)
            other.is_stopping = True  # nbdkit 1.32 aborts when a client vanishes
            try:
                async with anyio.create_task_group() as group:
                    group.start_soon(
                        copy, nbd(one.endpoint), nbd(two.endpoint), copier, events.append
                    )
                    await _connected(copier, short_tmp)
                    os.kill(dies.process.pid, signal.SIGKILL)
            except BaseExceptionGroup as several:  # as the engine does (copy/engine.py)
                raise most_telling(several) from None
    assert events[-1].type in ("failed", "cancelled")
    assert events[-1].bytes is not None
    assert events[-1].bytes.landed < 64 << 30


@pytest.mark.parametrize("copier", COPIERS)
async def test_a_copier_that_is_killed_is_a_failed_disk(short_tmp: Path, copier: Copier) -> None:
    events: list[Event] = []
    caught: list[V2VError] = []
    async with running_servers(V2VDir(short_tmp)) as servers:
        one = await serve(servers, "in1", short_tmp, "pattern", *SLOW, filters=("delay",))
        one.is_stopping = True  # nbdkit 1.32 aborts when a client vanishes

        async def fails() -> None:
            with pytest.raises(CopyError, match="killed by SIGKILL") as failure:
                await copy(nbd(one.endpoint), file(short_tmp / "t"), copier, events.append)
            caught.append(failure.value)

        async with anyio.create_task_group() as group:
            group.start_soon(fails)
            pid = await _connected(copier, short_tmp)
            os.kill(pid, signal.SIGKILL)
    assert caught[0].disk == 2
    assert events[-1].type == "failed"


@pytest.mark.parametrize("copier", COPIERS)
async def test_a_cancelled_copy_leaves_no_process(short_tmp: Path, copier: Copier) -> None:
    events: list[Event] = []
    async with running_servers(V2VDir(short_tmp)) as servers:
        one = await serve(servers, "in1", short_tmp, "pattern", *SLOW, filters=("delay",))
        one.is_stopping = True  # nbdkit 1.32 aborts when a client vanishes
        async with anyio.create_task_group() as group:
            group.start_soon(copy, nbd(one.endpoint), file(short_tmp / "t"), copier, events.append)
            await _connected(copier, short_tmp)
            group.cancel_scope.cancel()
        # At once, without a moment to end in.
        assert not _programs(copier, short_tmp)
    assert events[-1].type == "cancelled"
    assert events[-1].bytes is not None
    assert events[-1].bytes.landed < 64 << 30


@pytest.mark.parametrize("how", ["cancelled", "killed"])
async def test_servers_of_nbdcopy_go_with_it(short_tmp: Path, how: str) -> None:
    mark = f"{short_tmp}/mark"
    source = Endpoint(
        *("command", ""), ("nbdkit", "--filter=delay", "pattern", *SLOW, "-P", f"{mark}.pid")
    )
    events: list[Event] = []

    async def run() -> None:
        if how == "cancelled":
            await copy(source, file(short_tmp / "t"), "nbdcopy", events.append)
        else:
            with pytest.raises(CopyError, match="SIGKILL"):
                await copy(source, file(short_tmp / "t"), "nbdcopy", events.append)

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await until(Path(f"{mark}.pid").exists, "nbdcopy’s server listens")
        if how == "cancelled":
            group.cancel_scope.cancel()
        else:
            os.kill(_programs("nbdcopy", short_tmp)[0], signal.SIGKILL)
    assert_gone(mark)
    assert events[-1].type == ("cancelled" if how == "cancelled" else "failed")


@pytest.mark.parametrize("copier", COPIERS)
async def test_nothing_there_to_copy(short_tmp: Path, copier: Copier) -> None:
    events: list[Event] = []
    with pytest.raises(SourceError, match="No such file"):
        await copy(file(short_tmp / "s"), file(short_tmp / "t"), copier, events.append)
    assert not events
    assert not (short_tmp / "t").exists()


async def test_no_place_for_the_target(short_tmp: Path) -> None:
    source = fragmented(short_tmp / "s", MIB)
    sink = file(short_tmp / "no" / "t")
    with pytest.raises(TargetError, match="No such file"):
        await copy(file(source), sink, "qemu-img", ignore)
    with pytest.raises(CopyError, match="No such file"):
        await copy(file(source), sink, "nbdcopy", ignore)


async def test_what_is_refused_makes_no_file(short_tmp: Path) -> None:
    with pytest.raises(UsageError, match="nbds"):
        await copy_disk_external(
            *(1, nbd("nbds://localhost/"), file(short_tmp / "t")),
            CopyOptions(copier="qemu-img"),
            Reporter(print, "t"),
            is_known_zero=False,
            size=512,
        )
    assert not (short_tmp / "t").exists()


def ignore(event: Event) -> None:
    """For tests that look at the error."""


async def _connected(copier: Copier, folder: Path) -> int:
    """Wait until the copier is in the middle of it, and return its pid."""
    [pid, *_] = await until(
        lambda: [pid for pid in _programs(copier, folder) if _has_socket(pid)],
        f"{copier} is connected",
    )
    return pid


def _programs(copier: str, folder: Path) -> list[int]:
    """Return the copiers that name ``folder``: not setpriv or the shell that start them."""
    pids = [int(line.partition(":")[0]) for line in processes_naming(str(folder))]
    return [pid for pid in pids if _comm(pid) == copier]


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _has_socket(pid: int) -> bool:
    try:
        return any(
            os.readlink(each).startswith("socket:") for each in Path(f"/proc/{pid}/fd").iterdir()
        )
    except OSError:
        return False
