"""An NFS export mounted for the time of a run.

The mount point is *not* in the v2v directory, which is removed with all that is in it: a mount
that could not be taken away would be emptied. Only the empty mount point is ever removed.
"""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio

from v2v_async import process
from v2v_async.errors import TargetError
from v2v_async.events import Reporter
from v2v_async.v2vdir import MadeObject, V2VDir, default_parent

_KIND = "mount"  # MadeObject.kind
_MOUNT_TIMEOUT_S = 180.0  # mount.nfs itself retries for two minutes in the foreground
_UMOUNT_TIMEOUT_S = 45.0  # within the minute that abandon has

# The host has no slash, so that a local path with a colon stays one. Brackets: an IPv6 address.
_EXPORT = re.compile(r"(?P<host>\[[^]/]+\]|[^-/:[][^/:]*):(?P<path>/.*)", re.DOTALL)


def is_export(storage: str) -> bool:
    """Return whether ``-os`` names HOST:/EXPORT, not a directory."""
    return _EXPORT.fullmatch(storage) is not None


async def mount(v2vdir: V2VDir, export: str) -> Path:
    """Mount ``export`` for this run, and return where; it is noted first, for ``unmount``.

    Raises:
        TargetError: it can't be mounted.
    """
    point = _mount_point()
    v2vdir.add_object(_record(point))
    await _mount(export, point)
    return point


async def mount_again(v2vdir: V2VDir, export: str) -> Path:
    """Return where an earlier process mounted ``export``; it is mounted there, again after a boot.

    Raises:
        TargetError: it can't be.
    """
    point = mounted(v2vdir)
    if point is None:
        return await mount(v2vdir, export)
    if not _is_mounted(point):
        try:
            point.mkdir(mode=0o755, exist_ok=True)
        except OSError as error:
            raise TargetError(
                f"can't make ‘{point}’ to mount the export at: {error.strerror}"
            ) from error
        await _mount(export, point)
    return point


def mounted(v2vdir: V2VDir) -> Path | None:
    """Return where this run has its export mounted, None where it has not."""
    for made in v2vdir.state.objects:
        if made.kind == _KIND:
            return Path(made.name)
    return None


async def unmount(v2vdir: V2VDir, reporter: Reporter) -> None:
    """Take the mounts of this run away; can't fail, nor be cancelled."""
    for made in v2vdir.state.objects:
        if made.kind == _KIND and await _unmount(Path(made.name), reporter):
            v2vdir.forget_object(made)


@asynccontextmanager
async def mounted_for_a_look(export: str, reporter: Reporter) -> AsyncIterator[Path]:
    """Have ``export`` mounted while the block runs, before there is a v2v directory.

    Raises:
        TargetError: it can't be mounted.
    """
    point = _mount_point()
    try:
        await _mount(export, point)
        yield point
    finally:
        await _unmount(point, reporter)


def _mount_point() -> Path:
    try:
        point = Path(tempfile.mkdtemp(prefix="v2v-export.", dir=default_parent()))
        # The programs that write there may be nobody in particular.
        point.chmod(0o755)
    except OSError as error:
        raise TargetError(
            f"can't make a place to mount the export at: {error.strerror}",
            hint="set TMPDIR to a directory that you can write in",
        ) from error
    return point


def _record(point: Path) -> MadeObject:
    name = shlex.quote(str(point))
    return MadeObject(kind=_KIND, name=str(point), undo=f"umount {name} && rmdir {name}")


def _is_mounted(point: Path) -> bool:
    """Return whether something is mounted there; a server that hangs does not matter."""
    escaped = str(point)
    for character in "\\ \t\n":
        escaped = escaped.replace(character, f"\\{ord(character):03o}")
    # proc(5): the fifth field is where it is mounted.
    rows = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    return any(row.split(" ")[4] == escaped for row in rows)


async def _mount(export: str, point: Path) -> None:
    try:
        done = await process.run(
            ["mount", "-t", "nfs", "--", export, str(point)], timeout_s=_MOUNT_TIMEOUT_S
        )
    except TimeoutError as error:
        raise TargetError(
            f"‘{export}’ could not be mounted within {_MOUNT_TIMEOUT_S:.0f} seconds",
            hint="does the NFS server answer? Try: showmount -e HOST",
        ) from error
    if done.status != 0:
        why = " ".join(done.stderr.split()) or f"mount ended with status {done.status}"
        raise TargetError(
            f"‘{export}’ can't be mounted: {why}",
            hint="mounting needs root and nfs-common (Debian) or nfs-utils (Fedora); "
            "or mount it yourself and give that directory: -os DIR",
        )


async def _unmount(point: Path, reporter: Reporter) -> bool:
    with anyio.CancelScope(shield=True):
        if _is_mounted(point):
            why = "it took too long"
            with suppress(TimeoutError):
                done = await process.run(["umount", "--", str(point)], timeout_s=_UMOUNT_TIMEOUT_S)
                why = " ".join(done.stderr.split())
            if _is_mounted(point):
                reporter.warning(f"‘{point}’ can't be unmounted: {why}; try: {_record(point).undo}")
                return False
        try:
            point.rmdir()
        except FileNotFoundError:
            pass
        except OSError as error:
            reporter.warning(f"‘{point}’ can't be removed: {error.strerror}; try: rmdir {point}")
    return True
