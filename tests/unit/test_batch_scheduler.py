"""Which task starts next, and in which order guests begin."""

from __future__ import annotations

import pytest

from tests.batch_simulation import made_batch, simulate
from v2v_async.batch.schedule import scheduler as scheduler_module
from v2v_async.batch.schedule.order import Work, order
from v2v_async.batch.schedule.scheduler import Scheduler, Task
from v2v_async.errors import UsageError


def names(tasks: list[Task]) -> list[object]:
    return [task.key for task in tasks]


def test_starts_by_rank_as_far_as_there_is_room() -> None:
    scheduler = Scheduler({"conversions": 2})
    for key, rank in (("c", 3.0), ("a", 1.0), ("b", 2.0)):
        scheduler.add(Task(key, key, (rank,), {"conversions": 1}))
    assert names(scheduler.start()) == ["a", "b"]
    assert scheduler.reasons() == {"c": "conversions"}
    assert scheduler.start() == []
    scheduler.finish("a")
    assert names(scheduler.start()) == ["c"]
    assert scheduler.taken("conversions") == 2


def test_what_a_guest_keeps_is_free_when_the_guest_is_done() -> None:
    scheduler = Scheduler({"conversions": 2, "scratch": 10})
    for key in ("a", "b"):
        scheduler.add(Task(key, key, (0,), {"conversions": 1}, {"scratch": 6}))
    assert names(scheduler.start()) == ["a"]
    scheduler.finish("a")
    assert scheduler.start() == []
    assert scheduler.reasons() == {"b": "scratch"}
    scheduler.release("a")
    assert names(scheduler.start()) == ["b"]


def test_a_small_one_passes_a_large_one_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "MAX_OVERTAKEN", 5)
    scheduler = Scheduler({"memory": 4})
    for index in range(3):
        scheduler.add(Task(index, "small", (0,), {"memory": 1}))
    assert len(scheduler.start()) == 3
    scheduler.add(Task("large", "large", (1,), {"memory": 4}))
    passed = 0
    running: list[object] = [0, 1, 2]
    for index in range(3, 40):
        scheduler.add(Task(index, "small", (2,), {"memory": 1}))
        started = names(scheduler.start())
        passed += len(started)
        running += started
        if "large" in running:
            break
        if running:
            scheduler.finish(running.pop(0))
    assert "large" in running
    assert passed <= 5 + 2


def test_back_off_and_withdrawing() -> None:
    scheduler = Scheduler({"disks": 1})
    scheduler.add(Task("later", "g", (0,), {"disks": 1}, not_before=10.0))
    scheduler.add(Task("gone", "h", (0,), {"disks": 1}))
    assert scheduler.next_time() == 10.0
    assert names(scheduler.withdraw("h")) == ["gone"]
    assert scheduler.start(9.9) == []
    assert scheduler.reasons() == {"later": "time"}
    assert names(scheduler.start(10.0)) == ["later"]
    assert scheduler.next_time() is None
    with pytest.raises(ValueError, match="there already"):
        scheduler.add(Task("later", "g", (0,)))


def test_withdrawing_the_urgent_one_frees_what_was_reserved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scheduler_module, "MAX_OVERTAKEN", 1)
    scheduler = Scheduler({"memory": 4})
    scheduler.add(Task("first", "a", (0,), {"memory": 2}))
    scheduler.start()
    scheduler.add(Task("large", "large", (1,), {"memory": 4}))
    scheduler.add(Task("small", "a", (2,), {"memory": 1}))
    scheduler.start()
    scheduler.add(Task("next", "a", (3,), {"memory": 1}))
    assert scheduler.start() == []
    scheduler.withdraw("large")
    assert names(scheduler.start()) == ["next"]


def test_a_limit_may_change_while_it_runs() -> None:
    scheduler = Scheduler({"disks": 1})
    for key in range(4):
        scheduler.add(Task(key, "g", (key,), {"disks": 1}))
    assert names(scheduler.start()) == [0]
    scheduler.set_capacity("disks", 3)
    assert names(scheduler.start()) == [1, 2]
    scheduler.set_capacity("disks", 1)
    scheduler.finish(0)
    scheduler.finish(1)
    assert scheduler.start() == []
    scheduler.finish(2)
    assert names(scheduler.start()) == [3]


def test_what_comes_while_a_limit_is_lowered_waits() -> None:
    scheduler = Scheduler({"conversions": 2})
    scheduler.set_capacity("conversions", 0)
    scheduler.add(Task("a", "g", (0,), {"conversions": 1}))
    assert scheduler.start() == []
    scheduler.set_capacity("conversions", 2)
    assert names(scheduler.start()) == ["a"]


def test_a_paused_guest_waits() -> None:
    scheduler = Scheduler({"conversions": 2})
    scheduler.add(Task("a", "g", (0,), {"conversions": 1}))
    scheduler.pause("g")
    scheduler.add(Task("b", "g", (0,), {"conversions": 1}))
    assert scheduler.start() == []
    assert scheduler.reasons() == {"a": "paused", "b": "paused"}
    scheduler.resume("g")
    assert names(scheduler.start()) == ["a", "b"]


def test_more_room_starts_all_that_fit() -> None:
    scheduler = Scheduler({"disks": 1})
    for key in range(200):
        scheduler.add(Task(key, "g", (key,), {"disks": 1}))
    scheduler.start()
    scheduler.set_capacity("disks", 200)
    assert names(scheduler.start()) == list(range(1, 200))


def test_what_can_never_start_is_refused() -> None:
    scheduler = Scheduler({"scratch": 10})
    with pytest.raises(UsageError, match="web1: needs 11 of ‘scratch’, and the limit is 10"):
        scheduler.add(Task("a", "web1", (0,), {"scratch": 5}, {"scratch": 6}))
    with pytest.raises(ValueError, match="not a resource"):
        scheduler.add(Task("a", "web1", (0,), {"tapes": 1}))


def test_a_few_guests_go_longest_first_and_priorities_before_that() -> None:
    works = [
        Work("short", 10, {"conversions": 10}),
        Work("long", 50, {"conversions": 50}),
        Work("middle", 30, {"conversions": 30}),
        Work("urgent", 1, {"conversions": 1}, priority=1),
    ]
    ranks = order(works, {"conversions": 1})
    assert sorted(ranks, key=ranks.__getitem__) == ["urgent", "long", "middle", "short"]


@pytest.mark.parametrize("seed", range(4))
def test_a_thousand_guests_need_little_more_than_the_tightest_resource(seed: int) -> None:
    batch = made_batch(seed, 1000)
    result = simulate(batch)
    assert result.makespan_s <= 1.1 * batch.bound_s
    assert all(result.peak[name] <= amount for name, amount in batch.capacities.items())
