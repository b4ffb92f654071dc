"""One attempt at one guest, in the worker process that has it.

::

    begin ──> servers ──┬─ call convert, prepare, copy … ──> done ──┬──> leave ──> ended
                        └─ any fails, or a server dies ─────────────┴──> ended, and why

What the supervisor asks for is answered through the outbox, behind the events that go before it.
"""

from __future__ import annotations

import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.abc

from v2v_async.batch.cluster.errors_sent import error_to_send
from v2v_async.batch.cluster.outbox import Outbox
from v2v_async.batch.retry import named
from v2v_async.batch.runner import GuestWork
from v2v_async.errors import V2VError, leaves, most_telling
from v2v_async.events import Reporter

UNDO_TIMEOUT_S = 60.0
_MIRROR_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class OwnDirectory:
    """A v2v directory that only this machine has, and a file to leave when its guest is done.

    A supervisor that was killed when it was to hear of that must not begin anew.
    """

    path: Path
    tombstone: Path


class Attempt:
    """Does what it is asked for, in tasks of ``group``.

    Of an ``own`` directory ``state.json`` is sent when it changes: what was made on the target must
    be known even if this worker is gone for ever.
    """

    def __init__(
        self,
        name: str,
        work: GuestWork,
        outbox: Outbox,
        reporter: Reporter,
        group: anyio.abc.TaskGroup,
        own: OwnDirectory | None,
    ) -> None:
        self._name = name
        self._work = work
        self._outbox = outbox
        self._reporter = reporter
        self._group = group
        self._own = own
        self._sent = ""
        self._calls: anyio.abc.TaskGroup | None = None
        self._scopes: dict[str, anyio.CancelScope] = {}
        self._leave = anyio.Event()
        self._settled = anyio.Event()

    async def begin(self) -> None:
        """Have servers from now on; when that fails, the answer is that the attempt has ended."""
        self._group.start_soon(self._serve)
        await self._settled.wait()

    def call(self, call: str, what: str, *arguments: Any) -> None:
        """Do a part of the work, with the servers running."""
        steps: dict[str, Callable[..., Awaitable[Any]]] = {
            "convert": self._work.convert,
            "reopen": self._work.reopen,
            "prepare": self._work.prepare,
            "copy": self._work.copy,
            "finalize": self._finalize,
        }
        if self._calls is not None:  # else it has ended, and that has been said
            self._calls.start_soon(self._do, call, steps[what], arguments)

    def undo(self, call: str, what: str) -> None:
        """Remove what was made; the servers are gone."""
        steps: dict[str, Callable[[], Awaitable[bool | None]]] = {
            "abandon": self._work.abandon,
            "suspend": self._work.suspend,
        }
        self._group.start_soon(self._undo, call, steps[what])

    def cancel(self, call: str) -> None:
        """Stop one call; it is answered when it has stopped."""
        if call in self._scopes:
            self._scopes[call].cancel()

    def leave(self) -> None:
        """Stop the servers; the answer is that the attempt has ended."""
        self._leave.set()

    async def _serve(self) -> None:
        told: dict[str, Any] | None = None
        try:
            async with self._work.servers():
                await self._take_calls()
        except Exception as error:
            told = self._told(error)
        except anyio.get_cancelled_exc_class():
            # The supervisor is gone, or this worker goes: a later attempt goes on from here.
            await self._suspend()
            raise
        finally:
            self._mirror()
            self._outbox.tell(answer="ended", of=self._name, error=told)
            self._settled.set()

    async def _suspend(self) -> None:
        with (
            anyio.CancelScope(shield=True),
            anyio.move_on_after(UNDO_TIMEOUT_S),
            suppress(V2VError, OSError),
        ):
            await self._work.suspend()

    async def _take_calls(self) -> None:
        try:
            async with anyio.create_task_group() as self._calls:
                self._settled.set()
                if self._own is not None:
                    self._calls.start_soon(self._keep_mirroring)
                await self._leave.wait()
                self._calls.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            # The servers' block asks for the one error that it may know more about.
            raise most_telling(group) from None
        finally:
            self._calls = None

    async def _do(
        self, call: str, step: Callable[..., Awaitable[Any]], arguments: tuple[Any, ...]
    ) -> None:
        with anyio.CancelScope() as scope:
            self._scopes[call] = scope
            try:
                result = await step(*arguments)
            finally:
                del self._scopes[call]
                self._mirror()
            self._outbox.tell(answer="done", of=call, result=result)
        if scope.cancelled_caught:
            self._outbox.tell(answer="done", of=call, result=None)

    async def _finalize(self) -> list[str]:
        made = await self._work.finalize()
        if self._own is not None:
            self._own.tombstone.touch()
        return made

    async def _undo(self, call: str, step: Callable[[], Awaitable[bool | None]]) -> None:
        result: bool | None = None
        told: dict[str, Any] | None = None
        try:
            with anyio.fail_after(UNDO_TIMEOUT_S):
                result = await step()
        except TimeoutError:
            late = V2VError(f"it was not done within {UNDO_TIMEOUT_S:.0f} s")
            told = error_to_send(late)
        except Exception as error:
            told = self._told(error)
        self._outbox.tell(answer="done", of=call, result=result, error=told)

    def _told(self, error: Exception) -> dict[str, Any]:
        """Return what is sent of an error; of one of our own making, more goes to the log."""
        made = named(error)
        if not any(isinstance(each, V2VError) for each in leaves(error)):
            self._reporter.debug("".join(traceback.format_exception(error)))
        return error_to_send(made)

    async def _keep_mirroring(self) -> None:
        while True:
            self._mirror()
            await anyio.sleep(_MIRROR_EVERY_S)

    def _mirror(self) -> None:
        """Send the file if it has changed."""
        if self._own is None:
            return
        try:
            text = (self._own.path / "state.json").read_text()
        except OSError:
            return
        if text != self._sent:
            self._sent = text
            self._outbox.tell(answer="state", of=self._name, text=text)
