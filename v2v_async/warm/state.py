"""What a warm migration knows, in its folder: enough for the next command to go on.

::

    DIR (--state, a v2v directory)
    ├ warm.json        WarmState: replaced whole, and on the disk before anybody relies on it
    ├ lock             held (flock) by the command that is at it
    ├ digests-N        of disk N's blocks as they are on the target (compare.py)
    ├ landing/         what the conversion changed; with landing.json it will be on the target
    ├ metadata.in, .out, log/
    └ state.json       processes, and the target's disks under their hidden names

    phase:  syncing ──> copied ──> converted ──> (DIR is removed)
               ^──────────┘ the guest runs again, and is synced again
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from v2v_async.durable import sync
from v2v_async.errors import UsageError, V2VError
from v2v_async.model import Model
from v2v_async.options import InputOptions, OutputOptions
from v2v_async.secret import Secret
from v2v_async.v2vdir import V2VDir

Phase = Literal["syncing", "copied", "converted"]
Method = Literal["checkpoints", "tracking", "digests"]
"""How it is known what has changed: libvirt's checkpoints or VMware's change tracking tell, or all
of it is read and compared."""

_STATE = "warm.json"
_LOCK_TRIES, _LOCK_PAUSE_S = 10, 0.05


class KeptInput(Model):
    """``-i`` and what belongs to it, as :class:`InputOptions`.

    ``password_file``: of ``-ip``; the password itself is never kept.
    """

    mode: str
    arguments: tuple[str, ...]
    connection: str | None = None
    format: str | None = None
    options: tuple[tuple[str, str | None], ...] = ()
    transport: str | None = None
    password_file: str | None = None

    @property
    def given(self) -> InputOptions:
        """The options that a person gave, without the password."""
        return InputOptions(**self.model_dump(exclude={"password_file"}))

    def read(self) -> InputOptions:
        """Return the options that a person gave, with the password that their file has now.

        Raises:
            UsageError: it can't be read any more.
        """
        if self.password_file is None:
            return self.given
        return replace(self.given, password=Secret.read(Path(self.password_file), "-ip"))


class KeptOutput(Model):
    """``-o`` and what belongs to it, as :class:`OutputOptions`."""

    mode: str
    allocation: Literal["sparse", "preallocated"] = "sparse"
    connection: str | None = None
    format: str | None = None
    name: str | None = None
    options: tuple[tuple[str, str | None], ...] = ()
    storage: str | None = None

    @property
    def given(self) -> OutputOptions:
        """The options that a person gave."""
        return OutputOptions(**self.model_dump())


class WarmDisk(Model):
    """A disk of the source. ``path``: its local file.

    ``device`` and ``location``: its name in a libvirt guest (of VMware's: its number there), and
    where that says it is.
    """

    index: int
    format: str
    size: int
    device: str | None = None
    location: str = ""
    path: str | None = None


class KeptMachine(Model):
    """A virtual machine of VMware's. ``moref``: its reference there.

    ``was_tracked``: whether change tracking was on before this run.
    """

    moref: str
    was_tracked: bool


class PassDisk(Model):
    """What a pass did with a disk, in bytes: how much had changed, how much was written."""

    index: int
    changed: int
    copied: int = 0


class Pass(Model):
    """One pass over all disks. Written before its first byte moves, and when it has ended.

    ``since``: the mark that it starts from (None: all is copied); ``mark``: the one it makes.
    ``point``: the moment that its content is of, and ``began``, in seconds since the epoch.
    """

    number: int
    since: str | None = None
    mark: str
    began: float
    point: float = 0
    duration_s: float = 0
    is_off: bool = False
    is_all: bool = False
    disks: list[PassDisk] = []

    @property
    def changed(self) -> int:
        """Bytes that had changed, on all disks."""
        return sum(disk.changed for disk in self.disks)

    @property
    def copied(self) -> int:
        """Bytes that were written, on all disks."""
        return sum(disk.copied for disk in self.disks)


class WarmState(Model):
    """``warm.json``.

    ``base``: the mark that the targets' content is of. ``is_whole``: a pass over everything has
    ended. ``current``: a pass that has begun; of a command that is dead, one that died.
    ``stamps``: of the source's files, when the last pass copied them from a guest that was off.
    """

    version: Literal[1] = 1
    run: str
    guest: str
    phase: Phase = "syncing"
    method: Method
    input: KeptInput
    output: KeptOutput
    socket_dir: str | None = None
    bitmap: str | None = None
    disks: list[WarmDisk]
    machine: KeptMachine | None = None
    base: str | None = None
    is_whole: bool = False
    current: Pass | None = None
    passes: list[Pass] = []
    stamps: list[tuple[int, ...]] | None = None

    @property
    def prefix(self) -> str:
        """What the marks of this run begin with: nobody else's do."""
        return f"v2v-async-{self.run}"


class WarmFolder:
    """The folder of one warm migration. Construction does no I/O."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.v2vdir = V2VDir(self.path)

    def read(self) -> WarmState:
        """Return what is known.

        Raises:
            UsageError: there is no migration in it.
            V2VError: it can't be read.
        """
        path = self.path / _STATE
        try:
            return WarmState.model_validate_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UsageError(
                f"there is no warm migration in ‘{self.path}’",
                hint="v2v-async warm start --state DIR begins one",
            ) from error
        except (OSError, ValidationError) as error:
            raise V2VError(f"‘{path}’ can't be read: {error}") from error

    def save(self, state: WarmState) -> None:
        """Have it on the disk.

        Raises:
            V2VError: it can't be written; what was known before is there still.
        """
        new = self.path / f"{_STATE}.new"
        try:
            new.write_text(state.model_dump_json(indent=1) + "\n")
            sync(new)
            new.replace(self.path / _STATE)
            sync(self.path)
        except OSError as error:
            raise V2VError(f"‘{new}’ can't be written: {error.strerror}") from error

    def make(self) -> None:
        """Make it, for a new migration.

        Raises:
            UsageError: it is there already and not empty, or can't be made.
        """
        try:
            self.path.mkdir(mode=0o700, exist_ok=True)
            is_empty = not any(self.path.iterdir())
        except OSError as error:
            raise UsageError(f"--state ‘{self.path}’: {error.strerror}") from error
        if not is_empty:
            raise UsageError(
                f"--state ‘{self.path}’ is not empty",
                hint="v2v-async warm sync goes on with a migration; a new one wants a new folder",
            )
        self.v2vdir.check_length()

    def digests(self, index: int) -> Path:
        """Return where the digests of disk ``index`` are."""
        return self.path / f"digests-{index}"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Have it for this process alone.

        Raises:
            UsageError: another process is at it.
            V2VError: it can't be opened.
        """
        try:
            flags = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC
            descriptor = os.open(self.path / "lock", flags, 0o600)
        except (FileNotFoundError, NotADirectoryError):
            self.read()  # says that there is none
            raise
        except OSError as error:
            raise V2VError(f"‘{self.path}’ can't be used: {error.strerror}") from error
        try:
            _lock(descriptor)
        except BlockingIOError as error:
            os.close(descriptor)
            raise UsageError(
                f"another v2v-async is at the migration in ‘{self.path}’",
                hint="wait for it, or stop it: what it was doing is repeated",
            ) from error
        try:
            yield
        finally:
            os.close(descriptor)

    @property
    def is_busy(self) -> bool:
        """Whether a process is at it."""
        try:
            with self.held():
                return False
        except UsageError:
            return True


def _lock(descriptor: int) -> None:
    """Lock a file; one that only looks whether it is locked has it for a moment.

    Raises:
        BlockingIOError: somebody else has it.
    """
    for tries_left in reversed(range(_LOCK_TRIES)):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not tries_left:
                raise
        time.sleep(_LOCK_PAUSE_S)
