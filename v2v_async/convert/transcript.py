"""Follow virt-v2v-in-place while it works: what it says becomes events, a log and properties.

::

    stdout ──┬─ JSON lines ──> messages, warnings (events); errors (kept); the phase
             └─ other lines ─┐
    stderr ──────────────────┼─> log/convert.log, as they come
                             └─> i_… and gcaps_… properties · the socket directory · errors
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

from anyio.abc import ByteReceiveStream

from v2v_async.convert.properties import PropertyReader
from v2v_async.events import Reporter
from v2v_async.virt_v2v_in_place import (
    parse_error,
    parse_message,
    parse_phase,
    parse_socket_directory,
)

# A program in the guest may print without ever ending a line; longer ones are cut here.
_LONGEST_LINE = 1024 * 1024


class Transcript:
    """What was said so far. ``log`` is a file descriptor to append to; it is not closed here.

    With ``verbose``, debugging output becomes ``debug`` events too.
    """

    def __init__(self, log: int, reporter: Reporter, *, verbose: bool) -> None:
        self._log = log
        self._reporter = reporter
        self._verbose = verbose
        self._stderr_errors: list[str] = []
        self._json_errors: list[str] = []
        self.phase: str | None = None
        self.socket_directory: str | None = None
        self.properties = PropertyReader()

    @property
    def errors(self) -> list[str]:
        """What it said went wrong: as JSON, or else on standard error."""
        return self._json_errors or self._stderr_errors

    async def follow_stdout(self, stream: ByteReceiveStream) -> None:
        """Read standard output until its end."""
        await _lines(stream, self.take_stdout)

    async def follow_stderr(self, stream: ByteReceiveStream) -> None:
        """Read standard error until its end."""
        await _lines(stream, self.take_stderr)

    def take_stdout(self, line: str) -> None:
        """Take one line of standard output, without its newline."""
        message = parse_message(line)
        if message is None:
            # The same text comes as JSON: here it is only for the log.
            self.write_log(line)
            if parse_phase(line) is None and self._verbose and line:
                self._reporter.debug(line)
            return
        match message.kind:
            case "message":
                self.phase = message.text
                self._reporter.message(message.text)
            case "info":
                self._reporter.message(message.text)
            case "warning":
                self._reporter.warning(message.text)
            case "error":
                self._json_errors.append(message.text)

    def take_stderr(self, line: str) -> None:
        """Take one line of standard error, without its newline."""
        self.write_log(line)
        error = parse_error(line)
        if error is not None:
            self._stderr_errors.append(error)
        if self.socket_directory is None:
            # Only the first counts: it comes before the guest's own programs can print anything.
            self.socket_directory = parse_socket_directory(line)
        self.properties.feed(line)
        if self._verbose and line:
            self._reporter.debug(line)

    def write_log(self, line: str) -> None:
        """Append a line to the log, at once."""
        with suppress(OSError):
            # A full disk must not end a conversion that does not need it.
            os.write(self._log, line.encode(errors="surrogateescape") + b"\n")


async def _lines(stream: ByteReceiveStream, take: Callable[[str], None]) -> None:
    pending = b""
    async for chunk in stream:
        *lines, pending = (pending + chunk).split(b"\n")
        if len(pending) > _LONGEST_LINE:
            lines, pending = [*lines, pending], b""
        for line in lines:
            take(line.decode(errors="surrogateescape"))
    if pending:
        take(pending.decode(errors="surrogateescape"))
