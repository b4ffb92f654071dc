"""What stands in front of each service in tests: it counts, passes on, and fails as arranged.

::

    client ──> Front (a port of its own) ──┬─ a fault: another status, a cut connection, silence
                                           ├─ an App in this process (the stand-ins)
                                           └─ a real service on a Unix socket

It runs in a process of its own, ``python -m tests.services.openstack``.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any
from urllib.parse import parse_qs, urlsplit

_CHUNK = 1 << 16
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade"}


@dataclass
class Request:
    """What a stand-in gets. ``query`` has the last value of each name."""

    method: str
    path: str
    query: dict[str, str]
    headers: Mapping[str, str]
    body: Any


Answer = tuple[int, Any]
"""Status, and what is sent as JSON (nothing for None)."""
App = Callable[[Request], Answer]


@dataclass
class Fault:
    """What goes wrong when ``method path`` (regular expressions, whole) comes ``times`` times.

    ``status``: answered in the service's place, with ``body``; ``drop``: ``before`` the service
    sees the request, in the ``middle`` of a body, or ``after`` it was done; ``hang``: no answer,
    ever. ``skip``: so many pass first.
    """

    service: str
    method: str
    path: str
    status: int | None = None
    body: Any = None
    drop: str | None = None
    hang: bool = False
    skip: int = 0
    times: int = 1_000_000


@dataclass
class Shared:
    """What all fronts of a cloud know together."""

    faults: list[Fault] = field(default_factory=list)
    calls: list[list[Any]] = field(default_factory=list)
    """Service, method, path, status; and the JSON that a stand-in got (others get passwords)."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: threading.Event = field(default_factory=threading.Event)

    def fault(self, service: str, method: str, path: str) -> Fault | None:
        """Return what is to go wrong with this request."""
        with self.lock:
            for fault in self.faults:
                if fault.service != service or fault.times < 1:
                    continue
                if re.fullmatch(fault.method, method) and re.fullmatch(fault.path, path):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None


class Front(ThreadingHTTPServer):
    """One service's port."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self, service: str, shared: Shared, *, app: App | None = None, socket_: Path | None = None
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.service = service
        self.shared = shared
        self.app = app
        self.socket_path = socket_
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is nothing to tell of."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=120)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body are sent one after the other: Nagle's algorithm held each body up for 40 ms.
    disable_nagle_algorithm = True
    server: Front

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: calls are counted instead."""

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        shared = self.server.shared
        fault = shared.fault(self.server.service, self.command, parts.path)
        call: list[Any] = [self.server.service, self.command, parts.path, None, None]
        with shared.lock:
            shared.calls.append(call)
        if fault is not None and self._fails(fault, length, call):
            return
        if self.server.app is not None:
            status, answer = self._ask_app(parts.path, parts.query, length, call)
            headers = {"Content-Type": "application/json"}
            content = b"" if answer is None else json.dumps(answer).encode()
        else:
            try:
                status, headers, content = self._pass_on(length)
            except Exception:
                status, headers = 502, {"Content-Type": "text/plain"}
                content = traceback.format_exc().encode()
                self.close_connection = True
        call[3] = status
        if fault is not None and fault.drop == "after":
            self._drop()
            return
        self._answer(status, headers, content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _handle

    def _fails(self, fault: Fault, length: int, call: list[Any]) -> bool:
        if fault.hang:
            self.server.shared.ended.wait()
            self._drop()
        elif fault.drop == "before":
            self._drop()
        elif fault.drop == "middle":
            self.rfile.read(length // 2)
            self._drop()
        elif fault.status is not None:
            self._read(length)
            call[3] = fault.status
            content = json.dumps(fault.body).encode() if fault.body is not None else b""
            self._answer(fault.status, {"Content-Type": "application/json"}, content)
        else:
            return False
        return True

    def _read(self, length: int) -> bytes:
        return self.rfile.read(length) if length else b""

    def _ask_app(self, path: str, query: str, length: int, call: list[Any]) -> Answer:
        assert self.server.app is not None
        content = self._read(length)
        request = Request(
            self.command,
            path,
            {name: values[-1] for name, values in parse_qs(query).items()},
            dict(self.headers.items()),
            json.loads(content) if content else None,
        )
        call[4] = request.body
        try:
            return self.server.app(request)
        except Exception:
            # A mistake of ours must be seen in the test that met it.
            return 500, {"error": {"code": 500, "message": traceback.format_exc()}}

    def _pass_on(self, length: int) -> tuple[int, dict[str, str], bytes]:
        assert self.server.socket_path is not None
        backend = _UnixConnection(self.server.socket_path)
        try:
            backend.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP_BY_HOP:
                    backend.putheader(name, value)
            body: Any = self.rfile
            if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                # glanceclient sends chunks, which uwsgi does not take.
                body = self._unchunked()
                length = body.seek(0, os.SEEK_END)
                body.seek(0)
                backend.putheader("Content-Length", str(length))
            backend.endheaders()
            left = length
            while left:
                chunk = body.read(min(_CHUNK, left))
                if not chunk:
                    raise ConnectionError("the client went away")
                left -= len(chunk)
                try:
                    backend.send(chunk)
                except BrokenPipeError:
                    # It has answered before it saw everything: that answer is wanted.
                    body.read(left)
                    break
            response = backend.getresponse()
            content = response.read()
            headers = {
                name: value
                for name, value in response.getheaders()
                if name.lower() not in (_HOP_BY_HOP | {"content-length", "server", "date"})
            }
            return response.status, headers, content
        finally:
            backend.close()

    def _unchunked(self) -> IO[bytes]:
        """Return the body of a request that came in chunks."""
        whole = tempfile.TemporaryFile()  # noqa: SIM115 - it goes with its last reference
        while size := int(self.rfile.readline().split(b";")[0], 16):
            whole.write(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return whole

    def _answer(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD" and status != 204:
            self.wfile.write(content)

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
