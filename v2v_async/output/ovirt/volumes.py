"""Volumes of a storage domain: target disks with the folders, owners and ``.meta`` oVirt wants.

::

    DOMAIN/images/IMAGE_UUID/VOLUME_UUID        the disk
                             VOLUME_UUID.meta   what it is
    DOMAIN/master/vms/VM_UUID/VM_UUID.ovf       the guest (export domains)

The disks are made, served and renamed as everywhere else (``output/file_disks.py``).
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from v2v_async.errors import TargetError
from v2v_async.events import Reporter
from v2v_async.output import files
from v2v_async.output.contract import reported
from v2v_async.output.file_disks import Document, FileDisks
from v2v_async.output.ovirt.access import Access
from v2v_async.output.ovirt.ovf import Volume
from v2v_async.v2vdir import MadeObject, OutputFile, V2VDir

_FOLDER = "folder"  # MadeObject.kind


@dataclass(frozen=True, slots=True)
class VolumeDisks(FileDisks):
    """Disks below ``directory`` (…/images). ``mode`` is of each."""

    access: Access = field(default_factory=Access)
    mode: int = 0o666

    def _acting(self) -> AbstractContextManager[None]:
        return self.access.acting()

    def _make_file(self, path: Path) -> None:
        with self.access.acting():
            files.make_empty(path)
        try:
            # Before the disk gets its size: on an export that squashes root, the programs that
            # write it are nobody in particular.
            self.access.give(path, self.mode)
        except OSError as error:
            raise files.target_error("give away", path, error) from error

    def _write(self, path: Path, document: Document) -> None:
        with self.access.acting():
            FileDisks._write(self, path, document)
        self.access.give(path, 0o644)

    def _close(self, v2vdir: V2VDir) -> None:
        close_folders(v2vdir, self.access)


def finished_volume(disks: FileDisks, file: OutputFile, size: int) -> Volume:
    """Return what the OVF says of a disk that is copied; the last two folders name it."""
    final = Path(file.final)
    try:
        allocated = os.stat(file.temporary).st_blocks * 512
    except OSError as error:
        raise files.target_error("look at", Path(file.temporary), error) from error
    return Volume(
        final.parent.name, final.name, size, disks.format, disks.is_preallocated, allocated
    )


def make_folder(v2vdir: V2VDir, path: Path, access: Access) -> None:
    """Make a folder of this run; it is noted first, since ``abandon`` removes it.

    Raises:
        TargetError: it can't be made.
    """
    made = MadeObject(kind=_FOLDER, name=str(path), undo=f"rmdir {shlex.quote(str(path))}")
    # First, so that who does by hand what ``undo`` says comes to the mount last.
    v2vdir.update(objects=[made, *v2vdir.state.objects])
    try:
        access.make_directory(path)
    except OSError as error:
        if isinstance(error, FileExistsError):
            v2vdir.forget_object(made)  # somebody else's
        raise files.target_error("make", path, error) from error


def close_folders(v2vdir: V2VDir, access: Access) -> None:
    """Give the folders of this run their final mode: they belong to the new guest now."""
    for made in _folders(v2vdir):
        with suppress(OSError):
            access.give(Path(made.name), 0o755)
        v2vdir.forget_object(made)


def remove_made(v2vdir: V2VDir, reporter: Reporter) -> None:
    """Remove the files that make no whole guest yet, and the folders that were made for them.

    Of a guest that is whole, nothing but what the earlier files were kept under.
    """
    if v2vdir.state.is_finalized:
        files.remove_previous(v2vdir)
        return
    with reported(reporter):
        _take_names_back(v2vdir)
    files.remove_temporary(v2vdir.state.outputs)
    left = [each for each in v2vdir.state.outputs if os.path.lexists(each.temporary)]
    for file in left:
        reporter.warning(
            f"‘{file.temporary}’ can't be removed; try: rm {shlex.quote(file.temporary)}"
        )
    remove_folders(v2vdir, reporter)


def remove_folders(v2vdir: V2VDir, reporter: Reporter, below: Path | None = None) -> None:
    """Remove the empty folders that this run made, all or those in ``below``."""
    for made in reversed(list(_folders(v2vdir))):
        if below is not None and Path(made.name).parent != below:
            continue
        try:
            _remove_folder(Path(made.name))
        except FileNotFoundError:
            pass
        except OSError as error:
            reporter.warning(f"‘{made.name}’ can't be removed: {error.strerror}; try: {made.undo}")
            continue
        v2vdir.forget_object(made)


def _take_names_back(v2vdir: V2VDir) -> None:
    try:
        files.unpublish(v2vdir)
    except TargetError:
        if os.geteuid() != 0:
            raise
        files.unpublish(v2vdir, Access("switch").acting)


def _remove_folder(path: Path) -> None:
    """Remove an empty folder; not a tree, since what is in it would not be this run's."""
    try:
        path.rmdir()
    except PermissionError:
        # Of an export that squashes root, the folder above is 36:36's.
        if os.geteuid() != 0:
            raise
        with Access("switch").acting():
            path.rmdir()


def _folders(v2vdir: V2VDir) -> Iterable[MadeObject]:
    return [made for made in v2vdir.state.objects if made.kind == _FOLDER]
