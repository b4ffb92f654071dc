"""``<checksum>`` of a disk: what is served is read whole and compared, before the conversion."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import anyio
import anyio.to_thread

from v2v_async.connection import connected
from v2v_async.errors import SourceError, V2VError
from v2v_async.events import Reporter
from v2v_async.input.checking import raise_problems
from v2v_async.input.libvirt.domain_disks import ChecksumFail
from v2v_async.units import MIB
from v2v_async.v2vdir import V2VDir

# Small enough for a server of awkward limits, large enough that a round trip does not show.
_REQUEST = 2 * MIB
# Each holds a processor: hashing is what takes the time.
_AT_ONCE = 2
_SAYS_PER_DISK = 10


@dataclass(frozen=True, slots=True)
class Checksum:
    """What disk ``index`` should have. ``fail``: what happens otherwise; ``print`` only tells."""

    index: int
    method: str
    expected: str
    fail: ChecksumFail


async def verify_checksums(
    checksums: Sequence[Checksum], v2vdir: V2VDir, reporter: Reporter
) -> None:
    """Read each disk's ``inN`` whole, and compare; some at the same time.

    Raises:
        SourceError: all disks whose content is another, and where that is to be an error.
        NbdError: a disk can't be read.
    """
    problems: dict[int, V2VError] = {}
    limiter = anyio.CapacityLimiter(_AT_ONCE)

    async def verify(checksum: Checksum) -> None:
        async with limiter:
            try:
                await _verify(checksum, v2vdir, reporter.for_disk(checksum.index))
            except V2VError as error:
                problems[checksum.index] = error

    async with anyio.create_task_group() as group:
        for checksum in checksums:
            group.start_soon(verify, checksum)
    raise_problems(sorted(problems.items()))


async def _verify(checksum: Checksum, v2vdir: V2VDir, reporter: Reporter) -> None:
    reporter.message(f"checking the {checksum.method} checksum")
    digest = hashlib.new(checksum.method, usedforsecurity=False)

    async with connected(str(v2vdir.source_socket(checksum.index))) as connection:
        size = connection.info.size
        request = min(_REQUEST, connection.info.maximum_block)
        read = connection.handle.read_now
        tenth = -(-size // _SAYS_PER_DISK)
        told = 0

        def step(offset: int) -> None:
            digest.update(read(min(request, size - offset), offset))

        for offset in range(0, size, request):
            await anyio.to_thread.run_sync(partial(step, offset))
            if offset - told >= tenth and size > 1024 * MIB:
                told = offset
                reporter.message(f"{offset * 100 // size}% of the checksum is done")
    actual = digest.hexdigest()
    if checksum.fail == "print":
        reporter.message(f"its {checksum.method} checksum is {actual}")
    elif actual != checksum.expected:
        words = (
            f"the disk’s {checksum.method} checksum is {actual}, but its XML says "
            f"{checksum.expected}: it is not the disk that was meant, or it was damaged"
        )
        if checksum.fail == "warn":
            reporter.warning(words)
        else:
            raise SourceError(
                words,
                hint="copy the disk again, or take <checksum> out of the XML if the disk is right",
            )
