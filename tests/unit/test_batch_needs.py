"""What guests take of the limits, and how windows change them."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from v2v_async.batch.plan.model import GuestPlan, Limits, Window
from v2v_async.batch.schedule.needs import Facts, capacities, needs_of, source_host, target_name
from v2v_async.batch.schedule.windows import is_open, limits_at, next_change

GIB = 1 << 30


def guest(name: str, **fields: object) -> GuestPlan:
    return GuestPlan.model_validate({"name": name, **fields})


@pytest.mark.parametrize(
    ("source", "host"),
    [
        ({"connection": "vpx://user@vc.example.com/DC/esx1"}, "vc.example.com"),
        ({"type": "vmx", "source": "ssh://root@esx2/vmfs/volumes/ds/a.vmx"}, "esx2"),
        ({"type": "disk", "source": ["nbd://storage/a", "b.img"]}, "storage"),
        ({"type": "disk", "source": "/vms/a.img"}, None),
        ({"connection": "qemu:///system", "source": "a"}, None),
        ({}, None),
    ],
)
def test_hosts_of_sources(source: dict[str, object], host: str | None) -> None:
    assert source_host(guest("a", input=source)) == host


def test_needs_name_only_limits_that_the_plan_has(tmp_path: Path) -> None:
    limits = Limits.model_validate(
        {
            "conversions": 3,
            "memory": "16G",
            "scratch": "100G",
            "disks": 6,
            "connections": 12,
            "hosts": {"esx1": {"connections": 2, "disks": 1}, "esx2": {"connections": 9}},
            "targets": {"/srv": {"connections": 8}},
            "groups": {"slow": {"conversions": 1, "bandwidth": "10MB/s"}},
        }
    )
    window = Window.model_validate({"begin": "01:00", "end": "02:00", "group": "fast", "disks": 1})
    capacity = capacities(limits, [window], tmp_path)
    assert capacity == {
        "conversions": 3,
        "memory": 16 * GIB,
        "scratch": 100 * GIB,
        "disks": 6,
        "connections": 12,
        "hosts.esx1.connections": 2,
        "hosts.esx1.disks": 1,
        "hosts.esx2.connections": 9,
        "targets./srv.connections": 8,
        "groups.slow.conversions": 1,
        "groups.fast.conversions": 1 << 30,
        "groups.fast.disks": 1 << 30,
    }
    one = guest(
        "one",
        input={"connection": "esx://esx1/", "source": "one"},
        output={"type": "local", "storage": "/srv"},
        group="slow",
        memory="3G",
        scratch="5G",
    )
    two = guest("two", input={"type": "disk", "source": "x"}, output={"type": "null"}, priority=2)
    needs = needs_of([one, two], {"one": Facts((GIB, 9 * GIB)), "two": Facts((GIB,))}, capacity)
    assert needs["one"].convert == {
        "conversions": 1,
        "memory": 3 * GIB,
        "groups.slow.conversions": 1,
    }
    assert needs["one"].keeps == {"scratch": 5 * GIB}
    assert list(needs["one"].disks) == [1, 2]
    assert needs["one"].disks[1] == {
        "disks": 1,
        "connections": 2,
        "hosts.esx1.connections": 2,
        "hosts.esx1.disks": 1,
        "targets./srv.connections": 2,
    }
    assert needs["one"].lengths_s[2] == 9 * needs["one"].lengths_s[1]
    assert needs["two"].disks[1] == {"disks": 1, "connections": 4}
    assert needs["two"].rank < needs["one"].rank
    assert target_name(two) == "null"


@pytest.mark.parametrize(
    ("processors", "memory", "conversions"),
    [(1, 64 * GIB, 2), (2, 64 * GIB, 3), (8, 64 * GIB, 12), (8, 6 * GIB, 3), (8, GIB, 1)],
)
def test_conversions_are_as_many_as_processors_and_memory_bear(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    processors: int,
    memory: int,
    conversions: int,
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: processors)
    capacity = capacities(Limits(memory=memory), [], tmp_path)
    assert capacity["conversions"] == conversions


def test_without_limits_the_machine_sets_them(tmp_path: Path) -> None:
    capacity = capacities(Limits(), [], tmp_path)
    assert capacity["conversions"] >= 1
    assert capacity["memory"] >= 2 * GIB
    assert capacity["scratch"] > 0


NIGHTS = Window.model_validate(
    {"days": ["fri", "sat"], "begin": "22:00", "end": "06:00", "bandwidth": "1GB/s"}
)
WORK = Window.model_validate(
    {
        "days": ["mon", "tue", "wed", "thu", "fri"],
        "begin": "08:00",
        "end": "18:00",
        "conversions": 0,
        "bandwidth": "10MB/s",
    }
)
GROUP = Window.model_validate(
    {"begin": "00:00", "end": "00:00", "group": "dmz", "disks": 1, "bandwidth": "1MB/s"}
)


@pytest.mark.parametrize(
    ("moment", "is_night"),
    [
        ("2026-11-27 21:59", False),  # a Friday
        ("2026-11-27 22:00", True),
        ("2026-11-28 05:59", True),
        ("2026-11-28 06:00", False),
        ("2026-11-29 05:00", True),  # Sunday, still Saturday's night
        ("2026-11-29 23:00", False),
    ],
)
def test_a_window_over_midnight(moment: str, is_night: bool) -> None:
    assert is_open(NIGHTS, datetime.fromisoformat(moment)) == is_night


def test_what_the_windows_change() -> None:
    limits = Limits.model_validate({"bandwidth": "50MB/s", "groups": {"dmz": {}}})
    windows = [NIGHTS, WORK, GROUP]
    at_work = limits_at(limits, windows, datetime(2026, 11, 27, 12))
    assert at_work.rates == {"": 10_000_000, "groups.dmz": 1_000_000}
    assert at_work.capacities == {"conversions": 0, "groups.dmz.disks": 1}
    assert limits_at(limits, windows, datetime(2026, 11, 27, 23)).rates[""] == 1_000_000_000
    assert limits_at(limits, [], datetime(2026, 11, 27, 23)).rates == {"": 50_000_000}


def test_when_it_changes_next() -> None:
    windows = [NIGHTS, WORK]
    assert next_change(windows, datetime(2026, 11, 27, 12)) == datetime(2026, 11, 27, 18)
    assert next_change(windows, datetime(2026, 11, 27, 18)) == datetime(2026, 11, 27, 22)
    assert next_change(windows, datetime(2026, 11, 28, 1)) == datetime(2026, 11, 28, 6)
    assert next_change(windows, datetime(2026, 11, 29, 7)) == datetime(2026, 11, 30, 8)
    assert next_change([], datetime(2026, 11, 29, 7)) is None
