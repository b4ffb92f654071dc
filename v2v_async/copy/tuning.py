"""Finds request size, depth and connections by what they bring. Pure: the caller has the clock.

A local server answers in less than a millisecond, and more in flight only empties the processor's
cache; over a link with 50 ms, throughput is what is in flight divided by those 50 ms. So the tuner
begins with what suits a local one, and where answers are slow it tries one larger setting after
another, keeping each that brings more::

    start ──(answers are fast)──> settled
      └─(slow)─> size ×4 ──> depth ×4 ──> connections ×2 …    each measured for a round, and
                                                              taken back where it brought little

Larger requests come first: they help where a server works on one at a time, too. A round counts in
*waves*, each of them as many answers as there may be requests on their way: answers come in bursts,
and only whole waves take as long as they seem to::

    change │ answers of before │ one wave: queues fill │ one or two waves: measured │ judged
"""

from __future__ import annotations

from dataclasses import dataclass

# Answers from a local server under full load take 1-4 ms (8 requests of 1 MiB at 2-4 GiB/s); a
# network, a disk that seeks or a cloud store takes more.
SLOW_S = 0.010
# Less is noise, or not worth four times the memory (tests/unit/test_copy_tuning.py has servers
# whose delays vary by 90%).
_WORTH_IT = 1.4
# So much more needs no second wave.
_PLAINLY_WORTH_IT = 2.0
# Of so many first answers half must be slow: a local server may have to wake up, and one far away
# answers some requests soon.
_FIRST_ANSWERS = 16
_MEASURED_WAVES = 2
# Waves of few answers tell little.
_FEWEST_MEASURED = 16
# More connections come late: the driver looks five times a second, and each one needs round trips
# (TLS over TCP about ten); until then nothing of them can be measured.
_CONNECTING_S = 0.5
_CONNECTING_ANSWERS = 10
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
        self._kept: Setting | None = None
        self._kept_rate = 0.0
        self._tried: set[str] = set()
        self._fastest_s = float("inf")
        self._changed_at: float | None = None
        self._quick = 0
        self._answers = 0
        self._measured = 0
        self._bytes = 0
        self._since = 0.0

    def note(self, now: float, sent: float, length: int) -> bool:
        """Take in that a read of ``length`` bytes, sent at ``sent``, was answered at ``now``.

        Return whether :attr:`setting` has changed. Times are seconds of one clock.
        """
        if self.is_settled:
            return False
        if self._changed_at is None:
            self._changed_at = sent
        self._fastest_s = min(self._fastest_s, now - sent)
        if sent < self._changed_at:
            return False  # asked for with the setting before
        self._answers += 1
        is_first_round = self._kept is None
        if is_first_round:
            self._quick += now - sent < SLOW_S
            if self._answers == _FIRST_ANSWERS and 2 * self._quick >= _FIRST_ANSWERS:
                self.is_settled = True
                return False
        wave = self.setting.depth * self.setting.connections
        if self._answers <= wave or now < self._changed_at + self._pause_s():
            self._since = now
            return False
        self._measured += 1
        self._bytes += length
        if self._measured < max(_FEWEST_MEASURED, wave):
            return False
        rate = self._bytes / max(now - self._since, 1e-9)
        is_plain = not is_first_round and rate >= self._kept_rate * _PLAINLY_WORTH_IT
        if is_plain or self._measured >= max(_FEWEST_MEASURED, _MEASURED_WAVES * wave):
            return self._judge(now, rate)
        return False

    def _pause_s(self) -> float:
        """Return how long after a change nothing is measured."""
        if self._kept is None or self.setting.connections <= self._kept.connections:
            return 0.0
        return _CONNECTING_S + _CONNECTING_ANSWERS * self._fastest_s

    def _judge(self, now: float, rate: float) -> bool:
        was = self.setting
        if self._kept is None or rate >= self._kept_rate * _WORTH_IT:
            self._kept, self._kept_rate = was, rate
        else:
            # It brought little: back, and the other ways are tried.
            self.setting = self._kept
            if was.connections > self._kept.connections:
                self._tried.add("connections")
        larger = self._larger()
        if larger is None:
            self.is_settled = True
        else:
            self.setting = larger
        self._changed_at = now
        self._answers = self._measured = self._bytes = 0
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
            if now.in_flight < setting.in_flight <= limits.in_flight:
                return setting
            self._tried.add(name)
        return None

    def _within(self, setting: Setting) -> Setting:
        """Keep within the bytes in flight: fewer requests rather than smaller ones."""
        room = self.limits.in_flight // (setting.request_size * setting.connections)
        return Setting(setting.request_size, max(1, min(setting.depth, room)), setting.connections)
