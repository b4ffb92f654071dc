"""An oVirt engine's REST API: log in, ask, change, log out.

::

    POST …/sso/oauth/token (user, password) ──> token ──> GET, POST, DELETE …/api/… with the token
                                                  └─ 401: one new login, and the request again
    POST …/services/sso-logout <── close

Why not oVirt's own SDK: it is no package of Debian, and what PyPI has must be compiled against the
headers of libxml2 by whoever installs it; all that for a dozen calls of which each is one request.
What is sent and read here is the XML of the API's public documentation, since that is what every
client of oVirt uses; the JSON form is not described there. virt-v2v with the SDK has been run
against the stand-in of our tests: both mean the same (``tests/recorded/ovirt-upload``).

A request has a connection of its own. The engine closes idle ones, and a request on a connection
that is just being closed may or may not have been carried out; on a new one that is rare.

Everything blocks, for as long as TIMEOUT_S at each wait: call it in a thread. An :class:`Engine`
may be used by several threads.
"""

from __future__ import annotations

import http.client
import json
import shlex
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Literal
from urllib.parse import quote, urlencode

from lxml import etree

from v2v_async.errors import TargetError
from v2v_async.reaching import reaching, reason_of
from v2v_async.secret import Secret

TIMEOUT_S = 30.0
"""For each wait of a connection; adding a guest takes a busy engine several seconds."""

# A question changes nothing, so it may be asked again: engines restart in the middle of a copy.
_TRIES = 4
_PAUSE_S = 0.5

Method = Literal["GET", "POST", "DELETE"]


class EngineError(TargetError):
    """The engine refused a request; nothing was changed. ``status`` is HTTP's."""

    def __init__(self, message: str, *, status: int, **where: object) -> None:
        super().__init__(message, **where)  # type: ignore[arg-type]
        self.status = status


class UncertainError(TargetError):
    """The connection was lost after the request had gone: it may have been carried out."""


@dataclass(frozen=True, slots=True)
class EngineLogin:
    """Who logs in where. ``path`` is that of the API; ``verify``: check the certificate."""

    host: str
    port: int
    path: str
    user: str
    password: Secret
    verify: bool = False
    ca_file: str | None = None

    @property
    def address(self) -> str:
        """``HOST:PORT`` as URLs have it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == http.client.HTTPS_PORT else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The API's URL, without the user."""
        return f"https://{self.address}{self.path}"

    def command(self, method: Method, path: str, body: str | None = None) -> str:
        """Return the command that does a request by hand; curl asks for the password."""
        words = ["curl", "--user", self.user, "--request", method]
        if not self.verify:
            words.append("--insecure")
        elif self.ca_file is not None:
            words += ["--cacert", self.ca_file]
        if body is not None:
            words += ["--header", "Content-Type: application/xml", "--data", body]
        return shlex.join([*words, f"{self.url}/{path}"])


class Engine:
    """A session with an engine. Construction does no I/O; the first request logs in."""

    def __init__(self, login: EngineLogin) -> None:
        self.login = login
        self._context = tls_context(login.verify, login.ca_file)
        self._token: Secret | None = None
        self._is_closed = False
        self._lock = threading.Lock()

    def get(self, path: str, query: Mapping[str, str] | None = None) -> etree._Element:
        """Return what is at ``path`` below the API's; asked again when the connection is lost.

        Raises:
            EngineError: the engine refuses (``status`` 404: there is no such thing).
            TargetError: it can't be reached, or does not let us in.
        """
        for attempt in range(_TRIES):
            try:
                return self._call("GET", path, query, None)
            except UncertainError:
                if attempt == _TRIES - 1:
                    raise
            time.sleep(_PAUSE_S * 2**attempt)
        raise AssertionError("the last try returns or raises")

    def find(self, path: str, query: Mapping[str, str] | None = None) -> etree._Element | None:
        """Return what is at ``path``, None where there is nothing.

        Raises:
            EngineError, TargetError: as :meth:`get`.
        """
        try:
            return self.get(path, query)
        except EngineError as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return None
            raise

    def post(
        self, path: str, body: etree._Element, query: Mapping[str, str] | None = None
    ) -> etree._Element:
        """Have something made or done; never sent twice.

        Raises:
            EngineError: the engine refuses; nothing was done.
            UncertainError: nobody knows whether it was done.
            TargetError: the engine can't be reached, or does not let us in; nothing was done.
        """
        return self._call("POST", path, query, etree.tostring(body, encoding="utf-8"))

    def delete(self, path: str, query: Mapping[str, str] | None = None) -> bool:
        """Have something removed; return whether it was there. May be repeated.

        Raises:
            EngineError, UncertainError, TargetError: as :meth:`post`.
        """
        try:
            self._call("DELETE", path, query, None)
        except EngineError as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return False
            raise
        return True

    def close(self) -> None:
        """Log out. Never fails: a token that is left ends by itself."""
        with self._lock:
            token, self._token = self._token, None
            self._is_closed = True
        if token is None:
            return
        form = urlencode({"scope": "ovirt-app-api", "token": token.reveal()})
        with suppress(TargetError):
            self._send("POST", f"{self._root}/services/sso-logout", _FORM, form.encode())

    # What they consist of.

    @property
    def _root(self) -> str:
        """The engine's path, above that of the API: ``/ovirt-engine``."""
        return self.login.path.rpartition("/")[0]

    def _call(
        self, method: Method, path: str, query: Mapping[str, str] | None, body: bytes | None
    ) -> etree._Element:
        target = f"{self.login.path}/{quote(path)}" if path else self.login.path
        if query:
            target += f"?{urlencode(query)}"
        token = self._current_token(None)
        for is_last in (False, True):
            headers = {
                "Authorization": f"Bearer {token.reveal()}",
                "Accept": "application/xml",
                "Content-Type": "application/xml",
                "Version": "4",
            }
            status, content = self._send(method, target, headers, body)
            # Refused before anything was done; sessions end when they idle for long.
            if status != HTTPStatus.UNAUTHORIZED or is_last:
                break
            token = self._current_token(token)
        document = _parse(content)
        if status >= HTTPStatus.BAD_REQUEST or (document is None and method != "DELETE"):
            raise EngineError(
                f"the engine ‘{self.login.address}’ refuses {method} {path.partition('?')[0]}: "
                f"{_reason(status, document)}",
                status=status,
                hint=_hint(status),
            )
        return etree.Element("action") if document is None else document

    def _current_token(self, stale: Secret | None) -> Secret:
        """Return the session's token: a new one if there is none, or if it is ``stale``."""
        with self._lock:
            if self._is_closed:
                # A call that nobody waits for any more: a login now would be nobody's to end.
                raise TargetError(f"the session with the engine ‘{self.login.address}’ has ended")
            if self._token is None or self._token is stale:
                self._token = self._log_in()
            return self._token

    def _log_in(self) -> Secret:
        form = urlencode(
            {
                "grant_type": "password",
                "scope": "ovirt-app-api",
                "username": self.login.user,
                "password": self.login.password.reveal(),
            }
        )
        status, content = self._send("POST", f"{self._root}/sso/oauth/token", _FORM, form.encode())
        try:
            answer = json.loads(content)
        except ValueError:
            answer = None
        # Some engines put the answer into a list.
        if isinstance(answer, list) and answer:
            answer = answer[0]
        if not isinstance(answer, dict):
            raise TargetError(
                f"there is no oVirt engine at ‘{self.login.url}’ (HTTP {status})",
                hint="check -oc; it is https://ENGINE/ovirt-engine/api as a rule",
            )
        token = answer.get("access_token")
        if not isinstance(token, str) or not token or not token.isascii():
            why = answer.get("error_description") or answer.get("error") or f"HTTP {status}"
            raise TargetError(
                f"the engine ‘{self.login.address}’ does not let ‘{self.login.user}’ in: {why}",
                hint="check the user in -oc (user@profile, as in https://user%40profile@ENGINE/…) "
                "and the password in the file of -op",
            )
        return Secret(token)

    def _send(
        self, method: str, target: str, headers: Mapping[str, str], body: bytes | None
    ) -> tuple[int, bytes]:
        """Send one request on a connection of its own; return status and content."""
        login = self.login
        connection = http.client.HTTPSConnection(
            login.host, login.port, timeout=TIMEOUT_S, context=self._context
        )
        with _reaching(login):
            try:
                connection.connect()
                try:
                    connection.request(method, target, body=body, headers=dict(headers))
                    response = connection.getresponse()
                    return response.status, response.read()
                except (OSError, http.client.HTTPException) as error:
                    raise UncertainError(
                        f"the connection with the engine ‘{login.address}’ was lost: "
                        f"{reason_of(error)}",
                        hint="is the engine up, and the way to it open?",
                    ) from error
            finally:
                connection.close()


_FORM = {
    "Content-Type": "application/x-www-form-urlencoded",
    "Accept": "application/json",
}


def tls_context(verify: bool, ca_file: str | None) -> ssl.SSLContext:
    """Return how certificates are checked: against ``ca_file``, or the system's authorities.

    Raises:
        TargetError: ``ca_file`` can't be used.
    """
    if not verify:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise TargetError(
            f"the certificates in ‘{ca_file}’ can't be used: {error.strerror or error}",
            hint="fetch it from the engine: https://ENGINE/ovirt-engine/services/pki-resource"
            "?resource=ca-certificate&format=X509-PEM-CA",
        ) from error


def text(element: etree._Element, path: str, default: str = "") -> str:
    """Return the text of the first element at ``path`` below ``element``."""
    return element.findtext(path) or default


def number(element: etree._Element, path: str) -> int | None:
    """Return the whole number at ``path`` below ``element``, None where there is none."""
    found = text(element, path)
    return int(found) if found.isdecimal() else None


def _parse(content: bytes) -> etree._Element | None:
    parser = etree.XMLParser(resolve_entities=False, no_network=True)
    try:
        return etree.fromstring(content, parser)
    except (etree.XMLSyntaxError, ValueError):
        return None


def _reason(status: int, document: etree._Element | None) -> str:
    """Return what a fault says, in one line; it stands alone or in an ``action``."""
    if document is not None:
        fault = document if document.tag == "fault" else document.find("fault")
        if fault is not None:
            said = text(fault, "detail") or text(fault, "reason")
            if said:
                return " ".join(said.strip("[]").split())
        if status < HTTPStatus.BAD_REQUEST:
            return f"an answer that is no XML of its API (HTTP {status})"
    with suppress(ValueError):
        return f"{status} {HTTPStatus(status).phrase}"
    return f"HTTP {status}"


def _hint(status: int) -> str | None:
    match status:
        case HTTPStatus.UNAUTHORIZED | HTTPStatus.FORBIDDEN:
            return "the user in -oc has not the rights for it; ‘admin’ has"
        case HTTPStatus.NOT_FOUND:
            return "check -oc; it is https://ENGINE/ovirt-engine/api as a rule"
        case HTTPStatus.CONFLICT | HTTPStatus.BAD_REQUEST:
            return "Events in the engine's Administration Portal may tell more"
        case status if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return "/var/log/ovirt-engine/engine.log on the engine tells more"
    return None


def _reaching(login: EngineLogin) -> AbstractContextManager[None]:
    return reaching(
        f"the engine ‘{login.address}’",
        login.host,
        option="-oc",
        untrusted="name the engine's own authority with -oo rhv-cafile=ca.pem, and use the name "
        "that the certificate is for",
        timeout_s=TIMEOUT_S,
        error=TargetError,
    )
