"""A server and the lanes that read from it, in simulated time: what a tuner sees, in milliseconds.

::

    slots of a lane ──send──> wait for one of the server's threads ──> delay ──> wire ──> answer
          ^                                                                            │
          └──────────── the target takes it (write_s) <── the tuner is told ───────────┘
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from random import Random

from v2v_async.copy.tuning import Setting, Tuner


@dataclass(frozen=True)
class ServerKind:
    """How a server answers. Seconds, and bytes a second.

    ``width``: requests of a connection that it works on at a time. ``is_serialised``: one request
    of all connections at a time. ``jitter``: 0.5 means that a delay is 50% to 150% of what it says.
    """

    delay_s: float
    bandwidth: float = 4e9
    connection_bandwidth: float = inf
    width: int = 16
    is_serialised: bool = False
    jitter: float = 0.0


@dataclass(eq=False)
class SimulatedLane:
    """A connection: what it has on its way, and when its wire is free."""

    slots: int = 0
    busy: int = 0
    wire_free: float = 0.0
    queue: deque[Request] = field(default_factory=deque)


@dataclass(eq=False)
class Request:
    """A read that is on its way."""

    lane: SimulatedLane
    sent: float
    length: int


class Simulation:
    """Reads ``total`` bytes with lanes that follow ``tuner`` as those of the engine do.

    Connections come ``connect_s`` after they were asked for; those that are not wanted any more
    end with their next answers.
    """

    def __init__(
        self,
        kind: ServerKind,
        tuner: Tuner,
        *,
        seed: int = 0,
        write_s: float = 0.0003,
        connect_s: float = 0.3,
    ) -> None:
        self.kind = kind
        self.tuner = tuner
        self.random = Random(seed)
        self.write_s = write_s
        self.connect_s = connect_s
        self.now = 100.0
        self.settings: list[tuple[float, Setting]] = [(self.now, tuner.setting)]
        self.answers: list[tuple[float, int]] = []
        self.in_flight = self.most_in_flight = 0
        self.settled_at: int | None = None
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._lanes: list[SimulatedLane] = []
        self._opening = 0
        self._left = 0
        self._busy = 0
        self._queue: deque[Request] = deque()
        self._wire_free = 0.0

    def run(self, total: int, *, until_settled: bool = False) -> Simulation:
        """Read so many bytes, or fewer where the tuner is settled before."""
        self._left = total
        for _ in range(self.tuner.setting.connections):
            self._lanes.append(SimulatedLane())
        self._follow()
        while self._events and not (until_settled and self.tuner.is_settled):
            self.now, _, act = heapq.heappop(self._events)
            act()
        return self

    @property
    def rate(self) -> float:
        """Bytes a second over all of the run."""
        return sum(length for _, length in self.answers) / (self.now - self.settings[0][0])

    def read_before(self, moment: float) -> int:
        """Return the bytes that had been read at a moment."""
        return sum(length for at, length in self.answers if at < moment)

    def _at(self, when: float, act: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, act))

    # The client.

    def _follow(self) -> None:
        """Have as many lanes and slots as are wanted."""
        setting = self.tuner.setting
        while len(self._lanes) + self._opening < setting.connections:
            self._opening += 1
            self._at(self.now + self.connect_s, self._open)
        for lane in self._lanes[: setting.connections]:
            while lane.slots < setting.depth and self._left:
                lane.slots += 1
                self._send(lane)

    def _open(self) -> None:
        self._opening -= 1
        if len(self._lanes) < self.tuner.setting.connections:
            self._lanes.append(SimulatedLane())
            self._follow()

    def _send(self, lane: SimulatedLane) -> None:
        setting = self.tuner.setting
        is_over = lane not in self._lanes[: setting.connections]
        if not self._left or lane.slots > setting.depth or is_over:
            lane.slots -= 1
            if is_over and not lane.slots and lane in self._lanes:
                self._lanes.remove(lane)
            return
        length = min(setting.request_size, self._left)
        self._left -= length
        self.in_flight += length
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        queue = self._queue if self.kind.is_serialised else lane.queue
        queue.append(Request(lane, self.now, length))
        self._serve(lane)

    # The server.

    def _serve(self, lane: SimulatedLane) -> None:
        kind = self.kind
        queue = self._queue if kind.is_serialised else lane.queue
        while queue and (self._busy < 1 if kind.is_serialised else lane.busy < kind.width):
            request = queue.popleft()
            request.lane.busy += 1
            self._busy += 1
            delay = kind.delay_s * (1 + self.random.uniform(-kind.jitter, kind.jitter))
            self._at(self.now + delay, lambda request=request: self._transmit(request))  # type: ignore[misc]

    def _transmit(self, request: Request) -> None:
        kind, lane = self.kind, request.lane
        self._wire_free = max(self.now, self._wire_free) + request.length / kind.bandwidth
        lane.wire_free = max(self.now, lane.wire_free) + request.length / kind.connection_bandwidth
        self._at(max(self._wire_free, lane.wire_free), lambda: self._answer(request))

    def _answer(self, request: Request) -> None:
        lane, tuner = request.lane, self.tuner
        lane.busy -= 1
        self._busy -= 1
        self._serve(lane)
        self.in_flight -= request.length
        self.answers.append((self.now, request.length))
        was_settled = tuner.is_settled
        has_changed = tuner.note(self.now, request.sent, request.length)
        if has_changed:
            self.settings.append((self.now, tuner.setting))
            self._follow()
        if tuner.is_settled and not was_settled:
            self.settled_at = len(self.answers)
        self._at(self.now + self.write_s, lambda: self._send(lane))
