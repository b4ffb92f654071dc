"""Asks a worker for something and has its answer, or why there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio

from v2v_async.batch.cluster.errors_sent import error_sent
from v2v_async.batch.cluster.sealed import Sealed
from v2v_async.batch.cluster.workers import Worker
from v2v_async.errors import V2VError

if TYPE_CHECKING:
    from distributed import Client

ASK_TIMEOUT_S = 60.0
"""An answer is sent at once, but for a new attempt: that first ends what an earlier one left."""


class NotAnsweredError(V2VError):
    """A worker is there, as far as anybody knows, and has not answered in time."""


async def ask(
    client: Client, worker: Worker, what: str, *, timeout_s: float, **arguments: Any
) -> Any:
    """Ask a worker for something and return its answer.

    Raises:
        NotAnsweredError: it does not answer.
        V2VError: its error, or that it is gone.
    """
    from v2v_async.batch.cluster.host import answer

    request = Sealed.of((what, worker.session, arguments))
    answers: list[Sealed] = []
    problems: list[str] = []

    async def send(scope: anyio.CancelScope) -> None:
        try:
            found = await client.run(answer, request, workers=[worker.address])
            answers.append(found[worker.address])
        except Exception as error:  # whatever dask's comms raise when one side goes away
            problems.append(f"{type(error).__name__}: {error}")
        scope.cancel()

    async def lose(scope: anyio.CancelScope) -> None:
        await worker.lost.wait()
        scope.cancel()

    with anyio.move_on_after(timeout_s):
        async with anyio.create_task_group() as race:
            race.start_soon(send, race.cancel_scope)
            race.start_soon(lose, race.cancel_scope)
    if answers:
        result, error = answers[0].open()
        if error is not None:
            raise error_sent(error)
        return result
    if worker.lost.is_set():
        raise worker.gone()
    raise NotAnsweredError(
        f"the worker {worker.label} does not answer"
        + (f" ({problems[0]})" if problems else f" within {timeout_s:.0f} s"),
        hint="is it up, and the way to it from the scheduler open?",
    )
