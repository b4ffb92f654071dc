"""A rate that is told by a file, and may change while a copy runs: ``--bandwidth-file``."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio

from v2v_async.copy.throttle import Throttle
from v2v_async.events import Reporter
from v2v_async.units import format_rate, parse_rate

_EVERY_S = 0.5


class RateFile:
    """A file that tells the rate and may change at any time, as virt-v2v's ``--bandwidth-file``.

    Its first line is a rate as for ``--bandwidth``, or 0 or ``unlimited`` for no limit. A file that
    is missing, empty or not understood changes nothing: the last rate goes on. Source:
    nbdkit-rate-filter(1), "DYNAMIC ADJUSTMENT", and what nbdkit 1.32 does with 0 and with errors.
    """

    def __init__(self, path: Path, rate: int | None = None) -> None:
        self.path = path
        self._rate = rate
        self._content: str | None = None

    @property
    def rate(self) -> int | None:
        """The rate last told, in bytes a second (at first that of ``--bandwidth``)."""
        return self._rate

    def poll(self) -> str | None:
        """Read the file again; return a warning where its content is new and not understood.

        It is read whole each time, which costs no more than asking whether it has changed, and no
        clock or file system can hide a change.
        """
        try:
            content = self._read()
        except FileNotFoundError:
            self._content = None
            return None
        except OSError as error:
            content = f"\0{error.errno}"  # never the content of a file that was read
            problem = error.strerror or str(error)
        else:
            problem = ""
        if content == self._content:
            return None
        self._content = content
        line = content.partition("\n")[0].strip()
        if not problem and not line:
            return None
        if not problem:
            try:
                is_unlimited = line.lower() == "unlimited" or (line.isdecimal() and int(line) == 0)
                self._rate = None if is_unlimited else parse_rate(line)
                return None
            except ValueError as error:
                problem = str(error)
        return f"--bandwidth-file {self.path}: {problem}; the last rate is kept"

    def _read(self) -> str:
        # Nothing that is named here may hang the copy: O_NONBLOCK opens a pipe at once.
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(0, "not a regular file")
            return os.read(fd, 256).decode("utf-8", "replace")
        finally:
            os.close(fd)


@asynccontextmanager
async def followed(
    path: Path, rate: int | None, throttle: Throttle, reporter: Reporter
) -> AsyncIterator[None]:
    """Have ``throttle`` follow the file at ``path``, which begins with ``rate``."""
    async with anyio.create_task_group() as group:
        group.start_soon(_follow, RateFile(path, rate), throttle, reporter)
        yield
        group.cancel_scope.cancel()


async def _follow(file: RateFile, throttle: Throttle, reporter: Reporter) -> None:
    while True:
        warning = file.poll()
        if warning is not None:
            reporter.warning(warning)
        if file.rate != throttle.rate:
            now = "unlimited" if file.rate is None else format_rate(file.rate)
            reporter.message(f"the bandwidth is now {now}")
            throttle.set_rate(file.rate)
        await anyio.sleep(_EVERY_S)
