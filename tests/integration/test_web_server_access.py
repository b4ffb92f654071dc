"""--serve over real connections: who may read, and what every answer is like."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT
from tests.web_batch import TOKEN, BatchServer, another_process, ask, served
from v2v_async.web.guard import HEADERS

PAGES = ["/", "/page.css", "/page.js", "/api/state", "/api/guests/g001", "/metrics"]


@pytest.fixture(scope="module")
def shown() -> Iterator[BatchServer]:
    """A server for tests that only ask."""
    with another_process() as (server, _):
        yield server


# Who may read.


@pytest.mark.parametrize("path", [*PAGES, "/api/events", "/api/changes", "/no/such/page"])
def test_without_the_token_nothing_is_said(shown: BatchServer, path: str) -> None:
    wrong = [
        {},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": f"Bearer {TOKEN[:-1]}"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": "Bearer"},
        {"Cookie": f"v2v_token_{shown.port}=x"},
        {"Cookie": f"v2v_token_{shown.port + 1}={TOKEN}"},
    ]
    for headers in wrong:
        answer = ask(shown.port, path, headers=headers)
        assert answer.status == 401, headers
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert "Open the address that v2v-async printed" in answer.text
        assert "g001" not in answer.text
    assert ask(shown.port, f"{path}?token=wrong").status == 401
    assert "not the token of this run" in ask(shown.port, f"{path}?token=wrong").text


@pytest.mark.parametrize("path", PAGES)
def test_with_the_token(shown: BatchServer, path: str) -> None:
    assert shown.get(path).status == 200
    assert ask(shown.port, path, headers={"Authorization": f"bearer  {TOKEN}"}).status == 200
    cookie = {"Cookie": f"other=1; v2v_token_{shown.port}={TOKEN}"}
    assert ask(shown.port, path, headers=cookie).status == 200


def test_a_person_gets_a_cookie_and_an_address_without_the_token(shown: BatchServer) -> None:
    assert shown.url == f"http://127.0.0.1:{shown.port}/?token={TOKEN}"
    answer = ask(shown.port, f"/?token={TOKEN}")
    assert (answer.status, answer.headers["location"]) == (303, "/")
    [cookie] = answer.cookies
    parts = [part.strip().lower() for part in cookie.split(";")]
    assert parts[0] == f"v2v_token_{shown.port}={TOKEN}".lower()
    assert {"httponly", "samesite=strict", "path=/"} <= set(parts)
    assert ask(shown.port, "/", headers={"Cookie": cookie.split(";")[0]}).status == 200


def test_a_link_from_another_site_is_not_a_redirect(shown: BatchServer) -> None:
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    answer = ask(shown.port, f"/?token={TOKEN}", headers=headers)
    assert (answer.status, answer.headers["refresh"]) == (200, "0; url=/")
    assert answer.cookies
    assert TOKEN not in answer.text


def test_a_program_may_have_the_token_in_the_address(shown: BatchServer) -> None:
    assert ask(shown.port, f"/api/state?token={TOKEN}").json()["name"] == "move-it"


@pytest.mark.parametrize(
    ("path", "location"),
    [
        ("/api/state?token=T", "/api/state"),
        ("/api/state?a=1&token=T&b=%26", "/api/state?a=1&b=%26"),
        ("//evil.example/x?token=T", "/evil.example/x"),
        ("/%2Fevil.example?token=T", "/evil.example"),
        ("/a%0d%0aSet-Cookie:x?token=T", "/a%0D%0ASet-Cookie%3Ax"),
    ],
)
def test_redirects_stay_here(shown: BatchServer, path: str, location: str) -> None:
    path = path.replace("=T", f"={TOKEN}")
    answer = ask(shown.port, path, headers={"Sec-Fetch-Mode": "navigate"})
    assert (answer.status, answer.headers["location"]) == (303, location)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_other_names_for_this_machine(shown: BatchServer, host: str) -> None:
    """DNS rebinding: a site whose name now means 127.0.0.1."""
    answer = shown.get("/api/state", headers={"Host": host})
    assert answer.status == 421
    assert "g001" not in answer.text


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:9999", "127.0.0.1:1", "[::1]:80", "[::1]"]
)
def test_names_of_loopback(shown: BatchServer, host: str) -> None:
    """Another port than ours is one that ssh forwards."""
    assert shown.get("/api/state", headers={"Host": host}).status == 200


def test_without_a_token_everybody_may_read() -> None:
    with served(token=None) as batch:
        assert batch.url == batch.origin + "/"
        assert ask(batch.port, "/api/state").status == 200
        assert ask(batch.port, "/", headers={"Host": "evil.example"}).status == 421


def test_on_every_address_every_name_is_answered() -> None:
    with served("0.0.0.0:0") as batch:
        assert batch.url.startswith(f"http://{socket.gethostname()}:")
        assert batch.get("/api/state", headers={"Host": "gate.example.com"}).status == 200
        # Not one that is taken apart without care.
        assert batch.get("/", headers={"Host": "[::1"}).status == 200
        assert ask(batch.port, "/api/state").status == 401


def test_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with served("[::1]:0") as batch:
        assert batch.url == f"http://[::1]:{batch.port}/?token={TOKEN}"
        connection = http.client.HTTPConnection("::1", batch.port, timeout=10)
        connection.request("GET", "/healthz")
        assert connection.getresponse().read() == b"ok\n"
        connection.close()


# What every answer is like.


@pytest.mark.parametrize("path", [*PAGES, "/healthz", "/no/such/page"])
def test_headers(shown: BatchServer, path: str) -> None:
    for answer in (shown.get(path), ask(shown.port, path), shown.get(path, method="POST")):
        for name, value in HEADERS.items():
            assert answer.headers[name.lower()] == value
        assert "server" not in answer.headers
    assert "default-src 'self'" in HEADERS["Content-Security-Policy"]
    assert "unsafe" not in HEADERS["Content-Security-Policy"]


@pytest.mark.parametrize("path", [*PAGES, "/healthz", "/api/events", "/api/changes"])
def test_only_reading(shown: BatchServer, path: str) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        answer = shown.get(path, method=method)
        assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")
    head, whole = shown.get(path, method="HEAD"), None
    assert (head.status, head.text) == (200, "")
    if "stream" not in head.headers["content-type"]:
        whole = shown.get(path)
        assert whole.headers["content-type"] == head.headers["content-type"]
        assert whole.text


def test_types_and_packing(shown: BatchServer) -> None:
    types = {
        "/": "text/html; charset=utf-8",
        "/page.css": "text/css; charset=utf-8",
        "/page.js": "text/javascript; charset=utf-8",
        "/icon.svg": "image/svg+xml",
        "/api/state": "application/json",
    }
    for path, content_type in types.items():
        assert shown.get(path).headers["content-type"] == content_type
    packed = shown.get("/api/state", headers={"Accept-Encoding": "gzip, br"})
    assert packed.headers["content-encoding"] == "gzip"
    plain = shown.get("/api/state")
    assert "content-encoding" not in plain.headers
    assert packed.json()["guests"] == plain.json()["guests"]


def test_nothing_of_the_page_is_from_outside(shown: BatchServer) -> None:
    folder = ROOT / "v2v_async" / "web" / "page"
    for file in folder.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "//" not in text.replace("// ", "").replace("//\n", ""), file.name
        assert "http:" not in text
        assert "innerHTML" not in text
        answer = shown.get(f"/{file.name}")
        assert (answer.status, answer.text) == (200, file.read_text())


def test_health_is_for_everybody_and_says_nothing(shown: BatchServer) -> None:
    assert ask(shown.port, "/healthz").text == "ok\n"
