"""Choose the renderers that a command line asks for, and own the streams they write to."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from v2v_async.errors import UsageError
from v2v_async.events import Event
from v2v_async.render.broadcast import Broadcast, Renderer

if TYPE_CHECKING:
    from v2v_async.cli.values import Target
    from v2v_async.cli.virt_v2v import EdgeOptions
    from v2v_async.render.batch_plain import BatchPlain
    from v2v_async.render.batch_terminal import BatchTerminal


class Sink:
    """Write text to a stream until that fails, then drop it: a reader may go before we do.

    ``stream`` is None where the descriptor was closed when the program started.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def __call__(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._stream = None


def open_target(option: str, target: Target) -> tuple[Sink, Callable[[], None]]:
    """Return where to write for ``target``, and what closes it.

    Raises:
        UsageError: the file can't be written or the descriptor is not open.
    """
    if target.kind in ("stdout", "stderr"):
        return Sink(sys.stdout if target.kind == "stdout" else sys.stderr), lambda: None
    try:
        where: int | str = os.dup(target.fd) if target.fd is not None else str(target.path)
        # Closed by the caller: the stream outlives this function.
        stream = open(where, "w", encoding="utf-8", errors="replace")  # noqa: SIM115
    except OSError as error:
        raise _cannot_write(option, target, error) from None

    def close() -> None:
        with suppress(OSError):
            stream.close()

    return Sink(stream), close


def _cannot_write(option: str, target: Target, error: OSError) -> UsageError:
    name = f"fd:{target.fd}" if target.fd is not None else str(target.path)
    return UsageError(
        f"{option}: {name}: {error.strerror}",
        hint="open the descriptor in the calling program"
        if target.fd is not None
        else "name a file that can be written",
    )


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a live screen makes sense on ``stream``."""
    return stream is not None and stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class Screen:
    """Everything a run shows. Call :attr:`emit` with events; :meth:`error` once at the end.

    ``is_batch``: of many guests; ``on_leave`` is called when a person leaves a screen that only
    follows. Entering it raises UsageError where a target can't be written.
    """

    def __init__(
        self,
        edge: EdgeOptions,
        prog: str,
        *,
        is_plain: bool = False,
        is_batch: bool = False,
        on_leave: Callable[[], None] | None = None,
    ) -> None:
        self._edge = edge
        self._prog = prog
        self._is_plain = is_plain
        self._is_batch = is_batch
        self._on_leave = on_leave
        self._shown: Renderer | None = None
        self._batch: BatchTerminal | BatchPlain | None = None
        self._stack = ExitStack()
        self._machine: Sink | None = None
        self._broadcast = Broadcast([])

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._shown = self._person()
            renderers = [self._shown]
            if (target := self._edge.machine_readable) is not None:
                from v2v_async.render.machine import Machine

                self._machine, close = open_target("--machine-readable", target)
                stack.callback(close)
                stdout = self._machine if target.kind == "stdout" else Sink(sys.stdout)
                renderers.append(Machine(self._machine, stdout, quiet=self._edge.quiet))
            if (events := self._edge.events) is not None:
                from v2v_async.render.jsonl import JsonLines

                where = events.fd if events.fd is not None else events.path
                assert where is not None
                renderers.append(JsonLines(where))
            try:
                self._broadcast = stack.enter_context(Broadcast(renderers))
            except OSError as error:
                if events is None:
                    raise
                raise _cannot_write("--events", events, error) from None
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(exc_type, exc, traceback)

    def emit(self, event: Event) -> None:
        """Show ``event``. Never raises."""
        self._broadcast(event)

    def catch_up(self, events: Iterable[Event]) -> None:
        """Have a screen of a batch know what happened before, without saying it again."""
        if self._batch is not None:
            self._batch.catch_up(events)

    def say(self, text: str) -> None:
        """Tell a person something that is no other program's to know."""
        if self._shown is not None:
            self._shown(Event(time=time.time(), run="", type="message", text=text))

    def error(self, text: str, now: float) -> None:
        """Tell the program that reads --machine-readable why the run ended."""
        if self._machine is not None:
            from v2v_async.render.machine import message_line

            self._machine(message_line(text, now, "error") + "\n")

    def _person(self) -> Renderer:
        edge = self._edge
        # What is printed or written there must be alone, so that it can be piped.
        stream = sys.stderr if edge.keeps_stdout else sys.stdout
        wants_live = not (edge.quiet or edge.machine_readable or self._is_plain)
        if wants_live and is_terminal(stream):
            from rich.console import Console

            if self._is_batch:
                from v2v_async.render.batch_terminal import BatchTerminal, keyboard_of_stdin

                self._batch = BatchTerminal(
                    Console(file=stream),
                    verbose=edge.verbose,
                    keyboard=keyboard_of_stdin(),
                    on_leave=self._on_leave,
                )
                return self._batch
            from v2v_async.render.terminal import Terminal

            return Terminal(Console(file=stream), verbose=edge.verbose)
        if self._is_batch:
            from v2v_async.render.batch_plain import BatchPlain

            self._batch = BatchPlain(
                Sink(stream),
                Sink(sys.stderr),
                prog=self._prog,
                quiet=edge.quiet,
                verbose=edge.verbose,
            )
            return self._batch
        from v2v_async.render.plain import Plain

        return Plain(
            Sink(stream),
            Sink(sys.stderr),
            prog=self._prog,
            quiet=edge.quiet,
            verbose=edge.verbose,
            colours=edge.colours,
            show_progress=edge.machine_readable is None,
        )
