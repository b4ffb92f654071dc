"""Copies the disks of a guest in two goes: the source as it is, then what has changed since.

::

    plain1 plain2 … ──unchanged──> out1 out2 …       while the guest is converted, and after it
    in1 in2 …       ──changed────> out1 out2 …       when both are done

Who reads the events sees one copy of each disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from v2v_async.copy.early import Early, Rest, Span
from v2v_async.copy.endpoint import nbd
from v2v_async.copy.schedule import copy_disks
from v2v_async.copy.step import DiskLog, job_of, located
from v2v_async.events import Bytes, Event, Reporter
from v2v_async.model import SourceGuest
from v2v_async.options import CopyOptions
from v2v_async.v2vdir import V2VDir

_NOTHING = Bytes()


class OverlappedCopy:
    """The copy of all disks of a guest whose disks are served as they are, too."""

    def __init__(
        self, v2vdir: V2VDir, source: SourceGuest, options: CopyOptions, reporter: Reporter
    ) -> None:
        self._v2vdir = v2vdir
        self._source = source
        # What they are compared with is the converted disk, at the end.
        self._late_options = options
        self._early_options = replace(options, flush=True, verify=False)
        self.disks = {disk.index: Early() for disk in source.disks}
        self._shown = {index: _Shown() for index in self.disks}
        self._target = reporter.tee(DiskLog(v2vdir))
        self._reporter = Reporter(
            self._join, reporter.run, guest=reporter.guest, step=reporter.step
        )

    async def copy_early(self) -> None:
        """Copy what of the source is not known to have changed; return when all of it is flushed.

        Raises:
            CopyError: a disk failed; its targets are incomplete.
            V2VError: the output has not been set up.
        """
        jobs = [
            replace(
                job_of(self._v2vdir, index),
                source=nbd(str(self._v2vdir.plain_socket(index))),
                early=early,
            )
            for index, early in self.disks.items()
        ]
        with located(self._v2vdir, self._source):
            await copy_disks(jobs, self._reporter, self._early_options)

    async def copy_rest(
        self, changes: Mapping[int, tuple[Iterable[Span], Iterable[Span]]]
    ) -> list[Bytes]:
        """Copy what has changed, after :meth:`copy_early`; return bytes by class, disk by disk.

        ``changes``: data and zeroes of each disk (:meth:`Early.rest`).

        Raises:
            CopyError: as above.
        """
        jobs = []
        for index, early in self.disks.items():
            shown = self._shown[index]
            shown.rest = early.rest(*changes[index])
            job = job_of(self._v2vdir, index)
            jobs.append(replace(job, is_known_zero=False, parts=shown.rest.parts))
        with located(self._v2vdir, self._source):
            await copy_disks(jobs, self._reporter, self._late_options)
        return [shown.bytes for shown in self._shown.values()]

    def _join(self, event: Event) -> None:
        shown = self._shown.get(event.disk or 0)
        joined = event if shown is None else shown.join(event)
        if joined is not None:
            self._target.pass_on(joined)


@dataclass(slots=True)
class _Shown:
    """What is told of one disk. ``rest`` is there once its second copy is about to begin."""

    bytes: Bytes = _NOTHING
    early: Bytes = _NOTHING
    rest: Rest | None = None
    began: float | None = None

    def join(self, event: Event) -> Event | None:
        """Return an event of one of the two copies as one of both; None: it is not told."""
        if self.began is None:
            self.began = event.time
        if event.bytes is not None:
            if self.rest is None:
                self.bytes = self.early = event.bytes
            else:
                self.bytes = self.rest.join(self.early, event.bytes)
            event = replace(event, bytes=self.bytes)
        if self.rest is None:
            return replace(event, type="progress") if event.type == "finished" else event
        if event.type == "started":
            return None
        if event.type == "planned":
            return replace(event, type="progress")
        if event.type == "finished":
            return replace(event, duration_s=event.time - self.began)
        return event
