"""What a person asks of a run from another terminal: pause, resume, cancel.

A request is a line in the journal, which the run's supervisor answers; where there is none, what
can be done without it is done in the journal.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial
from typing import Literal, get_args

import anyio
import anyio.to_thread

from v2v_async.batch.record.journal import ENDED, Journal
from v2v_async.batch.runner import Runner
from v2v_async.errors import V2VError

What = Literal["pause", "resume", "cancel"]

POLL_EVERY_S = 0.25
_ANSWER_TIMEOUT_S = 10.0


async def follow_requests(journal: Journal, runner: Runner) -> None:
    """Do what other processes ask for, until cancelled."""
    while True:
        for request in await anyio.to_thread.run_sync(journal.requests):
            records = {each.name: each for each in await anyio.to_thread.run_sync(journal.guests)}
            going = [
                name
                for name in request.guests
                if name in records and records[name].phase not in ENDED
            ]
            if request.what in ("pause", "resume"):
                is_paused = request.what == "pause"
                await anyio.to_thread.run_sync(partial(journal.pause, going, is_paused=is_paused))
            if request.what == "cancel":
                await anyio.to_thread.run_sync(journal.cancel, going)
            if request.what in get_args(What):
                for name in going:
                    getattr(runner, request.what)(name)
            await anyio.to_thread.run_sync(journal.answer, request.number, _said(len(going)))
        await anyio.sleep(POLL_EVERY_S)


def ask(journal: Journal, what: What, guests: Iterable[str]) -> str:
    """Ask a run's supervisor, and return what it answers. Blocks.

    Raises:
        V2VError: it does not answer.
    """
    number = journal.ask(what, guests)
    end = time.monotonic() + _ANSWER_TIMEOUT_S
    while (answer := _answer(journal, number)) is None:
        if time.monotonic() > end:
            journal.answer(number, "too late")
            raise V2VError(
                "the run's supervisor does not answer",
                hint="it may still be looking at sources and targets, or be stopped (ctrl-Z): try "
                "again",
            )
    return answer


def _answer(journal: Journal, number: int) -> str | None:
    try:
        time.sleep(POLL_EVERY_S / 2)
        return journal.answer_to(number)
    except KeyboardInterrupt:
        journal.answer(number, "too late")  # nobody may obey it later
        raise


def _said(count: int) -> str:
    return "1 guest" if count == 1 else f"{count} guests"
