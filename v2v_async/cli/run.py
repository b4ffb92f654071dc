"""Run one job under signals, show its events, and turn how it ended into an exit status.

::

    SIGINT, SIGTERM, SIGHUP ──> cancel the job ──> its clean-up is awaited ──> exit 128 + n
                again       ──> say that it is cleaning up; nothing else
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from v2v_async.errors import V2VError
from v2v_async.events import Reporter

if TYPE_CHECKING:
    from v2v_async.cli.failure import Failure
    from v2v_async.cli.screen import Screen
    from v2v_async.cli.virt_v2v import EdgeOptions

Job = Callable[[Reporter], Awaitable[object]]


@dataclass(slots=True)
class Ending:
    """How a job ended: a result, an error, a signal, or a signal and an error in the clean-up."""

    result: object = None
    is_done: bool = False
    error: Exception | None = None
    signal: signal.Signals | None = None


async def under_signals(
    job: Callable[[], Awaitable[object]], notice: Callable[[str], None]
) -> Ending:
    """Await ``job``; a signal cancels it once, and its clean-up is awaited however many follow.

    ``notice`` is given one line about each signal. A signal that was ignored when the program
    started (nohup, a background job of a script) stays ignored.
    """
    import anyio

    wanted = [
        number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]
    ending = Ending()
    with anyio.open_signal_receiver(*wanted) as received:
        async with anyio.create_task_group() as group:
            scope = anyio.CancelScope()
            group.start_soon(_watch, received, scope, ending, notice)
            try:
                with scope:
                    ending.result = await job()
                    ending.is_done = True
            except Exception as error:
                ending.error = error
            group.cancel_scope.cancel()
    return ending


async def _watch(
    received: AsyncIterator[signal.Signals],
    scope: object,
    ending: Ending,
    notice: Callable[[str], None],
) -> None:
    async for number in received:
        if ending.signal is None:
            ending.signal = number
            notice(f"stopped by {number.name}: cleaning up")
            scope.cancel()  # type: ignore[attr-defined]
        else:
            notice(f"{number.name}: still cleaning up after {ending.signal.name}")


def run(
    job: Job,
    edge: EdgeOptions,
    prog: str,
    *,
    warnings: list[str] | None = None,
    is_plain: bool = False,
    after: Callable[[object], None] | None = None,
) -> int:
    """Run ``job`` with a reporter on the screen that ``edge`` asks for; return the exit status.

    ``after`` is given the result when the screen is gone, to print it.
    """
    from v2v_async.cli.failure import explain
    from v2v_async.cli.screen import Screen

    try:
        with Screen(edge, prog, is_plain=is_plain) as screen:
            reporter = Reporter(screen.emit, os.urandom(6).hex())
            for warning in warnings or []:
                reporter.warning(warning)
            reporter.emit("started", details={"program": prog, "version": _version()})
            ending = run_loop(job, reporter)
            failure = _conclude(ending, reporter, screen, verbose=edge.verbose)
    except V2VError as error:  # a target of the screen can't be written
        return report(explain(error), prog)
    if failure is not None:
        report(failure, prog)
    elif ending.is_done and after is not None:
        after(ending.result)
    if ending.signal is not None and not ending.is_done:
        return 128 + ending.signal
    return failure.exit_status if failure is not None else 0


def run_loop(job: Job, reporter: Reporter) -> Ending:
    import anyio

    try:
        return anyio.run(partial(under_signals, partial(job, reporter), reporter.warning))
    except KeyboardInterrupt:  # before the receiver was open, or after it was closed
        return Ending(signal=signal.SIGINT)
    except Exception as error:
        return Ending(error=error)


def _conclude(
    ending: Ending, reporter: Reporter, screen: Screen, *, verbose: bool
) -> Failure | None:
    """Emit the run's last event; return what has to be reported as an error."""
    from v2v_async.cli.failure import explain

    failure = explain(ending.error, verbose=verbose) if ending.error is not None else None
    if ending.signal is not None and not ending.is_done:
        reporter.emit("cancelled", f"stopped by {ending.signal.name}")
    elif failure is not None:
        reporter.emit(
            "failed",
            failure.one_line(),
            hint=failure.hint,
            log=failure.log,
            offset=failure.offset,
        )
    else:
        reporter.emit("finished")
    if failure is not None:
        screen.error(failure.one_line(), time.time())
    elif ending.signal is not None and not ending.is_done:
        screen.error(f"stopped by {ending.signal.name}", time.time())
    return failure


def report(failure: Failure, prog: str) -> int:
    """Print ``failure`` on stderr; return its exit status."""
    from v2v_async.cli.screen import Sink

    Sink(sys.stderr)(failure.text(prog))
    return failure.exit_status


def _version() -> str:
    from v2v_async import __version__

    return __version__
