"""The runner with made-up work: turns, failures, retries, pause, cancel, and going on after a stop.

What real work does is tested with real guests; this is about who does what when.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.waiting import until
from v2v_async.batch.plan.model import GuestPlan, Retries
from v2v_async.batch.record.journal import (
    Failure,
    GuestRecord,
    Journal,
    JournalError,
    Phase,
    open_journal,
)
from v2v_async.batch.retry import named
from v2v_async.batch.runner import Runner
from v2v_async.batch.schedule.needs import Needs
from v2v_async.batch.schedule.scheduler import Scheduler
from v2v_async.errors import (
    ConversionError,
    NotKeptError,
    ServerError,
    V2VError,
    most_telling,
)
from v2v_async.events import Event, Reporter

pytestmark = pytest.mark.anyio


class Work:
    """Says what is called; fails, or waits, where it is told to."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name

    async def _do(self, what: str) -> None:
        self.world.calls.append((self.name, what))
        self.world.running.add((self.name, what))
        self.world.most = max(self.world.most, len(self.world.running))
        try:
            await anyio.lowlevel.checkpoint()
            gate = self.world.gates.get((self.name, what))
            if gate is not None:
                self.world.reached[self.name, what].set()
                await gate.wait()
            errors = self.world.errors.get((self.name, what), [])
            if errors:
                raise errors.pop(0)
        finally:
            self.world.running.remove((self.name, what))

    @asynccontextmanager
    async def servers(self) -> AsyncIterator[None]:
        self.world.serving.add(self.name)
        try:
            async with anyio.create_task_group():
                yield
        except BaseExceptionGroup as group:
            raise most_telling(group) from None
        finally:
            self.world.serving.remove(self.name)

    async def convert(self) -> None:
        await self._do("convert")

    async def reopen(self) -> bool:
        await self._do("reopen")
        return self.name not in self.world.is_done

    async def prepare(self) -> None:
        await self._do("prepare")

    async def copy(self, disk: int) -> None:
        await self._do(f"copy{disk}")

    async def finalize(self) -> list[str]:
        await self._do("finalize")
        return [f"/out/{self.name}"]

    async def abandon(self) -> bool:
        assert self.name not in self.world.serving
        await self._do("abandon")
        return self.name in self.world.is_done

    async def suspend(self) -> None:
        assert self.name not in self.world.serving
        await self._do("suspend")


class World:
    """A batch of guests with two disks each."""

    def __init__(self, journal: Journal, names: list[str], **limits: int) -> None:
        self.journal = journal
        self.calls: list[tuple[str, str]] = []
        self.running: set[tuple[str, str]] = set()
        self.serving: set[str] = set()
        self.most = 0
        self.gates: dict[tuple[str, str], anyio.Event] = {}
        self.reached: dict[tuple[str, str], anyio.Event] = {}
        self.errors: dict[tuple[str, str], list[V2VError]] = {}
        self.events: list[Event] = []
        self.is_done: set[str] = set()
        self.names = names
        self.scheduler = Scheduler({"conversions": 1, "disks": 2, "scratch": 10, **limits})
        journal.add_guests(names)

    def hold(self, name: str, what: str) -> anyio.Event:
        """Have that wait until the event is set; ``reached`` tells that it does."""
        self.reached[name, what] = anyio.Event()
        self.gates[name, what] = anyio.Event()
        return self.gates[name, what]

    def runner(self, **retries: Any) -> Runner:
        needs = {
            name: Needs(
                rank=(float(place),),
                convert={"conversions": 1},
                keeps={"scratch": 1},
                disks={1: {"disks": 1}, 2: {"disks": 1}},
                lengths_s={1: 1.0, 2: 2.0},
            )
            for place, name in enumerate(self.names)
        }
        return Runner(
            [GuestPlan(name=name) for name in self.names],
            needs,
            self.scheduler,
            self.journal,
            Reporter(self.events.append, "t"),
            lambda plan, number: Work(self, plan.name),
            Retries(**{"delay": 0.01, **retries}),
            after_failure=self.bundle,
        )

    async def bundle(self, guest: GuestPlan, failure: Failure) -> dict[str, str]:
        assert failure.message
        return {"bundle": f"{guest.name}.tar.gz"}

    def of(self, name: str) -> list[str]:
        return [what for guest, what in self.calls if guest == name]


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with open_journal(tmp_path / "j.db", create=True) as made:
        yield made


@asynccontextmanager
async def running(world: World, name: str, what: str, **retries: Any) -> AsyncIterator[Runner]:
    """Hold a guest there, and have its runner from then to the end of the run."""
    world.hold(name, what)
    runner = world.runner(**retries)
    async with anyio.create_task_group() as group:
        group.start_soon(runner.run)
        with anyio.fail_after(10):
            await world.reached[name, what].wait()
        yield runner


def phases(records: list[GuestRecord]) -> dict[str, str]:
    return {each.name: each.phase for each in records}


async def test_all_are_done_under_the_limits(journal: Journal) -> None:
    world = World(journal, [f"g{index}" for index in range(20)])
    records = await world.runner().run()
    assert set(phases(records).values()) == {"done"}
    assert all(each.attempts == 1 for each in records)
    # The longer disk first.
    assert world.of("g3") == ["convert", "prepare", "copy2", "copy1", "finalize"]
    assert world.most <= 1 + 2 + 20  # a conversion, two copies, and finalize has no limit
    assert [world.scheduler.taken(name) for name in ("conversions", "disks", "scratch")] == [0] * 3


async def test_one_copies_while_another_converts(journal: Journal) -> None:
    world = World(journal, ["a", "b"])
    converting, copying = world.hold("b", "convert"), world.hold("a", "copy1")
    async with anyio.create_task_group() as group:
        group.start_soon(world.runner().run)
        with anyio.fail_after(10):
            await world.reached["b", "convert"].wait()
            await world.reached["a", "copy1"].wait()
        assert {("b", "convert"), ("a", "copy1")} <= world.running
        converting.set()
        copying.set()


async def test_a_failing_guest_touches_no_other_and_is_tried_again(journal: Journal) -> None:
    world = World(journal, ["a", "b", "c"])
    world.errors["b", "convert"] = [ServerError("gone"), ServerError("gone again")]
    world.errors["c", "convert"] = [ConversionError("no operating system")]
    records = await world.runner(attempts=3).run()
    assert phases(records) == {"a": "done", "b": "done", "c": "failed"}
    assert world.of("b")[:5] == ["convert", "abandon", "convert", "abandon", "convert"]
    assert [each.attempts for each in records] == [1, 3, 1]
    assert records[2].failure is not None
    assert records[2].failure.is_permanent
    assert [each.text for each in world.events if each.type == "retrying"] == [
        "attempt 1 of 3 failed: gone; the next begins in 0 s",
        "attempt 2 of 3 failed: gone again; the next begins in 0 s",
    ]
    assert world.scheduler.taken("scratch") == 0


async def test_a_copy_that_fails_goes_on_from_the_conversion(journal: Journal) -> None:
    world = World(journal, ["a"])
    world.errors["a", "copy2"] = [ServerError("reset by peer")]
    (record,) = await world.runner().run()
    assert record.phase == "done"
    assert world.of("a").count("convert") == 1
    assert world.of("a")[-6:] == ["suspend", "reopen", "prepare", "copy2", "copy1", "finalize"]


async def test_a_target_that_can_not_be_made_costs_no_second_conversion(journal: Journal) -> None:
    world = World(journal, ["a"])
    world.errors["a", "prepare"] = [ServerError("no answer")]
    (record,) = await world.runner().run()
    assert record.phase == "done"
    assert world.of("a").count("convert") == 1


async def test_a_guest_that_was_finished_when_the_supervisor_died(journal: Journal) -> None:
    world = World(journal, ["a"])
    journal.begin_attempt("a")
    journal.reach("a", "finalizing")
    world.is_done.add("a")
    (record,) = await world.runner().run()
    assert record.phase == "done"
    assert world.of("a") == ["reopen"]


async def test_a_bug_fails_its_guest_alone(journal: Journal) -> None:
    world = World(journal, ["a", "b"])
    world.errors["a", "convert"] = [KeyError("oops")] * 3  # type: ignore[list-item]
    records = await world.runner().run()
    assert phases(records) == {"a": "failed", "b": "done"}
    assert records[0].failure is not None
    assert records[0].failure.message == "internal error: KeyError: 'oops'"


def test_several_errors_are_told_in_one() -> None:
    both = ExceptionGroup("both", [ServerError("no source"), ServerError("no target")])
    assert named(both).message == "no source; also: no target"


async def test_cancelled_while_it_waits_for_another_attempt(journal: Journal) -> None:
    """What the attempt before has kept goes too."""
    world = World(journal, ["a", "b"])
    world.errors["a", "copy2"] = [ServerError("reset by peer")]
    async with running(world, "b", "convert", delay=3600.0) as runner:
        with anyio.fail_after(10):
            while ("a", "convert") not in world.scheduler.reasons():
                await anyio.lowlevel.checkpoint()
        assert world.of("a")[-1] == "suspend"
        runner.cancel("a")
        world.gates["b", "convert"].set()
    assert world.of("a")[-1] == "abandon"
    assert phases(journal.guests()) == {"a": "cancelled", "b": "done"}


async def test_each_failure_for_good_is_told_with_more_of_it(journal: Journal) -> None:
    world = World(journal, ["a"])
    world.errors["a", "copy1"] = [ConversionError("no", hint="try", offset=4096)]
    await world.runner().run()
    [failed] = [event for event in world.events if event.type == "failed"]
    assert (failed.guest, failed.text, failed.hint, failed.offset) == ("a", "no", "try", 4096)
    assert failed.details == {"step": None, "disk": 1, "permanent": True, "bundle": "a.tar.gz"}


async def test_who_waits_for_what_is_told(journal: Journal) -> None:
    world = World(journal, ["a", "b"])
    world.hold("a", "convert")
    runner = world.runner()
    async with anyio.create_task_group() as group:
        group.start_soon(runner.run)
        await until(
            lambda: any(event.type == "waiting" for event in world.events), "it is told who waits"
        )
        world.gates["a", "convert"].set()
    first = next(event for event in world.events if event.type == "waiting")
    assert (first.guest, first.details) == ("b", {"for": "conversions", "until": None})
    limits = [event.details for event in world.events if event.type == "limits"]
    assert {"taken": {"conversions": 1, "disks": 0, "scratch": 1}} | {
        "capacities": {"conversions": 1, "disks": 2, "scratch": 10}
    } in limits


async def test_attempts_and_budget_end(journal: Journal) -> None:
    world = World(journal, ["a", "b"])
    for name in world.names:
        world.errors[name, "copy1"] = [ServerError(f"{index}") for index in range(9)]
    records = await world.runner(attempts=3, budget=3).run()
    assert phases(records) == {"a": "failed", "b": "failed"}
    assert sum(each.attempts for each in records) == 2 + 3
    assert world.of("a")[-1] == world.of("b")[-1] == "abandon"
    assert records[0].failure is not None
    assert records[0].failure.disk == 1


async def test_cancelling_one_guest(journal: Journal) -> None:
    world = World(journal, ["a", "b", "c"])
    async with running(world, "a", "copy1") as runner:
        runner.cancel("a")
    assert phases(journal.guests()) == {"a": "cancelled", "b": "done", "c": "done"}
    assert world.of("a")[-1] == "abandon"
    assert world.scheduler.taken("disks") == world.scheduler.taken("scratch") == 0


async def test_a_guest_that_waits_can_be_cancelled_and_paused(journal: Journal) -> None:
    world = World(journal, ["a", "b", "c"])
    async with running(world, "a", "convert") as runner:
        runner.cancel("b")
        runner.pause("c")
        world.gates["a", "convert"].set()
        with anyio.fail_after(10):
            while "finalize" not in world.of("a"):
                await anyio.lowlevel.checkpoint()
        assert world.scheduler.reasons() == {("c", "convert"): "paused"}
        runner.resume("c")
    assert phases(journal.guests()) == {"a": "done", "b": "cancelled", "c": "done"}
    assert "convert" not in world.of("b")


@pytest.mark.parametrize("what", ["convert", "copy1", "finalize"])
async def test_stopped_and_taken_up_again(journal: Journal, what: str) -> None:
    world = World(journal, ["a", "b"])
    with anyio.CancelScope() as scope:
        async with running(world, "a", what):
            scope.cancel()
    assert world.of("a")[-1] == "suspend"
    again = World(journal, ["a", "b"])
    records = await again.runner().run()
    assert phases(records) == {"a": "done", "b": "done"}
    assert again.of("a")[0] == ("convert" if what == "convert" else "reopen")
    assert records[0].attempts == 2


@pytest.mark.parametrize("after", range(0, 120, 5))
async def test_a_stop_at_any_moment_loses_nothing(journal: Journal, after: int) -> None:
    names = ["a", "b", "c"]
    world = World(journal, names)
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(world.runner().run)
            for _ in range(after):
                await anyio.lowlevel.checkpoint()
            scope.cancel()
    assert not world.running
    taken = [world.scheduler.taken(name) for name in ("conversions", "disks", "scratch")]
    assert taken == [0, 0, 0]
    again = World(journal, names)
    assert set(phases(await again.runner().run()).values()) == {"done"}


async def test_a_journal_that_can_not_be_written_ends_the_batch(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest is not to blame, and loses nothing."""
    world = World(journal, ["a"])
    reach = journal.reach

    def full(guest: str, phase: Phase) -> None:
        if phase == "copying":
            raise JournalError("disk full")
        reach(guest, phase)

    monkeypatch.setattr(journal, "reach", full)
    with pytest.raises(ExceptionGroup) as caught:
        await world.runner().run()
    assert "disk full" in str(most_telling(caught.value))
    assert "abandon" not in world.of("a")
    assert journal.guests()[0].phase == "converted"


async def test_what_was_converted_is_gone(journal: Journal) -> None:
    world = World(journal, ["a"])
    journal.begin_attempt("a")
    journal.reach("a", "copying")
    world.errors["a", "reopen"] = [NotKeptError("no overlay")]
    (record,) = await world.runner().run()
    assert record.phase == "done"
    assert world.of("a")[:3] == ["reopen", "abandon", "convert"]


async def test_cancelled_when_it_had_just_come_to_its_end(journal: Journal) -> None:
    world = World(journal, ["a"])
    world.is_done.add("a")
    async with running(world, "a", "finalize") as runner:
        runner.cancel("a")
    assert phases(journal.guests()) == {"a": "done"}
    assert [event.type for event in world.events if event.guest == "a"][-1] == "finished"
