"""What is to land on the disks of a guest: on stable storage before the first byte of it lands.

::

    ~/.local/state/v2v-async/in-place/      $V2V_ASYNC_STATE, $XDG_STATE_HOME
    └ ID/
      ├ lock              held (flock) by the process that is at it
      ├ changes-N         what the conversion changed on disk N, at the same offsets; sparse
      └ landing.json      Landing. From the moment that it is there, the disks get it all

A folder whose lock nobody holds is what a dead run left: without ``landing.json`` its disks are as
they were, with it they may have a part. Landing again what has landed changes nothing.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from v2v_async.durable import sync
from v2v_async.errors import V2VError
from v2v_async.model import Model
from v2v_async.statedir import state_dir

Range = tuple[int, int]
"""Offset and length in bytes."""

_LANDING = "landing.json"


class LandingDisk(Model):
    """A disk and what lands on it.

    ``inode`` tells it from another file of its name; None: it is a block device.
    """

    index: int
    path: str
    format: str
    inode: int | None = None
    data: list[Range] = []
    zero: list[Range] = []

    @property
    def length(self) -> int:
        """How many bytes land, zeroes not counted."""
        return sum(length for _, length in self.data)


class Landing(Model):
    """``landing.json``. ``v2vdir`` is where the run that began it had its servers and logs.

    ``report`` and ``report_path`` are what ``-O FILE`` gets when all has landed.
    """

    version: Literal[1] = 1
    guest: str
    v2vdir: str
    disks: list[LandingDisk]
    report: str = ""
    report_path: str | None = None


class Journal:
    """The folder of one in-place conversion. Construction does no I/O."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def changes(self, index: int) -> Path:
        """Return where what changed on disk ``index`` is."""
        return self.path / f"changes-{index}"

    def commit(self, landing: Landing) -> None:
        """Have it all on stable storage: from now on it will land.

        Raises:
            OSError: it can't be; nothing will land.
        """
        for disk in landing.disks:
            sync(self.changes(disk.index))
        new = self.path / f"{_LANDING}.new"
        new.write_text(landing.model_dump_json() + "\n")
        sync(new)
        sync(self.path)
        sync(self.path.parent)
        new.rename(self.path / _LANDING)
        sync(self.path)

    def read(self) -> Landing | None:
        """Return what is to land; None where nothing was committed.

        Raises:
            V2VError: it can't be read.
        """
        path = self.path / _LANDING
        try:
            return Landing.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise V2VError(
                f"‘{path}’, which tells what has to land on disks, can't be read: {error}",
                hint="use the v2v-async that began it",
            ) from error

    def remove(self) -> None:
        """Remove the folder. What tells that something has to land goes first."""
        (self.path / _LANDING).unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)


@contextmanager
def new_journal() -> Iterator[Journal]:
    """Make a journal and hold it; it is removed at the end, unless something has yet to land.

    Raises:
        V2VError: it can't be made.
    """
    home = state_dir("in-place")
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = Path(tempfile.mkdtemp(dir=home, prefix=""))
    except OSError as error:
        raise V2VError(
            f"no folder can be made in ‘{home}’: {error.strerror}",
            hint="set V2V_ASYNC_STATE to a directory that you can write in",
        ) from error
    with _locked(path, wait=True) as is_ours:
        # Who tidies up at this moment may take it for a dead run's, before it is locked.
        if not is_ours:
            raise V2VError(f"‘{path}’ was removed by another process", hint="try again")
        journal = Journal(path)
        try:
            yield journal
        finally:
            if not (path / _LANDING).exists():
                journal.remove()


def left_journals() -> Iterator[Journal]:
    """Yield the journals of dead runs, the oldest first; each is held meanwhile.

    Raises:
        V2VError: their folder can't be read.
    """
    home = state_dir("in-place")
    try:
        found = sorted(home.iterdir(), key=lambda path: path.stat().st_mtime)
    except FileNotFoundError:
        return
    except OSError as error:
        raise V2VError(f"‘{home}’ can't be read: {error.strerror}") from error
    for path in found:
        with _locked(path, wait=False) as is_ours:
            if is_ours:
                yield Journal(path)


@contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a folder. Without ``wait`` and where another process has it: yield False.

    The kernel drops the lock with its process, however that ends; children do not get it.
    """
    try:
        descriptor = os.open(path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except (FileNotFoundError, NotADirectoryError):
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield path.exists()  # whoever had it before may have ended well
    finally:
        os.close(descriptor)
