"""Sums over a batch: room, memory, open files, processes."""

from __future__ import annotations

import os
import resource
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from v2v_async.batch.plan.model import GuestPlan, Limits, Window
from v2v_async.batch.preflight import machine
from v2v_async.batch.preflight.machine import Crowd, check_files, check_memory, check_tasks, crowd
from v2v_async.batch.preflight.room import (
    Demand,
    bytes_of,
    check_room,
    most_at_once,
    scratch_demand,
    target_demands,
)
from v2v_async.batch.preflight.target_files import TargetFiles
from v2v_async.model import SourceDisk
from v2v_async.output import files

GIB = 1 << 30
MIB = 1 << 20


def guest(name: str, **given: Any) -> GuestPlan:
    return GuestPlan.model_validate({"name": name, **given})


def disk(size: int, allocated: int | None, files: list[str] | None = None) -> SourceDisk:
    return SourceDisk(
        index=1, source="x", format="raw", size=size, allocated=allocated, files=files or []
    )


def test_bytes_that_may_move(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(b"x" * MIB)
    assert bytes_of(disk(GIB, None)) == GIB
    assert bytes_of(disk(GIB, 5 * MIB)) == 5 * MIB
    assert bytes_of(disk(GIB, 2 * GIB)) == GIB
    assert bytes_of(disk(GIB, 4096, [str(tmp_path / "gone"), str(base)])) >= MIB, "with its base"


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(files, "free_space", lambda directory: 10 * GIB)
    return 10 * GIB


def test_all_of_one_file_system_is_added_up(tmp_path: Path, free: int) -> None:
    (tmp_path / "out").mkdir()
    guests = [guest(f"g{number}", scratch="2G") for number in range(5)]
    target = TargetFiles(room=((tmp_path / "out", disk(8 * GIB, 1 * GIB + 1)),))
    demands = scratch_demand(guests, 6 * GIB, tmp_path)
    demands += target_demands(guests, {"g0": target, "g1": target}, 6 * GIB)
    assert check_room(demands) == ([], [])
    demands += target_demands(guests, {"g2": target, "g3": target}, 6 * GIB)
    (problem,), warnings = check_room(demands)
    assert warnings == []
    assert problem.guests == ()
    assert not problem.is_permanent
    assert "has 10.0 GiB left, and the batch needs 10.0 GiB there" in problem.message
    assert "6.0 GiB for overlays of 5 guests, 4.0 GiB for disks of 4 guests" in problem.message


@pytest.mark.parametrize(
    ("target", "size", "allocated", "problems", "warnings"),
    [
        (TargetFiles(), 20 * GIB, GIB, 0, 0),
        (TargetFiles(), 20 * GIB, 11 * GIB, 1, 0),
        (TargetFiles(), 20 * GIB, None, 0, 1),
        (TargetFiles(is_compressed=True), 20 * GIB, 11 * GIB, 0, 1),
        (TargetFiles(is_preallocated=True), 20 * GIB, GIB, 1, 0),
    ],
)
def test_what_is_needed_and_what_may_be(
    tmp_path: Path,
    free: int,
    target: TargetFiles,
    size: int,
    allocated: int | None,
    problems: int,
    warnings: int,
) -> None:
    # In a folder that will be made.
    room = ((tmp_path / "new" / "folder", disk(size, allocated)),)
    given = TargetFiles(
        room=room, is_preallocated=target.is_preallocated, is_compressed=target.is_compressed
    )
    wrong, doubtful = check_room(target_demands([guest("a")], {"a": given}, GIB))
    assert (len(wrong), len(doubtful)) == (problems, warnings)
    for each in doubtful:
        assert "may need" in each.message


def test_disks_that_only_pass_are_there_a_few_at_once(tmp_path: Path, free: int) -> None:
    guests = [guest(f"g{number}", scratch="1G") for number in range(10)]
    passing = {
        each.name: TargetFiles(room=((tmp_path, disk(3 * GIB, 3 * GIB)),), is_passing=True)
        for each in guests
    }
    assert most_at_once(guests, 3 * GIB) == 3
    assert check_room(target_demands(guests, passing, 3 * GIB)) == ([], [])
    assert len(check_room(target_demands(guests, passing, 4 * GIB))[0]) == 1


def test_two_file_systems_have_room_each(tmp_path: Path) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system to look at")
    demands = [
        Demand(folder, "disks", files.free_space(folder) - MIB, 0, ("a",))
        for folder in (other, tmp_path)
    ]
    assert check_room(demands) == ([], [])


CAPACITY = {"conversions": 2, "disks": 8, "connections": 64, "memory": 6 * GIB, "scratch": 10 * GIB}


def test_who_is_there_at_once() -> None:
    guests = [guest(f"g{number}", scratch="2G") for number in range(20)]
    disks = {each.name: 3 if each.name == "g7" else 1 for each in guests}
    raised = [Window.model_validate({"begin": "20:00", "end": "06:00", "conversions": 4})]
    assert crowd(guests, disks, CAPACITY, []) == Crowd(7, 2, 8, 64)
    assert crowd(guests, disks, CAPACITY, raised).conversions == 4
    assert crowd(guests[:1], disks, CAPACITY, []) == Crowd(1, 1, 1, 64)
    assert (
        crowd(guests, disks, CAPACITY, []).files < crowd(guests, disks, CAPACITY, raised).files + 1
    )


@pytest.mark.parametrize(
    ("total", "available", "limits", "is_problem", "is_told"),
    [
        (16 * GIB, 8 * GIB, {"conversions": 2}, False, False),
        (16 * GIB, 4 * GIB, {"conversions": 2}, False, True),
        (4 * GIB, 3 * GIB, {"conversions": 2}, True, False),
        (4 * GIB, 3 * GIB, {}, False, True),  # nobody asked for that much
    ],
)
def test_memory(
    monkeypatch: pytest.MonkeyPatch,
    total: int,
    available: int,
    limits: dict[str, Any],
    is_problem: bool,
    is_told: bool,
) -> None:
    monkeypatch.setattr(machine, "memory", lambda: (total, available))
    guests = [guest(f"g{number}", memory="2G") for number in range(5)]
    problem, told = check_memory(guests, Limits.model_validate(limits), [], CAPACITY)
    assert (problem is not None, told is not None) == (is_problem, is_told)
    if problem is not None:
        assert "4.0 GiB of memory, copies 512 MiB; the machine has 4.0 GiB" in problem.message


def test_memory_of_this_machine() -> None:
    total, available = machine.memory()
    assert 0 < available <= total


@pytest.fixture
def limit_of_files() -> Any:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_limit_of_files_is_raised_and_that_is_said(limit_of_files: tuple[int, int]) -> None:
    hard = limit_of_files[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (500, hard))
    assert check_files(400) == (None, None)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 500
    problem, told = check_files(600)
    assert problem is None
    assert told == "up to 600 files may be open at once: the limit was 500, and is raised"
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (600, hard)


def test_more_files_than_anybody_may_have(
    limit_of_files: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda what: (500, 1000))
    problem, told = check_files(1001)
    assert told is None
    assert problem is not None
    assert "up to 1001 files may be open at once, and the limit is 1000" in problem.message


def test_the_estimate_of_files_is_above_what_was_measured() -> None:
    """12 disks of two guests at once, 4 connections each: 131 were open at most."""
    assert 131 <= Crowd(12, 2, 12, 48).files <= 400


def test_processes_of_a_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Path("/proc/self/cgroup").read_text().partition("0::")[2].splitlines()[:1]
    if not own:
        pytest.skip("no control groups of version 2")
    folder = tmp_path / own[0].lstrip("/")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pids.max").write_text("100\n")
    (folder / "pids.current").write_text("40\n")
    (folder / "memory.max").write_text("max\n")
    (folder / "memory.current").write_text("1\n")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    assert check_tasks(60) is None
    problem = check_tasks(61)
    assert problem is not None
    assert "only 60 more may be made" in problem.message
    assert machine.memory()[0] > MIB, "‘max’ is no limit"


def test_processes_of_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "soft hard")
    monkeypatch.setattr(machine, "_CGROUPS", Path("/nowhere"))
    monkeypatch.setattr(resource, "getrlimit", lambda what: usage(50_000, 50_000))
    assert check_tasks(10**9) is None or os.getuid() != 0
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    assert check_tasks(50_000) is None
    problem = check_tasks(50_001)
    assert problem is not None
    assert "only 50000 more" in problem.message
