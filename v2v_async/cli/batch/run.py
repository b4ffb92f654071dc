"""``v2v-async batch run`` and ``resume``: be the supervisor of a run."""

from __future__ import annotations

import secrets
import shlex
import shutil
import sys
import textwrap
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from pathlib import Path

from v2v_async.batch.control import ask
from v2v_async.batch.plan.model import Plan
from v2v_async.batch.pool import OpenPool, local_pool
from v2v_async.batch.preflight.preflight import Checked
from v2v_async.batch.preflight.problems import Problem
from v2v_async.batch.record import folder
from v2v_async.batch.record.journal import ENDED, GuestRecord, Journal, open_journal
from v2v_async.batch.supervisor import Run, check, supervise
from v2v_async.cli.batch import plans
from v2v_async.cli.failure import explain
from v2v_async.cli.run import Ending, report, run_loop
from v2v_async.cli.screen import Screen, Sink
from v2v_async.cli.values import events_target
from v2v_async.cli.virt_v2v import EdgeOptions
from v2v_async.errors import UsageError, V2VError
from v2v_async.events import Emit, Event, Reporter
from v2v_async.options import GuestOptions
from v2v_async.render.batch_state import BatchState

PROG = "v2v-async batch"
_NOT_KEPT = "nothing had begun; the run is not kept"
_FIRST_FAILED, _MOST_FAILED = 10, 99


def run(words: Namespace) -> int:
    """``batch run PLAN``; return the exit status.

    Raises:
        V2VError: the plan is wrong, or the run can't be made.
    """
    plan, options = plans.read(words.plan)
    home, name = folder.state_home(), _name(plan) if words.name is None else words.name
    folder.check_name(name)
    if words.dry_run:
        return _dry_run(words, plan, options, home / name)
    path = folder.create(home, name, plan)
    try:
        return _supervised(words, Run(path, plan, options))
    finally:
        _remove_unbegun(path)


def resume(words: Namespace) -> int:
    """``batch resume RUN``; return the exit status.

    Raises:
        V2VError: there is no such run or guest, or it can't be gone on with.
    """
    path = folder.existing(folder.state_home(), words.run)
    with open_journal(path / folder.JOURNAL) as journal:
        records = journal.guests()
        names = plans.named_guests([each.name for each in records], words.guests, path.name)
        named = [
            each
            for each in records
            if each.name in words.guests or (words.failed and each.phase == "failed")
        ]
        again = [each.name for each in named]
        is_alive = folder.is_alive(path)
        if is_alive:
            _refuse_ended(path, words, named)
        if done := [each.name for each in named if each.phase == "done"]:
            told = ", ".join(f"‘{name}’" for name in done)
            raise UsageError(f"nothing is left to do for {told}", hint="leave that out")
        if is_alive:
            told = _take_out_of_pause(journal, records, names, is_named=bool(words.guests))
            Sink(sys.stdout)(f"{PROG}: {told}\n")
            return 0
    plan = folder.read_plan(path, (each.name for each in records))
    phases = {each.phase for each in records}
    if not again and phases <= {"done", "cancelled"}:  # of failures the end tells
        told = f"nothing is left to do: all guests of run ‘{path.name}’ have ended"
        if "cancelled" in phases:
            told += f"; one that was cancelled begins anew with {PROG} resume {path.name} GUEST"
        Sink(sys.stdout)(f"{PROG}: {told}\n")

    def take_up(journal: Journal) -> None:
        journal.pause(names, is_paused=False)
        journal.take_up(again)

    return _supervised(words, Run(path, plan, plans.options_of_all(plan.guests)), take_up)


def _take_out_of_pause(
    journal: Journal, records: list[GuestRecord], names: list[str], *, is_named: bool
) -> str:
    """Have the supervisor of a run go on with guests; return what became of that."""
    going = [each for each in records if each.name in names and each.phase not in ENDED]
    if paused := [each.name for each in going if each.is_paused]:
        return f"resumed: {ask(journal, 'resume', paused)}"
    if is_named:
        return f"nothing is paused of {', '.join(f'‘{each.name}’' for each in going)}"
    count = "1 guest" if len(going) == 1 else f"{len(going)} guests"
    return f"nothing is paused: the run goes on with {count}"


def _refuse_ended(path: Path, words: Namespace, named: list[GuestRecord]) -> None:
    """Raise UsageError where guests are to be tried again that a supervisor is done with."""
    tried = [each.name for each in named if each.phase in ENDED and each.phase != "done"]
    if tried:
        told = ", ".join(f"‘{name}’" for name in tried)
        again = "--failed" if words.failed else shlex.join(tried)
        raise UsageError(
            f"{told} can be tried again when the run has ended",
            hint=f"then: {PROG} resume {path.name} {again}",
        )
    if words.failed:
        raise UsageError(
            f"run ‘{path.name}’ goes on, and none of its guests has failed so far",
            hint=f"without --failed it takes guests out of a pause: {PROG} resume {path.name}",
        )


def _has_begun(path: Path) -> bool:
    """Tell whether anything of a run has been begun, which resume would go on with."""
    journal_path = path / folder.JOURNAL
    if not journal_path.exists():
        return False
    with open_journal(journal_path, read_only=True) as journal:
        return journal.get("work") is not None


def _remove_unbegun(path: Path) -> None:
    """Remove a run of which nothing has been begun: its plan is to be mended."""
    if _has_begun(path):
        return
    folder.release(path.parent, path.name)
    shutil.rmtree(path, ignore_errors=True)


def _name(plan: Plan) -> str:
    return f"{plan.name}-{datetime.now():%Y%m%d-%H%M%S}"


def _edge(words: Namespace) -> EdgeOptions:
    return EdgeOptions(
        quiet=words.quiet,
        verbose=words.verbose,
        events=None if words.events is None else events_target(words.events),
    )


def _dry_run(words: Namespace, plan: Plan, options: dict[str, GuestOptions], path: Path) -> int:
    from v2v_async.batch.schedule.forecast import forecast

    with Screen(_edge(words), PROG, is_plain=True, is_batch=True) as screen:
        ending = run_loop(
            lambda reporter: check(plan, options, reporter), Reporter(screen.emit, "dry-run")
        )
    if ending.error is not None:
        return report(explain(ending.error, verbose=words.verbose), PROG)
    if ending.signal is not None:
        return 128 + ending.signal
    write = Sink(sys.stdout)
    checked = ending.result
    assert isinstance(checked, Checked)
    problems = [*_of_other_runs(path, checked), *checked.problems]
    try:
        for line in forecast(plan, checked):
            write(line + "\n")
    except UsageError as error:  # no order: something needs more than there is
        if all(each.message != error.message for each in problems):
            problems.append(Problem(None, error.message, error.hint))
    if not problems:
        return 0
    count = len(problems)
    write(f"\n{count} thing{'' if count == 1 else 's'} to mend before it can begin:\n")
    for problem in problems:
        for part, indent in ((str(problem), "  "), (problem.hint, "      ")):
            write(textwrap.indent(part, indent) + "\n" if part else "")
    return 2


def _of_other_runs(path: Path, checked: Checked) -> Iterator[Problem]:
    """Yield what other runs have that a run with the folder ``path`` would need."""
    found: list[UsageError] = []
    if path.exists():
        found.append(folder.NameTakenError(path.name))
    # No run is named so: nothing that another one has is this one's.
    if conflicts := folder.conflicts(path.parent, "", checked.claims):
        found.append(folder.TakenError(conflicts))
    for error in found:
        yield Problem(None, error.message, error.hint)


def _supervised(words: Namespace, run: Run, first: Callable[[Journal], None] | None = None) -> int:
    try:
        with Screen(_edge(words), PROG, is_batch=True) as screen:
            reporter = Reporter(screen.emit, run.path.name)
            ending = run_loop(lambda told: _supervise(words, run, screen, told, first), reporter)
    except V2VError as error:  # a target of the screen can't be written
        return report(explain(error), PROG)
    return _conclude(words, run, ending)


async def _supervise(
    words: Namespace,
    run: Run,
    screen: Screen,
    reporter: Reporter,
    first: Callable[[Journal], None] | None,
) -> list[GuestRecord]:
    open_pool: OpenPool = local_pool
    async with AsyncExitStack() as stack:
        if words.cluster is not None:
            from v2v_async.batch.cluster.pool import cluster_pool

            open_pool = cluster_pool(words.cluster)
        if words.serve is not None:
            publish = await stack.enter_async_context(_page(words, screen))
            reporter = reporter.tee(publish)
        skips_wrong = getattr(words, "skip_wrong", True)
        return await supervise(
            run, reporter, skips_wrong=skips_wrong, open_pool=open_pool, first=first
        )


@asynccontextmanager
async def _page(words: Namespace, screen: Screen) -> AsyncIterator[Emit]:
    """Serve the web page; what is yielded is given each event."""
    from v2v_async.web.server import serving

    state = BatchState()
    token = None if words.no_token else secrets.token_urlsafe(24)
    # Not an event: the address has the token in it, which is no other program's to know.
    async with serving(
        state, words.serve, token=token, on_listening=lambda url: screen.say(f"watch it at {url}")
    ) as publish:

        def tell(event: Event) -> None:
            state.apply(event)
            publish(event)

        yield tell


def _conclude(words: Namespace, run: Run, ending: Ending) -> int:
    """Say how it ended, what to do next, and by the status how many failed."""
    name = run.path.name
    say = Sink(sys.stderr)
    if ending.signal is not None and not ending.is_done:
        is_kept = words.command == "resume" or _has_begun(run.path)
        then = f"to go on: {PROG} resume {name}" if is_kept else _NOT_KEPT
        say(f"{PROG}: stopped by {ending.signal.name}; {then}\n")
        if ending.error is not None:
            report(explain(ending.error, verbose=words.verbose), PROG)
        return 128 + ending.signal
    if ending.error is not None:
        return report(explain(ending.error, verbose=words.verbose), PROG)
    records = ending.result
    assert isinstance(records, list)
    failed = [record for record in records if record.phase == "failed"]
    if not failed:
        return 0
    say(
        f"{PROG}: {len(failed)} of {len(records)} guests failed; what and why: {PROG} report "
        f"{name}\n  try them again: {PROG} resume {name} --failed\n"
    )
    return _FIRST_FAILED + min(len(failed), _MOST_FAILED)
