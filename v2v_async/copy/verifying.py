"""``--verify``: read both sides again and compare; ``--repair``: copy again what differs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from v2v_async.copy.compare import BLOCK, CompareLane
from v2v_async.copy.disk import DiskCopy
from v2v_async.copy.ranges import Ranges
from v2v_async.copy.transfer import TransferLane
from v2v_async.errors import VerifyError
from v2v_async.units import format_size

if TYPE_CHECKING:
    from v2v_async.copy.driver import DiskDriver

_MOST_NAMED = 8
_REPORT_EVERY_S = 1.0


async def verify(driver: DiskDriver, *, repair: bool) -> None:
    """Compare all of both sides of a disk that has been copied and flushed.

    With ``repair``, what differs is copied again, reading all of it whatever the source tells of
    holes, flushed, and compared once more.

    Raises:
        VerifyError: they differ, after a repair still.
    """
    whole = Ranges([(0, driver.size)])
    different = await _compare(driver, whole)
    if different and repair:
        driver.reporter.warning(
            f"{_named(different)} differ from the source: copied again without asking for extents"
        )
        await driver.drive(_again(driver, different), TransferLane, flush=True)
        different = await _compare(driver, different)
    if different:
        raise VerifyError(
            f"the target differs from the source in {_named(different)}",
            ranges=list(different),
            offset=next(iter(different))[0],
            hint="copy it again with --repair, or find out who else writes to either side"
            if not repair
            else "somebody else writes to one of them, or the storage does not keep what it is "
            "given",
        )
    driver.reporter.message(f"verified: {format_size(driver.size)} are the same on both sides")


async def _compare(driver: DiskDriver, ranges: Ranges) -> Ranges:
    work = _again(driver, ranges)
    # The source as it really is, not as its extents tell: so the digest is taken here.
    work.digest = driver.digest if ranges.total == driver.size else None
    async with anyio.create_task_group() as group:
        group.start_soon(_report, driver, work, ranges.total)
        await driver.drive(work, CompareLane, flush=False)
        group.cancel_scope.cancel()
    return Ranges(work.differences)


async def _report(driver: DiskDriver, work: DiskCopy, total: int) -> None:
    while True:
        driver.reporter.emit("verifying", details={"compared": work.bytes().copied, "total": total})
        await anyio.sleep(_REPORT_EVERY_S)


def _again(driver: DiskDriver, ranges: Ranges) -> DiskCopy:
    """Return the work to deal with ``ranges`` alone, rounded to blocks, and nothing assumed."""
    copy = driver.copy
    unit = max(driver.geometry.block, BLOCK)
    rounded = Ranges()
    for offset, length in ranges:
        start = offset // unit * unit
        end = min(-(-(offset + length) // unit) * unit, driver.size)
        rounded.add(start, end - start)
    return DiskCopy(
        copy.index,
        driver.geometry,
        can_zero=copy.can_zero,
        can_fast_zero=copy.can_fast_zero,
        can_extents=False,
        allocated=copy.allocated,
        done=[(start, end - start) for start, end in rounded.gaps(0, driver.size)],
        epoch=copy.epoch,
    )


def _named(ranges: Ranges) -> str:
    """Return the first ranges and how many there are."""
    named = [f"{offset}-{offset + length - 1}" for offset, length in ranges][:_MOST_NAMED]
    more = len(ranges) - len(named)
    text = f"{ranges.total} bytes at " + ", ".join(named)
    return text + (f" and {more} more ranges" if more else "")
