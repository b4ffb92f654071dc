"""A batch that is only events, served as a real one is; and the requests that tests make."""

from __future__ import annotations

import gzip
import http.client
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from subprocess import PIPE, Popen
from typing import Any
from urllib.parse import urlsplit

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import ROOT
from v2v_async.events import Bytes, Event
from v2v_async.render.batch_state import BatchState
from v2v_async.web.server import serving

TOKEN = "T0ken-of_the-run"
GIB = 1 << 30
WITHIN_S = 15.0


@dataclass(frozen=True)
class Answer:
    """What a server said. ``text`` is unpacked."""

    status: int
    headers: dict[str, str]
    text: str
    cookies: list[str] = field(default_factory=list)

    def json(self) -> Any:
        """Return the body as JSON."""
        return json.loads(self.text)


class BatchServer:
    """A server of a batch, to be asked."""

    def __init__(self, url: str, token: str | None) -> None:
        self.url = url
        self.token = token
        self.port = urlsplit(url).port or 0
        self.origin = f"http://127.0.0.1:{self.port}"

    def get(
        self,
        path: str,
        *,
        token: str | None = None,
        method: str = "GET",
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """Ask for ``path``, by default with the token; never follow a redirect."""
        token = self.token if token is None else token
        wanted = {"Authorization": f"Bearer {token}"} if token else {}
        return ask(self.port, path, method=method, headers=wanted | (headers or {}))

    @contextmanager
    def stream(self, path: str, *, buffer: int | None = None) -> Iterator[socket.socket]:
        """Have a connection that asked for a stream; ``buffer``: bytes that it takes unread."""
        with socket.socket() as made:
            if buffer is not None:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            made.settimeout(WITHIN_S)
            made.connect(("127.0.0.1", self.port))
            made.sendall(
                f"GET {path} HTTP/1.1\r\nHost: localhost\r\n"
                f"Authorization: Bearer {self.token}\r\n\r\n".encode()
            )
            yield made


class ServedBatch(BatchServer):
    """One of this process, with a batch that events can be emitted into."""

    def __init__(
        self,
        portal: BlockingPortal,
        state: BatchState,
        publish: Callable[[Event], None],
        url: str,
        token: str | None,
    ) -> None:
        super().__init__(url, token)
        self._portal = portal
        self._publish = publish
        self.state = state

    def send(self, *events: Event) -> None:
        """Have the supervisor's loop take in events."""

        def take() -> None:
            for event in events:
                self.state.apply(event)
                self._publish(event)

        self._portal.call(take)

    def emit(self, type_: str, guest: str | None = None, **fields: Any) -> None:
        """Have one event happen now."""
        self.send(made(type_, guest, **fields))

    def plan(self, guests: int | list[str], *, disks: tuple[int, ...] = (GIB,)) -> list[str]:
        """Begin the run, with guests that have disks of so many bytes; return their names."""
        names = guests if isinstance(guests, list) else [f"g{n:03}" for n in range(1, guests + 1)]
        details: dict[str, Any] = {"program": "v2v-async", "batch": "move-it", "guests": len(names)}
        events = [made("started", details=details)]
        for name in names:
            plan = {"disks": list(disks), "phase": "waiting", "priority": 0, "group": None}
            events.append(made("planned", name, details=plan))
        self.send(*events)
        return names

    def copy(self, guest: str, copied: int, *, disk: int = 1, data: int = GIB) -> None:
        """Have a guest's disk be copied so far."""
        b = Bytes(total=2 * data, data=data, copied=copied)
        self.emit("progress", guest, step="copy", disk=disk, bytes=b)


def ask(
    port: int, path: str, *, method: str = "GET", headers: dict[str, str] | None = None
) -> Answer:
    """Ask a server of this machine."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WITHIN_S)
    try:
        connection.request(method, path, headers=headers or {})
        answer = connection.getresponse()
        body = answer.read()
        found = {name.lower(): value for name, value in answer.getheaders()}
        if found.get("content-encoding") == "gzip" and body:
            body = gzip.decompress(body)
        cookies = answer.headers.get_all("set-cookie") or []
        return Answer(answer.status, found, body.decode(), cookies)
    finally:
        connection.close()


def made(type_: str, guest: str | None = None, **fields: Any) -> Event:
    """Return an event of now."""
    return Event(time=time.time(), run="run-1", type=type_, guest=guest, **fields)


@contextmanager
def served(address: str = "127.0.0.1:0", *, token: str | None = TOKEN) -> Iterator[ServedBatch]:
    """Serve a batch from an event loop in a thread of its own."""
    state = BatchState()
    urls: list[str] = []
    with start_blocking_portal() as portal:
        block = serving(state, address, token=token, on_listening=urls.append)
        with portal.wrap_async_context_manager(block) as publish:
            yield ServedBatch(portal, state, publish, urls[0], token)


@pytest.fixture
def batch() -> Iterator[ServedBatch]:
    """A batch of three guests."""
    with served() as made:
        made.plan(3)
        yield made


def samples(text: str, content_type: str = "") -> dict[tuple[str, ...], float]:
    """Return what metrics say, by their name and the values of their labels."""
    parse = (
        openmetrics.text_string_to_metric_families
        if "openmetrics" in content_type
        else text_string_to_metric_families
    )
    found = {}
    for family in parse(text):
        assert family.documentation
        for sample in family.samples:
            assert family.type in ("gauge", "counter")
            if family.type == "counter":
                assert sample.name.endswith(("_total", "_created"))
            labels = (sample.labels[name] for name in sorted(sample.labels))
            found[(sample.name, *labels)] = sample.value
    return found


class Messages:
    """Reads Server-Sent Events from a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._file = connection.makefile("rb")
        self.status = int(self._file.readline().split()[1])
        while self._file.readline() not in (b"\r\n", b""):
            pass
        self._text = ""

    def close(self) -> None:
        """Give back the file; the connection is not this one's."""
        self._file.close()

    def next(self) -> tuple[str, Any] | None:
        """Return the next message's event and JSON; None at the end of the stream."""
        while True:
            while "\n\n" not in self._text:
                size = int(self._file.readline() or b"0", 16)
                if not size:
                    return None
                self._text += self._file.read(size).decode()
                self._file.readline()
            text, _, self._text = self._text.partition("\n\n")
            fields = dict(line.split(": ", 1) for line in text.split("\n") if line[0] != ":")
            if "data" in fields:
                return fields.get("event", "message"), json.loads(fields["data"])

    def until(self, wanted: Callable[[str, Any], bool]) -> Any:
        """Return the JSON of the first message that is wanted."""
        while (message := self.next()) is not None:
            if wanted(*message):
                return message[1]
        raise AssertionError("the stream ended first")


@contextmanager
def another_process(address: str = "127.0.0.1:0") -> Iterator[tuple[BatchServer, Popen[str]]]:
    """Have a server of three guests whose process may be killed, and whose sockets are not ours."""
    command = [sys.executable, "-m", "tests.web_batch", address]
    with Popen(command, stdout=PIPE, text=True, cwd=ROOT) as child:
        try:
            assert child.stdout is not None
            yield BatchServer(child.stdout.readline().strip(), TOKEN), child
        finally:
            child.kill()


def main() -> None:
    """Serve a batch of three guests at ``argv[1]`` until somebody kills this."""
    with served(sys.argv[1]) as batch:
        batch.plan(3)
        print(batch.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
