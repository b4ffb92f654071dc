"""Programs that we run: started so that they die with us, ended so that nothing is left.

Every program gets a session of its own. A Ctrl-C in the terminal therefore reaches only the
supervisor, which ends its programs in the right order; and one signal to the group ends a program
together with what it started itself.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
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
from v2v_async.secret import VARIABLES

GRACE_S = 5.0
"""From SIGTERM to SIGKILL. nbdkit and qemu-nbd need milliseconds; virt-v2v-in-place stops qemu."""


# The kernel tells nobody of a death that was before setpriv asked to be told.
_IS_OURS = '[ "$PPID" = "$0" ] || kill -KILL $$\n'

# Stands above a program that starts others: when we are killed only this shell hears of it, and it
# ends them all. 0 is its own process group; a program that stays is killed after 5 s.
_GUARD = """exec 3<&0
"$@" <&3 3<&- &
child=$!
trap 'trap "" TERM; kill -TERM 0; (sleep 5; kill -KILL 0) & wait $child; kill -KILL 0' TERM
wait $child
"""


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


def start_time(pid: int) -> int | None:
    """Return when ``pid`` began (clock ticks since boot), None when there is no such process.

    A pid together with this time names a process for good; a pid alone is reused.
    Source: proc_pid_stat(5), field 22.
    """
    fields = _stat(pid)
    return None if fields is None else int(fields[19])


def is_same(pid: int, started: int) -> bool:
    """Return whether process ``pid`` is still the one that began at ``started``."""
    return start_time(pid) == started


def dying_with_us(argv: Sequence[str], *, with_children: bool = False) -> list[str]:
    """Return the command that runs ``argv`` so that it gets SIGTERM when this process ends.

    Even when that is by SIGKILL, before ``argv`` has begun. It is tied to the *thread* that starts
    it (prctl(2), PR_SET_PDEATHSIG). ``with_children``: it starts programs that must end then too.
    """
    script = _IS_OURS + (_GUARD if with_children else 'exec "$@"')
    return ["setpriv", "--pdeathsig", "TERM", "--", "sh", "-c", script, str(os.getpid()), *argv]


async def start(
    argv: Sequence[str],
    *,
    stdin: int | IO[bytes] = DEVNULL,
    stdout: int | IO[bytes] = PIPE,
    stderr: int | IO[bytes] = PIPE,
    environment: Mapping[str, str] | None = None,
    with_children: bool = False,
) -> Process:
    """Start ``argv`` in a session of its own. ``environment`` is added to ours.

    It ends with us (:func:`dying_with_us`): call from the main thread.

    Raises:
        DependencyError: the program is not installed.
    """
    try:
        # Cancelled in here, asyncio would kill the program but not what it has started already.
        with anyio.CancelScope(shield=True):
            process = await anyio.open_process(
                dying_with_us(argv, with_children=with_children),
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env=_inherited(environment),
                start_new_session=True,
            )
    except FileNotFoundError as error:
        raise _not_installed(error.filename or argv[0]) from error
    return process


class Detached:
    """A program that stays when we end, and is not our child. Made by :func:`start_detached`."""

    UNKNOWN_STATUS = 255

    def __init__(self, pid: int, started: int) -> None:
        self.pid = pid
        self._started = started

    @property
    def returncode(self) -> int | None:
        """None while it runs, then UNKNOWN_STATUS: only its parent could know more."""
        return None if is_same(self.pid, self._started) else self.UNKNOWN_STATUS

    async def wait(self) -> int:
        """Wait for its end."""
        while (status := self.returncode) is None:
            await anyio.sleep(0.02)
        return status


Child = Process | Detached
"""A running program."""


def start_detached(
    argv: Sequence[str], *, output: IO[bytes], environment: Mapping[str, str] | None = None
) -> Detached:
    """Start ``argv`` in a session of its own, to stay when we end; it writes to ``output``.

    Two things would end it with us: asyncio kills its children when its loop closes, and nbdkit
    1.32 in the foreground asks for SIGTERM at its parent's death even without --exit-with-parent
    (strace shows the prctl). So it must have no parent but init *before* it starts: a shell leaves
    it behind, waiting for a line that is written when the shell has gone.

    Raises:
        DependencyError: the program is not installed.
    """
    if shutil.which(argv[0]) is None:
        raise _not_installed(argv[0])
    gate, opener = os.pipe()
    try:
        # A shell gives /dev/null to what it leaves behind, so the gate is moved to another number.
        script = 'exec 3<&0; (read -r go <&3; exec setsid -- "$@" 3<&-) >&2 & echo $!'
        shell = subprocess.run(
            ["sh", "-c", script, "sh", *argv],
            stdin=gate,
            stdout=PIPE,
            stderr=output,
            env=_inherited(environment),
            check=True,
        )
        pid = int(shell.stdout)
        started = start_time(pid) or 0
        os.write(opener, b"go\n")
    finally:
        os.close(gate)
        os.close(opener)
    return Detached(pid, started)


def bound_sockets(group: int) -> set[Path]:
    """Return the Unix sockets with a name that the processes of a group have open.

    Source: proc(5), /proc/net/unix: the seventh field is the inode, the eighth the name.
    """
    names = {}
    with suppress(OSError):
        for line in Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines()[1:]:
            fields = line.split(maxsplit=7)
            if len(fields) == 8 and fields[7].startswith("/"):
                names[fields[6]] = Path(fields[7])
    found = set()
    for pid in group_members(group):
        with suppress(OSError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                inode = os.readlink(descriptor).removeprefix("socket:[").rstrip("]")
                if inode in names:
                    found.add(names[inode])
    return found


def group_members(group: int) -> list[int]:
    """Return the live processes of a process group."""
    members = []
    for folder in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(folder.name))
        if fields is not None and int(fields[2]) == group:
            members.append(int(folder.name))
    return members


def _stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the third on; None for what is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field, the name, may hold spaces and parentheses: count from behind it.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else fields


def _names(pid: int, text: str) -> bool:
    """Return whether the command line or the environment of a process has ``text``."""
    for source in ("cmdline", "environ"):
        with suppress(OSError):
            if os.fsencode(text) in Path(f"/proc/{pid}/{source}").read_bytes():
                return True
    return False


async def end(process: Child, *, grace_s: float = GRACE_S) -> int:
    """End ``process`` and its group: SIGTERM, ``grace_s`` seconds, SIGKILL. Return its status.

    Shielded: cancellation does not leave it running. Does nothing to one that has ended.
    """
    with anyio.CancelScope(shield=True):
        if process.returncode is None:
            _signal_group(process.pid, signal.SIGTERM)
            with anyio.move_on_after(grace_s):
                await process.wait()
        if process.returncode is None:
            _signal_group(process.pid, signal.SIGKILL)
            await process.wait()
        elif start_time(process.pid) is None:
            # Its children may outlive it. As long as one does, the number of their group is not
            # given to a new process; so one that has it now means that none is left.
            _signal_group(process.pid, signal.SIGKILL)
    assert process.returncode is not None
    return process.returncode


async def end_pid(pid: int, started: int, *, naming: str, grace_s: float = GRACE_S) -> bool:
    """End a process of an earlier run, known by pid and start time. Return whether it was there.

    What it leaves of its group is killed, where a process's command line or environment has
    ``naming``: that makes sure that it is of that run.
    """
    was_there = is_same(pid, started)
    with anyio.CancelScope(shield=True):
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not is_same(pid, started):
                break
            _signal_group(pid, number)
            with anyio.move_on_after(grace_s):
                while is_same(pid, started):
                    await anyio.sleep(0.02)
    orphans = [member for member in group_members(pid) if _names(member, naming)]
    for member in orphans:
        with suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)
    return was_there or bool(orphans)


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


def unguarded(status: int) -> int:
    """Return a program's own status from that of the shell above it (``with_children``).

    A shell says 128 + n for a program that signal n killed.
    """
    return 128 - status if status > 128 else status


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


def _not_installed(name: str) -> DependencyError:
    return DependencyError(
        f"the program ‘{name}’ is not installed or not in the PATH",
        hint="‘v2v-async doctor’ says which package has it",
    )


async def _close_streams(process: Process) -> None:
    with anyio.CancelScope(shield=True):
        for stream in (process.stdout, process.stderr, process.stdin):
            if stream is not None:
                await stream.aclose()


def _inherited(more: Mapping[str, str] | None) -> dict[str, str]:
    """Return our environment with ``more``, without secrets that no other program needs.

    What a process has in its environment others may see.
    """
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return {**kept, **(more or {})}


def _signal_group(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
