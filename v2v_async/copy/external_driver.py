"""One disk that another program copies: ``--copier nbdcopy`` or ``qemu-img``."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import replace

from v2v_async.copy.external import copy_disk_external
from v2v_async.copy.external_command import size_of
from v2v_async.copy.job import CopyJob, DiskResult
from v2v_async.events import Bytes, Event, Reporter
from v2v_async.options import CopyOptions


class ExternalDriver:
    """A disk in the hands of one process of ``options.copier``."""

    most = 1

    def __init__(
        self, job: CopyJob, options: CopyOptions, at_once: int, reporter: Reporter
    ) -> None:
        self.job = job
        self.result = DiskResult(job.index)
        self.size = 0
        limits = [n for n in (options.connections, job.max_connections) if n is not None]
        self._options = replace(
            options,
            connections=min(limits) if limits else None,
            request_size=options.request_size
            or (job.request_size if options.copier == "nbdcopy" else None),
            # Nobody limits it over all processes: each gets its part.
            bandwidth=options.bandwidth // at_once if options.bandwidth is not None else None,
        )
        self._bytes = Bytes()
        self._reporter = reporter.tee(self._note)

    def _note(self, event: Event) -> None:
        if event.bytes is not None:
            self._bytes = event.bytes

    async def open(self, stack: AsyncExitStack) -> None:
        """Ask the source for its size, so that the longest disk can go first.

        Raises:
            V2VError: it can't be reached.
        """
        self.size = await size_of(self.job.source) or 0

    @property
    def remaining(self) -> int:
        """Bytes that are left."""
        return max(0, self.size - self._bytes.copied)

    def set_share(self, connections: int) -> None:
        """Do nothing: the program has its own connections."""

    def bytes(self) -> Bytes:
        """Return what has landed so far."""
        return self._bytes

    async def run(self) -> DiskResult:
        """Copy it.

        Raises:
            V2VError: the program failed, or can't do what was asked for.
        """
        self.result.bytes = await copy_disk_external(
            self.job.index,
            self.job.source,
            self.job.target,
            self._options,
            self._reporter,
            is_known_zero=self.job.is_known_zero,
            size=self.size or None,
        )
        return self.result
