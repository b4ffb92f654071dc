"""The copy engine between real servers: every byte, in every combination."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.integration.servers import MIB, digest, fragmented, serve, serve_qcow2
from v2v_async.copy.endpoint import nbd
from v2v_async.copy.schedule import MAX_BYTES_IN_FLIGHT, CopyJob, copy_disks
from v2v_async.errors import CopyError, NbdError, SizeMismatchError
from v2v_async.events import Event, Reporter
from v2v_async.options import CopyOptions
from v2v_async.server import Server, Servers, running_servers
from v2v_async.v2vdir import V2VDir

pytestmark = pytest.mark.anyio
# No multiple of 512, nor of a request; qcow2 rounds it up, so that the targets differ in size.
ODD_SIZE = 37 * MIB + 1234


async def target(
    servers: Servers, folder: Path, kind: str, size: int, filters: tuple[str, ...]
) -> tuple[Path, Server]:
    path = folder / f"target.{kind}"
    if kind == "raw":
        with path.open("wb") as file:
            file.truncate(size)
        return path, await serve(servers, "out1", folder, "file", f"file={path}", filters=filters)
    size = -(-size // 512) * 512
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(size)], check=True)
    return path, await serve_qcow2(servers, "out1", folder, path)


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
@pytest.mark.parametrize("connections", [1, 4])
@pytest.mark.parametrize("extents", [True, False], ids=["extents", "noextents"])
@pytest.mark.parametrize("zero", [True, False], ids=["zero", "nozero"])
@pytest.mark.parametrize("is_known_zero", [True, False], ids=["empty", "dirty"])
async def test_every_byte_arrives(
    short_tmp: Path, kind: str, connections: int, extents: bool, zero: bool, is_known_zero: bool
) -> None:
    source = fragmented(short_tmp / "source", ODD_SIZE)
    before = digest(source)
    events: list[Event] = []
    async with running_servers(V2VDir(short_tmp)) as servers:
        filters = () if extents else ("noextents",)
        served = await serve(
            servers, "in1", short_tmp, "file", f"file={source}", filters=filters, read_only=True
        )
        out_filters = () if zero else ("nozero",)
        path, out = await target(servers, short_tmp, kind, ODD_SIZE, out_filters)
        if not is_known_zero:
            await scribble(out.endpoint)
        job = CopyJob(1, nbd(served.endpoint), nbd(out.endpoint), is_known_zero)
        options = CopyOptions(connections=connections)
        landed = (await copy_disks([job], Reporter(events.append, "t"), options))[0].bytes
    assert landed.landed == landed.total == ODD_SIZE
    assert landed.data == landed.copied
    if extents:
        assert landed.copied < ODD_SIZE // 2
    if is_known_zero:
        assert landed.zero == 0
    assert digest(source) == before
    # qcow2 rounds up to 512 bytes; what is behind the source is left alone, as nbdcopy does.
    behind = 0 if is_known_zero else 0xAA
    assert digest_prefix(path, kind, ODD_SIZE, behind) == before
    planned = next(event for event in events if event.type == "planned")
    assert planned.details is not None
    assert planned.details["connections"] == connections
    progress = [event.bytes.landed for event in events if event.bytes is not None]
    assert progress == sorted(progress)


async def scribble(endpoint: str) -> None:
    """Fill the target with something else first."""
    from v2v_async.connection import connected

    async with connected(endpoint) as connection:
        left = connection.info.size
        handle = connection.handle
        done: list[int] = []

        def note(error: object) -> int:
            done.append(error.value)  # type: ignore[attr-defined]
            return 1

        offset = sent = 0
        while left:
            length = min(left, 8 * MIB)
            handle.write(memoryview(b"\xaa" * length), offset, note)
            sent += 1
            while len(done) < sent:
                handle._nbd.poll(-1)
            offset += length
            left -= length
        assert not any(done)


def digest_prefix(path: Path, kind: str, size: int, behind: int) -> str:
    """Digest the first ``size`` bytes; assert that what is behind them is all ``behind``."""
    raw = path
    if kind != "raw":
        raw = path.with_suffix(".raw")
        convert = ["qemu-img", "convert", "-f", kind, "-O", "raw", str(path), str(raw)]
        subprocess.run(convert, check=True)
    with raw.open("r+b") as file:
        file.seek(size)
        assert set(file.read()) <= {behind}
        file.truncate(size)
    return digest(raw)


async def test_many_disks_at_once_within_the_budget(short_tmp: Path) -> None:
    sizes = [5 * MIB + 7, 1, 40 * MIB, 511, 12 * MIB]
    events: list[Event] = []
    jobs, digests = [], []
    async with running_servers(V2VDir(short_tmp)) as servers:
        for index, size in enumerate(sizes, 1):
            source = fragmented(short_tmp / f"s{index}", size, seed=index)
            digests.append(digest(source))
            sink = short_tmp / f"t{index}"
            sink.touch()
            with sink.open("wb") as file:
                file.truncate(size)
            one = await serve(servers, f"in{index}", short_tmp, "file", f"file={source}")
            two = await serve(servers, f"out{index}", short_tmp, "file", f"file={sink}")
            jobs.append(CopyJob(index, nbd(one.endpoint), nbd(two.endpoint), is_known_zero=True))
        landed = await copy_disks(jobs, Reporter(events.append, "t"), CopyOptions(parallel=2))
    assert [result.bytes.landed for result in landed] == sizes
    assert [digest(short_tmp / f"t{i}") for i in range(1, 6)] == digests
    # The longest first, never more than two at once.
    running, most, order = set(), 0, []
    for event in events:
        if event.type == "started":
            running.add(event.disk)
            order.append(event.disk)
        elif event.type == "planned":
            assert event.details is not None
            assert event.details["requests"] * event.details["request_size"] <= MAX_BYTES_IN_FLIGHT
        elif event.type == "finished":
            running.discard(event.disk)
        most = max(most, len(running))
    assert most == 2
    assert order == [3, 5, 1, 4, 2]


async def test_a_target_that_is_too_small(short_tmp: Path) -> None:
    async with running_servers(V2VDir(short_tmp)) as servers:
        one = await serve(servers, "in1", short_tmp, "memory", "size=2M")
        two = await serve(servers, "out1", short_tmp, "memory", "size=1M")
        with pytest.raises(SizeMismatchError, match="too small") as caught:
            await copy_disks([CopyJob(1, nbd(one.endpoint), nbd(two.endpoint))], quiet())
    assert caught.value.disk == 1


async def test_a_target_that_is_read_only(short_tmp: Path) -> None:
    async with running_servers(V2VDir(short_tmp)) as servers:
        one = await serve(servers, "in1", short_tmp, "memory", "size=1M")
        two = await serve(servers, "out1", short_tmp, "memory", "size=1M", read_only=True)
        with pytest.raises(CopyError, match="read-only"):
            await copy_disks([CopyJob(1, nbd(one.endpoint), nbd(two.endpoint))], quiet())


async def test_nobody_there(short_tmp: Path) -> None:
    with pytest.raises(NbdError, match="can't connect") as caught:
        await copy_disks([CopyJob(7, nbd(f"{short_tmp}/in1"), nbd(f"{short_tmp}/out1"))], quiet())
    assert caught.value.disk == 7


async def test_no_disks_is_no_work() -> None:
    assert await copy_disks([], quiet()) == []


@pytest.mark.parametrize("sizes", ["512/4096/1048576", "4096/65536/65536"])
async def test_block_sizes_of_the_target_are_kept(short_tmp: Path, sizes: str) -> None:
    minimum, preferred, maximum = sizes.split("/")
    source = fragmented(short_tmp / "s", 9 * MIB, seed=4)
    sink = short_tmp / "t"
    with sink.open("wb") as file:
        file.truncate(9 * MIB)
    async with running_servers(V2VDir(short_tmp)) as servers:
        one = await serve(servers, "in1", short_tmp, "file", f"file={source}")
        features_filter = ("blocksize-policy",)
        policy = [
            f"blocksize-minimum={minimum}",
            f"blocksize-preferred={preferred}",
            f"blocksize-maximum={maximum}",
            "blocksize-error-policy=error",
        ]
        two = await serve(
            servers, "out1", short_tmp, "file", f"file={sink}", *policy, filters=features_filter
        )
        await copy_disks([CopyJob(1, nbd(one.endpoint), nbd(two.endpoint), True)], quiet())
    assert digest(sink) == digest(source)


def quiet() -> Reporter:
    return Reporter(lambda event: None, "t")
