"""nbdcopy and qemu-img as copiers, between real servers and files."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.conftest import require
from tests.integration.servers import MIB, digest, fragmented, serve, serve_qcow2
from v2v_async import qemu_img
from v2v_async.copy.endpoint import Endpoint, nbd
from v2v_async.copy.external import copy_disk_external
from v2v_async.errors import CopyError
from v2v_async.events import Bytes, Event, Reporter
from v2v_async.options import Copier, CopyOptions
from v2v_async.server import running_servers
from v2v_async.v2vdir import V2VDir

pytestmark = pytest.mark.anyio
COPIERS: tuple[Copier, ...] = ("nbdcopy", "qemu-img")
ODD_SIZE = 37 * MIB + 1234


@pytest.fixture(autouse=True)
def _installed() -> None:
    require("nbdcopy", "qemu-img", "nbdkit")


async def copy(
    source: Endpoint,
    target: Endpoint,
    options: CopyOptions,
    events: list[Event] | None = None,
    *,
    is_known_zero: bool = False,
) -> Bytes:
    told: list[Event] = [] if events is None else events
    reporter = Reporter(told.append, "t").for_disk(2)
    return await copy_disk_external(
        2, source, target, options, reporter, is_known_zero=is_known_zero
    )


def file(path: Path) -> Endpoint:
    return Endpoint("file", str(path))


@pytest.mark.parametrize("copier", COPIERS)
@pytest.mark.parametrize("size", [0, 1, 511, 512, 20 * MIB, ODD_SIZE])
@pytest.mark.parametrize("is_known_zero", [True, False], ids=["empty", "dirty"])
async def test_every_byte_arrives(
    short_tmp: Path, copier: Copier, size: int, is_known_zero: bool
) -> None:
    source = short_tmp / "s"
    if size > 1:
        fragmented(source, size)
    else:
        source.write_bytes(b"!" * size)
    sink = short_tmp / "t"
    sink.write_bytes(bytes(size) if is_known_zero else b"\xff" * size)
    events: list[Event] = []
    async with running_servers(V2VDir(short_tmp)) as servers:
        one = await serve(servers, "in1", short_tmp, "file", f"file={source}", read_only=True)
        two = await serve(servers, "out1", short_tmp, "file", f"file={sink}")
        landed = await copy(
            nbd(one.endpoint),
            nbd(two.endpoint),
            CopyOptions(copier=copier),
            events,
            is_known_zero=is_known_zero,
        )
    assert digest(sink) == digest(source)
    assert landed == Bytes(total=size, data=size, copied=size)
    kinds = [event.type for event in events]
    assert kinds[:2] == ["planned", "started"]
    assert kinds[-2:] == ["progress", "finished"]
    assert set(kinds[2:-1]) == {"progress"}
    amounts = [event.bytes.landed for event in events if event.bytes is not None]
    assert len(amounts) == len(events)
    assert amounts == sorted(amounts)
    # Only its end tells that all of it is there.
    assert all(amount < size for amount in amounts[:-2]) or size == 0
    assert {event.disk for event in events} == {2}
    details = events[0].details
    assert details is not None
    assert details["copier"] == copier
    assert str(details["version"])[0].isdigit()
    assert str(one.endpoint) in str(details["command"])
    has_flag = "-is-zero" in str(details["command"])
    assert has_flag == is_known_zero


@pytest.mark.parametrize("copier", COPIERS)
async def test_progress_tells_how_far_it_is(short_tmp: Path, copier: Copier) -> None:
    """Progress is counted by the program: nbdcopy's step is 128 MiB."""
    events: list[Event] = []
    async with running_servers(V2VDir(short_tmp)) as servers:
        one = await serve(servers, "in1", short_tmp, "pattern", "size=600M")
        two = await serve(servers, "out1", short_tmp, "null", "size=600M")
        await copy(
            nbd(one.endpoint), nbd(two.endpoint), CopyOptions(copier=copier, connections=1), events
        )
    amounts = {e.bytes.landed for e in events if e.type == "progress" and e.bytes is not None}
    assert len(amounts) >= 3


@pytest.mark.parametrize("copier", COPIERS)
async def test_an_odd_disk_into_qcow2(short_tmp: Path, copier: Copier) -> None:
    source = fragmented(short_tmp / "s", ODD_SIZE)
    image = short_tmp / "t.qcow2"
    await qemu_img.create_qcow2(image, -(-ODD_SIZE // 512) * 512)
    async with running_servers(V2VDir(short_tmp)) as servers:
        one = await serve(servers, "in1", short_tmp, "file", f"file={source}")
        two = await serve_qcow2(servers, "out1", short_tmp, image)
        await copy(nbd(one.endpoint), nbd(two.endpoint), CopyOptions(copier=copier))
    raw = short_tmp / "t.raw"
    await copy(file(image), file(raw), CopyOptions(copier="qemu-img"))  # as it is: raw
    assert digest(raw) == digest(image)
    padded = source.read_bytes() + bytes(-ODD_SIZE % 512)
    source.write_bytes(padded)
    assert digest(image, "qcow2") == digest(source)


@pytest.mark.parametrize("copier", COPIERS)
@pytest.mark.parametrize("before", ["none", "longer", "shorter"])
@pytest.mark.parametrize("is_open", [False, True], ids=["path", "open"])
async def test_files_with_awkward_names(
    short_tmp: Path, copier: Copier, before: str, is_open: bool
) -> None:
    source = fragmented(short_tmp / "-a,b:c%41=d ?&#", ODD_SIZE)
    sink = short_tmp / "-null:,x=y"
    if before != "none":
        sink.write_bytes(b"\xff" * (ODD_SIZE + MIB if before == "longer" else MIB))
    if not is_open:
        await copy(file(source), file(sink), CopyOptions(copier=copier))
    else:
        with source.open("rb") as one, sink.open("ab") as two:
            await copy(
                Endpoint("file", str(source), fd=one.fileno()),
                Endpoint("file", str(sink), fd=two.fileno()),
                CopyOptions(copier=copier),
            )
    assert digest(sink) == digest(source)


@pytest.mark.parametrize("copier", COPIERS)
async def test_sockets_and_exports_with_awkward_names(short_tmp: Path, copier: Copier) -> None:
    """nbdkit's info plugin serves the export's name as its content."""
    folder = short_tmp / "a,b c%41?&#+"
    folder.mkdir()
    source = fragmented(folder / "s", 3 * MIB)
    name = "n,1/ %41&?#+=é"
    options = CopyOptions(copier=copier)
    async with running_servers(V2VDir(short_tmp)) as servers:
        one = await serve(servers, "in1", folder, "file", f"file={source}")
        two = await serve(servers, "out1", folder, "memory", "size=3M")
        told = await serve(servers, "in2", folder, "info", "mode=exportname")
        await copy(nbd(one.endpoint), nbd(two.endpoint), options)
        await copy(nbd(two.endpoint), file(short_tmp / "t"), options)
        uri = f"nbd+unix:///{quote(name, safe='/')}?socket={quote(told.endpoint)}"
        await copy(nbd(uri), file(short_tmp / "name"), options)
    assert digest(short_tmp / "t") == digest(source)
    assert (short_tmp / "name").read_text() == name


@pytest.mark.parametrize("copier", COPIERS)
async def test_allocated_takes_the_room_of_a_target_known_to_be_zero(
    short_tmp: Path, copier: Copier
) -> None:
    used = []
    for allocated in (False, True):
        sink = short_tmp / f"t{allocated}"
        with sink.open("wb") as disk:
            disk.truncate(8 * MIB)
        options = CopyOptions(copier=copier, allocated=allocated)
        async with running_servers(V2VDir(short_tmp)) as servers:
            one = await serve(servers, "in1", short_tmp, "null", "size=8M")
            two = await serve(servers, "out1", short_tmp, "file", f"file={sink}")
            await copy(nbd(one.endpoint), nbd(two.endpoint), options, is_known_zero=True)
        used.append(sink.stat().st_blocks * 512)
    assert used[0] < 8 * MIB <= used[1]


async def test_all_of_nbdcopys_options_are_taken_by_the_real_one(short_tmp: Path) -> None:
    source = fragmented(short_tmp / "s", 4 * MIB)
    options = CopyOptions(
        copier="nbdcopy",
        connections=2,
        requests=4,
        request_size=65536,
        queue_size=1 << 20,
        sparse=4096,
        threads=1,
        target_is_zero=True,
        extents=False,
        synchronous=True,
    )
    await copy(file(source), file(short_tmp / "t"), options)
    assert digest(short_tmp / "t") == digest(source)


async def test_all_of_qemu_imgs_options_are_taken_by_the_real_one(short_tmp: Path) -> None:
    source = fragmented(short_tmp / "s", 4 * MIB)
    options = CopyOptions(
        copier="qemu-img", requests=16, sparse=65536, target_is_zero=True, bandwidth=1 << 30
    )
    await copy(file(source), file(short_tmp / "t"), options)
    assert digest(short_tmp / "t") == digest(source)


async def test_commands_are_nbdcopys_own_servers(short_tmp: Path) -> None:
    source = fragmented(short_tmp / "s", 4 * MIB)
    sink = short_tmp / "t"
    sink.write_bytes(bytes(4 * MIB))
    events: list[Event] = []
    landed = await copy(
        Endpoint("command", argv=("nbdkit", "file", str(source))),
        Endpoint("command", argv=("nbdkit", "file", str(sink))),
        CopyOptions(copier="nbdcopy"),
        events,
    )
    assert digest(sink) == digest(source)
    # Nobody knew its size but nbdcopy, which tells per cents.
    assert landed == Bytes()
    told = [event.details for event in events if event.type == "progress" and event.details]
    assert {"percent": 100.0} in told


async def test_secrets_are_not_told(short_tmp: Path) -> None:
    events: list[Event] = []
    argv = ("nbdkit", "null", "size=1M", "password=hidden")
    with pytest.raises(CopyError) as caught:
        await copy(
            Endpoint("command", argv=argv), Endpoint("null"), CopyOptions(copier="nbdcopy"), events
        )
    said = "".join(event.to_json() for event in events) + str(caught.value)
    assert "password=***" in said
    assert "hidden" not in said


async def test_streams_are_handed_over(short_tmp: Path) -> None:
    source = fragmented(short_tmp / "s", 4 * MIB)
    options = CopyOptions(copier="nbdcopy")
    events: list[Event] = []
    received: list[bytes] = []
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb") as pipe:
        reader = threading.Thread(target=lambda: received.append(pipe.read()))
        reader.start()
        try:
            await copy(file(source), Endpoint("stream", fd=write_end), options, events)
        finally:
            os.close(write_end)
            reader.join()
    assert received == [source.read_bytes()]
    assert [e.bytes.total for e in events if e.bytes is not None] == [4 * MIB] * len(events)

    fifo = short_tmp / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: fifo.write_bytes(received[0]))
    writer.start()
    async with running_servers(V2VDir(short_tmp)) as servers:
        out = await serve(servers, "out1", short_tmp, "memory", "size=4M")
        fd = os.open(fifo, os.O_RDONLY)
        try:
            await copy(Endpoint("stream", fd=fd), nbd(out.endpoint), options)
        finally:
            os.close(fd)
            writer.join()
        await copy(nbd(out.endpoint), file(short_tmp / "t"), options)
    assert digest(short_tmp / "t") == digest(source)


async def test_null_is_nbdcopys_alone(short_tmp: Path) -> None:
    source = fragmented(short_tmp / "s", 4 * MIB)
    landed = await copy(file(source), Endpoint("null"), CopyOptions(copier="nbdcopy"))
    assert landed.landed == 4 * MIB
