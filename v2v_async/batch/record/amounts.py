"""How far the copies of a run are: taken from its events, and noted in the journal now and then."""

from __future__ import annotations

import anyio
import anyio.to_thread

from v2v_async.batch.record.journal import Journal
from v2v_async.events import Bytes, Event

EVERY_S = 2.0
"""What a crash may take from the figures that are shown; the checkpoints know better."""


class Amounts:
    """Remembers the bytes of each disk until they are noted."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._new: dict[str, dict[int, Bytes]] = {}

    def __call__(self, event: Event) -> None:
        if event.bytes is None or event.guest is None or event.disk is None:
            return
        if event.step in (None, "copy"):
            self._new.setdefault(event.guest, {})[event.disk] = event.bytes

    async def keep_noting(self) -> None:
        """Note what is new, every two seconds, until cancelled; and then once more."""
        try:
            while True:
                await anyio.sleep(EVERY_S)
                await self.note()
        finally:
            await self.note()

    async def note(self) -> None:
        """Note what is new."""
        # Shielded: what has been taken out must be written.
        with anyio.CancelScope(shield=True):
            new, self._new = self._new, {}
            if new:
                await anyio.to_thread.run_sync(self._journal.set_bytes, new)
