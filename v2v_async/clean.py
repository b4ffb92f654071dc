"""Find and remove what dead runs left: only what ``state.json`` proves is theirs.

What an in-place conversion had begun to write to its disks is not removed but completed.

A process is ended when both its pid and its start time are those of the record, and the record is
of this boot. A directory whose supervisor still lives is left alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from v2v_async.errors import UsageError, V2VError
from v2v_async.events import Reporter
from v2v_async.in_place.run import complete_all
from v2v_async.steps import stop_recorded
from v2v_async.v2vdir import V2VDir, boot_id


async def clean(paths: list[Path], reporter: Reporter, *, keep_logs: bool = False) -> int:
    """Remove the given v2v directories, or with none given all dead ones; return how many.

    With ``keep_logs`` the logs stay. With none given, in-place conversions that were killed while
    they landed are completed too.

    Raises:
        UsageError: a given path is no v2v directory, or belongs to a run that is alive.
    """
    removed = 0 if paths else await complete_all(reporter)
    for path in paths or list(_candidates()):
        v2vdir = V2VDir(path.absolute())
        try:
            removed += await _clean_one(v2vdir, reporter, is_named=bool(paths), keep_logs=keep_logs)
        except V2VError as error:
            if paths:
                raise
            reporter.warning(f"{path}: {error.message}")
    return removed


async def _clean_one(
    v2vdir: V2VDir, reporter: Reporter, *, is_named: bool, keep_logs: bool
) -> bool:
    if not v2vdir.state_file.exists():
        if not is_named:
            return False
        raise UsageError(f"‘{v2vdir.path}’ is not a v2v directory: it has no state.json")
    if (v2vdir.path / "warm.json").exists():
        message = f"‘{v2vdir.path}’ is a warm migration, which has marks on its source"
        if is_named:
            raise UsageError(message, hint=f"v2v-async warm abort --state {v2vdir.path}")
        reporter.message(f"{message}: go on with it, or end it with v2v-async warm abort")
        return False
    state = v2vdir.state
    is_this_boot = state.boot_id == boot_id()
    if is_this_boot and state.owner is not None and state.owner.is_alive:
        message = f"‘{v2vdir.path}’ belongs to a run that is alive (pid {state.owner.pid})"
        if is_named:
            raise UsageError(message, hint=f"stop it first: kill {state.owner.pid}")
        reporter.message(message)
        return False
    if not is_named and state.owner is None:
        # Helpers run by hand have no supervisor: only the person knows whether they are done.
        reporter.message(f"‘{v2vdir.path}’ was made by hand; name it to remove it")
        return False
    ended = await stop_recorded(v2vdir) if is_this_boot else 0
    for output in state.outputs:
        _remove(Path(output.temporary), reporter)
    for name in state.files:
        _remove(Path(name), reporter)
    for made in state.objects:
        # What is on a server needs its login, which is not kept.
        reporter.warning(
            f"the run may have left the {made.kind} ‘{made.name}’"
            + (f"; undo it with: {made.undo}" if made.undo else "")
        )
    if keep_logs:
        v2vdir.keep_only_logs()
    else:
        v2vdir.remove()
    reporter.message(f"removed ‘{v2vdir.path}’ ({ended} processes ended)")
    return True


def _remove(path: Path, reporter: Reporter) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        reporter.warning(f"‘{path}’ can't be removed: {error.strerror}; try: rm -r {path}")


def _candidates() -> Iterable[Path]:
    """Yield our own v2v directories where runs make them."""
    places = dict.fromkeys([os.environ.get("TMPDIR") or "/var/tmp", "/var/tmp"])
    for place in places:
        for path in sorted(Path(place).glob("v2v.*")):
            if path.is_dir() and not path.is_symlink() and path.stat().st_uid == os.geteuid():
                yield path
