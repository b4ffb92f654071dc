"""What the lanes of a disk share."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from v2v_async.copy.shares import Budget
from v2v_async.copy.throttle import DiskThrottle
from v2v_async.copy.tuning import SLOW_S, Tuner

# So many requests tell how fast a server is: the first of each of four lanes are enough.
_PACES = 4


@dataclass(slots=True)
class Shared:
    """What the lanes of a disk share; behind some of it is what all disks share.

    ``retries``: times that a failing request is sent again. ``is_slow``: answers take so long that
    many requests are wanted at once.
    """

    tuner: Tuner
    budget: Budget
    throttle: DiskThrottle | None = None
    retries: int = 0
    is_slow: bool = False
    _paces: list[float] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note_pace(self, seconds: float) -> None:
        """Take in how long one of a blocking lane's requests took, from any thread.

        The shortest of several counts: on a busy machine any one may wait for a processor.
        """
        with self._lock:
            if self.tuner.is_settled:
                return  # with --synchronous there is nothing to find out
            self._paces.append(seconds)
            if len(self._paces) >= _PACES:
                self.is_slow = self.is_slow or min(self._paces) >= SLOW_S
                self._paces.clear()

    def note(self, sent: float, length: int) -> None:
        """Tell the tuner that a read of ``length`` bytes, sent at ``sent``, has been answered."""
        with self._lock:
            self.tuner.note(time.monotonic(), sent, length)
