"""Who may read: the token, the names that the server answers to, and what a browser may do.

A page on loopback can be reached by every site that the same browser has open: by a form, by an
image, and by a name that its owner points at 127.0.0.1 (DNS rebinding). So the name in the request
has to be one of loopback, the cookie is not sent along from other sites, and nothing may frame or
embed what is served.
"""

from __future__ import annotations

import hmac
import ipaddress
from urllib.parse import quote, urlencode

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}

_WITHOUT_TOKEN = frozenset({"/healthz"})
"""Says only that the server is there: for programs that watch it and know no secret."""

_HOW_TO = """
Open the address that v2v-async printed when the run began: it ends in ?token=...
(each start of the run has its own token, so an older address does not work any more).

Programs send the header   Authorization: Bearer TOKEN
"""


def is_loopback(host: str) -> bool:
    """Return whether ``host``, a name or an address, always means this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


class Guard:
    """Stands before the routes. ``token`` None: everybody may read.

    ``cookie`` is the name under which a browser keeps the token. ``is_local``: only requests for
    loopback's own names are answered.
    """

    def __init__(self, app: ASGIApp, *, token: str | None, cookie: str, is_local: bool) -> None:
        self._app = app
        self._token = token
        self._cookie = cookie
        self._is_local = is_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        request = Request(scope)
        answer = self._other_name(request) or self._other_method(request) or self._admit(request)
        await (answer or self._app)(scope, receive, send_with_headers)

    def _other_name(self, request: Request) -> Response | None:
        if not self._is_local or is_loopback(_host(request.headers.get("host", ""))):
            return None
        return PlainTextResponse(
            "This server answers only to localhost, 127.0.0.1 and [::1].\n", 421
        )

    def _other_method(self, request: Request) -> Response | None:
        if request.method in ("GET", "HEAD"):
            return None
        return PlainTextResponse(
            "Only GET and HEAD: nothing can be changed here.\n", 405, {"Allow": "GET, HEAD"}
        )

    def _admit(self, request: Request) -> Response | None:
        """Return None to let the request through, or else the answer to it."""
        if self._token is None or request.scope["path"] in _WITHOUT_TOKEN:
            return None
        given = request.query_params.get("token")
        if given is not None and self._is_right(given) and _is_for_a_person(request):
            return self._remember(request)
        scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
        bearer = credentials.strip() if scheme.lower() == "bearer" else None
        known = [bearer, given, request.cookies.get(self._cookie)]
        tokens = [token for token in known if token]
        if any(self._is_right(token) for token in tokens):
            return None
        wrong = "This is not the token of this run." if tokens else "A token is needed here."
        return PlainTextResponse(
            f"{wrong}\n{_HOW_TO}", 401, {"WWW-Authenticate": 'Bearer realm="v2v-async"'}
        )

    def _is_right(self, token: str) -> bool:
        # As bytes: compare_digest refuses text that is not ASCII.
        wanted = (self._token or "").encode()
        return hmac.compare_digest(token.encode("utf-8", "replace"), wanted)

    def _remember(self, request: Request) -> Response:
        """Give the browser its cookie, and send it to the same address without the token."""
        rest = [each for each in request.query_params.multi_items() if each[0] != "token"]
        # One slash: two would lead to another server.
        address = "/" + quote(request.scope["path"].lstrip("/"))
        if rest:
            address += "?" + urlencode(rest)
        answer: Response = RedirectResponse(address, 303)
        if request.headers.get("sec-fetch-site") == "cross-site":
            # Somebody followed a link, from a mail or a chat: a strict cookie does not go along
            # with a redirect then, but it does with what a page of our own asks for.
            answer = HTMLResponse("<!doctype html><title>v2v-async</title>")
            answer.headers["Refresh"] = f"0; url={address}"
        answer.set_cookie(self._cookie, self._token or "", httponly=True, samesite="strict")
        return answer


def _host(header: str) -> str:
    """Return the name or address in a Host header, without the port."""
    if header.startswith("["):
        return header.partition("]")[0][1:]
    return header.rpartition(":")[0] if ":" in header else header


def _is_for_a_person(request: Request) -> bool:
    """Return whether it is an address that somebody opened, and not a program's request."""
    if request.scope["path"] == "/":
        return True
    return request.headers.get("sec-fetch-mode") == "navigate"
