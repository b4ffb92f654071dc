"""The matrix: kinds of targets, connections, extents, zeroes and block sizes, at odd disk sizes.

Not every combination but every *pair* of values is tried (:func:`rows`, checked by a test of its
own): a fault that needs three special values at once is rare, and the whole matrix would be 1440
copies. Raw targets are nbdkit's ``sparse-random``, which refuses any byte that is not the source's;
behind qcow2 ones is a real qemu-nbd, and nbdkit stands before it to narrow what it can do.
"""

from __future__ import annotations

import itertools
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.integration.request_log import read_logs
from tests.integration.servers import MIB, serve
from v2v_async import qemu_nbd
from v2v_async.copy.endpoint import nbd
from v2v_async.copy.ranges import Ranges
from v2v_async.copy.schedule import CopyJob, copy_disks
from v2v_async.events import Event, Reporter
from v2v_async.options import CopyOptions
from v2v_async.server import Server, Servers, running_servers
from v2v_async.v2vdir import V2VDir

pytestmark = pytest.mark.anyio

AXES: dict[str, tuple[object, ...]] = {
    "kind": ("raw", "qcow2", "compressed"),
    "connections": (1, 2, 8),
    "extents": ("extents", "none"),
    "zero": ("zero", "no-zero", "fast-zero", "fast-refused"),
    "block": (1, 512, 4096, 65536),
    "size": (1, 511, 65537, 5 * MIB + 1234, 37 * MIB + 4097),
}
ZEROES = {
    "zero": ("zeromode=plugin", "fastzeromode=none"),
    "no-zero": ("zeromode=none",),
    "fast-zero": ("zeromode=plugin", "fastzeromode=ignore"),
    "fast-refused": ("zeromode=plugin", "fastzeromode=slow"),
}
Row = tuple[object, ...]
# Seeds of sparse-random whose disks of these sizes hold data and holes both, found by trying.
SEED = 3


def pairs_of(row: Row) -> set[tuple[tuple[int, object], ...]]:
    return set(itertools.combinations(enumerate(row), 2))


@cache
def rows() -> tuple[Row, ...]:
    """Return rows in which every value meets every other: the best one next, until all have met."""
    every = list(itertools.product(*AXES.values()))
    missing = set().union(*(pairs_of(row) for row in every))
    chosen = []
    while missing:
        best = max(every, key=lambda row: len(pairs_of(row) & missing))
        missing -= pairs_of(best)
        chosen.append(best)
    return tuple(chosen)


def test_every_value_meets_every_other() -> None:
    for (one, values), (other, others) in itertools.combinations(enumerate(AXES.values()), 2):
        met = {(row[one], row[other]) for row in rows()}
        assert met == set(itertools.product(values, others))
    assert len(rows()) < 40


@pytest.mark.parametrize(
    tuple(AXES), rows(), ids=["-".join(str(value) for value in row) for row in rows()]
)
async def test_every_byte_arrives(
    short_tmp: Path, kind: str, connections: int, extents: str, zero: str, block: int, size: int
) -> None:
    events: list[Event] = []
    log = short_tmp / "requests"
    if kind == "compressed":
        # qemu-nbd 7.2 takes whole clusters only, and says so; the policy must not say less.
        block = max(block, qemu_nbd.CLUSTER_SIZE)
    filters = () if extents == "extents" else ("noextents",)
    # Its smallest disks hold data only where all of a disk does.
    percent = 40 if size > MIB else 100
    disk = (f"size={size}", f"seed={SEED}", f"percent={percent}", "runlength=262144")
    async with running_servers(V2VDir(short_tmp)) as servers:
        source = await serve(servers, "in1", short_tmp, "sparse-random", *disk, filters=filters)
        policy = (
            f"logfile={log}",
            *ZEROES[zero],
            f"blocksize-minimum={block}",
            f"blocksize-preferred={max(block, 4096)}",
            f"blocksize-maximum={32 * MIB}",
            "blocksize-error-policy=error",
            f"round-up={block}",
        )
        # What the client asks for is logged before the policy refuses it. A padded last block must
        # be padded with zeroes: truncate refuses anything else behind the end.
        kept = ("log", "blocksize-policy", "nozero", "truncate", *filters)
        path = short_tmp / "target.qcow2"
        if kind == "raw":
            out = await serve(
                servers, "out1", short_tmp, "sparse-random", *disk, *policy, filters=kept
            )
        else:
            back = await serve_qcow2(servers, short_tmp, path, size, compress=kind == "compressed")
            socket = f"socket={back.endpoint}"
            out = await serve(servers, "out1", short_tmp, "nbd", socket, *policy, filters=kept)
        bears = {"max_connections": 1, "request_size": 65536} if kind == "compressed" else {}
        job = CopyJob(1, nbd(source.endpoint), nbd(out.endpoint), **bears)  # type: ignore[arg-type]
        options = CopyOptions(connections=connections, digest="sha256")
        result = (await copy_disks([job], Reporter(events.append, "t"), options))[0]
        wanted = await content_of(source.endpoint)
        if kind == "raw":
            assert await content_of(out.endpoint) == wanted + bytes(-size % block)
    asked = read_logs(log)
    assert not [request for request in asked.requests if request.error not in (None, "ENOTSUP")]
    assert not asked.of("Trim", failed=True)
    assert result.bytes.landed == result.bytes.total == size
    told = next(event for event in events if event.type == "planned").details
    assert told is not None
    assert told["connections"] == (1 if kind == "compressed" else connections)
    assert any(wanted)
    if size > MIB:
        assert 0 < data_of(wanted).total < size
    # A verifying target holds the right bytes from the start: all data must have been written.
    assert not missing(data_of(wanted), asked.ranges("Write"))
    if zero == "no-zero":
        assert not asked.of("Zero", failed=True)
    if kind != "raw":
        got = as_raw(path)
        assert got[:size] == wanted
        assert not any(got[size:])
    if kind == "compressed":
        assert {(r.offset % 65536, r.length) for r in asked.of("Write")} == {(0, 65536)}


async def serve_qcow2(
    servers: Servers, folder: Path, path: Path, size: int, *, compress: bool
) -> Server:
    # An image that is to be compressed may not end in half a cluster.
    unit = qemu_nbd.CLUSTER_SIZE if compress else 512
    rounded = -(-size // unit) * unit
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(rounded)], check=True)
    command = qemu_nbd.serve_target(path, folder / "back1", compress=compress)
    return await servers.start("back1", command, log=folder / "back1.log")


async def content_of(endpoint: str) -> bytes:
    """Read all of an export with another program."""
    import anyio

    script = ["nbdcopy", "--no-extents", f"nbd+unix:///?socket={endpoint}", "-"]
    return (await anyio.run_process(script)).stdout


def as_raw(path: Path) -> bytes:
    raw = path.with_suffix(".raw")
    subprocess.run(
        ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), str(raw)], check=True
    )
    return raw.read_bytes()


def data_of(content: bytes) -> Ranges:
    """Return the blocks of 4 KiB that are not all zeroes."""
    found = Ranges()
    for at in range(0, len(content), 4096):
        block = content[at : at + 4096]
        if any(block):
            found.add(at, len(block))
    return found


def missing(wanted: Ranges, got: Ranges) -> list[tuple[int, int]]:
    return [(offset, length) for offset, length in wanted if not got.contains(offset, length)]
