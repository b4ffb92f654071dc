"""Divides connections and memory among disks. Pure, but for the lock of :class:`Budget`."""

from __future__ import annotations

import threading
from collections.abc import Sequence


def divide(total: int, remaining: Sequence[int], most: Sequence[int]) -> list[int]:
    """Return how many connections each disk gets of ``total``, at least one each.

    ``remaining`` is what each has left to do and ``most`` what it can use. The share follows what
    is left, so that all disks end at about the same time.
    """
    shares = [1] * len(remaining)
    for _ in range(total - len(remaining)):
        # The next connection goes where it shortens the longest wait.
        waiting = [
            (left / share, -at)
            for at, (left, share, limit) in enumerate(zip(remaining, shares, most, strict=True))
            if share < limit
        ]
        if not waiting:
            break
        shares[-max(waiting)[1]] += 1
    return shares


class Budget:
    """Bytes that all lanes may hold in buffers together. Any thread may ask."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0
        self.most_taken = 0
        self._lock = threading.Lock()

    def take(self, length: int, *, must: bool = False) -> bool:
        """Take ``length`` bytes if they are left; ``must``: even if not (each lane's first buffer).

        Return whether they were taken.
        """
        with self._lock:
            if not must and self.taken + length > self.limit:
                return False
            self.taken += length
            self.most_taken = max(self.most_taken, self.taken)
            return True

    def give_back(self, length: int) -> None:
        """Return bytes that were taken."""
        with self._lock:
            self.taken -= length
