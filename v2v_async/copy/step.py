"""The copy step: ``in1`` to ``out1``, ``in2`` to ``out2`` …, all at once or each in its turn."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from v2v_async.copy.endpoint import nbd
from v2v_async.copy.ranges import Ranges
from v2v_async.copy.schedule import CopyJob, copy_disks
from v2v_async.errors import V2VError
from v2v_async.events import Bytes, Event, Reporter
from v2v_async.model import SourceGuest
from v2v_async.options import CopyOptions
from v2v_async.server import tail_of
from v2v_async.v2vdir import V2VDir

if TYPE_CHECKING:
    from v2v_async.copy.engine import Engine


async def copy(
    v2vdir: V2VDir, source: SourceGuest, options: CopyOptions, reporter: Reporter
) -> list[Bytes]:
    """Copy all disks of the guest; return bytes by class, disk by disk.

    What each disk negotiated, and how it ended, is in ``log/copy-N.log``.

    Raises:
        CopyError: a disk failed; its targets are incomplete.
        V2VError: the output has not been set up.
    """
    jobs = [job_of(v2vdir, disk.index) for disk in source.disks]
    with located(v2vdir, source):
        results = await copy_disks(jobs, reporter.tee(DiskLog(v2vdir)), options)
    return [result.bytes for result in results]


async def copy_ranges(
    v2vdir: V2VDir,
    source: SourceGuest,
    endpoints: Mapping[int, str],
    ranges: Mapping[int, Ranges],
    options: CopyOptions,
    reporter: Reporter,
) -> list[Bytes]:
    """Copy all disks, read from ``endpoints`` (by disk) in place of ``inN``; return bytes by class.

    Of a disk that is in ``ranges`` only those are copied; the rest counts as resumed. The targets
    have been flushed when this returns.

    Raises:
        CopyError: a disk failed; what the ranges cover on the targets is a mixture.
    """
    jobs = []
    for disk in source.disks:
        job = job_of(v2vdir, disk.index)
        only = ranges.get(disk.index)
        jobs.append(
            replace(
                job,
                source=nbd(endpoints[disk.index]),
                only=only,
                is_known_zero=job.is_known_zero and only is None,
            )
        )
    with located(v2vdir, source):
        results = await copy_disks(jobs, reporter.tee(DiskLog(v2vdir)), options)
    return [result.bytes for result in results]


async def copy_disk(
    v2vdir: V2VDir,
    source: SourceGuest,
    index: int,
    engine: Engine,
    options: CopyOptions,
    reporter: Reporter,
    *,
    groups: Sequence[str] = (),
    connections: int | None = None,
) -> Bytes:
    """Copy one disk (1-based) of the guest among others on ``engine``; return bytes by class.

    ``groups`` name the rates of the engine that hold for it, the narrowest first; ``connections``
    is the most that it may have to its source. ``options.checkpoint`` is a folder for this disk,
    which the caller removes when the guest is done or its target is another one. Of
    ``options.bandwidth``, which is for the guest, a disk has its part.

    Cancellation leaves nothing in flight, and a checkpoint from which the copy can go on.

    Raises:
        CopyError: it failed.
        V2VError: the output has not been set up.
    """
    job = job_of(v2vdir, index)
    limits = [limit for limit in (job.max_connections, connections) if limit is not None]
    job = replace(job, max_connections=min(limits, default=None))
    if options.bandwidth is not None:
        options = replace(options, bandwidth=max(1, options.bandwidth // len(source.disks)))
    with located(v2vdir, source):
        result = await engine.copy(job, options, reporter.tee(DiskLog(v2vdir)), groups=groups)
    return result.bytes


def job_of(v2vdir: V2VDir, index: int) -> CopyJob:
    """Return what is to be copied for one disk.

    Raises:
        V2VError: its target has not been set up.
    """
    target = next((each for each in v2vdir.state.targets if each.index == index), None)
    if target is None:
        raise V2VError(
            f"no target for disk {index} has been set up in ‘{v2vdir.path}’",
            hint="run the output's setup first",
        )
    return CopyJob(
        index=index,
        source=nbd(str(v2vdir.source_socket(index))),
        target=nbd(str(v2vdir.target_socket(index))),
        is_known_zero=target.is_known_zero,
        max_connections=target.max_connections,
        request_size=target.request_size,
    )


@contextmanager
def located(v2vdir: V2VDir, source: SourceGuest) -> Iterator[None]:
    """Tell errors of a disk where its log is, and what the server of its source said."""
    try:
        yield
    except V2VError as error:
        if error.disk is not None:
            error.locate(log=v2vdir.log("copy", error.disk))
            _tell_of_source(error, v2vdir, source)
        raise


def _tell_of_source(error: V2VError, v2vdir: V2VDir, source: SourceGuest) -> None:
    """Add what the server of the source said: it knows of the host behind it, a copy does not."""
    disk = next((disk for disk in source.disks if disk.index == error.disk), None)
    said = tail_of(v2vdir.log("input", error.disk)).rpartition(" error: ")[2].splitlines()[:1]
    if disk is None or error.hint is not None or not said:
        return
    error.hint = f"the server of its source, ‘{disk.source}’, said: {said[0]}"


class DiskLog:
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
