"""A target that forgets what it had not flushed, in either part of a copy that overlaps.

The source, what the conversion made of it, and the target are served by servers that the copy can
lose: in a run they are watched, and one that dies ends it.
"""

from __future__ import annotations

import random
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.fault.restarting import FORGETTING, Restarting, nbdkit
from tests.integration.servers import MIB
from v2v_async.copy.overlapped import OverlappedCopy
from v2v_async.events import Event, Reporter
from v2v_async.model import SourceDisk, SourceGuest
from v2v_async.options import CopyOptions
from v2v_async.v2vdir import TargetExport, V2VDir

pytestmark = pytest.mark.anyio
SIZE = 8 * MIB
# Each part of the copy takes long enough to be killed in its middle.
SLOWLY = CopyOptions(bandwidth=16 * MIB, retries=50)


def disks(folder: Path) -> tuple[bytes, bytes, list[tuple[int, int]], list[tuple[int, int]]]:
    """Return a source, what is made of it, and where that has other data, and zeroes."""
    noise = random.Random(3)
    before = bytearray(noise.randbytes(SIZE))
    before[MIB : 2 * MIB] = bytes(MIB)
    after = bytearray(before)
    data = [(MIB + 4096, 8192), (3 * MIB, 3 * MIB)]
    zero = [(MIB // 2, MIB // 2), (MIB + 65536, 4096), (7 * MIB, MIB)]
    for offset, length in data:
        after[offset : offset + length] = noise.randbytes(length)
    for offset, length in zero:
        after[offset : offset + length] = bytes(length)
    (folder / "before").write_bytes(before)
    (folder / "after").write_bytes(after)
    return bytes(before), bytes(after), data, zero


@pytest.mark.parametrize("part", ["early", "rest", "both"])
@pytest.mark.parametrize("is_new", [True, False], ids=["new", "used"])
async def test_every_byte_is_right(
    v2vdir: V2VDir, short_tmp: Path, is_new: bool, part: str
) -> None:
    _, after, data, zero = disks(short_tmp)
    target = short_tmp / "target"
    target.write_bytes(bytes(SIZE) if is_new else b"\xd5" * SIZE)
    v2vdir.update(targets=[TargetExport(index=1, is_known_zero=is_new)])
    guest = SourceGuest(
        name="web",
        memory=MIB,
        vcpus=1,
        disks=[SourceDisk(index=1, source="before", format="raw", size=SIZE)],
    )
    kills = {"early", "rest"} if part == "both" else {part}
    now = "early"
    events: list[Event] = []

    def emit(event: Event) -> None:
        events.append(event)
        if event.type == "progress" and now in kills and event.bytes is not None:
            landed = event.bytes.copied - (first if now == "rest" else 0)
            if landed > MIB:
                kills.discard(now)
                server.kill()

    first = 0
    socket = v2vdir.target_socket(1)
    async with AsyncExitStack() as stack:
        for name, path in (("plain1", "before"), ("in1", "after")):
            argv = nbdkit(v2vdir.path / name, "--readonly", "file", f"file={short_tmp / path}")
            await stack.enter_async_context(Restarting(argv, v2vdir.path / name))
        argv = nbdkit(socket, "python", str(FORGETTING), f"file={target}")
        server = await stack.enter_async_context(Restarting(argv, socket, is_kept=True))
        copying = OverlappedCopy(v2vdir, guest, SLOWLY, Reporter(emit, "t", step="copy"))
        copying.disks[1].leave_out([(7 * MIB, MIB)])
        await copying.copy_early()
        now = "rest"
        first = max(event.bytes.copied for event in events if event.bytes is not None)
        [landed] = await copying.copy_rest({1: (data, zero)})
        assert server.kills == (2 if part == "both" else 1)
    assert target.read_bytes() == after
    assert landed.landed == landed.total == SIZE
    assert landed.data == landed.copied
    assert landed.wasted >= 3 * MIB
