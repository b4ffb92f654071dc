"""The address of ``--serve``: read, and listened on."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass
from typing import Any

from v2v_async.errors import UsageError

_HINT = "write --serve HOST:PORT, for example 127.0.0.1:8080; port 0 is any that is free"
_LOOPBACK = "127.0.0.1"
_EVERY = ("0.0.0.0", "::")

# A reader that is gone without a word, or that does not read, is cut off by the kernel after this
# time, in which nothing that was sent has been taken: each holds a descriptor and its unsent bytes.
UNREAD_MS = 60_000
_TCP_USER_TIMEOUT = 18  # tcp(7)


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def url(self, port: int) -> str:
        """Return the page's address, with the port that was found."""
        # What listens everywhere is reached by this machine's name.
        host = socket.gethostname() if self.host in _EVERY else self.host
        return f"http://{Address(host, port)}/"


def parse_address(text: str) -> Address:
    """Read ``HOST:PORT``, ``[IPV6]:PORT``, or only a port: then it is loopback's.

    Raises:
        UsageError: it is none of them.
    """
    host, _, port = text.strip().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host or host.startswith("["):
        raise UsageError(
            f"--serve: in ‘{text}’ it is not clear where the port begins",
            hint="an IPv6 address stands in brackets: [::1]:8080",
        )
    # isdecimal alone takes digits of other scripts.
    if not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise UsageError(f"--serve: ‘{text}’ has no port from 0 to 65535", hint=_HINT)
    return Address(host or _LOOPBACK, int(port))


Found = tuple[int, int, int, str, Any]
"""What :func:`socket.getaddrinfo` has of one address."""


def look_up(address: Address) -> Found:
    """Return where that is. Blocks while the name is looked up.

    Raises:
        UsageError: nobody knows it.
    """
    try:
        return socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a name"
        raise UsageError(
            f"--serve: the host ‘{address.host}’ is not known: {reason}", hint=_HINT
        ) from error


def listen(address: Address, found: Found) -> socket.socket:
    """Return a socket that listens there.

    Raises:
        UsageError: nobody can, or somebody does already.
    """
    family, kind, protocol, _, where = found
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections that are accepted have it too.
        made.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, UNREAD_MS)
        made.bind(where)
        made.listen()
    except OSError as error:
        made.close()
        raise UsageError(
            f"--serve: can't listen on ‘{address}’: {error.strerror}", hint=_hint(error, address)
        ) from error
    return made


def _hint(error: OSError, address: Address) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"who has it: ss -ltnp sport = :{address.port}; or let --serve "
            f"{Address(address.host, 0)} find a port that is free"
        )
    if error.errno == errno.EACCES:
        return "ports below 1024 are root's: take a higher one"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine does not have that address; its own are in: ip address"
    return _HINT
