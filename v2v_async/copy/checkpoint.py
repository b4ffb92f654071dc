"""Remember what has landed on the targets and been flushed, and prove that it is there still.

::

    DIR/lock             flock: one run at a time; says whether DIR is ours to remove
        disk-1.json      the last record, whole: rename(2) puts it there
        disk-1.json.new  a record being written: fsync, then the rename, then fsync of DIR

A record only ever claims too little: a range is in it after the target's flush. So an older record
is as true as a newer one, and copying again what it leaves out does no harm. That needs the same
source and target as then; see :meth:`Checkpoint.prove`. No clock is read, and no secret is stored:
names are compared with their secrets masked, so a new password is no other disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import stat
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any

from v2v_async.copy.ranges import Ranges
from v2v_async.copy.samples import Read, Sample, difference, digest, spread
from v2v_async.durable import sync
from v2v_async.errors import CopyError
from v2v_async.redact import redact
from v2v_async.units import MIB

VERSION = 1
_FORMAT = "v2v-async checkpoint"
# More ranges than these are not recorded (the shortest go, and are copied again): 100,000 are
# about 0.7 MiB and cost 60 ms of processor time to save, measured with random ranges.
MOST_RANGES = 100_000
_LARGEST_FILE = 64 * MIB  # far above any record: what is larger is none, and is not read


class SaveError(CopyError):
    """A record could not be saved or removed; the one before it is still there and true."""


@dataclass(slots=True)
class Record:
    """One disk: which it is, and what of it is ``done``: landed and flushed. Sizes are bytes.

    ``source`` and ``target`` are names without secrets; the same disk must always have the same
    (absolute paths). ``source_identity`` is empty or :func:`file_identity`. ``source_samples`` are
    of the whole source, from before anything was copied; ``target_samples`` from
    :meth:`WrittenSamples.inside`. ``target_was_zero``: it read as zeroes before the first run.
    ``options`` are those that change what lands.
    """

    source: str
    target: str
    source_size: int
    target_size: int
    source_identity: str = ""
    source_samples: list[Sample] = field(default_factory=list)
    target_samples: list[Sample] = field(default_factory=list)
    done: Ranges = field(default_factory=Ranges)
    target_was_zero: bool = False
    is_complete: bool = False
    options: Mapping[str, bool | int | str | None] = field(default_factory=dict)
    version: int = VERSION

    def target_expected(self) -> list[Sample]:
        """Return what the target must hold: samples of either side that are done, telling first."""
        known = [s for s in self.source_samples if self.done.contains(s.offset, s.length)]
        return sorted({*self.target_samples, *known}, key=lambda sample: sample.is_zero)

    def source_places(self) -> list[tuple[int, int]]:
        """Return the (offset, length) that a proof reads from the source."""
        samples = [*self.source_samples, *self.target_samples]
        return sorted({*((s.offset, s.length) for s in samples), *spread(self.done)})

    def target_places(self) -> list[tuple[int, int]]:
        """Return the (offset, length) that a proof reads from the target."""
        samples = self.target_expected()
        return sorted({*((s.offset, s.length) for s in samples), *spread(self.done)})


class Checkpoint:
    """The record of one disk (1-based) in a checkpoint folder. Any thread may save."""

    def __init__(self, folder: Path, folder_fd: int, index: int) -> None:
        self._folder = folder
        self._fd = folder_fd
        self._index = index
        self._name = f"disk-{index}.json"
        self._new = f"{self._name}.new"
        self._lock = threading.Lock()

    @property
    def path(self) -> Path:
        """Where the record is."""
        return self._folder / self._name

    def load(self) -> Record | None:
        """Return the record last saved, None where there is none.

        Raises:
            CopyError: what is there can't be read, is damaged, not ours, or of a newer version.
        """
        try:
            raw = self._read()
            return None if raw is None else _decode(raw)
        except OSError as error:
            raise self._refusal(f"can’t be read: {error.strerror or error}") from error
        except ValueError as error:
            raise self._refusal(str(error)) from error

    def save(self, record: Record) -> None:
        """Put ``record`` (nobody may change it meanwhile) in the place of the last one, durably.

        Whenever this is cut short, by ``kill -9`` or a loss of power, the last record or this one
        is there.

        Raises:
            SaveError: it could not be written (a full disk). The last record stays; a later save
                may work.
        """
        with self._lock:
            try:
                self._write(_encode(record))
                os.replace(self._new, self._name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
                os.fsync(self._fd)
            except OSError as error:
                with contextlib.suppress(OSError):  # it may be what fills the disk
                    os.unlink(self._new, dir_fd=self._fd)
                raise SaveError(
                    f"the checkpoint ‘{self.path}’ could not be saved: {error.strerror or error}",
                    hint="the copy can go on; what was recorded before still holds",
                    disk=self._index,
                ) from error

    def prove(self, record: Record, now: Record, read_source: Read, read_target: Read) -> None:
        """Make sure that ``record`` holds for the source and target that ``now`` describes.

        Reads :meth:`Record.source_places` and :meth:`Record.target_places`, and nothing else; who
        wants them faster fetches them at once before. Of ``now`` neither samples nor ``done`` are
        looked at.

        Raises:
            CopyError: something differs; it says which side and where.
        """
        for what, then, is_now in (
            ("source", redact(record.source), redact(now.source)),
            ("target", redact(record.target), redact(now.target)),
            ("size of the source", record.source_size, now.source_size),
            ("size of the target", record.target_size, now.target_size),
            ("options", _shown(record.options), _shown(now.options)),
        ):
            if then != is_now:
                raise self._mismatch(f"the {what} is not what it was: ‘{is_now}’, then ‘{then}’")
        both_known = record.source_identity and now.source_identity
        if both_known and record.source_identity != now.source_identity:
            reason = "the source has been written or replaced since"
            raise self._mismatch(reason, hint="give the source of then")
        changed = difference([*record.source_samples, *record.target_samples], read_source)
        if changed is not None:
            reason = "the source has changed since"
            raise self._mismatch(reason, changed.offset, "give the source of then")
        changed = difference(record.target_expected(), read_target)
        if changed is not None:
            there = read_target(changed.offset, changed.length)
            raise self._refuse_target(changed.offset, there)
        for offset, length in spread(record.done):
            there = read_target(offset, length)
            if there != read_source(offset, length):
                raise self._refuse_target(offset, there)

    def remove(self) -> None:
        """Remove the record, and one half written.

        Raises:
            SaveError: it could not be.
        """
        for name in (self._name, self._new):
            try:
                os.unlink(name, dir_fd=self._fd)
            except FileNotFoundError:
                pass
            except OSError as error:
                raise SaveError(
                    f"the checkpoint ‘{self.path}’ could not be removed: {error.strerror}",
                    hint=f"remove {self._folder} yourself: it is not needed any more",
                    disk=self._index,
                ) from error

    def _read(self) -> bytes | None:
        try:
            # O_NONBLOCK: opening a pipe that somebody put there hangs nobody.
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            fd = os.open(self._name, flags, dir_fd=self._fd)
        except FileNotFoundError:
            return None
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            # What another user could write would decide what is not copied.
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                raise ValueError("is not a file that this user made")
            if status.st_size > _LARGEST_FILE:
                raise ValueError("is too large to be a checkpoint")
            return file.read()

    def _write(self, raw: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(self._new, flags, 0o600, dir_fd=self._fd)
        try:
            left = memoryview(raw)
            while left:
                left = left[os.write(fd, left) :]
            os.fsync(fd)
        finally:
            os.close(fd)

    def _refusal(self, reason: str) -> CopyError:
        return CopyError(
            f"the checkpoint ‘{self.path}’ {reason}",
            hint=f"remove {self._folder} to begin again, or give another --checkpoint folder",
            disk=self._index,
        )

    def _mismatch(
        self, reason: str, offset: int | None = None, hint: str = "give the same command as then"
    ) -> CopyError:
        return CopyError(
            f"the checkpoint in ‘{self._folder}’ does not fit: {reason}",
            hint=f"{hint}, or remove {self._folder} to begin again",
            disk=self._index,
            offset=offset,
        )

    def _refuse_target(self, offset: int, content: bytes) -> CopyError:
        reason = "the target does not hold what was copied to it"
        if content != bytes(len(content)):
            return self._mismatch(reason, offset, "give the target of then")
        return self._mismatch(
            f"{reason} (it reads as zeroes)", offset, "give the target of then if this is a new one"
        )


class CheckpointFolder:
    """A folder of checkpoints, locked against a second run: ``with CheckpointFolder(path) as f``.

    Made with mode 0700 where it is missing.

    Raises:
        CopyError: (on entry) it can't be made or used, or another run is using it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1
        self._lock_fd = -1
        self._is_ours = False
        self._disks: dict[int, Checkpoint] = {}

    def __enter__(self) -> CheckpointFolder:
        try:
            while not self._enter():  # another run has just finished and removed it
                self._close()
        except BlockingIOError as error:
            holder = os.pread(self._lock_fd, 64, 0).decode("ascii", "replace").split()[1:2]
            self._close()
            process = f" (process {holder[0]})" if holder else ""
            raise CopyError(
                f"another run{process} is using the checkpoint folder ‘{self.path}’",
                hint="wait for it to end, or give each run its own --checkpoint folder",
            ) from error
        except OSError as error:
            self._close()
            raise CopyError(
                f"the checkpoint folder ‘{self.path}’ can’t be used: {error.strerror or error}",
                hint="--checkpoint wants a folder of a local file system that you may write to",
            ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    def disk(self, index: int) -> Checkpoint:
        """Return the checkpoint of one disk (1-based)."""
        return self._disks.setdefault(index, Checkpoint(self.path, self._fd, index))

    def finish(self) -> None:
        """Remove what is ours, after all disks are done: the folder too if we made it.

        Raises:
            SaveError: something could not be removed.
        """
        for checkpoint in self._disks.values():
            checkpoint.remove()
        with contextlib.suppress(OSError):  # gone, or with files that are not ours in it
            os.unlink("lock", dir_fd=self._fd)
            if self._is_ours:
                self.path.rmdir()

    def _enter(self) -> bool:
        """Make, open and lock the folder; False: what was locked is not there any more."""
        try:
            self.path.mkdir(0o700)
            self._is_ours = True
            sync(self.path.absolute().parent)  # else a loss of power takes the folder away
        except FileExistsError:
            pass
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._lock_fd = os.open("lock", flags, 0o600, dir_fd=self._fd)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held, there = os.fstat(self._lock_fd), os.stat(self.path / "lock")
        except FileNotFoundError:
            return False
        if (held.st_dev, held.st_ino) != (there.st_dev, there.st_ino):
            return False
        # Whose the folder is must be known to the run that finishes, which may be a later one.
        self._is_ours |= os.pread(self._lock_fd, 64, 0).startswith(b"made")
        with contextlib.suppress(OSError):  # full: then the folder stays in the end
            text = f"{'made' if self._is_ours else 'found'} {os.getpid()}\n".encode()
            os.pwrite(self._lock_fd, text, 0)
            os.ftruncate(self._lock_fd, len(text))
        return True

    def _close(self) -> None:
        for fd in (self._lock_fd, self._fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._lock_fd = -1


def _shown(options: Mapping[str, bool | int | str | None]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(options.items()))


def _encode(record: Record) -> bytes:
    bounds = record.done.largest(MOST_RANGES).bounds()
    # The distances between bounds, in their common unit, are a few digits each.
    unit = math.gcd(*bounds) or 1
    steps = [(after - before) // unit for before, after in _pairs(bounds)]
    told = {
        "source": redact(record.source),
        "target": redact(record.target),
        "source_size": record.source_size,
        "target_size": record.target_size,
        "source_identity": record.source_identity,
        "source_samples": record.source_samples,
        "target_samples": record.target_samples,
        "target_was_zero": record.target_was_zero,
        "is_complete": record.is_complete,
        "options": dict(record.options),
        "done": {"unit": unit, "steps": steps},
    }
    body = json.dumps(told, separators=(",", ":")).encode()
    head = {"format": _FORMAT, "version": record.version, "check": digest(body)}
    return json.dumps(head)[:-1].encode() + b', "record":' + body + b"}\n"


def _pairs(bounds: list[int]) -> Iterator[tuple[int, int]]:
    return zip([0, *bounds], bounds, strict=False)


def _decode(raw: bytes) -> Record:
    """Read what :func:`_encode` wrote.

    Raises:
        ValueError: it is not that; the message goes on after the file's name.
    """
    try:
        outer: dict[str, Any] = json.loads(raw)
        if outer["format"] != _FORMAT:
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("is not a checkpoint of v2v-async, or is damaged") from None
    if outer.get("version") != VERSION:
        raise ValueError(f"was made by another version of v2v-async (format {outer['version']!r})")
    # A flipped digit would be a range that is never copied: the text itself must be as written.
    _, _, body = raw.partition(b', "record":')
    if digest(body[:-2]) != outer.get("check"):
        raise ValueError("is damaged, or was edited")
    told = outer["record"]
    for name in ("source_samples", "target_samples"):
        told[name] = [Sample(*sample) for sample in told[name]]
    unit = told["done"]["unit"]
    bounds = [bound * unit for bound in accumulate(told["done"]["steps"])]
    return Record(**{**told, "done": Ranges.from_bounds(bounds)})
