"""Programs that we run: started so that they die with us, ended so that nothing is left.

Every program gets a session of its own. A Ctrl-C in the terminal therefore reaches only the
supervisor, which ends its programs in the right order; and one signal to the group ends a program
together with what it started itself.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import IO

import anyio
from anyio.abc import Process

from v2v_async.errors import DependencyError
from v2v_async.redact import redact_argv

GRACE_S = 5.0
"""From SIGTERM to SIGKILL. nbdkit and qemu-nbd need milliseconds; virt-v2v-in-place stops qemu."""


@dataclass(frozen=True, slots=True)
class Completed:
    """What a finished program left: exit status, standard output and the end of its errors."""

    status: int
    stdout: str
    stderr: str


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """How to start an NBD server. ``environment`` is added to ours.

    ``socket`` is the Unix socket that it will listen on.
    """

    program: str
    argv: tuple[str, ...]
    socket: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    pass_fds: tuple[int, ...] = ()


def start_time(pid: int) -> int | None:
    """Return when ``pid`` began (clock ticks since boot), None when there is no such process.

    A pid together with this time names a process for good; a pid alone is reused.
    Source: proc_pid_stat(5), field 22.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field, the name, may hold spaces and parentheses: count from behind it.
    fields = stat.rpartition(")")[2].split()
    if fields[0] in ("Z", "X"):
        return None
    return int(fields[19])


def is_same(pid: int, started: int) -> bool:
    """Return whether process ``pid`` is still the one that began at ``started``."""
    return start_time(pid) == started


async def start(
    argv: Sequence[str],
    *,
    stdin: int | IO[bytes] = DEVNULL,
    stdout: int | IO[bytes] = PIPE,
    stderr: int | IO[bytes] = PIPE,
    environment: Mapping[str, str] | None = None,
    dies_with_parent: bool = True,
    pass_fds: Sequence[int] = (),
) -> Process:
    """Start ``argv`` in a session of its own. ``environment`` is added to ours.

    With ``dies_with_parent`` the kernel sends it SIGTERM when we end, even by SIGKILL. That is
    tied to the *thread* that starts it (prctl(2), PR_SET_PDEATHSIG): call from the main thread.

    Raises:
        DependencyError: the program is not installed.
    """
    lifetime = ["setpriv", "--pdeathsig", "TERM", "--"] if dies_with_parent else []
    try:
        return await anyio.open_process(
            [*lifetime, *argv],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, **environment} if environment else None,
            start_new_session=True,
            pass_fds=pass_fds,
        )
    except FileNotFoundError as error:
        missing = error.filename or argv[0]
        raise DependencyError(
            f"the program ‘{missing}’ is not installed or not in the PATH",
            hint="‘v2v-async doctor’ says which package has it",
        ) from error


async def end(process: Process, *, grace_s: float = GRACE_S) -> int:
    """End ``process`` and its group: SIGTERM, ``grace_s`` seconds, SIGKILL. Return its status.

    Shielded: cancellation does not leave it running. Does nothing to one that has ended.
    """
    with anyio.CancelScope(shield=True):
        if process.returncode is None:
            _signal_group(process.pid, signal.SIGTERM)
            with anyio.move_on_after(grace_s):
                await process.wait()
        # Its children may outlive it; the group exists as long as one of them does.
        _signal_group(process.pid, signal.SIGKILL)
        await process.wait()
    assert process.returncode is not None
    return process.returncode


async def end_pid(pid: int, started: int, *, grace_s: float = GRACE_S) -> bool:
    """End a process of an earlier run, known by pid and start time. Return whether it was there."""
    if not is_same(pid, started):
        return False
    with anyio.CancelScope(shield=True):
        _signal_group(pid, signal.SIGTERM)
        with anyio.move_on_after(grace_s):
            while is_same(pid, started):
                await anyio.sleep(0.02)
        if is_same(pid, started):
            _signal_group(pid, signal.SIGKILL)
            with anyio.move_on_after(grace_s):
                while is_same(pid, started):
                    await anyio.sleep(0.02)
    return True


async def run(
    argv: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
) -> Completed:
    """Run a short program to its end and return its status and output.

    Raises:
        DependencyError: it is not installed.
        TimeoutError: it took longer than ``timeout_s``; it has been ended.
    """
    process = await start(argv, environment=environment)
    assert process.stdout is not None
    assert process.stderr is not None
    chunks: dict[str, list[bytes]] = {"stdout": [], "stderr": []}

    async def drain(name: str, stream: anyio.abc.ByteReceiveStream) -> None:
        async for chunk in stream:
            chunks[name].append(chunk)

    try:
        with anyio.fail_after(timeout_s):
            async with anyio.create_task_group() as group:
                group.start_soon(drain, "stdout", process.stdout)
                group.start_soon(drain, "stderr", process.stderr)
            status = await process.wait()
    finally:
        await end(process, grace_s=1.0)
        await _close_streams(process)
    return Completed(
        status,
        b"".join(chunks["stdout"]).decode(errors="replace"),
        b"".join(chunks["stderr"]).decode(errors="replace"),
    )


def describe_status(status: int) -> str:
    """Say an exit status as a person would: ``exit status 1``, ``killed by SIGKILL``."""
    if status >= 0:
        return f"exit status {status}"
    with suppress(ValueError):
        return f"killed by {signal.Signals(-status).name}"
    return f"killed by signal {-status}"


def command_line(argv: Sequence[str]) -> str:
    """Return ``argv`` for people and logs, secrets masked."""
    return " ".join(redact_argv(argv))


async def _close_streams(process: Process) -> None:
    with anyio.CancelScope(shield=True):
        for stream in (process.stdout, process.stderr, process.stdin):
            if stream is not None:
                await stream.aclose()


def _signal_group(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
