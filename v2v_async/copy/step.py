"""The copy step: ``in1`` to ``out1``, ``in2`` to ``out2`` …, all at the same time."""

from __future__ import annotations

import time
from dataclasses import asdict

from v2v_async.copy.endpoint import nbd
from v2v_async.copy.engine import CopyJob, copy_disks
from v2v_async.errors import V2VError
from v2v_async.events import Bytes, Event, Reporter
from v2v_async.model import SourceGuest
from v2v_async.options import CopyOptions
from v2v_async.server import tail_of
from v2v_async.v2vdir import V2VDir


async def copy(
    v2vdir: V2VDir, source: SourceGuest, options: CopyOptions, reporter: Reporter
) -> list[Bytes]:
    """Copy all disks of the guest; return bytes by class, disk by disk.

    What each disk negotiated, and how it ended, is in ``log/copy-N.log``.

    Raises:
        CopyError: a disk failed; its targets are incomplete.
        V2VError: the output has not been set up.
    """
    targets = {target.index: target for target in v2vdir.state.targets}
    missing = [disk.index for disk in source.disks if disk.index not in targets]
    if missing:
        raise V2VError(
            f"no target for disk {missing[0]} has been set up in ‘{v2vdir.path}’",
            hint="run the output's setup first",
        )
    jobs = [
        CopyJob(
            index=disk.index,
            source=nbd(str(v2vdir.source_socket(disk.index))),
            target=nbd(str(v2vdir.target_socket(disk.index))),
            is_known_zero=targets[disk.index].is_known_zero,
            max_connections=targets[disk.index].max_connections,
            request_size=targets[disk.index].request_size,
        )
        for disk in source.disks
    ]
    try:
        results = await copy_disks(jobs, reporter.tee(_DiskLog(v2vdir)), options)
    except V2VError as error:
        if error.disk is not None:
            error.locate(log=v2vdir.log("copy", error.disk))
            _tell_of_source(error, v2vdir, source)
        raise
    return [result.bytes for result in results]


def _tell_of_source(error: V2VError, v2vdir: V2VDir, source: SourceGuest) -> None:
    """Add what the server of the source said: it knows of the host behind it, a copy does not."""
    disk = next((disk for disk in source.disks if disk.index == error.disk), None)
    said = tail_of(v2vdir.log("input", error.disk)).rpartition(" error: ")[2].splitlines()[:1]
    if disk is None or error.hint is not None or not said:
        return
    error.hint = f"the server of its source, ‘{disk.source}’, said: {said[0]}"


class _DiskLog:
    """Writes what happens to each disk, but for its progress, into that disk's log."""

    def __init__(self, v2vdir: V2VDir) -> None:
        self._v2vdir = v2vdir

    def __call__(self, event: Event) -> None:
        if event.disk is None or event.type == "progress":
            return
        stamp = time.strftime("%H:%M:%S", time.localtime(event.time))
        said = [f"{stamp} {event.type}", event.text or ""]
        if event.details:
            said += [f"{key}={value}" for key, value in event.details.items()]
        if event.bytes is not None:
            said += [f"{key}={value}" for key, value in asdict(event.bytes).items()]
        with self._v2vdir.log("copy", event.disk).open("a") as log:
            log.write(" ".join(part for part in said if part) + "\n")
