"""What a cutover would cost now, and whether another pass would make it cheaper. Pure.

A pass takes what it takes in any case (servers, a flush; where nothing tells what has changed, the
reading of everything) and the time for what it copies. What is left to copy grows with the rate at
which the guest writes to blocks that were the same before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from v2v_async.warm.state import Pass

# Below, another pass is not worth its reading.
_WORTH = 0.9


@dataclass(frozen=True, slots=True)
class DiskForecast:
    """``dirty_rate`` is bytes a second; ``left`` the bytes that a cutover would copy.

    ``downtime_s``: what they add to the downtime.
    """

    index: int
    dirty_rate: float
    left: int
    downtime_s: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of the copy alone: what the guest takes to shut down and the conversion come on top of it.

    ``throughput`` is bytes a second. ``downtime_s``: of a cutover now; ``next_downtime_s``: of one
    right after another pass.
    """

    throughput: float
    disks: tuple[DiskForecast, ...]
    downtime_s: float
    next_downtime_s: float

    @property
    def left(self) -> int:
        """Bytes that a cutover now would copy."""
        return sum(disk.left for disk in self.disks)

    @property
    def dirty_rate(self) -> float:
        """Bytes a second that change on all disks."""
        return sum(disk.dirty_rate for disk in self.disks)

    @property
    def is_worth_a_pass(self) -> bool:
        """Whether another pass would make the downtime shorter, and not by a trifle."""
        return self.next_downtime_s < _WORTH * self.downtime_s


def forecast(passes: Sequence[Pass], now: float) -> Forecast | None:
    """Return what can be said at the time ``now``; None before there were two passes.

    ``passes`` are those that have ended, in order.
    """
    if len(passes) < 2:
        return None
    before, last = passes[-2:]
    period_s = last.point - before.point
    if last.is_all or period_s <= 0:
        return None
    # The pass that moved most says best how fast bytes move.
    fastest = max(passes, key=lambda each: each.copied)
    throughput = fastest.copied / fastest.duration_s if fastest.duration_s > 0 else 0.0
    if throughput <= 0:
        return None
    always_s = max(0.0, last.duration_s - last.copied / throughput)
    since_s = 0.0 if last.is_off else max(0.0, now - last.point)
    disks = []
    for disk in last.disks:
        rate = disk.changed / period_s
        left = round(rate * since_s)
        disks.append(DiskForecast(disk.index, rate, left, left / throughput))
    downtime_s = always_s + sum(disk.downtime_s for disk in disks)
    dirty_rate = sum(disk.dirty_rate for disk in disks)
    return Forecast(
        throughput=throughput,
        disks=tuple(disks),
        downtime_s=downtime_s,
        next_downtime_s=always_s + dirty_rate * downtime_s / throughput,
    )
