"""Target files: made under a hidden name, renamed when everything is whole.

::

    .NAME-sda.1f3a….partial ──(copy, fsync)──┐
    .NAME-sdb.1f3a….partial ─────────────────┼─ rename all, the XML last; fsync of the directory
    .NAME.xml.1f3a….partial ─────────────────┘
    .NAME-sda.1f3a….previous   a second link to the earlier file, only while renaming: if one of the
                               renames fails, the earlier files are put back

A file of the user's is therefore untouched until the new guest is whole. Whoever removes what a
dead run left only removes ``.partial`` and ``.previous`` names of ``state.json``; a final name
never: when the run died in the middle of renaming, whole disks of the new guest have it. Whoever
goes on from there takes all names back first (:func:`unpublish`).
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import anyio
import anyio.to_thread

from v2v_async import durable
from v2v_async.errors import TargetError
from v2v_async.v2vdir import OutputFile, V2VDir

# posix_fallocate can't be interrupted: between steps of this size a Ctrl-C is seen.
_ALLOCATION_STEP = 1024**3
_NAME_MAX = 255  # on every Linux file system that matters, in bytes


def temporary_for(final: Path) -> Path:
    """Return a new hidden name beside ``final``.

    Raises:
        TargetError: a name of that length can't be made.
    """
    temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}.partial")
    # .previous is one byte longer.
    if len(os.fsencode(temporary.name)) + 1 > _NAME_MAX:
        raise TargetError(
            f"the file name ‘{final.name}’ is too long", hint="give a shorter name: -on NAME"
        )
    return temporary


def make_empty(path: Path) -> None:
    """Make an empty file that was not there before, with the mode that the umask gives.

    Raises:
        TargetError: it can't be made.
    """
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    except OSError as error:
        raise target_error("make", path, error) from error


async def make_raw(path: Path, size: int, *, preallocated: bool) -> None:
    """Give the file ``path`` a size; when ``preallocated``, blocks for all of it too.

    Raises:
        TargetError: there is no room, or the file system refuses.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if preallocated and size > free_space(path.parent):
            # The kernel would take all that is left before it fails: others need it too.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(descriptor, size)
        if preallocated:
            for offset in range(0, size, _ALLOCATION_STEP):
                await anyio.to_thread.run_sync(
                    os.posix_fallocate, descriptor, offset, min(_ALLOCATION_STEP, size - offset)
                )
    except OSError as error:
        raise target_error(f"give {size} bytes to", path, error) from error
    finally:
        os.close(descriptor)


async def sync(path: Path) -> None:
    """Have the file's data on the disk.

    Raises:
        TargetError: a write failed, perhaps long ago.
    """
    try:
        await anyio.to_thread.run_sync(durable.sync, path)
    except OSError as error:
        raise target_error("write", path, error) from error


def publish(v2vdir: V2VDir, files: Sequence[OutputFile], *, is_last: bool = False) -> None:
    """Rename each temporary file to its final name, all or none.

    ``is_last``: the target guest is made by it, which ``state.json`` says from then on; until it
    does, a process that was killed can be undone. Blocks for a moment. There is no point at which a
    cancellation could come in between.

    Raises:
        TargetError: one of them failed. The earlier files are where they were, ours are gone.
    """
    noted = {_previous_name(file) for file in files}
    previous = _link_previous(v2vdir, files)
    renamed: list[OutputFile] = []
    is_half_done = False
    try:
        for file in files:
            os.rename(file.temporary, file.final)
            renamed.append(file)
        for directory in {Path(file.final).parent for file in files}:
            # Not every file system can: then it has its own ideas of what is safe.
            with suppress(OSError):
                durable.sync(directory)
        if is_last:
            v2vdir.update(is_finalized=True)
        is_half_done = not is_last
    except OSError as error:
        for file in reversed(renamed):
            with suppress(OSError):
                if file.final in previous:
                    os.rename(previous[file.final], file.final)
                else:
                    os.unlink(file.final)
        failed = [*files[len(renamed) :], files[-1]][0]
        raise target_error("rename", Path(failed.final), error) from error
    finally:
        for path in previous.values():
            with suppress(OSError):
                os.unlink(path)
        left = [name for name in v2vdir.state.files if name not in noted]
        v2vdir.update(files=left, is_publishing=is_half_done)


def remove_previous(v2vdir: V2VDir) -> None:
    """Remove what the earlier files were kept under, now that the new ones have their names."""
    names = {_previous_name(file) for file in v2vdir.state.outputs}
    for name in names.intersection(v2vdir.state.files):
        with suppress(OSError):
            os.unlink(name)


def identify(v2vdir: V2VDir, temporary: Path) -> None:
    """Note which file that is, so that it is known again under its final name."""
    inode = temporary.lstat().st_ino
    name = str(temporary)
    v2vdir.update(
        outputs=[
            each.model_copy(update={"inode": inode}) if each.temporary == name else each
            for each in v2vdir.state.outputs
        ]
    )


def unpublish(
    v2vdir: V2VDir, acting: Callable[[], AbstractContextManager[None]] = nullcontext
) -> None:
    """Undo what a process did that was killed in :func:`publish`: all or nothing again.

    New files get their temporary names back, earlier ones their own. Does nothing where nobody was
    killed there. May be killed itself, and repeated. Files are renamed within ``acting``.

    Raises:
        TargetError: a file can't be renamed.
    """
    if not v2vdir.state.is_publishing:
        return
    outputs = v2vdir.state.outputs
    for file in reversed(outputs):
        try:
            with acting():
                if not os.path.lexists(file.temporary) and _is_at(file, file.final):
                    os.rename(file.final, file.temporary)
                _put_back(file)
        except OSError as error:
            raise target_error("take the name back from", Path(file.final), error) from error
    noted = {_previous_name(file) for file in outputs}
    left = [name for name in v2vdir.state.files if name not in noted]
    v2vdir.update(files=left, is_publishing=False)


def free_space(directory: Path) -> int:
    """Return the bytes that we may still write in ``directory``."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def remove_temporary(files: Sequence[OutputFile]) -> None:
    """Remove those files that have not been renamed. Never fails."""
    for file in files:
        with suppress(OSError):
            os.unlink(file.temporary)


def target_error(what: str, path: Path, error: OSError) -> TargetError:
    """Return the error of a failed system call on a target file."""
    hints = {
        errno.ENOSPC: "free space there, or give another directory: -os DIR",
        errno.EDQUOT: "the quota there is used up: give another directory: -os DIR",
        errno.EFBIG: "that file system can't hold a file of this size: -os DIR elsewhere",
        errno.EACCES: "you may not write there",
        errno.EROFS: "it is read-only",
        errno.EISDIR: "a directory has that name: move it, or give another name: -on NAME",
    }
    return TargetError(f"can't {what} ‘{path}’: {error.strerror}", hint=hints.get(error.errno or 0))


def _previous_name(file: OutputFile) -> str:
    return file.temporary.removesuffix(".partial") + ".previous"


def _is_at(file: OutputFile, name: str) -> bool:
    try:
        return os.lstat(name).st_ino == file.inode
    except FileNotFoundError:
        return False


def _put_back(file: OutputFile) -> None:
    """Give the earlier file of that name, if there was one, its name back."""
    previous = _previous_name(file)
    if not os.path.lexists(previous):
        return
    if not os.path.lexists(file.final):
        os.rename(previous, file.final)
    elif os.path.samestat(os.lstat(previous), os.lstat(file.final)):
        os.unlink(previous)
    # Else somebody has made another in its place: both are theirs.


def _link_previous(v2vdir: V2VDir, files: Sequence[OutputFile]) -> dict[str, str]:
    """Give each file that will be replaced a second name; where that can't be, go without."""
    names = {file.final: _previous_name(file) for file in files if os.path.lexists(file.final)}
    v2vdir.update(files=[*v2vdir.state.files, *names.values()], is_publishing=True)
    linked = {}
    for final, name in names.items():
        with suppress(OSError):
            os.link(final, name, follow_symlinks=False)
            linked[final] = name
    return linked
