"""A batch's state as the JSON that programs and the page get."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Collection
from typing import Any

from v2v_async.render.batch_state import BatchState


class Views:
    """Answers from the state as of now. ``clock``: seconds since the epoch, as in events."""

    def __init__(self, state: BatchState, clock: Callable[[], float] = time.time) -> None:
        self.batch = state
        self.clock = clock

    def state(self) -> dict[str, Any]:
        """Return everything."""
        return self.batch.snapshot(self.clock())

    def changes(self, names: Collection[str]) -> dict[str, Any]:
        """Return the same, with only those guests that are named and known."""
        # The sums are kept, not made from the guests: a state with few guests costs few.
        part = copy.copy(self.batch)
        part.guests = {name: self.batch.guests[name] for name in names if name in self.batch.guests}
        return part.snapshot(self.clock())

    def guest(self, name: str) -> dict[str, Any] | None:
        """Return one guest, or None where there is none of that name."""
        found = self.changes([name])
        if not found["guests"]:
            return None
        return {"version": found["version"], "run": found["run"], "now": found["now"]} | {
            "guest": found["guests"][0]
        }

    def at_work(self) -> set[str]:
        """Return the names of the guests of which times and rates change without an event."""
        return set(self.batch.running)


def to_json(value: object) -> str:
    """Return ``value`` as JSON in ASCII, which holds file names that no encoding can decode."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))
