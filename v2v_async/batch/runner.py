"""Runs the guests of a batch: asks the scheduler, does the work, writes the journal.

::

    for each guest, at the same time:
        turn(convert) ─> convert ─> journal ─> prepare ─┬─ turn(disk 1) ─> copy ─┬─> finalize
                                                        └─ turn(disk 2) ─> copy ─┘
        a failure: undone, then waiting again or failed; no other guest notices

What the work is, is somebody else's: :class:`GuestWork`.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Hashable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import anyio
import anyio.abc
import anyio.to_thread

from v2v_async.batch.news import News
from v2v_async.batch.plan.model import GuestPlan, Retries
from v2v_async.batch.record.journal import (
    ENDED,
    Failure,
    GuestRecord,
    Journal,
    JournalError,
    Phase,
)
from v2v_async.batch.record.state_events import tell_failure
from v2v_async.batch.retry import delay, failure_of, named
from v2v_async.batch.schedule.needs import Needs
from v2v_async.batch.schedule.scheduler import Scheduler, Task
from v2v_async.errors import NotKeptError, V2VError, most_telling
from v2v_async.events import Reporter

T = TypeVar("T")

_CONVERTED: tuple[Phase, ...] = ("converted", "copying", "finalizing")
_ABANDON_TIMEOUT_S = 120.0
# How often a time of the clock is looked at again: it may be set, and a laptop may sleep.
_LONGEST_NAP_S = 30.0
_NEWS_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class _Next:
    """How an attempt begins, after how many failures.

    ``has_kept``: what its guest keeps is taken already.
    """

    phase: Phase
    not_before: float
    failures: int
    has_kept: bool = False


@dataclass(slots=True)
class _Attempt:
    """How far an attempt has come. ``turn``: what it has of the scheduler until it is converted."""

    number: int
    is_converted: bool
    turn: Hashable | None


class GuestWork(Protocol):
    """One attempt at one guest. Each method raises V2VError where it fails."""

    def servers(self) -> AbstractAsyncContextManager[None]:
        """Have servers for what follows; they are gone at the end of the block.

        A server that dies ends the block with the error that says so.
        """
        ...

    async def convert(self) -> None:
        """Serve the source and convert it; what it changed is on the disk when this returns."""
        ...

    async def reopen(self) -> bool:
        """Serve again what an earlier attempt had converted; False: the guest is done already."""
        ...

    async def prepare(self) -> None:
        """Serve the target's disks: new ones, or those of an earlier attempt."""
        ...

    async def copy(self, disk: int) -> None:
        """Copy one disk, from where an earlier attempt was."""
        ...

    async def finalize(self) -> list[str]:
        """Make the target guest, remove what was only for the way; return what is there now."""
        ...

    async def abandon(self) -> bool:
        """Remove what the attempt made, on the target too. Its servers are gone.

        True: it had come to its end, so that the guest is done and stays.
        """
        ...

    async def suspend(self) -> None:
        """Remove what is of no use to a later attempt that goes on from here."""
        ...


class Runner:
    """Runs guests until each is done, failed or cancelled.

    ``needs`` is by guest; ``make_work`` is given a guest and the number of its attempt, from 1.
    ``after_failure`` is awaited when a guest has failed for good; what it returns becomes details
    of the event. :meth:`run` may be cancelled: what is converted is kept, and the journal says so.
    """

    def __init__(
        self,
        guests: list[GuestPlan],
        needs: Mapping[str, Needs],
        scheduler: Scheduler,
        journal: Journal,
        reporter: Reporter,
        make_work: Callable[[GuestPlan, int], GuestWork],
        retries: Retries,
        *,
        after_failure: Callable[[GuestPlan, Failure], Awaitable[Mapping[str, Any]]] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._guests = guests
        self._needs = needs
        self._scheduler = scheduler
        self._journal = journal
        self._reporter = reporter
        self._make_work = make_work
        self._retries = retries
        self._budget = retries.budget
        self._clock = clock
        self._turns: dict[Hashable, anyio.Event] = {}
        self._changed = anyio.Event()
        self._scopes: dict[str, anyio.CancelScope] = {}
        self._after_failure_of = after_failure
        self._works: dict[str, GuestWork] = {}
        self._cancelled: set[str] = set()
        self._done_after_all: set[str] = set()
        self._news = News(reporter)

    async def run(self) -> list[GuestRecord]:
        """Do it all; return what became of each guest, in the order of the plan."""
        records = {each.name: each for each in await self._write(self._journal.guests)}
        for record in records.values():
            if record.is_paused:
                self._scheduler.pause(record.name)
        async with anyio.create_task_group() as group:
            group.start_soon(self._deal, name="scheduler")
            group.start_soon(self._tell, name="news")
            async with anyio.create_task_group() as guests:
                for guest in self._guests:
                    record = records[guest.name]
                    if record.phase not in ENDED:
                        guests.start_soon(self._run_guest, guest, record, name=guest.name)
            group.cancel_scope.cancel()
        return await self._write(self._journal.guests)

    def pause(self, guest: str) -> None:
        """Let nothing more of a guest begin; what runs goes on to its end."""
        self._scheduler.pause(guest)
        self._reporter.for_guest(guest).emit("paused")

    def resume(self, guest: str) -> None:
        """Let a guest go on."""
        self._scheduler.resume(guest)
        self._changed.set()
        self._reporter.for_guest(guest).emit("resumed")

    def set_capacity(self, name: str, amount: int) -> None:
        """Change a limit while guests run."""
        self._scheduler.set_capacity(name, amount)
        self._changed.set()

    def cancel(self, guest: str) -> None:
        """Stop a guest for good, and remove what it has made."""
        self._cancelled.add(guest)
        scope = self._scopes.get(guest)
        if scope is not None:
            scope.cancel()

    # The turns.

    async def _deal(self) -> None:
        """Give turns whenever something has changed or a time has come."""
        while True:
            self._changed = anyio.Event()
            for task in self._scheduler.start(self._clock()):
                self._turns.pop(task.key).set()
            due = self._scheduler.next_time()
            nap = _LONGEST_NAP_S if due is None else min(_LONGEST_NAP_S, due - self._clock())
            with anyio.move_on_after(max(0.0, nap)):
                await self._changed.wait()

    async def _tell(self) -> None:
        """Say what waits for what, and how much of each limit is in use."""
        while True:
            self._news.tell(self._scheduler)
            await anyio.sleep(_NEWS_EVERY_S)

    async def _turn(self, task: Task) -> None:
        """Wait until the scheduler says that a task may start."""
        turn = self._turns[task.key] = anyio.Event()
        self._scheduler.add(task)
        self._changed.set()
        try:
            await turn.wait()
        except anyio.get_cancelled_exc_class():
            # All that the guest waits for: its other disks are cancelled too.
            self._withdraw(task.guest)
            if turn.is_set():
                self._end(task.key)
            raise

    def _end(self, key: Hashable) -> None:
        self._scheduler.finish(key)
        self._changed.set()

    def _withdraw(self, guest: str) -> None:
        for task in self._scheduler.withdraw(guest):
            self._turns.pop(task.key, None)

    def _release(self, guest: str) -> None:
        """Give back what a guest keeps."""
        self._scheduler.release(guest)
        self._changed.set()

    # A guest.

    async def _run_guest(self, guest: GuestPlan, record: GuestRecord) -> None:
        next_: _Next | None = _Next(record.phase, record.not_before, record.failures)
        try:
            with anyio.CancelScope() as scope:
                self._scopes[guest.name] = scope
                if guest.name in self._cancelled:
                    scope.cancel()
                while next_ is not None:
                    next_ = await self._attempt(guest, next_)
        except anyio.get_cancelled_exc_class():
            await self._suspend(guest)
            raise
        finally:
            self._release(guest.name)
            del self._scopes[guest.name]
        if scope.cancelled_caught:
            await self._give_up(guest, partial(self._journal.reach, guest.name, "cancelled"))
            if guest.name not in self._done_after_all:
                self._reporter.for_guest(guest.name).emit("cancelled")

    async def _attempt(self, guest: GuestPlan, this: _Next) -> _Next | None:
        """Try once; return how to try again, or None when the guest has come to its end."""
        attempt = _Attempt(0, this.phase in _CONVERTED, None)
        mine = self._reporter.for_guest(guest.name)
        began = self._clock()
        try:
            await self._begin(guest, this, attempt)
            began = self._clock()
            mine.emit("started", details={"attempt": attempt.number})
            work = self._works[guest.name] = self._make_work(guest, attempt.number)
            async with work.servers():
                if await self._convert(guest, work, attempt):
                    await work.prepare()
                    await self._copy_all(guest, work)
                    await self._reach(guest, "finalizing")
                    made = await work.finalize()
                    await self._write(partial(self._journal.set_outputs, guest.name, made))
            await self._reach(guest, "done")
        except JournalError:
            raise  # nothing that is done now could be noted
        except Exception as error:
            return await self._after_failure(guest, this, named(error), attempt, began)
        finally:
            self._give_turn_back(attempt)
        mine.emit("finished", duration_s=self._clock() - began)
        return None

    async def _begin(self, guest: GuestPlan, this: _Next, attempt: _Attempt) -> None:
        """Wait for the guest's turn and note that an attempt begins."""
        needs = self._needs[guest.name]
        key = (guest.name, "convert")
        await self._turn(
            Task(
                key,
                guest.name,
                needs.rank,
                {} if attempt.is_converted else needs.convert,
                {} if this.has_kept else needs.keeps,
                this.not_before,
            )
        )
        attempt.turn = key
        phase: Phase = "converted" if attempt.is_converted else "checking"
        attempt.number = await self._write(partial(self._journal.begin_attempt, guest.name, phase))

    def _give_turn_back(self, attempt: _Attempt) -> None:
        turn, attempt.turn = attempt.turn, None
        if turn is not None:
            self._end(turn)

    async def _convert(self, guest: GuestPlan, work: GuestWork, attempt: _Attempt) -> bool:
        """Have the guest converted and its source served; False: it is done already."""
        if attempt.is_converted:
            is_needed = await work.reopen()
        else:
            await self._reach(guest, "converting")
            await work.convert()
            await self._reach(guest, "converted")
            attempt.is_converted = is_needed = True
            self._reporter.for_guest(guest.name).emit("converted")
        self._give_turn_back(attempt)
        return is_needed

    async def _copy_all(self, guest: GuestPlan, work: GuestWork) -> None:
        await self._reach(guest, "copying")
        try:
            async with anyio.create_task_group() as group:
                for disk in self._needs[guest.name].disks:
                    group.start_soon(self._copy, guest, work, disk)
        except BaseExceptionGroup as failures:
            raise most_telling(failures) from None

    async def _copy(self, guest: GuestPlan, work: GuestWork, disk: int) -> None:
        needs = self._needs[guest.name]
        key = (guest.name, disk)
        rank = (*needs.rank, -needs.lengths_s.get(disk, 0.0))
        await self._turn(Task(key, guest.name, rank, needs.disks[disk]))
        try:
            await work.copy(disk)
        except V2VError as error:
            error.locate(disk=disk)
            raise
        finally:
            self._end(key)

    async def _suspend(self, guest: GuestPlan) -> None:
        """End what an attempt has running; what a later one goes on from stays."""
        with anyio.CancelScope(shield=True):
            await self._undo(guest, lambda work: work.suspend())

    async def _give_up(self, guest: GuestPlan, note: Callable[[], None]) -> None:
        """Remove all that a guest has made, then ``note`` what has become of it.

        Where it had come to its end it is done.
        """
        with anyio.CancelScope(shield=True):
            # Before anything goes: a supervisor that dies now leaves nothing to go on from.
            await self._reach(guest, "waiting")
            if await self._undo(guest, lambda work: work.abandon()):
                self._done_after_all.add(guest.name)
                await self._reach(guest, "done")
                self._reporter.for_guest(guest.name).emit("finished")
            else:
                await self._write(note)

    async def _undo(self, guest: GuestPlan, step: Callable[[GuestWork], Awaitable[T]]) -> T | None:
        try:
            with anyio.fail_after(_ABANDON_TIMEOUT_S):
                # What a dead supervisor's attempt made is known to a new one's work too.
                work = self._works.get(guest.name) or self._make_work(guest, 0)
                return await step(work)
        except TimeoutError:
            problem = f"it took more than {_ABANDON_TIMEOUT_S:.0f} s"
        except Exception as error:
            problem = str(named(error))
        mine = self._reporter.for_guest(guest.name)
        mine.warning(f"not all of it could be removed: {problem}")
        return None

    async def _after_failure(
        self,
        guest: GuestPlan,
        this: _Next,
        error: V2VError,
        attempt: _Attempt,
        began: float,
    ) -> _Next | None:
        """Undo the attempt, but for what the next one goes on from; return how that begins."""
        error.locate(guest=guest.name)
        failure = failure_of(error)
        mine = self._reporter.for_guest(guest.name)
        # Those that a stop or a crash cut short do not count.
        failures = this.failures + 1
        again_at: float | None = None
        if not failure.is_permanent and failures < self._retries.attempts and self._budget > 0:
            self._budget -= 1
            seconds = delay(self._retries, failures)
            again_at = self._clock() + seconds
            mine.emit(
                "retrying",
                f"attempt {failures} of {self._retries.attempts} failed: {error.message}; the next "
                f"begins in {seconds:.0f} s",
                hint=error.hint,
                details={"attempt": attempt.number, "at": again_at},
            )
        is_kept = attempt.is_converted and not isinstance(error, NotKeptError)
        goes_on = again_at is not None and is_kept
        note = partial(
            self._journal.fail, guest.name, failure, again_at=again_at, is_converted=goes_on
        )
        with anyio.CancelScope(shield=True):
            if goes_on:
                await self._suspend(guest)
                await self._write(note)
            else:
                await self._give_up(guest, note)
        if guest.name in self._done_after_all:
            return None
        if again_at is not None:
            phase: Phase = "converted" if goes_on else "waiting"
            return _Next(phase, again_at, failures, has_kept=True)
        more = await self._after_failure_of(guest, failure) if self._after_failure_of else {}
        tell_failure(mine, failure, more, duration_s=self._clock() - began)
        return None

    async def _reach(self, guest: GuestPlan, phase: Phase) -> None:
        await self._write(partial(self._journal.reach, guest.name, phase))

    @staticmethod
    async def _write(call: Callable[[], T]) -> T:
        """Run a call of the journal, which waits for the disk, in a thread."""
        return await anyio.to_thread.run_sync(call)
