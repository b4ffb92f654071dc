"""Zeroes: skipped where they are there already, made by the server where not, never trimmed."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.request_log import RequestLog, read_logs
from tests.integration.servers import MIB, digest, fragmented, serve
from v2v_async.copy.endpoint import nbd
from v2v_async.copy.ranges import Ranges
from v2v_async.copy.schedule import CopyJob, copy_disks
from v2v_async.events import Bytes, Reporter
from v2v_async.options import CopyOptions
from v2v_async.server import running_servers
from v2v_async.units import KIB
from v2v_async.v2vdir import V2VDir

pytestmark = pytest.mark.anyio
SIZE = 24 * MIB + 4096
FAST = ("zeromode=plugin", "fastzeromode=ignore")


@dataclass
class Copied:
    """What came of a copy, and all that the target was asked."""

    bytes: Bytes
    log: RequestLog

    def zeroed(self) -> list[tuple[int, int]]:
        return list(self.log.ranges("Zero"))


async def copy(
    folder: Path,
    source: Path,
    target: Path,
    *parameters: str,
    filters: tuple[str, ...] = (),
    in_filters: tuple[str, ...] = (),
    is_known_zero: bool = False,
    options: CopyOptions | None = None,
) -> Copied:
    """Copy between two file servers; the target's log is nearest to the client."""
    log = folder / "requests"
    async with running_servers(V2VDir(folder)) as servers:
        one = await serve(
            servers, "in1", folder, "file", f"file={source}", filters=in_filters, read_only=True
        )
        logged = ("log", *filters)
        words = (f"file={target}", f"logfile={log}", *parameters)
        two = await serve(servers, "out1", folder, "file", *words, filters=logged)
        job = CopyJob(1, nbd(one.endpoint), nbd(two.endpoint), is_known_zero)
        quiet = Reporter(lambda event: None, "t")
        result = (await copy_disks([job], quiet, options or CopyOptions()))[0]
    copied = Copied(result.bytes, read_logs(log))
    assert not copied.log.of("Trim", failed=True)
    assert result.bytes.landed == result.bytes.total
    assert digest(target) == digest(source)
    return copied


def hole(path: Path, size: int = SIZE) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def dirty(path: Path, length: int = SIZE, size: int = SIZE) -> Path:
    """Write a file whose first ``length`` bytes are not zero and whose rest is a hole."""
    with path.open("wb") as file:
        file.write(b"\xaa" * length)
        file.truncate(size)
    return path


def islands(path: Path, size: int = SIZE, every: int = MIB, length: int = 64 * KIB) -> Path:
    """Write a sparse file with ``length`` bytes of data at the start of ``every`` bytes."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset in range(0, size - length, every):
            file.seek(offset)
            file.write(b"data" * (length // 4))
        # Until it is written back, a file seems to take less room than it will.
        os.fsync(file.fileno())
    return path


def specks(path: Path, zeroes: int, size: int = 4 * MIB) -> Path:
    """Write a file without holes: ``zeroes`` bytes of data, as many of zeroes, and so on."""
    path.write_bytes((b"\x11" * zeroes + bytes(zeroes)) * (size // zeroes // 2))
    return path


def nonzero(path: Path) -> Ranges:
    """Return the blocks of 4 KiB of a raw disk that are not all zeroes."""
    found, content = Ranges(), path.read_bytes()
    for at in range(0, len(content), 4 * KIB):
        block = content[at : at + 4 * KIB]
        if any(block):
            found.add(at, len(block))
    return found


def everything(size: int = SIZE) -> list[tuple[int, int]]:
    return [(0, size)]


@pytest.mark.parametrize("maximum", [64 * KIB, MIB, 3 * MIB, 4 * 1024 * MIB - 4 * KIB])
@pytest.mark.parametrize("mode", ["plugin", "ignore"])
async def test_zero_requests_keep_to_the_maximum(short_tmp: Path, maximum: int, mode: str) -> None:
    size = 80 * MIB
    policy = ["blocksize-minimum=4096", "blocksize-preferred=65536", f"blocksize-maximum={maximum}"]
    policy += ["blocksize-error-policy=error", "zeromode=plugin"]
    policy += [f"fastzeromode={'ignore' if mode == 'ignore' else 'none'}"]
    copied = await copy(
        short_tmp,
        hole(short_tmp / "s", size),
        dirty(short_tmp / "t", size, size),
        *policy,
        filters=("blocksize-policy", "nozero"),
    )
    assert copied.zeroed() == everything(size)
    assert max(request.length for request in copied.log.of("Zero", failed=True)) <= maximum
    assert not copied.log.of("Write", failed=True)
    assert copied.bytes.zero == size


async def test_a_target_known_to_be_zero_gets_no_zeroes_at_all(short_tmp: Path) -> None:
    source = fragmented(short_tmp / "s", SIZE)
    copied = await copy(short_tmp, source, hole(short_tmp / "t"), is_known_zero=True)
    assert not copied.log.of("Zero", "Extents", failed=True)
    assert list(copied.log.ranges("Write")) == list(nonzero(source))
    assert copied.bytes.zero == 0


async def test_a_target_that_the_person_calls_zero_is_believed(short_tmp: Path) -> None:
    source = fragmented(short_tmp / "s", SIZE)
    options = CopyOptions(target_is_zero=True)
    copied = await copy(short_tmp, source, hole(short_tmp / "t"), options=options)
    assert not copied.log.of("Zero", "Extents", failed=True)
    assert list(copied.log.ranges("Write")) == list(nonzero(source))


async def test_a_fresh_file_is_proven_zero_by_its_extents(short_tmp: Path) -> None:
    source = islands(short_tmp / "s")
    copied = await copy(short_tmp, source, hole(short_tmp / "t"))
    assert not copied.log.of("Zero", failed=True)
    assert list(copied.log.ranges("Write")) == list(nonzero(source))
    assert copied.bytes.skipped == SIZE - nonzero(source).total
    assert (short_tmp / "t").stat().st_blocks <= source.stat().st_blocks


async def test_a_half_dirty_target_gets_zeroes_where_it_needs_them(short_tmp: Path) -> None:
    source = islands(short_tmp / "s")
    half = 12 * MIB
    copied = await copy(short_tmp, source, dirty(short_tmp / "t", half))
    wanted = Ranges([(0, half)])
    for offset, length in nonzero(source):
        wanted.remove(offset, length)
    assert copied.zeroed() == list(wanted)
    assert list(copied.log.ranges("Write")) == list(nonzero(source))


async def test_target_extents_that_lie_elsewhere_do_not_matter_without_any(short_tmp: Path) -> None:
    """A dirty target that tells no extents is zeroed everywhere."""
    source = islands(short_tmp / "s")
    copied = await copy(short_tmp, source, dirty(short_tmp / "t"), filters=("noextents",))
    wanted = Ranges(everything())
    for offset, length in nonzero(source):
        wanted.remove(offset, length)
    assert copied.zeroed() == list(wanted)


async def test_fast_zeroes_that_are_refused_are_written(short_tmp: Path) -> None:
    source = specks(short_tmp / "s", 64 * KIB)
    target = dirty(short_tmp / "t", 4 * MIB, 4 * MIB)
    words = ("zeromode=plugin", "fastzeromode=slow")
    copied = await copy(short_tmp, source, target, *words, filters=("nozero",))
    refused = copied.log.of("Zero", failed=True)
    assert refused
    assert {request.error for request in refused} == {"ENOTSUP"}
    assert all(request.words["fast"] == "1" for request in refused)
    assert list(copied.log.ranges("Write")) == everything(4 * MIB)
    # Only what was on its way when the first was refused: 8 slots of a MiB with 8 zeroes each.
    assert len(refused) <= 64


async def test_fast_zeroes_are_asked_for_only_in_data(short_tmp: Path) -> None:
    """A hole costs no reading, so even a slow zero is cheaper than writing it."""
    copied = await copy(
        short_tmp,
        hole(short_tmp / "s"),
        dirty(short_tmp / "t"),
        "zeromode=plugin",
        "fastzeromode=slow",
        filters=("nozero",),
    )
    assert copied.zeroed() == everything()
    assert not copied.log.of("Write", failed=True)


async def test_zeroes_that_are_refused_are_written(short_tmp: Path) -> None:
    copied = await copy(
        short_tmp,
        hole(short_tmp / "s"),
        dirty(short_tmp / "t"),
        "error-zero=EINVAL",
        "error-zero-rate=100%",
        filters=("error",),
    )
    assert copied.log.of("Zero", failed=True)
    assert list(copied.log.ranges("Write")) == everything()


async def test_a_server_without_zeroes_has_them_written(short_tmp: Path) -> None:
    source = islands(short_tmp / "s")
    copied = await copy(short_tmp, source, dirty(short_tmp / "t"), filters=("nozero",))
    assert not copied.log.of("Zero", failed=True)
    assert list(copied.log.ranges("Write")) == everything()
    assert max(request.length for request in copied.log.of("Write")) <= 4 * MIB


@pytest.mark.parametrize("is_known_zero", [True, False])
@pytest.mark.parametrize("in_filters", [(), ("noextents",)], ids=["extents", "none"])
async def test_allocated_makes_no_holes(
    short_tmp: Path, is_known_zero: bool, in_filters: tuple[str, ...]
) -> None:
    source = fragmented(short_tmp / "s", SIZE)
    target = hole(short_tmp / "t")
    copied = await copy(
        short_tmp,
        source,
        target,
        is_known_zero=is_known_zero,
        in_filters=in_filters,
        options=CopyOptions(allocated=True),
    )
    zeroes = copied.log.of("Zero", failed=True)
    assert zeroes
    assert {request.words["trim"] for request in zeroes} == {"0"}
    assert list(copied.log.ranges("Write", "Zero")) == everything()
    assert target.stat().st_blocks * 512 >= SIZE
    assert source.stat().st_blocks * 512 < SIZE


async def test_without_allocated_the_server_may_make_holes(short_tmp: Path) -> None:
    target = dirty(short_tmp / "t")
    copied = await copy(short_tmp, hole(short_tmp / "s"), target)
    assert {request.words["trim"] for request in copied.log.of("Zero")} == {"1"}
    assert target.stat().st_blocks == 0


@pytest.mark.parametrize(
    ("sparse", "zeroes", "are_found"),
    [
        (0, 64 * KIB, False),
        (None, 4 * KIB, True),
        (None, 2 * KIB, False),
        (512, 512, True),
        (64 * KIB, 64 * KIB, True),
        (64 * KIB, 32 * KIB, False),
    ],
)
@pytest.mark.parametrize("is_known_zero", [True, False])
async def test_zeroes_in_data_are_looked_for_in_blocks(
    short_tmp: Path, sparse: int | None, zeroes: int, are_found: bool, is_known_zero: bool
) -> None:
    source = specks(short_tmp / "s", zeroes)
    target = hole(short_tmp / "t", 4 * MIB) if is_known_zero else short_tmp / "t"
    if not is_known_zero:
        dirty(target, 4 * MIB, 4 * MIB)
    copied = await copy(
        short_tmp,
        source,
        target,
        *FAST,
        filters=("nozero",),
        is_known_zero=is_known_zero,
        options=CopyOptions(sparse=sparse),
    )
    wanted = 2 * MIB if are_found else 4 * MIB
    assert copied.log.ranges("Write").total == wanted == copied.bytes.copied
    assert copied.log.ranges("Zero").total == (0 if is_known_zero else 4 * MIB - wanted)


@pytest.mark.parametrize("in_filters", [(), ("noextents",)], ids=["extents", "none"])
@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_the_target_takes_no_more_room_than_with_nbdcopy(
    short_tmp: Path, in_filters: tuple[str, ...], seed: int
) -> None:
    source = fragmented(short_tmp / "s", SIZE, seed=seed)
    ours, theirs = hole(short_tmp / "t"), hole(short_tmp / "theirs")
    await copy(short_tmp, source, ours, in_filters=in_filters)
    server = ["[", "nbdkit", "--exit-with-parent", *(f"--filter={name}" for name in in_filters)]
    one = [*server, "file", str(source), "]"]
    two = ["[", "nbdkit", "--exit-with-parent", "file", str(theirs), "]"]
    subprocess.run(["nbdcopy", "--flush", "--", *one, *two], check=True)
    assert digest(theirs) == digest(source)
    assert ours.stat().st_blocks <= theirs.stat().st_blocks
    assert ours.stat().st_blocks > 0
