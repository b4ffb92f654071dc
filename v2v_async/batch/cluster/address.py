"""What ``--cluster`` says: workers to start here, or the scheduler of those that are there."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from v2v_async.errors import UsageError

_HINT = "write --cluster local:2, --cluster tcp://HOST:8786 or --cluster tls://HOST:8786"
# Each is a process that may run an appliance; more than a machine has processors is a slip.
_MOST_WORKERS = 256


@dataclass(frozen=True, slots=True)
class ClusterAddress:
    """``workers`` to start here, or the ``uri`` of a scheduler; the other one is None."""

    workers: int | None = None
    uri: str | None = None

    @property
    def is_private(self) -> bool:
        """Whether nobody between the machines can read what is sent."""
        if self.uri is None:
            return True
        address = urlsplit(self.uri)
        return address.scheme == "tls" or _is_loopback(address.hostname or "")

    def __str__(self) -> str:
        return self.uri or f"local:{self.workers}"


def parse_cluster(text: str) -> ClusterAddress:
    """Read the value of ``--cluster``.

    Raises:
        UsageError: it is neither ``local:N`` nor the address of a scheduler.
    """
    if found := re.fullmatch(r"local:(\d{1,6})", text):
        count = int(found[1])
        if not 1 <= count <= _MOST_WORKERS:
            raise UsageError(f"--cluster ‘{text}’: from 1 to {_MOST_WORKERS} workers", hint=_HINT)
        return ClusterAddress(workers=count)
    try:
        address = urlsplit(text)
        is_whole = bool(address.hostname and address.port) and not (
            address.path or address.query or address.fragment or address.username
        )
    except ValueError:
        is_whole = False
    if not is_whole or address.scheme not in ("tcp", "tls"):
        raise UsageError(f"--cluster ‘{text}’ is not the address of a cluster", hint=_HINT)
    return ClusterAddress(uri=text)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
