"""Say what went wrong, in one form: what, where, why, which log, what to do.

::

    v2v-async: error: the disk could not be copied
      where: guest debian12, step copy, disk 2, offset 1048576
      cause: write of 262144 bytes failed: No space left on device
      log:   /var/tmp/v2v.k3x9/log/copy-2.log
      hint:  free space in /srv/images, then run it again
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import dataclass

from v2v_async.errors import (
    ConversionError,
    ServerExitedError,
    ServerStartError,
    V2VError,
    leaves,
)
from v2v_async.redact import redact
from v2v_async.render.text import clean, clean_lines

_TAIL_LINES = 8  # of a server's stderr: enough for its error, not its whole log


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as a person reads it."""

    message: str
    where: str
    lines: tuple[tuple[str, str], ...]
    exit_status: int
    hint: str | None = None
    log: str | None = None
    offset: int | None = None

    def text(self, prog: str) -> str:
        """Return all lines, with a newline at the end, safe for a terminal."""
        first, *rest = clean_lines(redact(self.message)) or [""]
        made = [f"{prog}: error: {first}", *(f"  {line}" for line in rest if line)]
        for label, value in self.lines:
            head, *more = clean_lines(redact(value)) or [""]
            made.append(f"  {label + ':':<6} {head}")
            made += [f"         {line}" for line in more if line]
        return "\n".join(made) + "\n"

    def one_line(self) -> str:
        """Return the message, place and causes in a line, for programs."""
        causes = [value for label, value in self.lines if label == "cause"]
        head = f"{self.where}: {self.message}" if self.where else self.message
        return redact(clean(": ".join([head, *causes])))


def explain(error: BaseException, *, verbose: bool = False) -> Failure:
    """Return what a person should read about ``error``.

    Of a group, the first error raised on purpose is told, then the others in a line each. Any
    error that was not raised on purpose is a bug here, and is called one.
    """
    all_errors = list(leaves(error))
    main = next((e for e in all_errors if isinstance(e, V2VError)), all_errors[0])
    others = [e for e in all_errors if e is not main]
    lines = list(_details(main, verbose=verbose)) if isinstance(main, V2VError) else []
    lines += [("cause", text) for text in _causes(main)]
    lines += [("also", _one(other)) for other in others]
    if isinstance(main, V2VError):
        if main.log is not None:
            lines.append(("log", str(main.log)))
        if main.hint:
            lines.append(("hint", main.hint))
    is_bug = any(not isinstance(e, V2VError) for e in all_errors)
    if is_bug:
        if verbose:
            lines.append(("trace", "".join(traceback.format_exception(error))))
        again = "" if verbose else "; run it again with -v and add the output"
        lines.append(("bug", f"this is a bug in v2v-async, please report it{again}"))
    if not isinstance(main, V2VError):
        return Failure(f"internal error: {_one(main)}", "", tuple(lines), 1)
    return Failure(
        main.message,
        main.where,
        tuple(lines),
        main.exit_status,
        hint=redact(main.hint) if main.hint else None,
        log=str(main.log) if main.log is not None else None,
        offset=main.offset,
    )


def _details(error: V2VError, *, verbose: bool) -> Iterator[tuple[str, str]]:
    if error.where:
        yield "where", error.where
    if isinstance(error, ConversionError) and error.phase:
        yield "while", error.phase
    if isinstance(error, ServerStartError) and verbose:
        yield "ran", " ".join(error.argv)
    if isinstance(error, ServerStartError | ServerExitedError) and error.stderr_tail.strip():
        yield "said", "\n".join(error.stderr_tail.rstrip().splitlines()[-_TAIL_LINES:])


def _causes(error: BaseException) -> Iterator[str]:
    """Yield the chain of explicit causes, each text once."""
    told = {_one(error)}
    cause = error.__cause__
    while cause is not None:
        for leaf in leaves(cause):
            text = _one(leaf)
            if text not in told:
                told.add(text)
                yield text
        cause = cause.__cause__


def _one(error: BaseException) -> str:
    if isinstance(error, V2VError):
        return error.message
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
