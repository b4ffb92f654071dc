"""Changed blocks of any other source: none are told, or an NBD export's dirty bitmap tells them.

What was dirty stays so, since nothing here may write to the source: with a bitmap only what it has
is read and compared, without one everything is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from v2v_async.events import Reporter
from v2v_async.input.registry import parse_input
from v2v_async.options import InputOptions
from v2v_async.server import Servers
from v2v_async.v2vdir import V2VDir
from v2v_async.warm.changed import Delta, Opened, dirty_ranges


class InputChanges:
    """Implements :class:`~v2v_async.warm.changed.ChangedBlocks` for what an input can serve.

    ``bitmap``: a dirty bitmap that the exports of ``-i disk`` tell, older than the first pass.
    """

    def __init__(self, options: InputOptions, bitmap: str | None = None) -> None:
        self._options = options
        self._bitmap = bitmap

    @asynccontextmanager
    async def opened(
        self, since: str | None, mark: str, v2vdir: V2VDir, servers: Servers, reporter: Reporter
    ) -> AsyncIterator[Opened]:
        """See :class:`ChangedBlocks`; ``since`` only says that there was a pass before."""
        source = parse_input(self._options)
        await source.check(reporter)
        guest = await source.setup(v2vdir, servers, reporter)
        deltas = []
        for disk, argument in zip(guest.disks, self._arguments(len(guest.disks)), strict=True):
            ranges = None
            if self._bitmap is not None:
                ranges = await dirty_ranges(argument, self._bitmap)
            endpoint = str(v2vdir.source_socket(disk.index))
            deltas.append(Delta(disk.index, endpoint, None if since is None else ranges))
        yield Opened(deltas, mark, is_off=False)

    async def forget(self, keep: str | None, reporter: Reporter) -> None:
        """See :class:`ChangedBlocks`: nothing was made there."""

    def _arguments(self, count: int) -> tuple[str, ...]:
        return self._options.arguments if self._bitmap is not None else ("",) * count
