"""Keep the bytes that all lanes together let through to a rate, and let a person change it.

::

    credit   ──┐ grows by the rate, to at most 0.1 s of it; below zero it is a debt
               ▼
    waiting  [lane 3: 512 KiB] [lane 0: 512 KiB] [lane 7: 64 KiB]     first come, first served
             may go when the credit covers what waits before it, even if not itself

A lane that may not go yet is told how long to wait and asks again; nothing is promised to it
meanwhile, so a new rate, or a request that was cut smaller, counts from the next time it asks.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable, Hashable
from pathlib import Path

from v2v_async.units import KIB, parse_rate

# What may be saved up while nobody asks. It makes up for lanes that wake late (poll(2) and the
# interpreter are good for some milliseconds), and is 2% of five seconds.
BURST_S = 0.1
# Nobody waits longer without asking again, so that a new rate is heard of at once.
MAX_WAIT_S = 0.1
# Nor shorter: poll(2) counts whole milliseconds, and the credit gives back what is lost.
MIN_WAIT_S = 0.002
# A lane that has not asked for so long after it should have is gone, and its place with it.
GONE_S = 0.1
# How much of a second one request may take: more makes waves, less costs calls (20 a second).
REQUEST_S = 1 / 20
# The block of file systems and of most servers: smaller ones cost a read for each write. It keeps
# to 10% in 5 s down to 10 kB/s (0.4 s a request); who wants less can't want it smooth.
SMALLEST_REQUEST = 4 * KIB


class Throttle:
    """A rate in bytes a second (None: no limit) that lanes in any threads share.

    Over any time t, at most ``rate * (t + 0.1 s)`` bytes and one request more are let through, and
    a new rate adds at most one request. Lanes that always want more get that rate, and each of
    them the same number of requests.
    """

    def __init__(
        self, rate: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._rate = _checked(rate)
        self._credit = 0.0  # bytes
        self._settled = clock()
        self._waiting: dict[Hashable, tuple[int, float]] = {}  # who: length, when it is gone

    @property
    def rate(self) -> int | None:
        """The rate now, in bytes a second; None where there is no limit."""
        return self._rate

    def take(self, length: int, who: Hashable = None) -> float:
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
            before = 0
            for other, (wanted, gone) in list(self._waiting.items()):
                if other == who:
                    break
                if now > gone:
                    del self._waiting[other]
                else:
                    before += wanted
            if before <= self._credit:
                self._waiting.pop(who, None)
                self._credit -= length
                return 0.0
            wait = min(max((before - self._credit) / rate, MIN_WAIT_S), MAX_WAIT_S)
            self._waiting[who] = length, now + wait + GONE_S
            return wait

    def leave(self, who: Hashable) -> None:
        """Give up the place of ``who``, which waits no more. Others would wait 0.2 s for it."""
        with self._lock:
            self._waiting.pop(who, None)

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


def request_limit(rate: int | None) -> int | None:
    """Return the largest request, in bytes, that keeps ``rate`` smooth; None where any does.

    A twentieth of a second's worth, as a power of two so that requests stay aligned, and at least
    4 KiB. A server's minimum block size goes before it.
    """
    if rate is None:
        return None
    return max(SMALLEST_REQUEST, 1 << max(0, int(rate * REQUEST_S).bit_length() - 1))


def smoothed(throttle: Throttle | None, size: int, block: int) -> int:
    """Return how much of ``size`` bytes, in whole blocks, one request may have."""
    limit = request_limit(throttle.rate) if throttle is not None else None
    return size if limit is None else min(size, max(limit // block * block, block))


class RateFile:
    """A file that tells the rate and may change at any time, as virt-v2v's ``--bandwidth-file``.

    Its first line is a rate as for ``--bandwidth``, or 0 or ``unlimited`` for no limit. A file that
    is missing, empty or not understood changes nothing: the last rate goes on. Source:
    nbdkit-rate-filter(1), "DYNAMIC ADJUSTMENT", and what nbdkit 1.32 does with 0 and with errors.
    """

    def __init__(self, path: Path, rate: int | None = None) -> None:
        self.path = path
        self._rate = rate
        self._content: str | None = None

    @property
    def rate(self) -> int | None:
        """The rate last told, in bytes a second (at first that of ``--bandwidth``)."""
        return self._rate

    def poll(self) -> str | None:
        """Read the file again; return a warning where its content is new and not understood.

        It is read whole each time, which costs no more than asking whether it has changed, and no
        clock or file system can hide a change.
        """
        try:
            content = self._read()
        except FileNotFoundError:
            self._content = None
            return None
        except OSError as error:
            content = f"\0{error.errno}"  # never the content of a file that was read
            problem = error.strerror or str(error)
        else:
            problem = ""
        if content == self._content:
            return None
        self._content = content
        line = content.partition("\n")[0].strip()
        if not problem and not line:
            return None
        if not problem:
            try:
                is_unlimited = line.lower() == "unlimited" or (line.isdecimal() and int(line) == 0)
                self._rate = None if is_unlimited else parse_rate(line)
                return None
            except ValueError as error:
                problem = str(error)
        return f"--bandwidth-file {self.path}: {problem}; the last rate is kept"

    def _read(self) -> str:
        # Nothing that is named here may hang the copy: O_NONBLOCK opens a pipe at once.
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(0, "not a regular file")
            return os.read(fd, 256).decode("utf-8", "replace")
        finally:
            os.close(fd)


def _checked(rate: int | None) -> int | None:
    if rate is not None and rate <= 0:
        raise ValueError(f"no rate: {rate} bytes a second")
    return rate
