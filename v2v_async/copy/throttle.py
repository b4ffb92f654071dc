"""Keep the bytes that lanes let through to rates, fairly among disks, and let people change these.

::

    credit   ──┐ grows by the rate, to at most 0.1 s of it; below zero it is a debt
               ▼
    waiting  [disk 1: 512 KiB] [disk 2: 512 KiB] [disk 1: 512 KiB] …   whose disk had least, first
             may go when the credit covers what waits before it, even if not itself

A lane that may not go yet is told how long to wait and asks again; nothing is promised to it
meanwhile, so a new rate, or a request that was cut smaller, counts from the next time it asks.

Where several rates hold for a disk (its group's, that of all copies) its lanes wait for one after
the other, the narrowest first: who may not go for its group's sake holds up nobody outside of it.

The order is that of start-time fair queueing: each request has as its tag how much its disk had
been let through before it, and the smallest goes first. A disk that comes, or comes again, begins
where the others are now, so that it neither waits for what they had before nor makes them wait.
Source: Goyal, Vin and Cheng, "Start-time Fair Queuing", SIGCOMM 1996.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from v2v_async.units import KIB

# What may be saved up while nobody asks. It makes up for lanes that wake late (poll(2) and the
# interpreter are good for some milliseconds), and is 2% of five seconds.
BURST_S = 0.1
# Nobody waits longer without asking again, so that a new rate is heard of at once.
MAX_WAIT_S = 0.1
# Nor shorter: poll(2) counts whole milliseconds, and the credit gives back what is lost.
MIN_WAIT_S = 0.002
# A lane that has not asked for so long after it should have is gone, and its place with it.
GONE_S = 0.1
# What is not a rate is asked about so often: a flush that lets a disk go on takes as long.
STANDSTILL_S = 0.02
# How much of a second one request may take: more makes waves, less costs calls (20 a second).
REQUEST_S = 1 / 20
# The block of file systems and of most servers: smaller ones cost a read for each write. It keeps
# to 10% in 5 s down to 10 kB/s (0.4 s a request); who wants less can't want it smooth.
SMALLEST_REQUEST = 4 * KIB


@dataclass(slots=True)
class _Waiting:
    """One that may not go yet: how much it wants, its place, and when it is taken to be gone."""

    length: int
    tag: float
    gone_at: float


class Throttle:
    """A rate in bytes a second (None: no limit) that lanes in any threads share.

    Over any time t, at most ``rate * (t + 0.1 s)`` bytes and one request more are let through, and
    a new rate adds at most one request. Disks that always want more get that rate, each as much of
    it as any other; and so do a disk's lanes, each the same number of requests.
    """

    def __init__(
        self, rate: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._rate = _checked(rate)
        self._credit = 0.0  # bytes
        self._settled = clock()
        self._waiting: dict[Hashable, _Waiting] = {}  # in the order of their first asking
        self._tag = 0.0  # of the last one that went
        self._tags: dict[Hashable, float] = {}  # of each disk's next request

    @property
    def rate(self) -> int | None:
        """The rate now, in bytes a second; None where there is no limit."""
        return self._rate

    def take(self, length: int, who: Hashable = None, disk: Hashable = None) -> float:
        """Return how many seconds to wait before asking again (at most 0.1); 0.0: send now.

        0.0 means that the bytes are counted: ask last, when nothing else is in the way. ``who``
        keeps its place while it waits, and may ask for another length each time.
        """
        if self._rate is None:  # most copies
            return 0.0
        with self._lock:
            now = self._settle()
            rate = self.rate  # it may have changed before the lock was ours
            if rate is None:
                return 0.0
            place = self._waiting.get(who)
            tag = max(self._tag, self._tags.get(disk, 0.0)) if place is None else place.tag
            before = self._before(who, tag, now)
            if place is None:
                self._tags[disk] = tag + length
            if before <= self._credit:
                self._waiting.pop(who, None)
                self._credit -= length
                self._went(tag)
                return 0.0
            wait = min(max((before - self._credit) / rate, MIN_WAIT_S), MAX_WAIT_S)
            self._waiting[who] = _Waiting(length, tag, now + wait + GONE_S)
            return wait

    def _before(self, who: Hashable, tag: float, now: float) -> int:
        """Return how many bytes go before those of ``who``; of equal tags the first that asked."""
        before = 0
        is_later = False
        for other, place in list(self._waiting.items()):
            if other == who:
                is_later = True
            elif now > place.gone_at:
                del self._waiting[other]
            elif place.tag < tag or (place.tag == tag and not is_later):
                before += place.length
        return before

    def _went(self, tag: float) -> None:
        """Go on to ``tag``, and forget the disks that would begin there anyhow."""
        if tag <= self._tag:
            return
        self._tag = tag
        for disk in [disk for disk, next_ in self._tags.items() if next_ <= tag]:
            del self._tags[disk]

    def leave(self, who: Hashable) -> None:
        """Give up the place of ``who``, which waits no more. Others would wait 0.2 s for it."""
        with self._lock:
            self._waiting.pop(who, None)

    def give_back(self, length: int) -> None:
        """Let others have bytes that were counted and are not sent after all."""
        with self._lock:
            self._settle()
            if self._rate is not None:
                self._credit = min(self._credit + length, self._rate * BURST_S)

    def set_rate(self, rate: int | None) -> None:
        """Let ``rate`` bytes a second through from now on, or everything with None."""
        with self._lock:
            old = self._rate
            if rate == old:
                return
            self._settle()
            self._rate = _checked(rate)
            if old is None:
                self._credit = 0.0
            elif rate is not None and self._credit < 0:
                # A debt weighs no more bytes and no more seconds than it did: neither the request
                # of a moment ago nor a rate mistyped for a moment stops a copy for minutes.
                self._credit = max(self._credit, self._credit / old * rate)

    def _settle(self) -> float:
        now = self._clock()
        if self._rate is not None:
            earned = max(0.0, now - self._settled) * self._rate
            self._credit = min(self._credit + earned, self._rate * BURST_S)
        self._settled = now
        return now


class DiskThrottle:
    """All that holds one disk back: rates, and whatever else its lanes have to wait for.

    Each of ``throttles`` is asked when those before it have let a request through, so the narrowest
    goes first. ``must_wait`` tells whether nothing may be sent just now, whatever the rates.
    """

    def __init__(
        self, throttles: Sequence[Throttle], must_wait: Callable[[], bool] | None = None
    ) -> None:
        self._throttles = tuple(throttles)
        self.must_wait = must_wait
        self._passed: dict[Hashable, tuple[int, int]] = {}  # who: how many, with how many bytes

    @property
    def rate(self) -> int | None:
        """The lowest rate now, in bytes a second; None where there is no limit."""
        rates = [rate for each in self._throttles if (rate := each.rate) is not None]
        return min(rates, default=None)

    def take(self, length: int, who: Hashable) -> float:
        """Return how many seconds to wait before asking again (at most 0.1); 0.0: send now.

        ``who`` asks for the same length until it may go, or leaves.
        """
        if self.must_wait is not None and self.must_wait():
            return STANDSTILL_S
        passed, _ = self._passed.get(who, (0, 0))
        for at in range(passed, len(self._throttles)):
            wait = self._throttles[at].take(length, who, self)
            if wait > 0:
                if at:
                    self._passed[who] = at, length
                return wait
        self._passed.pop(who, None)
        return 0.0

    def leave(self, who: Hashable) -> None:
        """Give up the places of ``who``, which waits no more."""
        passed, length = self._passed.pop(who, (0, 0))
        for throttle in self._throttles[:passed]:
            throttle.give_back(length)
        for throttle in self._throttles:
            throttle.leave(who)


def request_limit(rate: int | None) -> int | None:
    """Return the largest request, in bytes, that keeps ``rate`` smooth; None where any does.

    A twentieth of a second's worth, as a power of two so that requests stay aligned, and at least
    4 KiB. A server's minimum block size goes before it.
    """
    if rate is None:
        return None
    return max(SMALLEST_REQUEST, 1 << max(0, int(rate * REQUEST_S).bit_length() - 1))


def smoothed(throttle: DiskThrottle | None, size: int, block: int) -> int:
    """Return how much of ``size`` bytes, in whole blocks, one request may have."""
    limit = request_limit(throttle.rate) if throttle is not None else None
    return size if limit is None else min(size, max(limit // block * block, block))


def _checked(rate: int | None) -> int | None:
    if rate is not None and rate <= 0:
        raise ValueError(f"no rate: {rate} bytes a second")
    return rate
