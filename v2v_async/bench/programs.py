"""Programs that are timed, and servers beside them.

Not :mod:`v2v_async.process`: what a program used (CPU, memory) is only told to the one that reaps
it, by wait4(2), and an event loop's own work would be measured along. So this waits with poll(2) on
pidfds, for contestants and servers alike.
"""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from v2v_async.errors import DependencyError, ServerExitedError, ServerStartError, V2VError
from v2v_async.process import GRACE_S, describe_status, dying_with_us, start_time
from v2v_async.redact import redact, redact_argv

_READY_TIMEOUT_S = 30.0
_TAIL_BYTES = 2000
_TAIL_LINES = 4

_SAMPLE_S = 0.02
"""Between looks at a contestant's peak memory; one look takes about 30 µs."""

_MARGIN = 1 << 20
"""The kernel counts resident pages per processor and adds them up late: its two figures differ."""

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Cost:
    """What a contestant used.

    ``peak_bytes`` is the sum over those that ran at the same time; None where one was too short.
    """

    wall_s: float
    user_s: float
    system_s: float
    peak_bytes: int | None


class Child:
    """A program in a session of its own, ended with us; its output goes to ``log``.

    Raises:
        DependencyError: it is not installed.
    """

    def __init__(
        self, argv: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.argv = list(argv)
        self.log = log
        self.status: int | None = None
        self.user_s = self.system_s = 0.0
        self._seen_peak = 0
        # A new program's ru_maxrss begins with that of the memory it was forked from: ours.
        self._floor = _peak_memory(os.getpid())
        try:
            with log.open("ab") as output:
                self._popen = subprocess.Popen(
                    dying_with_us(argv),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={**os.environ, **(environment or {})},
                    start_new_session=True,
                )
        except FileNotFoundError as error:
            raise DependencyError(
                "the program ‘setpriv’ is not installed", hint="it is in the package util-linux"
            ) from error
        self.pid = self._popen.pid
        try:
            self.pidfd = os.pidfd_open(self.pid)
        except BaseException:
            self._popen.kill()
            self._popen.wait()
            raise

    @property
    def peak_bytes(self) -> int | None:
        """The most memory it had: exact where that is more than ours, else to the last sample.

        None where there was no time for a sample.
        """
        return self._seen_peak or None

    def sample(self) -> None:
        """Look at its peak memory."""
        self._seen_peak = max(self._seen_peak, _peak_memory(self.pid))

    def reap(self) -> int:
        """Wait for its end and take down what it used."""
        if self.status is None:
            _, status, used = os.wait4(self.pid, 0)
            self.status = self._popen.returncode = os.waitstatus_to_exitcode(status)
            os.close(self.pidfd)
            self.user_s, self.system_s = used.ru_utime, used.ru_stime
            if used.ru_maxrss * 1024 > self._floor + _MARGIN:
                self._seen_peak = used.ru_maxrss * 1024
        return self.status

    def end(self, *, grace_s: float = GRACE_S) -> None:
        """End it and its group: SIGTERM, ``grace_s`` seconds, SIGKILL."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.status is not None:
                break
            self._signal(number)
            if _any_ended([self], grace_s if number == signal.SIGTERM else None):
                self.reap()
        # What it started may outlive it, and keeps the number of its group from being given again.
        if start_time(self.pid) is None:
            self._signal(signal.SIGKILL)

    def tail(self) -> str:
        """Return its last words, secrets masked."""
        with suppress(OSError), self.log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            return redact(file.read().decode(errors="replace")).strip()
        return ""

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


@contextmanager
def running_server(argv: Sequence[str], listens_on: Path, log: Path) -> Iterator[Child]:
    """Run a server until the end of the block. It is ready when it takes connections.

    Raises:
        ServerStartError: it ended, or did not listen in 30 s.
    """
    child = Child(argv, log)
    try:
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while not _listens(listens_on):
            if _any_ended([child], 0.01):
                raise _not_started(child, describe_status(child.reap()))
            if time.monotonic() > deadline:
                raise _not_started(child, f"did not listen in {_READY_TIMEOUT_S:.0f} s")
        yield child
    finally:
        child.end()
        listens_on.unlink(missing_ok=True)


def race(
    commands: Sequence[Sequence[str]],
    *,
    parallel: int,
    log: Path,
    servers: Sequence[Child],
    limit_s: float,
    environment: Mapping[str, str] | None = None,
) -> Cost:
    """Run commands in their order, ``parallel`` at a time, and return what they cost together.

    Raises:
        V2VError: one failed, or they took longer than ``limit_s``.
        ServerExitedError: a server ended meanwhile.
    """
    waiting, running, done = list(commands), list[Child](), list[Child]()
    with ExitStack() as stack:
        began = time.monotonic()
        while waiting or running:
            while waiting and len(running) < parallel:
                child = Child(waiting.pop(0), log, environment)
                stack.callback(child.end)
                running.append(child)
            ended = _any_ended([*running, *servers], _SAMPLE_S)
            for child in running:
                if child not in ended:
                    child.sample()
            for child in [child for child in running if child in ended]:
                running.remove(child)
                done.append(child)
                if child.reap() != 0:
                    raise _failed(child, describe_status(child.reap()))
            for server in servers:
                if server in ended:
                    raise _server_gone(server)
            if running and time.monotonic() - began > limit_s:
                raise _failed(running[0], f"took longer than {limit_s:.0f} s")
        wall_s = time.monotonic() - began
    peaks = sorted((child.peak_bytes or 0 for child in done), reverse=True)
    return Cost(
        wall_s,
        sum(child.user_s for child in done),
        sum(child.system_s for child in done),
        sum(peaks[:parallel]) if all(peaks) else None,
    )


def cpu_seconds(pids: Sequence[int]) -> float:
    """Return the CPU time that running processes used. Source: proc_pid_stat(5), 14 and 15."""
    ticks = 0
    for pid in pids:
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks * _TICK_S


def _peak_memory(pid: int) -> int:
    """Return the most memory that a process had, in bytes; 0 when it is gone."""
    with suppress(OSError):
        match = re.search(r"^VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
        return int(match[1]) * 1024 if match else 0
    return 0


def _any_ended(children: Sequence[Child], timeout_s: float | None) -> list[Child]:
    """Return those that have ended, at the latest after ``timeout_s`` seconds."""
    poll = select.poll()
    for child in children:
        if child.status is None:
            poll.register(child.pidfd, select.POLLIN)
    ready = {fd for fd, _ in poll.poll(None if timeout_s is None else timeout_s * 1000)}
    return [child for child in children if child.status is not None or child.pidfd in ready]


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as trial, suppress(OSError):
        trial.connect(str(path))
        return True
    return False


def _not_started(child: Child, reason: str) -> ServerStartError:
    return ServerStartError(
        f"the server ‘{child.argv[0]}’ did not start: {reason}",
        argv=redact_argv(child.argv),
        stderr_tail=child.tail(),
    )


def _failed(child: Child, reason: str) -> V2VError:
    said = child.tail().splitlines()[-_TAIL_LINES:]
    name = Path(child.argv[0]).name
    return V2VError(f"{name}: {reason}" + (f": {'; '.join(said)}" if said else ""))


def _server_gone(server: Child) -> ServerExitedError:
    status = server.reap()
    return ServerExitedError(
        f"the server ‘{server.argv[0]}’ went away: {describe_status(status)}",
        status=status,
        stderr_tail=server.tail(),
    )
