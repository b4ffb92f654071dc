"""Servers that answer awkwardly about their extents, servers that lie, and ``--verify``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.request_log import read_logs
from tests.integration.servers import MIB, digest, fragmented, serve
from v2v_async.copy.endpoint import nbd
from v2v_async.copy.schedule import CopyJob, DiskResult, copy_disks
from v2v_async.errors import VerifyError
from v2v_async.events import Event, Reporter
from v2v_async.options import CopyOptions
from v2v_async.server import Server, Servers, running_servers
from v2v_async.units import KIB
from v2v_async.v2vdir import V2VDir

pytestmark = pytest.mark.anyio
SIZE = 6 * MIB + 4096
DATA = [(0, 64 * KIB), (MIB, 4 * KIB), (3 * MIB + 8 * KIB, MIB), (SIZE - 4 * KIB, 4 * KIB)]


def disk(path: Path, ranges: list[tuple[int, int]] | None = None, size: int = SIZE) -> Path:
    """Write a sparse disk that holds data in ``ranges`` (offset, length) and zeroes elsewhere."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset, length in DATA if ranges is None else ranges:
            file.seek(offset)
            file.write(((b"disk%08d" % offset) * (length // 12 + 1))[:length])
    return path


def blank(path: Path, size: int = SIZE) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


async def serve_telling(servers: Servers, folder: Path, path: Path, extents: str) -> Server:
    """Serve a file whose extents a shell script tells: ``$3`` bytes are asked for from ``$4``."""
    read = f'dd if={path} skip="$4" count="$3" iflag=count_bytes,skip_bytes bs=1M status=none'
    log = f"logfile={folder}/asked"
    told = ["can_extents=exit 0", f"extents={extents}", "can_multi_conn=exit 0"]
    size = f"get_size=echo {path.stat().st_size}"
    return await serve(
        servers, "in1", folder, "eval", size, f"pread={read}", *told, log, filters=("log",)
    )


def truth(kind: str = "hole,zero", data: str = "") -> str:
    """Return shell that prints the extents of ``DATA`` from ``$4`` on, in order."""
    edges, at = [], 0
    for offset, length in DATA:
        if offset > at:
            edges.append((at, offset - at, kind))
        edges.append((offset, length, data))
        at = offset + length
    lines = [f"{offset} {length} {what}" for offset, length, what in edges]
    return "printf '%s\\n' " + " ".join(f"'{line}'" for line in lines)


# Keeps what ends behind the first byte asked for, cut so that it begins there.
FROM_THERE = "| while read o l t; do e=$((o+l)); [ $e -gt $4 ] || continue; "
FROM_THERE += "[ $o -ge $4 ] || o=$4; echo $o $((e-o)) $t; done"
IN_PIECES = (
    f"{truth()} {FROM_THERE} | while read o l t; do e=$((o+l)); "
    "[ $e -lt $(($4+$3)) ] || e=$(($4+$3)); n=0; "
    # nbdkit merges equal neighbours, so every other piece of a hole is told as allocated zeroes.
    "while [ $o -lt $e ]; do p=$((e-o)); [ $p -le 65536 ] || p=65536; n=$((1-n)); k=$t; "
    '[ "$t" != hole,zero -o $n = 1 ] || k=zero; echo $o $p $k; o=$((o+p)); done; done'
)
HABITS: dict[str, str] = {
    "whole": f"{truth()} {FROM_THERE}",
    "one at a time": f"{truth()} {FROM_THERE} | head -n 1",
    "64 KiB at a time": f"{truth()} {FROM_THERE} | while read o l t; do "
    "[ $l -le 65536 ] || l=65536; echo $o $l $t; break; done",
    "odd lengths": f"{truth()} {FROM_THERE} | while read o l t; do "
    "[ $l -le 300001 ] || l=300001; echo $o $l $t; break; done",
    "unmerged": IN_PIECES,
    "zero without hole": f"{truth('zero')} {FROM_THERE}",
    "hole without zero": f"{truth('hole')} {FROM_THERE}",
    "data in holes": f"{truth('hole,zero', 'hole')} {FROM_THERE}",
}


@pytest.mark.parametrize("habit", HABITS)
@pytest.mark.parametrize("is_known_zero", [True, False], ids=["known", "dirty"])
async def test_awkward_extents(short_tmp: Path, habit: str, is_known_zero: bool) -> None:
    source, target = disk(short_tmp / "s"), short_tmp / "t"
    if is_known_zero:
        blank(target)
    else:
        target.write_bytes(b"\xaa" * SIZE)
    async with running_servers(V2VDir(short_tmp)) as servers:
        one = await serve_telling(servers, short_tmp, source, HABITS[habit])
        two = await serve(servers, "out1", short_tmp, "file", f"file={target}")
        job = CopyJob(1, nbd(one.endpoint), nbd(two.endpoint), is_known_zero)
        result = (await copy_disks([job], quiet(), CopyOptions()))[0]
    assert digest(target) == digest(source)
    asked = read_logs(short_tmp / "asked")
    assert asked.of("Extents")
    read = sum(request.length for request in asked.of("Read"))
    if habit == "hole without zero":
        assert read == SIZE
    elif habit == "odd lengths":
        # What an extent leaves of a block is read, no more.
        assert sum(length for _, length in DATA) <= read < 2 * MIB
    else:
        assert read == sum(length for _, length in DATA)
    assert result.bytes.landed == SIZE


@pytest.mark.parametrize("when", ["first", "second", "always"])
async def test_extents_that_fail(short_tmp: Path, when: str) -> None:
    """A server that can't tell is not believed to have no data there."""
    source, target = disk(short_tmp / "s"), blank(short_tmp / "t")
    fails = {"first": "[ $n = 1 ]", "second": "[ $n = 2 ]", "always": "true"}[when]
    count = f"n=$(cat {short_tmp}/n 2>/dev/null || echo 0); n=$((n+1)); echo $n >{short_tmp}/n"
    script = f"{count}; if {fails}; then echo EIO >&2; exit 1; fi; {HABITS['one at a time']}"
    async with running_servers(V2VDir(short_tmp)) as servers:
        one = await serve_telling(servers, short_tmp, source, script)
        two = await serve(servers, "out1", short_tmp, "file", f"file={target}")
        job = CopyJob(1, nbd(one.endpoint), nbd(two.endpoint), is_known_zero=True)
        await copy_disks([job], quiet(), CopyOptions(connections=1))
    assert digest(target) == digest(source)
    asked = read_logs(short_tmp / "asked")
    assert [request.error for request in asked.of("Extents", failed=True)].count("EIO") >= 1
    assert sum(request.length for request in asked.of("Read")) > sum(n for _, n in DATA)


# Lies.

LIE = "echo 0 1M; echo 1M 5G hole,zero"
LIED = [(offset, length) for offset, length in DATA if offset >= MIB]


async def copy_from_a_liar(
    folder: Path, options: CopyOptions, events: list[Event] | None = None
) -> DiskResult:
    source, target = disk(folder / "s"), blank(folder / "t")
    async with running_servers(V2VDir(folder)) as servers:
        one = await serve_telling(servers, folder, source, LIE)
        two = await serve(servers, "out1", folder, "file", f"file={target}")
        job = CopyJob(1, nbd(one.endpoint), nbd(two.endpoint), is_known_zero=True)
        reporter = Reporter(events.append, "t") if events is not None else quiet()
        return (await copy_disks([job], reporter, options))[0]


async def test_a_lie_is_believed_without_verify(short_tmp: Path) -> None:
    """Else the next two tests would prove nothing."""
    result = await copy_from_a_liar(short_tmp, CopyOptions())
    assert result.bytes.landed == SIZE
    assert digest(short_tmp / "t") != digest(short_tmp / "s")


async def test_a_lie_is_found_by_verify(short_tmp: Path) -> None:
    events: list[Event] = []
    with pytest.raises(VerifyError, match="1056768 bytes at 1048576-1052671, ") as caught:
        await copy_from_a_liar(short_tmp, CopyOptions(verify=True), events)
    assert caught.value.ranges == LIED
    assert caught.value.offset == MIB
    assert caught.value.disk == 1
    assert caught.value.hint is not None
    assert "--repair" in caught.value.hint
    assert [event.type for event in events][-1] == "failed"


async def test_a_lie_is_mended_by_repair(short_tmp: Path) -> None:
    events: list[Event] = []
    options = CopyOptions(verify=True, repair=True, digest="sha256")
    result = await copy_from_a_liar(short_tmp, options, events)
    assert digest(short_tmp / "t") == digest(short_tmp / "s")
    assert any(
        event.type == "warning" and "1056768 bytes" in (event.text or "") for event in events
    )
    assert events[-1].type == "finished"
    # The digest is of what the source holds, not of what it told.
    honest = await copy_from_a_liar(short_tmp, CopyOptions(extents=False, digest="sha256"))
    assert result.digest == honest.digest


async def test_without_extents_there_are_no_lies(short_tmp: Path) -> None:
    await copy_from_a_liar(short_tmp, CopyOptions(extents=False))
    assert digest(short_tmp / "t") == digest(short_tmp / "s")
    assert not read_logs(short_tmp / "asked").of("Extents", failed=True)


# Targets that do not keep what they were given.


async def copy_and_then(
    folder: Path,
    options: CopyOptions,
    harm: Callable[[], None] = lambda: None,
    *,
    size: int = SIZE + 1234,
    parameters: tuple[str, ...] = (),
    filters: tuple[str, ...] = (),
) -> tuple[DiskResult, list[Event]]:
    """Copy a disk; ``harm`` is called once, when all of it has landed and before it is verified."""
    source, target = fragmented(folder / "s", size), blank(folder / "t", size)
    events: list[Event] = []

    def watch(event: Event) -> None:
        had_landed = any(e.bytes is not None and e.bytes.landed == size for e in events)
        events.append(event)
        if not had_landed and event.bytes is not None and event.bytes.landed == size:
            harm()

    async with running_servers(V2VDir(folder)) as servers:
        one = await serve(servers, "in1", folder, "file", f"file={source}", read_only=True)
        words = (f"file={target}", *parameters)
        two = await serve(servers, "out1", folder, "file", *words, filters=filters)
        job = CopyJob(1, nbd(one.endpoint), nbd(two.endpoint), is_known_zero=True)
        return (await copy_disks([job], Reporter(watch, "t"), options))[0], events


def flip(path: Path, *offsets: int) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        for offset in offsets:
            byte = os.pread(fd, 1, offset)[0]
            os.pwrite(fd, bytes([byte ^ 1]), offset)
    finally:
        os.close(fd)


@pytest.mark.parametrize("block", [1, 4096, 65536])
async def test_a_good_copy_is_verified(short_tmp: Path, block: int) -> None:
    policy = [f"blocksize-minimum={block}", f"blocksize-preferred={max(block, 4096)}"]
    policy += ["blocksize-maximum=33554432", "blocksize-error-policy=error", f"round-up={block}"]
    result, events = await copy_and_then(
        short_tmp,
        CopyOptions(verify=True, digest="sha256"),
        parameters=tuple(policy),
        filters=("blocksize-policy", "truncate"),
    )
    assert digest(short_tmp / "t") == digest(short_tmp / "s")
    assert "verifying" in [event.type for event in events]
    assert any(event.text is not None and event.text.startswith("verified") for event in events)
    plain, _ = await copy_and_then(short_tmp, CopyOptions(digest="sha256"))
    assert result.digest == plain.digest
    assert result.bytes.landed == result.bytes.total == SIZE + 1234


async def test_bytes_that_changed_on_the_target_are_named(short_tmp: Path) -> None:
    size = SIZE + 1234
    places = [5, 4095, 4096, 3 * MIB + 1, size - 1]
    with pytest.raises(VerifyError) as caught:
        await copy_and_then(
            short_tmp, CopyOptions(verify=True), lambda: flip(short_tmp / "t", *places)
        )
    last = size // 4096 * 4096
    assert caught.value.ranges == [(0, 8192), (3 * MIB, 4096), (last, size - last)]
    assert caught.value.message.endswith(f"0-8191, {3 * MIB}-{3 * MIB + 4095}, {last}-{size - 1}")


async def test_many_ranges_are_counted_and_the_first_ones_named(short_tmp: Path) -> None:
    places = range(0, SIZE, 64 * KIB)
    with pytest.raises(VerifyError, match=f"and {len(places) - 8} more ranges") as caught:
        await copy_and_then(
            short_tmp, CopyOptions(verify=True), lambda: flip(short_tmp / "t", *places)
        )
    assert caught.value.ranges == [(offset, 4096) for offset in places]


async def test_bytes_that_changed_on_the_target_are_mended(short_tmp: Path) -> None:
    size = SIZE + 1234
    places = [5, 4096, 3 * MIB + 1, size - 1]
    result, events = await copy_and_then(
        short_tmp,
        CopyOptions(verify=True, repair=True, digest="sha256"),
        lambda: flip(short_tmp / "t", *places),
    )
    assert digest(short_tmp / "t") == digest(short_tmp / "s")
    assert [event.type for event in events].count("warning") == 1
    plain, _ = await copy_and_then(short_tmp, CopyOptions(digest="sha256"))
    assert result.digest == plain.digest
    assert events[-1].type == "finished"


async def test_without_verify_nobody_looks(short_tmp: Path) -> None:
    """Else the tests above would prove nothing."""
    await copy_and_then(short_tmp, CopyOptions(), lambda: flip(short_tmp / "t", 5))
    assert digest(short_tmp / "t") != digest(short_tmp / "s")


@pytest.mark.parametrize("repair", [True, False])
async def test_a_target_that_keeps_nothing_can_not_be_mended(short_tmp: Path, repair: bool) -> None:
    source = disk(short_tmp / "s")
    with pytest.raises(VerifyError) as caught:
        async with running_servers(V2VDir(short_tmp)) as servers:
            one = await serve(servers, "in1", short_tmp, "file", f"file={source}")
            two = await serve(servers, "out1", short_tmp, "null", f"size={SIZE}")
            job = CopyJob(1, nbd(one.endpoint), nbd(two.endpoint), is_known_zero=True)
            await copy_disks([job], quiet(), CopyOptions(verify=True, repair=repair))
    assert [offset for offset, _ in caught.value.ranges] == [offset for offset, _ in DATA]
    assert caught.value.ranges == DATA
    assert ("--repair" in (caught.value.hint or "")) is not repair


def quiet() -> Reporter:
    return Reporter(lambda event: None, "t")
