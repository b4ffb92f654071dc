"""Who writes on a storage domain: oVirt's daemons are user 36 and group 36 (vdsm, kvm).

::

    not root                 as we are; the owner will be another, which is a warning
    root, chown works        as root, and what is made is given to 36:36
    root, but not there      an export that squashes root: calls on files are made as 36:36

The last is a property of the calling thread alone (setfsuid(2)), and only of what runs between two
awaits: programs that are started stay root.
"""

from __future__ import annotations

import ctypes
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from v2v_async.errors import TargetError
from v2v_async.events import Reporter

VDSM = 36
"""Number of both the user vdsm and the group kvm, on every oVirt host."""


@dataclass(frozen=True, slots=True)
class Access:
    """How files are made that oVirt can use."""

    kind: Literal["plain", "chown", "switch"] = "plain"

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Make the file calls in the block as 36:36 where that is needed. No await in it!"""
        if self.kind != "switch":
            yield
            return
        group = _set_id("setfsgid", VDSM)
        try:
            user = _set_id("setfsuid", VDSM)
            try:
                yield
            finally:
                _set_id("setfsuid", user)
        finally:
            _set_id("setfsgid", group)

    def give(self, path: Path, mode: int) -> None:
        """Set owner and mode of what was made within ``acting``.

        Raises:
            OSError: the file system refuses.
        """
        with self.acting():
            os.chmod(path, mode)
            if self.kind == "chown":
                os.chown(path, VDSM, VDSM, follow_symlinks=False)

    def make_directory(self, path: Path) -> None:
        """Make a directory in which everybody may write, until ``give`` says otherwise.

        A root that the export squashes must make and rename files in it.

        Raises:
            OSError: the file system refuses.
        """
        with self.acting():
            os.mkdir(path)
        self.give(path, 0o777 if self.kind == "switch" else 0o755)


def probe_access(directory: Path, reporter: Reporter) -> Access:
    """Write and remove a file in ``directory``, and return how that went best.

    Raises:
        TargetError: it can't be written at all.
    """
    is_root = os.geteuid() == 0
    kinds: tuple[Literal["plain", "chown", "switch"], ...]
    kinds = ("chown", "switch", "plain") if is_root else ("plain",)
    problem: OSError | None = None
    for kind in kinds:
        access = Access(kind)
        try:
            owner = _owner_of_new_file(directory, access)
        except OSError as error:
            problem = problem or error
            continue
        if owner != (VDSM, VDSM):
            reporter.warning(
                f"new files in ‘{directory}’ belong to {owner[0]}:{owner[1]} and not to "
                f"{VDSM}:{VDSM}, so that oVirt can't import them; "
                + (
                    "afterwards change their owner there"
                    if is_root
                    else "run this as root, or change their owner afterwards"
                )
            )
        return access
    assert problem is not None
    raise TargetError(
        f"‘{directory}’ can't be written: {problem.strerror}",
        hint=f"it must belong to {VDSM}:{VDSM}; run this as root, or have the export writable",
    ) from problem


def _owner_of_new_file(directory: Path, access: Access) -> tuple[int, int]:
    path = directory / f".{secrets.token_hex(8)}.v2v-async-test"
    try:
        with access.acting():
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        access.give(path, 0o644)
        with access.acting():
            status = path.stat()
    finally:
        with access.acting(), suppress(OSError):
            path.unlink()
    return status.st_uid, status.st_gid


def _set_id(call: str, number: int) -> int:
    """Set this thread's identity for files and return the earlier one."""
    library = ctypes.CDLL(None)
    previous: int = getattr(library, call)(number)
    # It reports no failure: the next call tells what is in force.
    if getattr(library, call)(number) != number:
        raise PermissionError(f"{call}({number}) is not permitted")
    return previous
