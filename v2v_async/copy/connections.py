"""The connections of one disk: opened as lanes need them, kept while they may prove something.

A flush proves only what went to the same server before it. Where a disk has several connections, a
server could have been restarted between two of them; so one more, the *witness*, is opened before
anything is written and used for flushes alone: as long as it answers, it is the same server. Where
a disk has one connection, only that one can flush what it has written, and it is kept even when its
other side is lost.
"""

from __future__ import annotations

import anyio
import anyio.to_thread

from v2v_async.copy.disk import DiskCopy
from v2v_async.copy.lane import Side
from v2v_async.copy.opening import (
    Opened,
    Pair,
    another,
    can_reconnect,
    close_side,
    template,
)


class Connections:
    """Pairs of connections of a disk that may have ``most`` of them; begins with a first one."""

    def __init__(self, source: Opened, target: Opened, most: int) -> None:
        # More are opened from these, also when the first lane has gone and its files are closed.
        self.source = template(source)
        self.target = template(target)
        self.most = most
        self.opened = 0
        self.side: Side = "target"
        """Where the last attempt to open a pair got to."""
        self._idle = [Pair(source, target)]
        self._witness: Pair | None = None
        self._kept: Pair | None = None

    async def take(self, work: DiskCopy) -> Pair:
        """Return a pair of ``work``'s epoch.

        Raises:
            NbdError: nobody is there now; :attr:`side` says where.
            TimeoutError: nobody answered in time.
            CopyError: what is there now is something else.
        """
        epoch = work.epoch
        kept, self._kept = self._kept, None
        try:
            await self._call_witness(epoch)
            while self._idle:
                pair = self._idle.pop()
                if pair.epoch == epoch and not pair.source.end.is_lost:
                    return pair
                if self.most == 1 and pair.epoch == epoch and kept is None:
                    kept = pair
                    await pair.close_source()
                else:
                    await pair.close()
            self.side = "source"
            source = await another(self.source, wants_extents=work.can_extents)
            self.side = "target"
            if kept is not None and kept.epoch == epoch:
                target = kept.target
            else:
                target = await self._target(source, work)
        except BaseException:  # cancelled as well: nobody else would close it
            self._kept = kept
            raise
        self.opened += 1
        return Pair(source, target, epoch, self.opened)

    async def _target(self, source: Opened, work: DiskCopy) -> Opened:
        try:
            return await another(self.target, wants_extents=work.can_target_extents)
        except BaseException:
            await close_side(source)
            raise

    def give_back(self, pair: Pair) -> None:
        """Keep a pair that is well for the next lane."""
        self._idle.append(pair)

    async def leave(self, pair: Pair, work: DiskCopy, *, is_quiet: bool) -> None:
        """Close a pair that is not; ``is_quiet``: nothing is on its way."""
        is_needed = self.most == 1 and pair.epoch == work.epoch and not pair.target.end.is_lost
        if is_needed and is_quiet:
            self._kept = pair
            await pair.close_source()
        else:
            await pair.close(politely=is_quiet)

    @property
    def can_flush(self) -> bool:
        """Whether the target's server knows flushes."""
        return self.target.info.can_flush

    @property
    def has_witness(self) -> bool:
        """Whether flushes go over a connection of their own."""
        return self.most > 1 and can_reconnect(self.target.endpoint)

    def witness(self, epoch: int) -> Pair | None:
        """Return the witness of ``epoch``, if there is one."""
        pair = self._witness
        return pair if pair is not None and pair.epoch == epoch else None

    async def _call_witness(self, epoch: int) -> None:
        """Have a witness of this epoch, which is connected before anything is written in it."""
        self.side = "target"
        if not self.has_witness or self.witness(epoch) is not None:
            return
        if self._witness is not None:
            await self._witness.close()
            self._witness = None
        made = await another(self.target, wants_extents=False)
        self._witness = Pair(made, made, epoch)

    async def close(self) -> None:
        """Close all that are not with a lane. May be repeated."""
        others = [pair for pair in (self._witness, self._kept) if pair is not None]
        for pair in (*self._idle, *others):
            await pair.close()
        for side in (self.source, self.target):
            await close_side(side)
        self._idle.clear()
        self._witness = self._kept = None


async def flush(pair: Pair) -> None:
    """Flush the target of a pair that no lane has.

    Raises:
        NbdError: it failed, or the server is gone.
    """
    # A server that hangs in its flush must not hold a cancelled run; nor may many that are slow
    # take all the threads that the event loop has for everything else.
    await anyio.to_thread.run_sync(
        pair.target.end.flush_now, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1)
    )
