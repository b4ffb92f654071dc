"""Whether limits and windows ever let each guest begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from v2v_async.batch.plan.model import Plan
from v2v_async.batch.preflight.problems import Problem
from v2v_async.batch.preflight.satisfiable import never_open, too_large, unused
from v2v_async.batch.schedule.needs import Facts, capacities, needs_of
from v2v_async.batch.schedule.scheduler import Scheduler, Task
from v2v_async.errors import UsageError

GIB = 1 << 30


def made(guests: list[dict[str, Any]], **plan: Any) -> Plan:
    named = [{"name": f"g{number}", **each} for number, each in enumerate(guests)]
    return Plan.model_validate({"guests": named, **plan})


def looked(plan: Plan, tmp_path: Path) -> tuple[list[Problem], list[Problem]]:
    capacity = capacities(plan.limits, plan.windows, tmp_path)
    needs = needs_of(plan.guests, {each.name: Facts((GIB,)) for each in plan.guests}, capacity)
    return too_large(needs, capacity), never_open(plan, needs, capacity)


def test_what_no_limit_lets_begin(tmp_path: Path) -> None:
    plan = made(
        [{"memory": "9G"}, {"memory": "9G"}, {"scratch": "50G"}, {}],
        limits={"memory": "8G", "scratch": "40G"},
    )
    memory, scratch = looked(plan, tmp_path)[0]
    assert str(memory) == "g0, g1: needs 9.0 GiB of ‘memory’, and the limit is 8.0 GiB"
    assert memory.hint == "raise limits.memory, or lower the guest's memory"
    assert scratch.guests == ("g2",)


def test_the_scheduler_agrees(tmp_path: Path) -> None:
    plan = made([{"memory": "9G"}, {"memory": "8G"}], limits={"memory": "8G"})
    capacity = capacities(plan.limits, plan.windows, tmp_path)
    needs = needs_of(plan.guests, {each.name: Facts((GIB,)) for each in plan.guests}, capacity)
    refused = []
    for name, each in needs.items():
        try:
            Scheduler(capacity).add(Task(name, name, each.rank, each.convert, each.keeps))
        except UsageError:
            refused.append(name)
    assert refused == [name for each in too_large(needs, capacity) for name in each.guests]


ALL_DAY = {"begin": "00:00", "end": "00:00"}
NIGHT = {"begin": "20:00", "end": "06:00"}
DAY = {"begin": "06:00", "end": "20:00"}


@pytest.mark.parametrize(
    ("windows", "told"),
    [
        ([ALL_DAY | {"conversions": 0}], "no conversion of it begin at any time of the week"),
        ([ALL_DAY | {"disks": 0}], "no copy of it begin"),
        ([NIGHT | {"conversions": 0}, DAY | {"conversions": 0}], "‘conversions’ is 0"),
        ([NIGHT | {"conversions": 0}], None),
        (
            [
                NIGHT | {"conversions": 0},
                DAY | {"group": "dmz", "conversions": 0},
            ],
            "‘conversions’ and ‘groups.dmz.conversions’ are never open together",
        ),
        ([ALL_DAY | {"days": ["sat"], "conversions": 0}], None),
        # A later window of the plan wins.
        (
            [ALL_DAY | {"conversions": 0}, {"begin": "03:00", "end": "03:01", "conversions": 2}],
            None,
        ),
    ],
)
def test_windows(windows: list[dict[str, Any]], told: str | None, tmp_path: Path) -> None:
    plan = made([{"group": "dmz"}], windows=windows, limits={"conversions": 2})
    found = looked(plan, tmp_path)[1]
    if told is None:
        assert found == []
    else:
        (problem,) = found
        assert problem.guests == ("g0",)
        assert told in problem.message


def test_a_window_of_another_group(tmp_path: Path) -> None:
    window = ALL_DAY | {"group": "dmz", "conversions": 0}
    plan = made([{"group": "dmz"}, {"group": "lan"}, {}], windows=[window])
    (problem,) = looked(plan, tmp_path)[1]
    assert problem.guests == ("g0",)


def test_names_that_nobody_uses() -> None:
    plan = made(
        [
            {"input": {"type": "disk", "source": "nbd://esx1/a"}, "group": "dmz"},
            {"input": {"type": "disk", "source": "/a"}, "datastore": "slow", "group": "lan"},
        ],
        limits={
            "hosts": {"esx1": {"disks": 1}, "esx2": {"disks": 1}},
            "targets": {"/srv": {"disks": 1}},
            "groups": {"dmz": {"disks": 1}},
            "datastores": {"slwo": {"disks": 1}},
        },
        windows=[ALL_DAY | {"group": "lan", "disks": 1}, ALL_DAY | {"group": "none", "disks": 1}],
    )
    assert unused(plan) == [
        "[limits.hosts.esx2] holds for no guest: their hosts are esx1",
        "[limits.datastores.slwo] holds for no guest: their datastores are slow",
        "[limits.targets./srv] holds for no guest: their targets are libvirt",
        "a window is for the group ‘none’, which no guest is in: their groups are dmz, lan",
        "g1: the datastore ‘slow’ is not in [limits.datastores], so that nothing limits it",
    ]
    assert unused(made([{"group": "dmz"}])) == []
