"""Servers that die and come back in the middle of a copy, or do not, and requests that fail.

Each row says the outcome: every byte is right, or the disk fails with what and where.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fault.restarting import FORGETTING, Proxy, Restarting, nbdkit, qemu_nbd
from tests.integration.servers import MIB, digest
from v2v_async.copy.endpoint import Endpoint, nbd
from v2v_async.copy.schedule import CopyJob, DiskResult, copy_disks
from v2v_async.errors import CopyError
from v2v_async.events import Event, Reporter
from v2v_async.options import CopyOptions

pytestmark = pytest.mark.anyio

SIZE = 16 * MIB
# A second long: whoever is killed at the first bytes that land is killed in the middle.
SLOWLY = CopyOptions(bandwidth=SIZE, retries=50)


@pytest.fixture
def source(short_tmp: Path) -> Path:
    """A disk without zeroes."""
    path = short_tmp / "s"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


def target_file(folder: Path, size: int = SIZE, name: str = "t") -> Path:
    """A file that a target server keeps, full of what is wrong."""
    path = folder / name
    path.write_bytes(b"\xd5" * size)
    return path


class Watch:
    """Keeps the events of a copy; calls ``act`` when ``landed`` bytes of disk 1 have."""

    def __init__(self, act: Callable[[], object] = lambda: None, landed: int = 1) -> None:
        self.events: list[Event] = []
        self._act: Callable[[], object] | None = act
        self._landed = landed

    def __call__(self, event: Event) -> None:
        """Take an event."""
        self.events.append(event)
        if event.disk == 1 and event.bytes is not None and event.bytes.landed >= self._landed:
            act, self._act = self._act, None
            if act is not None:
                act()

    def of(self, kind: str, disk: int | None = None) -> list[Event]:
        """Return the events of a type, perhaps of one disk only."""
        return [e for e in self.events if e.type == kind and disk in (None, e.disk)]

    @property
    def last(self) -> dict[int | None, str]:
        """What was told last of each disk."""
        return {event.disk: event.type for event in self.events}


async def copy(
    pairs: list[tuple[str, str]], watch: Watch, options: CopyOptions = SLOWLY
) -> list[DiskResult]:
    """Copy disks between NBD URIs or paths."""
    jobs = [CopyJob(n, _end(one), _end(two)) for n, (one, two) in enumerate(pairs, 1)]
    return await copy_disks(jobs, Reporter(watch, "t"), options)


def _end(name: str) -> Endpoint:
    return nbd(name) if name.startswith("nbd") else Endpoint("file", name)


def served_file(folder: Path, name: str, path: Path, *arguments: str) -> list[str]:
    """Return the command that serves a file by nbdkit on ``folder/name``."""
    filters = [word for word in arguments if word.startswith("--")]
    others = [word for word in arguments if not word.startswith("--")]
    return nbdkit(folder / name, *filters, "file", f"file={path}", *others)


# Lost, and back again.


@pytest.mark.parametrize("connections", [1, 4])
@pytest.mark.parametrize("kind", ["file", "no-multi-conn", "qcow2", "forgets", "forgets-private"])
async def test_a_target_that_comes_back_has_every_byte(
    short_tmp: Path, source: Path, kind: str, connections: int
) -> None:
    """Twice: also when what was flushed after the first time is there already."""
    path, socket = target_file(short_tmp), short_tmp / "out"
    image_format = "raw"
    if kind == "qcow2":
        path, image_format = short_tmp / "t.qcow2", "qcow2"
        command = ["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(SIZE)]
        subprocess.run(command, check=True)
        # What it has not flushed of its tables is lost with it.
        argv = qemu_nbd(socket, "--format=qcow2", "--cache=writeback", str(path))
    elif kind.startswith("forgets"):
        private = int(kind == "forgets-private")
        argv = nbdkit(socket, "python", str(FORGETTING), f"file={path}", f"private={private}")
    elif kind == "no-multi-conn":
        argv = served_file(short_tmp, "out", path, "--filter=multi-conn", "multi-conn-mode=disable")
    else:
        argv = served_file(short_tmp, "out", path)
    async with (
        Restarting(served_file(short_tmp, "in", source), short_tmp / "in") as one,
        Restarting(argv, socket, is_kept=True) as two,
    ):
        again = Watch(lambda: two.kill(0.1), landed=SIZE // 2)
        watch = Watch(lambda: two.kill(0.1), landed=SIZE // 4)

        def both(event: Event) -> None:
            watch(event)
            if two.starts > 1:
                again(event)

        options = CopyOptions(bandwidth=SIZE, retries=50, connections=connections)
        jobs = [CopyJob(1, nbd(one.uri), nbd(two.uri))]
        results = await copy_disks(jobs, Reporter(both, "t"), options)
        assert two.kills == 2
    assert digest(path, image_format) == digest(source)
    assert results[0].bytes.retried > 0
    assert results[0].bytes.landed == SIZE
    told = [event.text for event in watch.of("retrying")]
    assert any(text and "the target" in text and "attempt 1 of 50" in text for text in told)


@pytest.mark.parametrize("is_file", [False, True], ids=["served", "file"])
async def test_a_source_that_comes_back_is_read_on(
    short_tmp: Path, source: Path, is_file: bool
) -> None:
    path = target_file(short_tmp)
    async with (
        Restarting(served_file(short_tmp, "in", source), short_tmp / "in", is_kept=True) as one,
        Restarting(served_file(short_tmp, "out", path), short_tmp / "out") as two,
    ):
        watch = Watch(lambda: one.kill(0.1), landed=SIZE // 4)
        await copy([(one.uri, str(path) if is_file else two.uri)], watch)
        assert one.kills == 1
    assert digest(path) == digest(source)
    assert any("the source" in str(event.text) for event in watch.of("retrying"))


async def test_both_servers_lost_at_once(short_tmp: Path, source: Path) -> None:
    """One connection, and a target that forgets: its loss must not hide behind the source's."""
    path = target_file(short_tmp)
    argv = nbdkit(short_tmp / "out", "python", str(FORGETTING), f"file={path}", "private=1")
    async with (
        Restarting(served_file(short_tmp, "in", source), short_tmp / "in", is_kept=True) as one,
        Restarting(argv, short_tmp / "out", is_kept=True) as two,
    ):

        def kill() -> None:
            one.kill()
            two.kill()

        await copy([(one.uri, two.uri)], Watch(kill, landed=SIZE // 2))
        assert two.kills == 1
    assert digest(path) == digest(source)


@pytest.mark.parametrize("side", ["source", "target"])
async def test_a_server_that_dies_is_one_attempt(short_tmp: Path, source: Path, side: str) -> None:
    """However many connections are lost with it."""
    path = target_file(short_tmp)
    async with (
        Restarting(served_file(short_tmp, "in", source), short_tmp / "in", is_kept=True) as one,
        Restarting(served_file(short_tmp, "out", path), short_tmp / "out", is_kept=True) as two,
    ):
        watch = Watch((one if side == "source" else two).kill, landed=SIZE // 4)
        options = CopyOptions(bandwidth=SIZE, retries=5, connections=8, request_size=65536)
        await copy([(one.uri, two.uri)], watch, options)
    assert digest(path) == digest(source)
    told = [str(event.text) for event in watch.of("retrying")]
    # One that was being opened just then has not been lost, but is told as well.
    assert sum(text.startswith(f"the {side} ‘") for text in told) == 1, told


async def test_connections_dropped_while_idle_cost_nothing(short_tmp: Path, source: Path) -> None:
    """The second disk waits, connected, for the first one; so a proxy drops its connections."""
    paths = [target_file(short_tmp, name=f"t{n}") for n in (1, 2)]
    async with (
        Restarting(served_file(short_tmp, "in", source), short_tmp / "in", is_kept=True) as one,
        Restarting(
            served_file(short_tmp, "out1", paths[0]), short_tmp / "out1", is_kept=True
        ) as two,
        Restarting(
            served_file(short_tmp, "out2", paths[1]), short_tmp / "out2", is_kept=True
        ) as three,
        Proxy(one.socket) as near,
        Proxy(three.socket) as far,
    ):

        def drop() -> None:
            near.cut()
            far.cut()

        watch = Watch(drop)
        options = CopyOptions(parallel=1, bandwidth=2 * SIZE)
        await copy([(one.uri, two.uri), (near.uri, far.uri)], watch, options)
        assert near.cuts
        assert far.cuts
    assert [digest(path) for path in paths] == [digest(source)] * 2
    assert watch.of("retrying", 2)


# Lost, and gone.


@pytest.mark.parametrize("keeps_going", [True, False])
@pytest.mark.parametrize("side", ["source", "target"])
async def test_a_server_that_stays_away_fails_its_disk(
    short_tmp: Path, source: Path, side: str, keeps_going: bool
) -> None:
    paths = [target_file(short_tmp, name=f"t{n}") for n in (1, 2)]
    async with (
        Restarting(served_file(short_tmp, "in1", source), short_tmp / "in1") as in1,
        Restarting(served_file(short_tmp, "in2", source), short_tmp / "in2") as in2,
        Restarting(served_file(short_tmp, "out1", paths[0]), short_tmp / "out1") as out1,
        Restarting(served_file(short_tmp, "out2", paths[1]), short_tmp / "out2") as out2,
    ):
        victim = in1 if side == "source" else out1
        watch = Watch(victim.kill)
        # Without keep_going the other disk is still on its way when this one has failed.
        rate = 2 * SIZE if keeps_going else SIZE // 8
        options = CopyOptions(bandwidth=rate, retries=2, keep_going=keeps_going)
        with pytest.raises(CopyError, match=victim.socket.name) as caught:
            await copy([(in1.uri, out1.uri), (in2.uri, out2.uri)], watch, options)
    assert caught.value.disk == 1
    assert side in caught.value.message
    assert len(watch.of("retrying", 1)) == 2
    assert watch.last == {1: "failed", 2: "finished" if keeps_going else "cancelled"}
    if keeps_going:
        assert digest(paths[1]) == digest(source)


async def test_without_retries_the_first_loss_is_the_end(short_tmp: Path, source: Path) -> None:
    path = target_file(short_tmp)
    async with (
        Restarting(served_file(short_tmp, "in", source), short_tmp / "in") as one,
        Restarting(served_file(short_tmp, "out", path), short_tmp / "out", is_kept=True) as two,
    ):
        watch = Watch(two.kill)
        with pytest.raises(CopyError, match="the target"):
            await copy([(one.uri, two.uri)], watch, CopyOptions(bandwidth=SIZE, retries=0))
    assert not watch.of("retrying")


@pytest.mark.parametrize("side", ["source", "target"])
async def test_a_server_that_comes_back_as_another_disk(
    short_tmp: Path, source: Path, side: str
) -> None:
    path = target_file(short_tmp)
    async with (
        Restarting(served_file(short_tmp, "in", source), short_tmp / "in", is_kept=True) as one,
        Restarting(served_file(short_tmp, "out", path), short_tmp / "out", is_kept=True) as two,
    ):

        def change() -> None:
            victim, disk = (one, source) if side == "source" else (two, path)
            victim.kill()
            with disk.open("ab") as file:
                file.truncate(SIZE + 512)

        with pytest.raises(CopyError, match=f"had {SIZE} bytes and now has {SIZE + 512}") as caught:
            await copy([(one.uri, two.uri)], Watch(change))
    assert caught.value.disk == 1


# Requests that fail.


@pytest.mark.parametrize("side", ["source", "target"])
async def test_errors_now_and_then_are_asked_again(
    short_tmp: Path, source: Path, side: str
) -> None:
    path = target_file(short_tmp)
    fault = ["--filter=error", "error=EIO", "error-rate=30%"]
    async with (
        Restarting(
            served_file(short_tmp, "in", source, *(fault if side == "source" else [])),
            short_tmp / "in",
        ) as one,
        Restarting(
            served_file(short_tmp, "out", path, *(fault if side == "target" else [])),
            short_tmp / "out",
        ) as two,
    ):
        watch = Watch()
        await copy([(one.uri, two.uri)], watch, CopyOptions(retries=50))
    assert digest(path) == digest(source)


@pytest.mark.parametrize("retries", [0, 2])
@pytest.mark.parametrize(
    ("code", "is_final"), [("EIO", False), ("EPERM", True), ("ENOSPC", True), ("EINVAL", True)]
)
@pytest.mark.parametrize("side", ["source", "target"])
async def test_what_can_not_pass_is_not_asked_again(
    short_tmp: Path, side: str, code: str, is_final: bool, retries: int
) -> None:
    """Requests are counted: one, and ``retries`` more where the cause might pass."""
    count = short_tmp / "count"
    refuse = f"echo x >> {count}; echo {code} >&2; exit 1"
    is_source = side == "source"
    ends = {"pread": refuse if is_source else "head -c $3 /dev/urandom"}
    others = {
        "can_write": "exit 0",
        "pread": "head -c $3 /dev/zero",
        "pwrite": "cat > /dev/null" if is_source else f"cat > /dev/null; {refuse}",
    }

    def eval_plugin(name: str, calls: dict[str, str]) -> list[str]:
        calls["get_size"] = "echo 1M"
        return nbdkit(short_tmp / name, "eval", *(f"{call}={text}" for call, text in calls.items()))

    async with (
        Restarting(eval_plugin("in", ends), short_tmp / "in") as one,
        Restarting(eval_plugin("out", others), short_tmp / "out") as two,
    ):
        options = CopyOptions(synchronous=True, retries=retries, request_size=MIB)
        with pytest.raises(CopyError, match=code) as caught:
            await copy([(one.uri, two.uri)], Watch(), options)
    assert (caught.value.disk, caught.value.offset) == (1, 0)
    assert ("reading" if side == "source" else "writing") in caught.value.message
    assert len(count.read_text().split()) == (1 if is_final else 1 + retries)
