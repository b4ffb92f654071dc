"""What one disk's copy remembers with ``--checkpoint``, and how it takes it up again.

::

    flush ──> durable ranges ──note──> save ──> disk-N.json
    the same command again ──recall──> prove that both sides are the same ──> go on with the rest
"""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import anyio
import anyio.to_thread

from v2v_async.copy.checkpoint import Checkpoint, Record, SaveError
from v2v_async.copy.endpoint import Endpoint
from v2v_async.copy.fetch import fetch
from v2v_async.copy.job import CopyJob
from v2v_async.copy.opening import Opened, Pair
from v2v_async.copy.ranges import Ranges
from v2v_async.copy.samples import BLOCK, WrittenSamples, file_identity, identify, sample_offsets
from v2v_async.errors import CopyError
from v2v_async.events import Reporter
from v2v_async.options import CopyOptions
from v2v_async.units import MIB, format_size

# What a copy that is killed repeats is bounded by time: of a slow copy this much.
INTERVAL_S = 10.0
# And by bytes: a flush is wanted for each of so many parts of the disk, and at most eight parts may
# wait for one. Flushing costs nothing in the end, where all has to be on the disk: 1 GiB to a file
# took 1.4-1.8 s so, and 1.5-2.1 s with one flush at the end.
_PARTS = 256
_SMALLEST_PART, _LARGEST_PART = 2 * MIB, 512 * MIB
_MOST_PARTS = 8


def most_unflushed(size: int) -> tuple[int, int]:
    """Return after how many bytes of a disk of ``size`` to flush, and how many may ever wait.

    That is 1/256 and 1/32 of the disk, but for very small and large ones. Not more than the second
    is on its way besides, so that a copy that is killed repeats 1/16 of its disk at the very most,
    and 1/100 as a rule.
    """
    part = min(max(size // _PARTS, _SMALLEST_PART), _LARGEST_PART)
    return part, part * _MOST_PARTS


class NothingToRememberError(CopyError):
    """The target can't flush: nothing of it is known to be there until it is closed."""


class Memory:
    """The checkpoint of one disk while it is copied."""

    interval_s = INTERVAL_S

    def __init__(self, checkpoint: Checkpoint, reporter: Reporter) -> None:
        self._checkpoint = checkpoint
        self._reporter = reporter
        self._lock = threading.Lock()
        self._saving = anyio.Lock()
        self._record: Record | None = None
        self._done = Ranges()
        self._is_dirty = False
        self._is_complete = False
        self._has_warned = False
        self.written = WrittenSamples()

    def recall(self) -> Record | None:
        """Return the record of an earlier run, None where there is none.

        Raises:
            CopyError: there is one, and it can't be used.
        """
        self._record = self._checkpoint.load()
        return self._record

    async def begin(
        self, job: CopyJob, pair: Pair, options: CopyOptions, *, is_known_zero: bool
    ) -> tuple[list[tuple[int, int]], bool]:
        """Return the ranges (offset, length) that are done, and whether the target was zero.

        Raises:
            NothingToRememberError: the target can't flush.
            CopyError: the record of an earlier run is not of this source and this target.
        """
        if job.target.kind == "null" or not pair.target.info.can_flush:
            raise NothingToRememberError(
                f"--checkpoint: the target ‘{job.target}’ can't flush, so that nothing could be "
                "promised of it",
                hint="copy without --checkpoint",
            )
        now = Record(
            source=_name(job.source),
            target=_name(job.target),
            source_size=pair.source.info.size,
            target_size=pair.target.info.size,
            source_identity=file_identity(Path(job.source.address))
            if job.source.kind == "file" and job.source.address
            else "",
            target_was_zero=is_known_zero,
            options={"allocated": options.allocated, "target_is_zero": options.target_is_zero},
        )
        then = self._record
        if then is None:
            await anyio.to_thread.run_sync(_identify, now, pair.source)
            self._record = now
            return [], is_known_zero
        await anyio.to_thread.run_sync(self._prove, then, now, pair)
        self._done = then.done.copy()
        self.written = WrittenSamples(then.target_samples)
        self._reporter.message(
            f"going on where an earlier run was stopped: {format_size(self._done.total)} of "
            f"{format_size(then.source_size)} have been copied and flushed"
        )
        return list(self._done), then.target_was_zero

    def _prove(self, then: Record, now: Record, pair: Pair) -> None:
        source, target = pair.source, pair.target
        if (then.source_size, then.target_size) != (now.source_size, now.target_size):
            self._checkpoint.prove(then, now, _nothing, _nothing)  # refuses them for that
        known = fetch(source.end, source.info, then.source_places())
        found = fetch(target.end, target.info, then.target_places())
        self._checkpoint.prove(then, now, lambda *place: known[place], lambda *place: found[place])

    def note(self, ranges: list[tuple[int, int]]) -> None:
        """Note ranges (offset, length) that have been flushed. Any thread may call it."""
        with self._lock:
            for offset, length in ranges:
                self._done.add(offset, length)
            self._is_dirty = True

    async def save(self, *, is_complete: bool = False) -> None:
        """Save what is new. Where that fails the copy goes on, with a warning."""
        if self._record is None or not (self._is_dirty or is_complete):
            return
        self._is_complete = self._is_complete or is_complete
        async with self._saving:
            with self._lock:
                self._is_dirty = False
                done = self._done.copy()
            record = replace(
                self._record,
                done=done,
                target_samples=self.written.inside(done),
                is_complete=self._is_complete,
            )
            try:
                # It waits for the disk, and must not wait for other threads that do.
                await anyio.to_thread.run_sync(
                    self._checkpoint.save, record, limiter=anyio.CapacityLimiter(1)
                )
            except SaveError as error:
                self._is_dirty = True
                if not self._has_warned:
                    self._has_warned = True
                    self._reporter.warning(f"{error.message}; {error.hint}")


def _name(endpoint: Endpoint) -> str:
    if endpoint.kind == "file" and endpoint.address:
        return os.path.abspath(endpoint.address)
    return str(endpoint)


def _identify(record: Record, source: Opened) -> None:
    size = source.info.size
    places = [(offset, min(BLOCK, size - offset)) for offset in sample_offsets(size)]
    known = fetch(source.end, source.info, places)
    record.source_samples = identify(lambda *place: known[place], size)


def _nothing(offset: int, length: int) -> bytes:
    raise AssertionError("nothing is read of a disk that has another size")
