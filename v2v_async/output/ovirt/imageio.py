"""Reading and writing a disk through ovirt-imageio's images API.

::

    plugin threads ──> Images.write ──> a free Connection ──> PUT /images/TICKET
                        .zero                                 PATCH {"op": "zero"}
                        .flush          all of them           PATCH {"op": "flush"}
                        .read                                 GET with Range
    keeper thread  ──> idle ones                              OPTIONS: the ticket stays alive

The API has no request that can't be sent twice: each says which bytes of the disk are meant, and
what they are to be. So a request whose connection was cut is sent again on a new one, a few times.
What the server itself refuses is not.

This runs inside nbdkit, in the distribution's Python and without our virtual environment: it uses
the standard library alone, in what Python 3.9 (RHEL 9) understands.
Source: oVirt/ovirt-imageio, docs/images.md.
"""

from __future__ import annotations

import errno
import http.client
import json
import queue
import socket
import ssl
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator

    Buffer = bytes | bytearray | memoryview

TIMEOUT_S = 120.0
"""For each wait: storage that hangs shortly (a failover of paths) needs up to a minute."""

IDLE_S = 20.0
"""How long a connection may be silent: the server closes it after 60 s, and the engine takes a
transfer without any activity for dead."""

MOST_CONNECTIONS = 4
"""For one disk. Over TLS on two cores 2 were 0.73 times as fast; 8, the server's bound, 0.75."""

# Pauses before a cut connection is tried again. A daemon that is restarted has forgotten its
# tickets, so that waiting longer is of no use; a switch that changes ports needs some seconds.
PAUSES_S = (0.2, 0.5, 1.0, 2.0, 4.0)

# A request must end within TIMEOUT_S, and zeroing preallocated disks is writing to slow storage.
MOST_ZERO = 128 * 1024 * 1024


class ImageioError(OSError):
    """A request failed; ``errno`` is what NBD can say of it."""


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket; a name that begins with NUL is an abstract one."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(self.path)


class _Slot:
    """A place in the pool; its connection is made when it is needed."""

    def __init__(self) -> None:
        self.connection: http.client.HTTPConnection | None = None
        self.last_used = time.monotonic()

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None


class Images:
    """One disk: the transfer's URL, and the connections to it. Its methods are thread-safe.

    ``is_local``: imageio runs on this machine, so that its Unix socket may be used.
    """

    def __init__(
        self,
        url: str,
        *,
        verify: bool,
        ca_file: str | None = None,
        is_local: bool = False,
    ) -> None:
        parts = urlsplit(url)
        self._host = parts.hostname or ""
        self._port = parts.port or 443
        self._path = parts.path
        self._is_local = is_local
        self._socket: str | None = None
        self._context = _context(verify, ca_file)
        self._pool: queue.LifoQueue[_Slot] = queue.LifoQueue()
        self._count = 0
        self._gathering = threading.Lock()
        self._is_closed = threading.Event()
        self.can_zero = False
        self.can_flush = False

    @property
    def connections(self) -> int:
        """How many there may be at once."""
        return self._count

    @property
    def is_on_unix_socket(self) -> bool:
        """Whether data goes through imageio's Unix socket."""
        return self._socket is not None

    def open(self) -> None:
        """Ask the server what it can do, and keep the transfer alive from now on.

        Raises:
            ImageioError
        """
        slot = _Slot()
        options = self._options(slot)
        slot.close()
        features = options.get("features") or ()
        self.can_zero = "zero" in features
        self.can_flush = "flush" in features
        offered = min(int(options.get("max_readers", 1)), int(options.get("max_writers", 1)))
        self._count = max(1, min(offered, MOST_CONNECTIONS))
        name = options.get("unix_socket")
        if self._is_local and name:
            self._socket = str(name)
            try:
                # A daemon's socket of another machine would not know our ticket either.
                self._options(slot, tries=1)
            except ImageioError:
                self._socket = None
            slot.close()
        for _ in range(self._count):
            self._pool.put(_Slot())
        threading.Thread(target=self._keep_alive, name="keeper", daemon=True).start()

    def close(self) -> None:
        """Close the connections that are idle; there are no others when nbdkit ends."""
        self._is_closed.set()
        for slot in self._idle():
            slot.close()

    def read(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer``.

        Raises:
            ImageioError
        """
        span = f"bytes={offset}-{offset + len(buffer) - 1}"
        with self._slot() as slot:
            self._request(slot, "GET", headers={"Range": span}, expected=206, into=buffer)

    def write(self, data: Buffer, offset: int, *, flush: bool = False) -> None:
        """Write ``data``; with ``flush`` it is on the disk when this returns.

        Raises:
            ImageioError
        """
        last = offset + len(data) - 1
        with self._slot() as slot:
            self._request(
                slot,
                "PUT",
                query="?flush=y" if flush else "?flush=n",
                headers={"Content-Range": f"bytes {offset}-{last}/*"},
                body=data,
            )

    def zero(self, offset: int, length: int, *, flush: bool = False) -> None:
        """Make ``length`` bytes zero, without sending them.

        Raises:
            ImageioError
        """
        end = offset + length
        with self._slot() as slot:
            while offset < end:
                size = min(MOST_ZERO, end - offset)
                is_last = offset + size == end
                self._patch(
                    slot, {"op": "zero", "offset": offset, "size": size, "flush": flush and is_last}
                )
                offset += size

    def flush(self) -> None:
        """Have everything on the disk that was written before.

        On all connections: behind each may be a server of its own (imageio's proxy has that), and
        to have them all means that no write is on its way.

        Raises:
            ImageioError
        """
        slots: list[_Slot] = []
        try:
            # Two that have half of them each would wait for ever.
            with self._gathering:
                while len(slots) < self._count:
                    slots.append(self._pool.get())
            opened = [slot for slot in slots if slot.connection is not None]
            for slot in opened or slots[:1]:
                self._patch(slot, {"op": "flush"})
                slot.last_used = time.monotonic()
        finally:
            for slot in slots:
                self._pool.put(slot)

    # What they consist of.

    @contextmanager
    def _slot(self) -> Iterator[_Slot]:
        slot = self._pool.get()
        try:
            yield slot
        finally:
            slot.last_used = time.monotonic()
            self._pool.put(slot)

    def _idle(self) -> list[_Slot]:
        found = []
        with suppress(queue.Empty):
            while True:
                found.append(self._pool.get_nowait())
        return found

    def _keep_alive(self) -> None:
        """Let no connection idle; the transfer too lives on what is asked here."""
        while not self._is_closed.wait(IDLE_S / 2):
            before = time.monotonic() - IDLE_S
            late = []
            for slot in self._idle():
                if slot.last_used <= before:
                    late.append(slot)
                else:
                    self._pool.put(slot)
            # One is enough for the transfer; the others only where there is a connection.
            opened = [slot for slot in late if slot.connection is not None] or late[:1]
            for slot in late:
                if slot in opened:
                    try:
                        self._options(slot, tries=1)
                    except ImageioError:
                        slot.close()  # whoever uses it next finds out more
                    slot.last_used = time.monotonic()
                self._pool.put(slot)

    def _options(self, slot: _Slot, *, tries: int = 3) -> dict[str, Any]:
        content = self._request(slot, "OPTIONS", tries=tries)
        try:
            found = json.loads(content) if content else {}
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ImageioError(errno.EIO, "what answers is not ovirt-imageio")
        return found

    def _patch(self, slot: _Slot, message: dict[str, Any]) -> None:
        self._request(
            slot,
            "PATCH",
            headers={"Content-Type": "application/json"},
            body=json.dumps(message).encode(),
        )

    def _request(
        self,
        slot: _Slot,
        method: str,
        *,
        query: str = "",
        headers: dict[str, str] | None = None,
        body: Buffer | None = None,
        expected: int = 200,
        into: memoryview | None = None,
        tries: int = len(PAUSES_S) + 1,
    ) -> bytes:
        """Send a request until there is an answer; return its content, or read it ``into``.

        Raises:
            ImageioError: the server refused, or could not be reached.
        """
        for attempt in range(tries):
            try:
                status, content = self._once(slot, method, query, headers or {}, body, into)
            except (OSError, http.client.HTTPException) as error:
                slot.close()
                if isinstance(error, ssl.SSLCertVerificationError):
                    raise ImageioError(
                        errno.EIO,
                        f"the certificate of {self._host} is not trusted: {error.verify_message}",
                    ) from error
                if attempt == tries - 1 or self._is_closed.is_set():
                    raise ImageioError(
                        errno.EIO, f"{self._place} can't be reached: {_why(error)}"
                    ) from error
                self._is_closed.wait(PAUSES_S[min(attempt, len(PAUSES_S) - 1)])
                continue
            if status == expected:
                return content
            # The answers to a refusal end a connection, or leave what was sent unread.
            slot.close()
            raise _refusal(method, status, content, self._path)
        raise AssertionError("the last try returns or raises")

    @property
    def _place(self) -> str:
        if self._socket is not None:
            return "imageio's Unix socket"
        return f"imageio on {self._host}:{self._port}"

    def _once(
        self,
        slot: _Slot,
        method: str,
        query: str,
        headers: dict[str, str],
        body: Buffer | None,
        into: memoryview | None,
    ) -> tuple[int, bytes]:
        if slot.connection is None:
            slot.connection = self._connect()
        connection = slot.connection
        connection.putrequest(method, self._path + query, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders()
        if body is not None:
            # A server that refuses answers before it has read everything, and closes.
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.send(body)
        response = connection.getresponse()
        if into is None or response.status != 206:
            return response.status, response.read()
        got = 0
        while got < len(into):
            count = response.readinto(into[got:])
            if not count:
                raise http.client.IncompleteRead(b"", len(into) - got)
            got += count
        return response.status, b""

    def _connect(self) -> http.client.HTTPConnection:
        connection: http.client.HTTPConnection
        if self._socket is not None:
            connection = _UnixConnection(self._socket)
        else:
            connection = http.client.HTTPSConnection(
                self._host, self._port, timeout=TIMEOUT_S, context=self._context
            )
        try:
            connection.connect()
        except BaseException:
            connection.close()
            raise
        return connection


def _context(verify: bool, ca_file: str | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca_file if verify else None)
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _refusal(method: str, status: int, content: bytes, path: str) -> ImageioError:
    """Return the error for an answer; the ticket, which its text may name, stays out of it."""
    said = content.decode(errors="replace").strip()[:300]
    ticket = path.rpartition("/")[2]
    if ticket:
        said = said.replace(ticket, "***")
    number = errno.EIO
    if status == http.client.FORBIDDEN:
        number = errno.EPERM
        said += " (the engine ended the transfer, or it had been idle for too long)"
    elif status >= http.client.INTERNAL_SERVER_ERROR:
        # It does not tell which error its storage gave.
        said += " (is the storage full? /var/log/ovirt-imageio/daemon.log on the host tells more)"
    return ImageioError(number, f"imageio refuses {method}: {status} {said}")


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
