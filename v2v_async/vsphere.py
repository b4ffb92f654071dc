"""A vSphere server's HTTPS side: its certificate, and the datastores under ``/folder``.

::

    login (basic auth) ──> session cookie ──> HEAD, GET with the cookie
                               └─ ends when it idles too long, or the server starts again

The folder named by :func:`write_login` lets a program that runs later (nbdkit's ``cookie-script``)
renew the session: it holds ``login`` (user and password, 0600), ``session`` (the cookie, 0600),
``lock``, and ``cookie``, the program. Nothing here writes a password or cookie anywhere else.

Everything blocks, for as long as TIMEOUT_S at each wait: call it in a thread. The module imports
little, since each renewal starts a Python.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import http.client
import json
import os
import re
import shlex
import socket
import ssl
import sys
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from v2v_async.errors import SourceError
from v2v_async.reaching import reaching

TIMEOUT_S = 30.0
"""For each wait of a connection; vCenter takes seconds for its first answer on a busy day."""

HTTPS_PORT = 443
# What nbdkit 1.32 names the file for its script's errors, and forgets to remove.
_ERRORS_OF_NBDKIT = re.compile(r"/tmp/errors\w{6}")


@dataclass(frozen=True, slots=True)
class Login:
    """Who logs in where. ``verify``: check the certificate, against ``ca_file`` where given."""

    host: str
    port: int
    user: str
    password: str = field(repr=False)
    verify: bool = True
    ca_file: str | None = None

    @property
    def address(self) -> str:
        """``HOST``, or ``HOST:PORT`` where the port is not that of HTTPS, as URLs have it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == HTTPS_PORT else f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a HEAD request brought. ``size`` is bytes, None where the server does not tell."""

    status: int
    reason: str
    size: int | None
    has_ranges: bool
    cookie: str | None = field(repr=False)


def ca_file() -> str | None:
    """Return the file of authorities that the environment names for all TLS (SSL_CERT_FILE).

    Python reads it by itself; libcurl has to be told.
    """
    return os.environ.get("SSL_CERT_FILE") or None


def head(login: Login, url: str, cookie: str | None = None) -> Answer:
    """Ask for a file's headers: with ``cookie``, or else with user and password.

    Raises:
        SourceError: there is no answer, or the server's certificate is not trusted.
    """
    headers = {"Cookie": cookie} if cookie else {"Authorization": _basic(login)}
    parts = urlsplit(url)
    with _reaching(login):
        connection = http.client.HTTPSConnection(
            login.host, login.port, timeout=TIMEOUT_S, context=tls_context(login)
        )
        try:
            connection.request("HEAD", f"{parts.path}?{parts.query}", headers=headers)
            response = connection.getresponse()
            response.read()
        finally:
            connection.close()
    length = response.headers.get("Content-Length", "")
    given = response.headers.get_all("Set-Cookie") or []
    pairs = [text.partition(";")[0].strip() for text in given]
    return Answer(
        response.status,
        response.reason,
        int(length) if length.isdecimal() else None,
        response.headers.get("Accept-Ranges", "").lower() != "none",
        "; ".join(pair for pair in pairs if "=" in pair) or None,
    )


def thumbprint(login: Login) -> str:
    """Return the SHA-1 of the server's certificate as VDDK wants it: ``AB:CD:…``, 20 pairs.

    Raises:
        SourceError: the server can't be reached, or its certificate is to be verified and is not
            trusted.
    """
    with (
        _reaching(login),
        socket.create_connection((login.host, login.port), timeout=TIMEOUT_S) as plain,
        tls_context(login).wrap_socket(plain, server_hostname=login.host) as secured,
    ):
        certificate = secured.getpeercert(binary_form=True)
    assert certificate is not None, "a TLS server always shows one"
    return hashlib.sha1(certificate, usedforsecurity=False).digest().hex(":").upper()


def _basic(login: Login) -> str:
    return "Basic " + base64.b64encode(f"{login.user}:{login.password}".encode()).decode()


def tls_context(login: Login) -> ssl.SSLContext:
    """Return what a connection is checked by."""
    context = ssl.create_default_context(cafile=login.ca_file)
    if not login.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _reaching(login: Login) -> AbstractContextManager[None]:
    return reaching(
        f"‘{login.address}’",
        login.host,
        option="-ic",
        untrusted="add the certificate of its authority to this machine's, use the name that the "
        "certificate is for, or add ?no_verify=1 to -ic to trust any",
        timeout_s=TIMEOUT_S,
        error=SourceError,
    )


# A session that outlives the one who began it.


def write_login(folder: Path, login: Login, cookie: str | None) -> Path:
    """Make ``folder`` (0700); return the program in it that prints a cookie for the URL it gets.

    The password has to stay there for as long as the disks are served: a server that was started
    again knows no sessions, and a conversion that had read for hours would be lost.
    """
    folder.mkdir(mode=0o700, exist_ok=True)  # an earlier process may have been killed
    _write(folder / "login", json.dumps(asdict(login)))
    _write(folder / "session", cookie or "")
    _write(folder / "lock", "")
    program = folder / "cookie"
    package = str(Path(__file__).resolve().parent.parent)
    code = (
        f"import sys; sys.path.insert(0, {package!r}); from v2v_async.vsphere import main; main()"
    )
    words = [sys.executable, "-I", "-c", code, str(folder)]
    _write(program, f'#!/bin/sh -\nexec {shlex.join(words)} "$1"\n')
    program.chmod(0o700)
    return program


def current_cookie(folder: Path, url: str) -> str:
    """Return a cookie that the server accepts for ``url``: the one there is, or a new session's.

    One session serves all disks of a guest: vCenter limits how many there are at a time.

    Raises:
        SourceError: the server can't be reached or does not let us in.
    """
    login = Login(**json.loads((folder / "login").read_text()))
    session = folder / "session"
    with (folder / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cookie = session.read_text()
        if cookie and head(login, url, cookie).status != http.HTTPStatus.UNAUTHORIZED:
            return cookie
        answer = head(login, url)
        if answer.cookie is None or answer.status >= http.HTTPStatus.BAD_REQUEST:
            raise SourceError(
                f"‘{login.address}’ gives no session: {answer.status} {answer.reason}"
            )
        fresh = session.with_name("session.new")
        _write(fresh, answer.cookie)
        fresh.replace(session)
        return answer.cookie


def main() -> None:
    """Print a cookie for nbdkit; arguments are the folder and the URL."""
    try:
        cookie = current_cookie(Path(sys.argv[1]), sys.argv[2])
    except SourceError as error:
        sys.exit(error.message)
    except (OSError, ValueError) as error:
        sys.exit(f"the session can't be renewed: {type(error).__name__}")
    print(cookie)
    with suppress(OSError):
        errors = os.readlink("/proc/self/fd/2")
        if _ERRORS_OF_NBDKIT.fullmatch(errors):
            os.unlink(errors)


def _write(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
