"""One supervisor of one run: everything that goes on beside the guests, from top to bottom.

::

    lock ─> journal ─> preflight ─> claims ─┬─ runner: the guests
                                            ├─ timetable: windows
                                            ├─ requests of other processes
                                            └─ amounts: how far, into the journal
    a run that was stopped or killed begins here again, from what its journal knows
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import anyio
import anyio.to_thread

from v2v_async import __version__
from v2v_async.batch.control import follow_requests
from v2v_async.batch.guest_work import Copying
from v2v_async.batch.plan.model import GuestPlan, Plan
from v2v_async.batch.pool import OpenPool, Order, Pool, local_pool
from v2v_async.batch.preflight.preflight import Checked, preflight_batch
from v2v_async.batch.preflight.problems import Problem
from v2v_async.batch.record import folder
from v2v_async.batch.record.amounts import Amounts
from v2v_async.batch.record.event_file import EventFile
from v2v_async.batch.record.journal import (
    ENDED,
    Failure,
    GuestRecord,
    Journal,
    Phase,
    open_journal,
)
from v2v_async.batch.record.state_events import tell_failure, tell_state
from v2v_async.batch.repeated import once_each
from v2v_async.batch.retry import failure_of, named
from v2v_async.batch.runner import GuestWork, Runner
from v2v_async.batch.schedule.needs import Facts, Needs, capacities, needs_of, places_of
from v2v_async.batch.schedule.scheduler import Scheduler
from v2v_async.batch.timetable import Timetable
from v2v_async.errors import UsageError
from v2v_async.events import Reporter
from v2v_async.options import GuestOptions
from v2v_async.v2vdir import default_parent

WORK_PREFIX = "v2vb."
"""Not ``v2v.``, which ``v2v-async clean`` removes when its supervisor is dead: this one's run may
go on."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run: its folder (made by :func:`folder.create`), its plan, and each guest's options."""

    path: Path
    plan: Plan
    options: Mapping[str, GuestOptions]


class WrongBatchError(UsageError):
    """Things that have to be mended before a batch can begin."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        count = "one thing is" if len(problems) == 1 else f"{len(problems)} things are"
        lines = [f"  {each}" + (f" ({each.hint})" if each.hint else "") for each in problems]
        super().__init__(
            f"{count} wrong before the batch can begin:\n" + "\n".join(lines),
            hint="mend the plan; with --skip-wrong the other guests are converted",
        )
        self.problems = list(problems)


@dataclass(slots=True)
class _Stage:
    """What the parts of a supervisor share."""

    run: Run
    journal: Journal
    reporter: Reporter
    tmpdir: Path
    capacities: Mapping[str, int]
    facts: dict[str, Facts] = field(default_factory=dict)


async def check(
    plan: Plan, options: Mapping[str, GuestOptions], reporter: Reporter, tmpdir: Path | None = None
) -> Checked:
    """Look at everything that a batch needs, without beginning it (``--dry-run``)."""
    place = tmpdir or default_parent()
    limits = capacities(plan.limits, plan.windows, place)
    return await preflight_batch(plan, options, tmpdir=place, capacities=limits, reporter=reporter)


async def supervise(
    run: Run,
    reporter: Reporter,
    *,
    tmpdir: Path | None = None,
    skips_wrong: bool = False,
    open_pool: OpenPool = local_pool,
    first: Callable[[Journal], None] | None = None,
) -> list[GuestRecord]:
    """Run a batch, or go on with it, until each guest has come to its end; return their records.

    When cancelled, all that is converted or copied is kept, and the run can be taken up again.
    ``tmpdir`` (default ``$TMPDIR``, else /var/tmp) is where the overlays of a new run are.
    ``first`` changes the journal before anything else, when no other supervisor can have it.

    Raises:
        WrongBatchError: it can't begin; nothing has been touched.
        UsageError: another supervisor has the run, another run one of its guests or targets.
        V2VError: its journal or folder can't be used.
    """
    with ExitStack() as stack:
        stack.enter_context(folder.locked(run.path))
        journal = stack.enter_context(open_journal(run.path / folder.JOURNAL))
        is_new = journal.get("work") is None
        if first is not None:
            first(journal)
        for request in journal.requests():
            journal.answer(request.number, "nobody: the run had no supervisor")
        events = EventFile(run.path)
        stack.callback(events.close)
        amounts = Amounts(journal)
        told = once_each(reporter.tee(events).tee(amounts))
        place = tmpdir or default_parent()
        limits = capacities(run.plan.limits, run.plan.windows, place)
        if run.plan.limits.scratch is None:
            # What is free now is less by what the overlays of an earlier supervisor take.
            limits["scratch"] += _scratch_taken(run.plan, journal)
        stage = _Stage(run, journal, told, place, limits)
        _begin(stage)
        try:
            async with open_pool(run.plan, told) as pool:
                there = pool.capacities().items()
                asked = run.plan.limits.model_fields_set
                limits |= {name: amount for name, amount in there if name not in asked}
                await _look(stage, skips_wrong=skips_wrong or not is_new)
                records = await _work(stage, pool, amounts)
        except anyio.get_cancelled_exc_class():
            _conclude(stage, "cancelled")
            raise
        except Exception:
            _conclude(stage, "failed")
            raise
        _conclude(stage, "finished")
        return records


async def undo(run: Run, names: Sequence[str], reporter: Reporter) -> None:
    """Cancel guests of a run that has no supervisor: remove what they made, for good.

    Raises:
        UsageError: the run has a supervisor.
        V2VError: its journal can't be used.
    """
    with folder.locked(run.path), open_journal(run.path / folder.JOURNAL) as journal:
        events = EventFile(run.path)
        told = reporter.tee(events)
        stage = _Stage(run, journal, told, default_parent(), {})
        records = {each.name: each for each in journal.guests()}
        try:
            async with local_pool(run.plan, told) as pool:
                for guest in run.plan.guests:
                    if guest.name in names and records[guest.name].phase not in ENDED:
                        await _cancel(stage, pool, guest)
        finally:
            events.close()
            _tidy(stage)


async def _cancel(stage: _Stage, pool: Pool, guest: GuestPlan) -> None:
    """Remove what a guest has made, where no runner does."""
    journal, mine = stage.journal, stage.reporter.for_guest(guest.name)
    phase: Phase = "cancelled"
    if journal.get("work") is not None:  # else nothing has been begun
        # Before anything goes: a process that dies now leaves nothing to go on from.
        journal.reach(guest.name, "waiting")
        try:
            if await _maker(stage, pool, {})(guest, 0).abandon():
                phase = "done"  # it had come to its end when its supervisor went
        except Exception as error:
            mine.warning(f"not all of it could be removed: {named(error)}")
    journal.reach(guest.name, phase)
    mine.emit("cancelled" if phase == "cancelled" else "finished")
    folder.release(stage.run.path.parent, stage.run.path.name, guest.name)


def _scratch_taken(plan: Plan, journal: Journal) -> int:
    scratch = {guest.name: guest.scratch for guest in plan.guests}
    return sum(
        scratch[each.name]
        for each in journal.guests()
        if each.phase not in ENDED and each.phase != "waiting"
    )


# The parts.


def _begin(stage: _Stage) -> None:
    """Say what the run is and how far it has come."""
    plan = stage.run.plan
    stage.facts = {
        name: Facts(tuple(sizes)) for name, sizes in (stage.journal.get("facts") or {}).items()
    }
    stage.reporter.emit(
        "started",
        details={
            "program": "v2v-async batch",
            "version": __version__,
            "batch": stage.run.path.name,
            "guests": len(plan.guests),
        },
    )


async def _look(stage: _Stage, *, skips_wrong: bool) -> None:
    """Look at everything before the first byte moves; take what the guests need for this run.

    Raises:
        WrongBatchError, UsageError
    """
    run, journal = stage.run, stage.journal
    records = {each.name: each for each in journal.guests()}
    guests = {guest.name: guest for guest in run.plan.guests}
    going = [guest for guest in run.plan.guests if records[guest.name].phase not in ENDED]
    # Whose attempts were forgotten when it was taken up again has to be looked at like a new one.
    begun = frozenset(
        name
        for name, each in records.items()
        if each.attempts and (each.phase != "waiting" or each.failures)
    )
    checked = await preflight_batch(
        run.plan,
        {guest.name: run.options[guest.name] for guest in going},
        tmpdir=stage.tmpdir,
        capacities=stage.capacities,
        reporter=stage.reporter,
        begun=begun,
    )
    wrong = [each for each in checked.problems if not (each.guests and skips_wrong)]
    if wrong:
        raise WrongBatchError(checked.problems)
    of_guest: dict[str, list[Problem]] = {}
    for problem in checked.problems:
        for name in problem.guests:
            # Whose disks are known finds out by itself, with the retries that the plan gives it.
            is_known = name in begun or (name in stage.facts and not problem.is_permanent)
            if not is_known:
                of_guest.setdefault(name, []).append(problem)
    for name, problems in of_guest.items():
        failure = Failure(
            "; also: ".join(each.message for each in problems),
            problems[0].hint,
            is_permanent=any(each.is_permanent for each in problems),
        )
        journal.fail(name, failure)
        await _bundle(stage, guests[name], failure)
    conflicts = folder.claim(run.path.parent, run.path.name, checked.claims)
    if conflicts:
        raise folder.TakenError(conflicts)
    stage.facts |= {name: facts for name, facts in checked.facts.items() if name not in stage.facts}
    journal.set("facts", {name: facts.disks for name, facts in stage.facts.items()})
    tell_state(run.path, run.plan, stage.facts, journal.guests(), stage.reporter)


async def _work(stage: _Stage, pool: Pool, amounts: Amounts) -> list[GuestRecord]:
    run, journal, reporter = stage.run, stage.journal, stage.reporter
    records = {each.name: each for each in journal.guests()}
    going = [
        guest
        for guest in run.plan.guests
        if records[guest.name].phase not in ENDED and guest.name in stage.facts
    ]
    needs = needs_of(going, stage.facts, stage.capacities)
    _make_work_folder(stage)
    make_work = _maker(stage, pool, needs)
    for guest in list(going):
        if records[guest.name].is_cancelled:
            await _cancel(stage, pool, guest)
            going.remove(guest)
            continue
        try:
            # What a supervisor that was killed had running is ended before anything begins.
            await make_work(guest, 0).suspend()
        except Exception as error:
            failure = failure_of(named(error))
            journal.fail(guest.name, failure)
            more = await _bundle(stage, guest, failure)
            tell_failure(reporter.for_guest(guest.name), failure, more)
            going.remove(guest)
    runner = Runner(
        going,
        needs,
        Scheduler(stage.capacities),
        journal,
        reporter,
        make_work,
        run.plan.retries,
        after_failure=partial(_bundle, stage),
    )
    timetable = Timetable(run.plan, stage.capacities, runner, pool.set_rates, reporter)
    timetable.apply()
    async with anyio.create_task_group() as group:
        for call in (timetable.follow, amounts.keep_noting):
            group.start_soon(call)
        group.start_soon(follow_requests, journal, runner)
        await runner.run()
        group.cancel_scope.cancel()
    return journal.guests()


def _make_work_folder(stage: _Stage) -> None:
    """Have the folder of the guests' v2v directories; what is gone with it begins anew."""
    journal, reporter = stage.journal, stage.reporter
    known = journal.get("work")
    if known is not None and Path(known).is_dir():
        return
    try:
        made = tempfile.mkdtemp(prefix=WORK_PREFIX, dir=stage.tmpdir)
    except OSError as error:
        raise UsageError(
            f"no temporary directory can be made in ‘{stage.tmpdir}’: {error.strerror}",
            hint="set TMPDIR to a directory that you can write in",
        ) from error
    for record in journal.guests() if known is not None else []:
        if record.phase not in ENDED and record.phase != "waiting":
            reporter.for_guest(record.name).warning(
                f"the overlays of {record.name} were in ‘{known}’, which is gone: it begins anew, "
                "and what was made of it on the target may have to be removed by hand"
            )
            journal.reach(record.name, "waiting")
    # Last: a supervisor that dies before has changed nothing that the next one does not change.
    journal.set("work", made)


def _maker(
    stage: _Stage, pool: Pool, needs: Mapping[str, Needs]
) -> Callable[[GuestPlan, int], GuestWork]:
    """Return what makes the work of an attempt (0: only to undo one)."""
    run = stage.run
    work = Path(stage.journal.get("work"))
    places = {guest.name: place for place, guest in enumerate(run.plan.guests, 1)}

    def make_work(guest: GuestPlan, attempt: int) -> GuestWork:
        disks = needs[guest.name].disks if guest.name in needs else {}
        order = Order(
            run.options[guest.name],
            work / str(places[guest.name]),
            folder.guest_folder(run.path, guest.name) / f"attempt-{attempt}",
            Copying({n: wants["connections"] for n, wants in disks.items()}, places_of(guest)),
        )
        return pool.work(order, stage.reporter.for_guest(guest.name))

    return make_work


async def _bundle(stage: _Stage, guest: GuestPlan, failure: Failure) -> dict[str, Any]:
    """Write what somebody who helps needs to see."""
    from v2v_async.batch.report.bundle import write_bundle  # many runs need none

    record = next(each for each in stage.journal.guests() if each.name == guest.name)
    path = folder.bundle_path(stage.run.path, guest.name)
    call = partial(write_bundle, path, stage.run.path, guest, record)
    try:
        return {"bundle": str(await anyio.to_thread.run_sync(call))}
    except Exception as error:  # a bundle is a help; its failure must not end the batch
        stage.reporter.for_guest(guest.name).warning(f"no bundle of its failure: {error}")
        return {}


def _conclude(stage: _Stage, how: Literal["finished", "failed", "cancelled"]) -> None:
    """Say how it ended, and give back what is not needed any more."""
    records = stage.journal.guests()
    counts = Counter(record.phase for record in records)
    stage.reporter.emit(how, details={each: counts[each] for each in ENDED})
    home, name = stage.run.path.parent, stage.run.path.name
    for record in records:
        if record.phase in ENDED:
            folder.release(home, name, record.name)
    _tidy(stage)


def _tidy(stage: _Stage) -> None:
    """Remove the folder of the guests' v2v directories when all have come to their end."""
    work = stage.journal.get("work")
    if work is None or any(each.phase not in ENDED for each in stage.journal.guests()):
        return
    for path in Path(work).glob("*.done"):
        path.unlink(missing_ok=True)
    left = [path for path in Path(work).glob("*") if (path / "state.json").exists()]
    if left:
        # What could not be removed is known only there.
        stage.reporter.warning(
            f"something is left of {len(left)} guests, on the target too; to try again: v2v-async "
            f"clean {work}/*"
        )
    else:
        shutil.rmtree(work, ignore_errors=True)
