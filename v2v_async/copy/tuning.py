"""Finds request size, depth and connections by what they bring. Pure: the caller has the clock.

A local server answers in less than a millisecond, and more in flight only empties the processor's
cache; over a link with 50 ms, throughput is what is in flight divided by those 50 ms. So the tuner
begins with what suits a local one, and where answers are slow it tries one larger setting after
another, keeping each that brings more::

    start ──(answers are fast)──> settled
      └─(slow)─> size ×4 ──> depth ×4 ──> connections ×2 …    each measured for a round, and
                                                              taken back where it brought little

Larger requests come first: they help where a server works on one at a time, too. A round is as
long as a few answers take, so that all in it was asked for with the setting that it measures.
"""

from __future__ import annotations

from dataclasses import dataclass

# Answers from a local server under full load take 1-4 ms (8 requests of 1 MiB at 2-4 GiB/s); a
# network, a disk that seeks or a cloud store takes more.
SLOW_S = 0.010
# Less is noise on a busy machine.
_WORTH_IT = 1.25
_SAMPLES = 4
_ROUND_S = 0.1
# nbdkit works on 16 requests of a connection at a time; more would only wait there.
MAX_DEPTH = 16


@dataclass(frozen=True, slots=True)
class Setting:
    """Bytes a request, requests on a connection, connections of a disk."""

    request_size: int
    depth: int
    connections: int

    @property
    def in_flight(self) -> int:
        """Bytes on their way when all of it is used."""
        return self.request_size * self.depth * self.connections


@dataclass(frozen=True, slots=True)
class Limits:
    """The most of each; ``in_flight`` is bytes. A limit equal to the start means: leave it."""

    request_size: int
    depth: int
    connections: int
    in_flight: int


class Tuner:
    """Chooses the :class:`Setting` of one disk. Used by one thread at a time."""

    def __init__(self, start: Setting, limits: Limits) -> None:
        self.setting = start
        self.is_settled = False
        self.limits = limits
        self._before: Setting | None = None
        self._before_rate = 0.0
        self._tried: set[str] = set()
        self._changed_at: float | None = None
        self._fastest_s = float("inf")
        self._samples = 0
        self._bytes = 0
        self._since = 0.0

    def note(self, now: float, sent: float, length: int) -> bool:
        """Take in that a read of ``length`` bytes, sent at ``sent``, was answered at ``now``.

        Return whether :attr:`setting` has changed. Times are seconds of one clock.
        """
        if self.is_settled:
            return False
        if self._changed_at is None:
            self._changed_at = self._since = sent
        took = now - sent
        self._fastest_s = min(self._fastest_s, took)
        if sent < self._changed_at:
            return False  # asked for with the setting before
        if self._samples == 0:
            self._since = now - took if self._before is None else now
            # The first answer of a round only marks its beginning.
            self._bytes = length if self._before is None else 0
        else:
            self._bytes += length
        self._samples += 1
        if self._samples < _SAMPLES:
            return False
        if self._before is None and self._fastest_s < SLOW_S:
            self.is_settled = True
            return False
        elapsed = now - self._since
        if elapsed < min(_ROUND_S, 2 * self._fastest_s):
            return False
        return self._judge(now, self._bytes / elapsed if elapsed > 0 else 0.0)

    def _judge(self, now: float, rate: float) -> bool:
        was = self.setting
        if self._before is None or rate >= self._before_rate * _WORTH_IT:
            self._before_rate = rate
        else:
            # It brought little: back, and the other ways are tried.
            self.setting = self._before
        self._before = self.setting
        larger = self._larger()
        if larger is None:
            self.is_settled = True
        else:
            self.setting = larger
        self._changed_at = now
        self._samples = self._bytes = 0
        return self.setting != was

    def _larger(self) -> Setting | None:
        """Return the next setting to try, None when none is left."""
        now, limits = self.setting, self.limits
        tries = {
            "size": Setting(
                min(now.request_size * 4, limits.request_size), now.depth, now.connections
            ),
            "depth": Setting(now.request_size, min(now.depth * 4, limits.depth), now.connections),
            "connections": Setting(
                now.request_size, now.depth, min(now.connections * 2, limits.connections)
            ),
        }
        for name, setting in tries.items():
            if name in self._tried:
                continue
            setting = self._within(setting)
            # Connections may double more than once.
            if name != "connections" or setting.connections == limits.connections:
                self._tried.add(name)
            if setting.in_flight > now.in_flight:
                return setting
            self._tried.add(name)
        return None

    def _within(self, setting: Setting) -> Setting:
        """Keep within the bytes in flight: fewer requests rather than smaller ones."""
        room = self.limits.in_flight // (setting.request_size * setting.connections)
        return Setting(setting.request_size, max(1, min(setting.depth, room)), setting.connections)
