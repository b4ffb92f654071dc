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
    """Bytes that lanes may hold in buffers together. Any thread may ask.

    Each disk has a :meth:`part` of its own, so that one whose server hangs holds nothing that the
    others need. The parts' limits are to add up to no more than that of the whole.
    """

    def __init__(self, limit: int, whole: Budget | None = None) -> None:
        self.limit = limit
        self.taken = 0
        self.most_taken = 0
        self._whole = whole
        self._lock = threading.Lock()

    def part(self, limit: int) -> Budget:
        """Return the budget of one disk, whose bytes count here as well."""
        return Budget(limit, self)

    def take(self, length: int) -> bool:
        """Take ``length`` bytes if they are left; return whether they were taken.

        Where nothing is taken they always are: a limit that is too small for one request must not
        stop a disk. Who is refused asks again: others of the same disk give back what they have.
        """
        with self._lock:
            if self.taken and self.taken + length > self.limit:
                return False
            self._count(length)
        if self._whole is not None:
            with self._whole._lock:
                self._whole._count(length)
        return True

    def give_back(self, length: int) -> None:
        """Return bytes that were taken."""
        with self._lock:
            self._count(-length)
        if self._whole is not None:
            with self._whole._lock:
                self._whole._count(-length)

    def _count(self, length: int) -> None:
        self.taken += length
        self.most_taken = max(self.most_taken, self.taken)
