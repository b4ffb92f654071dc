"""How a batch may go, by its own scheduler without any work."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from v2v_async.batch.plan.model import Plan
from v2v_async.batch.preflight.preflight import Checked
from v2v_async.batch.schedule.forecast import forecast
from v2v_async.batch.schedule.needs import BYTES_S, CONVERT_S, Facts, capacities
from v2v_async.batch.schedule.simulation import Forecast, share_rates, simulate
from v2v_async.units import GIB, MIB

FRIDAY = datetime(2026, 11, 27, 12)
COPY_S = GIB / BYTES_S


def made(count: int, **plan: Any) -> Plan:
    limits = {"memory": "64G", "scratch": "64G", "conversions": 2, **plan.pop("limits", {})}
    guests = plan.pop("guests", [{"name": f"g{number}"} for number in range(count)])
    return Plan.model_validate({"guests": guests, "limits": limits, **plan})


def simulated(
    plan: Plan, tmp_path: Path, sizes: Mapping[str, tuple[int, ...]] | None = None
) -> Forecast:
    facts = {each.name: Facts((sizes or {}).get(each.name, (GIB,))) for each in plan.guests}
    limits = capacities(plan.limits, plan.windows, tmp_path)
    return simulate(plan.guests, facts, limits, plan, FRIDAY)


def test_one_guest(tmp_path: Path) -> None:
    found = simulated(made(1), tmp_path, {"g0": (GIB, 2 * GIB, 0)})
    (one,) = found.guests
    assert one.conversion == (0.0, CONVERT_S)
    assert one.copies[1] == pytest.approx((CONVERT_S, CONVERT_S + COPY_S))
    assert one.copies[2] == pytest.approx((CONVERT_S, CONVERT_S + 2 * COPY_S))
    assert one.copies[3] == pytest.approx((CONVERT_S, CONVERT_S))
    assert found.makespan_s == pytest.approx(CONVERT_S + 2 * COPY_S)
    assert found.longest_s == found.bound_s == pytest.approx(found.makespan_s)
    assert found.bottleneck is None
    assert found.stuck == []


def test_conversions_hold_it_up(tmp_path: Path) -> None:
    found = simulated(made(10), tmp_path)
    assert found.bottleneck == "conversions"
    assert found.busy_s["conversions"] == 5 * CONVERT_S
    assert found.bound_s == 5 * CONVERT_S
    assert found.makespan_s == pytest.approx(5 * CONVERT_S + COPY_S)
    assert [each.begins_s for each in found.guests] == [n // 2 * CONVERT_S for n in range(10)]


def test_a_converted_guest_has_only_its_copy_before_it(tmp_path: Path) -> None:
    plan = made(1)
    limits = capacities(plan.limits, [], tmp_path)
    facts = {"g0": Facts((GIB,))}
    found = simulate(plan.guests, facts, limits, plan, FRIDAY, converted=frozenset(["g0"]))
    assert found.makespan_s == pytest.approx(COPY_S)


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        ({"bandwidth": 10 * MIB}, "bandwidth"),
        ({"targets": {"libvirt": {"bandwidth": 10 * MIB}}}, "targets.libvirt.bandwidth"),
        ({"groups": {"slow": {"bandwidth": 10 * MIB}}}, "groups.slow.bandwidth"),
    ],
)
def test_bandwidth_holds_it_up(tmp_path: Path, limits: dict[str, Any], name: str) -> None:
    guests = [{"name": f"g{number}", "group": "slow"} for number in range(4)]
    found = simulated(made(4, guests=guests, limits=limits), tmp_path)
    assert found.bottleneck == name
    assert found.busy_s[name] == pytest.approx(4 * GIB / (10 * MIB))
    assert found.makespan_s == pytest.approx(CONVERT_S + found.busy_s[name])


def test_bandwidth_is_shared_fairly() -> None:
    copies = {("a", 1): ("", "g"), ("b", 1): ("", "g"), ("c", 1): ("",), ("d", 1): ("",)}
    speeds = share_rates(copies, {"": 100, "g": 20, "h": 1}, 1000.0)
    assert speeds == {("a", 1): 10, ("b", 1): 10, ("c", 1): 40, ("d", 1): 40}
    assert share_rates(copies, {"": 10_000}, 1000.0) == dict.fromkeys(copies, 1000.0)
    assert share_rates(copies, {}, 7.0) == dict.fromkeys(copies, 7.0)


def test_windows_are_waited_for(tmp_path: Path) -> None:
    day = {"begin": "06:00", "end": "22:00"}
    plan = made(3, windows=[day | {"conversions": 0, "bandwidth": 1 * MIB}])
    found = simulated(plan, tmp_path)
    assert found.guests[0].begins_s == 10 * 3600, "from noon to 22:00"
    assert found.makespan_s == pytest.approx(10 * 3600 + 2 * CONVERT_S + COPY_S)
    assert found.stuck == []


def test_what_no_window_lets_begin_is_stuck(tmp_path: Path) -> None:
    plan = made(
        2,
        guests=[{"name": "a", "group": "dmz"}, {"name": "b"}],
        windows=[{"begin": "00:00", "end": "00:00", "group": "dmz", "disks": 0}],
    )
    found = simulated(plan, tmp_path)
    assert found.stuck == ["a"]
    assert found.makespan_s == pytest.approx(CONVERT_S + COPY_S)


def test_a_thousand_guests_are_near_the_bound_and_soon_told(tmp_path: Path) -> None:
    sizes = {f"g{number}": (GIB * (1 + number % 40),) for number in range(1000)}
    plan = made(1000, limits={"conversions": 8, "disks": 8, "scratch": "200G"})
    began = time.process_time()
    found = simulated(plan, tmp_path, sizes)
    assert time.process_time() - began < 10
    assert found.stuck == []
    assert found.bound_s <= found.makespan_s <= 1.1 * found.bound_s


def test_copies_hold_it_up(tmp_path: Path) -> None:
    plan = made(40, limits={"disks": 2})
    found = simulated(plan, tmp_path, {f"g{n}": (GIB * n,) for n in range(40)})
    assert found.bottleneck == "disks"
    assert found.bound_s == pytest.approx(sum(range(40)) * COPY_S / 2)


def checked(plan: Plan, tmp_path: Path, **facts: Facts) -> Checked:
    limits = capacities(plan.limits, plan.windows, tmp_path)
    return Checked(facts=facts, capacities=limits)


def test_lines(tmp_path: Path) -> None:
    plan = made(4)
    known = {f"g{n}": Facts((GIB, GIB)) for n in range(3)}
    lines = forecast(plan, checked(plan, tmp_path, **known), begin=FRIDAY, width=100)
    assert lines[0].startswith("A guess at how it goes, as if each conversion took 2:00")
    assert "Real lengths differ" in lines[1]
    assert [line.split()[0] for line in lines[3:7]] == ["guest", "g0", "g1", "g2"]
    assert lines[4] == "  g0     0:00 – 2:00  2:00 – 2:10 (2 disks)    2.0 GiB"
    assert lines[6] == "  g2     2:00 – 4:00  4:00 – 4:10 (2 disks)    2.0 GiB"
    told = " ".join(line.strip() for line in lines[8:])
    assert (
        "About 4:10 for 3 guests with up to 6.0 GiB to move; no order is shorter than 3:00" in told
    )
    assert "What holds it up is ‘conversions’. Busy for at least: ‘conversions’ (2) 3:00" in told
    assert lines[-1] == "Left out, since nothing is known of their disks: g3."


def test_lines_with_windows_have_the_time_of_the_clock(tmp_path: Path) -> None:
    plan = made(1, windows=[{"begin": "06:00", "end": "22:00", "conversions": 0}])
    lines = forecast(plan, checked(plan, tmp_path, g0=Facts((GIB,))), begin=FRIDAY, width=100)
    assert "Fri 22:00 – Fri 22:02" in lines[4]


def test_lines_of_what_never_begins(tmp_path: Path) -> None:
    plan = made(1, windows=[{"begin": "00:00", "end": "00:00", "conversions": 0}])
    lines = forecast(plan, checked(plan, tmp_path, g0=Facts((GIB,))), begin=FRIDAY, width=100)
    assert "never" in lines[4]
    assert lines[-1] == "Never done, as the limits and windows are: g0."


@pytest.mark.parametrize(("width", "most"), [(None, 80), (60, 60), (132, 132)])
def test_sentences_are_broken_at_the_width(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int | None, most: int
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    plan = made(30, limits={"scratch": "63G"})
    known = {f"g{n}": Facts((GIB, GIB)) for n in range(20)}
    found = checked(plan, tmp_path, **known)
    lines = forecast(plan, found, begin=FRIDAY, width=width)
    assert max(map(len, lines)) <= most
    whole = forecast(plan, found, begin=FRIDAY, width=10_000)
    assert " ".join("\n".join(lines).split()) == " ".join("\n".join(whole).split())
    assert not any(line.strip().startswith(("GiB", "MiB")) for line in lines)
    monkeypatch.setenv("COLUMNS", "50")
    assert max(len(line) for line in forecast(plan, found, begin=FRIDAY)[-3:]) <= 50


def test_nothing_known_is_nothing_told(tmp_path: Path) -> None:
    plan = made(2)
    assert forecast(plan, checked(plan, tmp_path), begin=FRIDAY) == [
        "Left out, since nothing is known of their disks: g0, g1."
    ]
