"""An HTTP server of files that knows Range requests, as disks behind nbdkit's curl plugin want."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body are sent one after the other: Nagle's algorithm held each body up for 40 ms.
    disable_nagle_algorithm = True
    server: RangeServer

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        address = urlsplit(self.path)
        file = self.server.folder / unquote(address.path).lstrip("/")
        if self.server.failures > 0 and with_body:
            self.server.failures -= 1
            self._headers(HTTPStatus.SERVICE_UNAVAILABLE, 0)
            return
        if not file.is_file() or (self.server.query and address.query != self.server.query):
            self._headers(HTTPStatus.NOT_FOUND, 0)
            return
        size = file.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(wanted[1]) if wanted else 0
        last = min(int(wanted[2]) if wanted and wanted[2] else size - 1, size - 1)
        status = HTTPStatus.PARTIAL_CONTENT if wanted else HTTPStatus.OK
        self._headers(status, last - first + 1, f"bytes {first}-{last}/{size}")
        if with_body:
            with file.open("rb") as content, contextlib.suppress(ConnectionError):
                content.seek(first)
                self.wfile.write(content.read(last - first + 1))

    def _headers(self, status: HTTPStatus, length: int, content_range: str = "") -> None:
        self.send_response(status)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(length))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: ``requests`` remembers."""


class RangeServer(ThreadingHTTPServer):
    """``query``: what must follow the question mark; ``failures``: this many GETs get a 503."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.query = ""
        self.failures = 0
        self.requests: list[str] = []
        self._open: set[socket.socket] = set()
        self._is_unplugged = False

    def unplug(self) -> None:
        """Cut what is connected, and whoever connects from now on."""
        self._is_unplugged = True
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def plug_in(self) -> None:
        """Be there again."""
        self._is_unplugged = False

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Refuse whoever comes while unplugged."""
        if not self._is_unplugged:
            self._open.add(request)
        return not self._is_unplugged

    def close_request(self, request: Any) -> None:
        """Forget a connection."""
        self._open.discard(request)
        super().close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that were cut."""

    @property
    def port(self) -> int:
        return int(self.server_address[1])


@contextlib.contextmanager
def range_server(folder: Path, *, certificates: Path | None = None) -> Iterator[RangeServer]:
    """Serve the files of ``folder`` on a loopback port; ``certificates``: over TLS."""
    server = RangeServer(folder)
    if certificates is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates / "server-cert.pem", certificates / "server-key.pem")
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
