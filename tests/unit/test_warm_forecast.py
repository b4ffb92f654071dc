"""What a cutover would cost, from what the passes took."""

from __future__ import annotations

import pytest

from v2v_async.units import GIB, MIB
from v2v_async.warm.forecast import forecast
from v2v_async.warm.start import told
from v2v_async.warm.state import Pass, PassDisk


def made(
    number: int,
    point: float,
    duration_s: float,
    *changed: int,
    is_all: bool = False,
    is_off: bool = False,
) -> Pass:
    disks = [PassDisk(index=at, changed=size, copied=size) for at, size in enumerate(changed, 1)]
    return Pass(
        number=number,
        mark=f"m-{number}",
        began=point,
        point=point,
        duration_s=duration_s,
        is_all=is_all,
        is_off=is_off,
        disks=disks,
    )


FIRST = made(1, 0, 100, 8 * GIB, 2 * GIB, is_all=True)


def test_nothing_is_known_of_one_pass() -> None:
    assert forecast([], 0) is None
    assert forecast([FIRST], 50) is None


def test_two_everythings_tell_no_rate() -> None:
    assert forecast([FIRST, made(2, 500, 100, 10 * GIB, is_all=True)], 700) is None


def test_the_rates_and_what_is_left() -> None:
    """100 s after the last pass; 100 MiB/s are copied, 10 s a pass takes in any case."""
    last = made(2, 1000, 20, 1000 * MIB, 24 * MIB)
    found = forecast([FIRST, last], 1100)
    assert found is not None
    assert found.throughput == pytest.approx(10 * GIB / 100)
    assert [disk.dirty_rate for disk in found.disks] == [MIB, 0.024 * MIB]
    assert [disk.left for disk in found.disks] == [100 * MIB, round(2.4 * MIB)]
    assert [disk.downtime_s for disk in found.disks] == pytest.approx([1, 0.024], rel=0.03)
    assert found.downtime_s == pytest.approx(10 + 1)
    # Another sync takes 11 s, and leaves what was written meanwhile.
    assert found.next_downtime_s == pytest.approx(10 + 11 * 1.024 / 102.4, rel=1e-3)
    assert not found.is_worth_a_pass
    assert "take 0:11, before" in told(found)


def test_another_pass_is_worth_it_after_a_long_time() -> None:
    last = made(2, 1000, 10, 1024 * MIB)
    found = forecast([FIRST, last], 1000 + 3600)
    assert found is not None
    assert found.is_worth_a_pass
    assert found.next_downtime_s < 2 < found.downtime_s
    assert "after another sync" in told(found)


def test_a_guest_that_writes_faster_than_it_is_copied() -> None:
    passes = [FIRST, made(2, 100, 100, 20 * GIB)]
    found = forecast(passes, 200)
    assert found is not None
    assert not found.is_worth_a_pass


def test_a_guest_that_is_off_writes_nothing() -> None:
    found = forecast([FIRST, made(2, 1000, 10, 1024 * MIB, is_off=True)], 9000)
    assert found is not None
    assert found.left == 0
