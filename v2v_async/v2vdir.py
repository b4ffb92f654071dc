"""The v2v directory: where the steps of one guest meet.

::

    v2v.XXXXXX/            mode 0700
    ├ in1 in2 …            sockets: exports of an overlay on each source disk
    ├ plain1 plain2 …      sockets: exports of the source disks, where they are copied early
    ├ out1 out2 …          sockets: exports of the target disks
    ├ metadata.in          SourceGuest, written by input
    ├ metadata.out         TargetGuest, written by convert
    ├ converting           an empty file, there while the conversion runs: servers look at it
    ├ log/STEP.log         each step's whole output; log/STEP-N.log: of disk N
    └ state.json           State: enough for another process to clean up

Every document is replaced atomically, so that a reader never sees half of one.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ValidationError

from v2v_async import process
from v2v_async.errors import UsageError, V2VError
from v2v_async.model import Model, SourceGuest, TargetGuest

# sockaddr_un.sun_path holds 108 bytes with the final NUL (unix(7)); a name as out999 must fit.
_MAX_DIRECTORY_LENGTH = 107 - len("/out999")


class ProcessRecord(Model):
    """A process, named for good by pid *and* start time (clock ticks since boot)."""

    pid: int
    started: int
    program: str
    argv: list[str] = []
    socket: str | None = None

    @property
    def is_alive(self) -> bool:
        """Whether this very process is still there."""
        return process.is_same(self.pid, self.started)


class TargetExport(Model):
    """What copy must know about the export ``outINDEX``."""

    index: int
    is_known_zero: bool = False
    max_connections: int | None = None
    request_size: int | None = None


class OutputFile(Model):
    """A file that this run makes: written as ``temporary``, renamed to ``final`` at the end.

    ``inode`` tells it from a file of somebody else's under its final name; 0: not known yet.
    """

    temporary: str
    final: str
    inode: int = 0


class MadeObject(Model):
    """Something that this run made outside the file system: a volume, an image, a domain.

    ``undo`` is the command that removes it by hand, for people.
    """

    kind: str
    name: str
    undo: str = ""


class State(Model):
    """``state.json``. ``boot_id`` tells whether the pids are of this boot."""

    version: Literal[1] = 1
    run: str = ""
    phase: str = "new"
    boot_id: str = ""
    owner: ProcessRecord | None = None
    processes: list[ProcessRecord] = []
    targets: list[TargetExport] = []
    outputs: list[OutputFile] = []
    objects: list[MadeObject] = []
    files: list[str] = []
    """Files outside this directory that belong to the run and go with it."""
    is_overlapped: bool = False
    """The source disks are copied while they are converted: they are also served as they are."""
    is_publishing: bool = False
    """Outputs may have their final names, and the target guest is not made yet."""
    is_finalized: bool = False
    """The target guest is made: what this run made outside this directory is the result now."""


_D = TypeVar("_D", bound=Model)


class V2VDir:
    """Paths and documents of one v2v directory. Construction does no I/O."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, parent: Path | None = None) -> V2VDir:
        """Make a new one under ``parent`` (default ``$TMPDIR``, or /var/tmp as virt-v2v does).

        Raises:
            UsageError: ``parent`` is no directory to write in, or too long for socket names.
        """
        base = parent or default_parent()
        try:
            path = Path(tempfile.mkdtemp(prefix="v2v.", dir=base.absolute()))
        except OSError as error:
            raise UsageError(
                f"no temporary directory can be made in ‘{base}’: {error.strerror}",
                hint="set TMPDIR to a directory that you can write in",
            ) from error
        made = cls(path)
        try:
            made.check_length()
            made.log_directory.mkdir()
            made.update(boot_id=boot_id(), owner=record_of(os.getpid(), "supervisor"))
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        return made

    def adopt(self) -> None:
        """Make this existing directory a v2v directory, for a helper that comes first.

        Raises:
            UsageError: it is no directory, belongs to somebody else, or its name is too long.
        """
        try:
            status = self.path.stat()
        except OSError as error:
            raise UsageError(
                f"--v2vdir ‘{self.path}’: {error.strerror}", hint="make it first: mktemp -d"
            ) from error
        if not self.path.is_dir() or status.st_uid != os.geteuid():
            raise UsageError(f"--v2vdir ‘{self.path}’ is not a directory of yours")
        self.check_length()
        self.path.chmod(0o700)
        self.log_directory.mkdir(exist_ok=True)
        if not self.state_file.exists():
            self.update(boot_id=boot_id())

    def check_length(self) -> None:
        """Refuse a name in which Unix sockets can't be made."""
        if len(os.fsencode(self.path)) > _MAX_DIRECTORY_LENGTH:
            raise UsageError(
                f"the directory name ‘{self.path}’ is too long for Unix sockets",
                hint=f"set TMPDIR to a path of less than {_MAX_DIRECTORY_LENGTH - 12} bytes",
            )

    def remove(self) -> None:
        """Remove the directory and all in it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def keep_only_logs(self) -> None:
        """Remove all but the logs, for a run that failed."""
        for entry in self.path.iterdir():
            if entry == self.log_directory:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)

    # Paths.

    @property
    def log_directory(self) -> Path:
        """Where the logs are."""
        return self.path / "log"

    @property
    def state_file(self) -> Path:
        """``state.json``."""
        return self.path / "state.json"

    @property
    def metadata_in(self) -> Path:
        """``metadata.in``."""
        return self.path / "metadata.in"

    @property
    def metadata_out(self) -> Path:
        """``metadata.out``."""
        return self.path / "metadata.out"

    def source_socket(self, index: int) -> Path:
        """``inINDEX`` (1-based)."""
        return self.path / f"in{index}"

    def plain_socket(self, index: int) -> Path:
        """``plainINDEX`` (1-based)."""
        return self.path / f"plain{index}"

    def target_socket(self, index: int) -> Path:
        """``outINDEX`` (1-based)."""
        return self.path / f"out{index}"

    @property
    def converting_mark(self) -> Path:
        """A file that is there while the conversion runs, for servers to see."""
        return self.path / "converting"

    def log(self, step: str, disk: int | None = None) -> Path:
        """The log file of a step, or of one disk in it."""
        return self.log_directory / (f"{step}.log" if disk is None else f"{step}-{disk}.log")

    # Documents.

    def read_source(self) -> SourceGuest:
        """Return ``metadata.in``."""
        return _read(self.metadata_in, SourceGuest, "helper-v2v-input-*")

    def write_source(self, source: SourceGuest) -> None:
        """Write ``metadata.in``."""
        _write(self.metadata_in, source)

    def read_target(self) -> TargetGuest:
        """Return ``metadata.out``."""
        return _read(self.metadata_out, TargetGuest, "helper-v2v-convert")

    def write_target(self, target: TargetGuest) -> None:
        """Write ``metadata.out``."""
        _write(self.metadata_out, target)

    @property
    def state(self) -> State:
        """``state.json`` as it is now (an empty one where there is none)."""
        if not self.state_file.exists():
            return State()
        return _read(self.state_file, State, "v2v-async")

    def update(self, **changes: object) -> State:
        """Change fields of ``state.json`` and return the new state."""
        state = self.state.model_copy(update=changes)
        _write(self.state_file, state)
        return state

    def add_process(self, record: ProcessRecord) -> None:
        """Note a process that must end with this run."""
        self.update(processes=[*self.state.processes, record])

    def forget_process(self, pid: int) -> None:
        """Strike a process that has ended."""
        self.update(processes=[p for p in self.state.processes if p.pid != pid])

    def add_object(self, made: MadeObject) -> None:
        """Note something outside the file system, before or as soon as it is made."""
        self.update(objects=[*self.state.objects, made])

    def forget_object(self, made: MadeObject) -> None:
        """Strike something that is gone, or that is the result now."""
        self.update(objects=[each for each in self.state.objects if each != made])

    def add_output(self, output: OutputFile) -> None:
        """Note a file that this run makes, before it makes it."""
        self.update(outputs=[*self.state.outputs, output])


def default_parent() -> Path:
    """Return where v2v directories are made: ``$TMPDIR``, or /var/tmp as virt-v2v does."""
    return Path(os.environ.get("TMPDIR") or "/var/tmp")


def boot_id() -> str:
    """Return the kernel's id of this boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def record_of(
    pid: int, program: str, argv: list[str] | None = None, socket: str | None = None
) -> ProcessRecord:
    """Return the record of a running process (start time 0 where it has gone already)."""
    return ProcessRecord(
        pid=pid,
        started=process.start_time(pid) or 0,
        program=program,
        argv=argv or [],
        socket=socket,
    )


def _read(path: Path, kind: type[_D], written_by: str) -> _D:
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise V2VError(
            f"‘{path}’ is not there", hint=f"{written_by} writes it and must run first"
        ) from error
    except (OSError, ValidationError) as error:
        raise V2VError(f"‘{path}’ can't be read: {error}") from error


def _write(path: Path, document: Model) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(document.model_dump_json(indent=2) + "\n")
    temporary.replace(path)
