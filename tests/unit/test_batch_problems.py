"""Problems of a batch: each told once, with the guests that have it."""

from __future__ import annotations

import errno

import pytest

from v2v_async.batch.preflight.problems import Problem, merged, of_error, of_guests
from v2v_async.errors import DependencyError, SourceError, TargetError


def test_equal_problems_of_many_guests_are_one() -> None:
    problems = [Problem(f"g{number}", "it is full", "free space") for number in range(500)]
    problems.insert(7, Problem("db", "it is off"))
    problems.append(Problem(None, "too little memory"))
    whole, full, off = merged(problems)
    assert str(whole) == "too little memory"
    assert whole.guests == ()
    assert str(full) == "g0, g1, g2 and 497 more: it is full"
    assert full.guest is None
    assert len(full.guests) == 500
    assert str(off) == "db: it is off"
    assert (off.guest, off.guests) == ("db", ("db",))


def test_what_differs_is_not_merged() -> None:
    same = Problem("a", "x", "h")
    others = [
        Problem("a", "x"),
        Problem("a", "x", "h", is_permanent=False),
        Problem(None, "x", "h"),
    ]
    assert len(merged([same, same, *others])) == 4
    assert merged([same, same])[0].guests == ("a",)


def test_errors_are_told_with_their_disk_and_without_secrets() -> None:
    error = SourceError("‘nbd://joe:secret@host/a’ is away", hint="see password=hunter2", disk=2)
    (problem,) = of_error("web", error)
    assert problem.message == "disk 2: ‘nbd://joe:***@host/a’ is away"
    assert problem.hint == "see password=***"
    assert not problem.is_permanent


def test_a_group_is_all_its_errors() -> None:
    full = TargetError("full")
    full.__cause__ = OSError(errno.ENOSPC, "no space")
    group = ExceptionGroup("two", [DependencyError("no nbdkit"), full])
    assert [each.is_permanent for each in of_error("a", group)] == [True, True]


def test_a_mistake_of_ours_is_not_a_problem() -> None:
    with pytest.raises(ExceptionGroup):
        list(of_error("a", ExceptionGroup("bug", [ZeroDivisionError()])))


def test_guests_of_a_problem() -> None:
    assert of_guests(["a"], "x").guest == "a"
    assert of_guests(["a", "b"], "x").where == "a, b"
    assert of_guests([], "x").where == ""
