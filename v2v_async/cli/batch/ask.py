"""``v2v-async batch pause`` and ``cancel``: ask a run that goes on, or change one that does not."""

from __future__ import annotations

import sys
from argparse import Namespace

from v2v_async.batch.control import ask
from v2v_async.batch.record import folder
from v2v_async.batch.record.journal import ENDED, open_journal
from v2v_async.batch.supervisor import Run, undo
from v2v_async.cli.batch import plans
from v2v_async.cli.failure import explain
from v2v_async.cli.run import report, run_loop
from v2v_async.cli.screen import Screen, Sink
from v2v_async.cli.virt_v2v import EdgeOptions
from v2v_async.errors import UsageError
from v2v_async.events import Reporter

PROG = "v2v-async batch"
_ENDED = {"done": "is done", "failed": "has failed", "cancelled": "is cancelled"}


def pause_or_cancel(words: Namespace) -> int:
    """Do it; return the exit status.

    Raises:
        UsageError: there is no such run or guest, or nothing is left to be done for it.
        V2VError: its journal can't be used, or its supervisor does not answer.
    """
    path = folder.existing(folder.state_home(), words.run)
    said = "paused" if words.command == "pause" else "cancelled"
    with open_journal(path / folder.JOURNAL) as journal:
        records = journal.guests()
        names = plans.named_guests([each.name for each in records], words.guests, path.name)
        wanted = [each for each in records if each.name in names]
        going = [each.name for each in wanted if each.phase not in ENDED]
        # Of guests that nobody named it goes without saying.
        ended = ", ".join(
            f"‘{each.name}’ {_ENDED[each.phase]}"
            for each in wanted
            if each.phase in ENDED and words.guests
        )
        if not going:
            raise UsageError(
                f"nothing is left to {words.command}: "
                f"{ended or f'all guests of run ‘{path.name}’ have ended'}",
                hint=f"{PROG} report {path.name} says what became of them",
            )
        ended = f"; {ended}" if ended else ""
        if folder.is_alive(path):
            Sink(sys.stdout)(f"{PROG}: {said}: {ask(journal, words.command, names)}{ended}\n")
            return 0
        if words.command == "pause":
            journal.pause(going, is_paused=True)
    if words.command == "cancel":
        plan = folder.read_plan(path, (each.name for each in records))
        run = Run(path, plan, plans.options_of_all(plan.guests))
        with Screen(EdgeOptions(), PROG, is_plain=True, is_batch=True) as screen:
            reporter = Reporter(screen.emit, path.name)
            ending = run_loop(lambda told: undo(run, going, told), reporter)
        if ending.error is not None:
            return report(explain(ending.error), PROG)
        if ending.signal is not None and not ending.is_done:
            return 128 + ending.signal
    count = len(going)
    write = Sink(sys.stdout)
    write(f"{PROG}: {said}: {count} guest{'' if count == 1 else 's'}{ended}\n")
    if words.command == "pause":
        write(
            f"  run ‘{path.name}’ is stopped; to go on with others and not with these, name one of "
            f"them: {PROG} resume {path.name} GUEST\n"
        )
    return 0
