"""What a server was really asked: the log of nbdkit's log filter, read back.

Source: nbdkit-log-filter(1), "LOG FILE FORMAT".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from v2v_async.copy.ranges import Ranges

_LINE = re.compile(
    r"^(?P<time>\S+ \S+) connection=(?P<connection>\d+) "
    r"(?P<dots>\.\.\.)?(?P<op>[A-Z]\w+)(?P<rest>.*)$"
)
_WORD = re.compile(r"(\w+)=(\S+)")
DATA = frozenset({"Read", "Write"})


@dataclass
class Request:
    """One request; ``began`` and ``ended`` are places in the order of all lines of all logs."""

    connection: tuple[str, int]
    op: str
    offset: int
    length: int
    words: dict[str, str]
    began: int
    ended: int = 1 << 60
    error: str | None = None

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + self.length


@dataclass
class RequestLog:
    """Requests in the order in which the servers began them, and how many clients they had."""

    requests: list[Request] = field(default_factory=list)
    most_connections: int = 0
    connects: int = 0

    def of(self, *ops: str, failed: bool = False) -> list[Request]:
        """Return the requests of some kinds, those that the server refused only with ``failed``."""
        return [r for r in self.requests if r.op in ops and (failed or r.error is None)]

    def ranges(self, *ops: str) -> Ranges:
        """Return the bytes that good requests of some kinds have covered."""
        covered = Ranges()
        for request in self.of(*ops):
            covered.add(request.offset, request.length)
        return covered

    def most_at_once(self) -> int:
        """Return the most reads and writes that one connection had at a time."""
        of_each: dict[tuple[str, int], list[tuple[Request, int]]] = {}
        for request in self.of(*DATA, failed=True):
            of_each.setdefault(request.connection, []).append((request, 1))
        return max((self._peak(each) for each in of_each.values()), default=0)

    def most_bytes(self) -> int:
        """Return the most bytes that all connections together had in reads and writes."""
        return self._peak((r, r.length) for r in self.of(*DATA, failed=True))

    @staticmethod
    def _peak(weighed: Iterable[tuple[Request, int]]) -> int:
        steps = []
        for request, weight in weighed:
            steps += [(request.began, weight), (request.ended, -weight)]
        now = most = 0
        for _, weight in sorted(steps):
            now += weight
            most = max(most, now)
        return most


def read_logs(*paths: Path) -> RequestLog:
    """Read the logs of one or more servers, merged by their time stamps."""
    lines = [
        (match["time"], str(path), at, match)
        for path in paths
        for at, line in enumerate(path.read_text().splitlines())
        if (match := _LINE.match(line))
    ]
    log = RequestLog()
    waiting: dict[tuple[str, str, str], Request] = {}
    clients = 0
    for at, (_, path, _, match) in enumerate(sorted(lines, key=lambda line: line[:3])):
        op, words = match["op"], dict(_WORD.findall(match["rest"]))
        key = (path, match["connection"], words.get("id", ""))
        if op == "Connect":
            clients += 1
            log.connects += 1
            log.most_connections = max(log.most_connections, clients)
        elif op == "Disconnect":
            clients -= 1
        elif match["dots"]:
            request = waiting.pop(key)
            request.ended, request.error = at, words.get("error")
        else:
            request = waiting[key] = Request(
                (path, int(match["connection"])),
                op,
                int(words.get("offset", "0"), 16),
                int(words.get("count", "0"), 16),
                words,
                at,
            )
            log.requests.append(request)
    return log
