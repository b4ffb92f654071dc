"""What a person names as the source or the target of a copy.

::

    nbd      a socket path or an NBD URI: many connections where the server allows it
    command  ``[ CMD ARGS … ]``: a server of our own by systemd socket activation: one connection
    file     a regular file or a block device
    stream   ``-``, a pipe or a socket: in order, once, of unknown size when it is the source
    null     ``null:``: takes everything and keeps nothing

Source: nbdcopy(1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from v2v_async.redact import redact, redact_argv

Kind = Literal["nbd", "command", "file", "stream", "null"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One side of a copy.

    ``address`` is the socket path or URI, or the file's path (empty for ``-``); ``argv`` is the
    server's command line; ``fd`` the descriptor of a stream, or of a file that was given open.
    """

    kind: Kind
    address: str = ""
    argv: tuple[str, ...] = ()
    fd: int | None = None

    def __str__(self) -> str:
        if self.kind == "command":
            return f"[ {' '.join(redact_argv(list(self.argv)))} ]"
        if self.kind == "null":
            return "null:"
        return redact(self.address) or "-"


def nbd(address: str) -> Endpoint:
    """Return the endpoint for a socket path or an NBD URI."""
    return Endpoint("nbd", address)
