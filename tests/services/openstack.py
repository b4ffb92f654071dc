"""A cloud for tests: real Keystone and Glance, stand-ins for Cinder and Nova, faults on request.

::

    test process ──(start, stop; HTTP to the control port)──> python -m tests.services.openstack DIR
        Front ports: identity, image, volume, compute           ├ uwsgi: Keystone on a Unix socket
                                                                └ uwsgi: Glance on a Unix socket

Everything is below a temporary folder. It takes some ten seconds to begin, so a test session has
one (:func:`cloud`); :meth:`TestCloud.reset` empties it between tests.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from tests.services import glance, keystone
from tests.services.cinder import Cinder
from tests.services.front import Answer, Fault, Front, Request, Shared
from tests.services.nova import Nova
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parent.parent.parent
_START_TIMEOUT_S = 120.0


class TestCloud:
    """The cloud as tests see it; made by :func:`start`."""

    __test__ = False

    def __init__(self, folder: Path, child: subprocess.Popen[str], ready: dict[str, str]) -> None:
        self.folder = folder
        self.child = child
        self.urls = ready
        self.devices = folder / "by-id"
        self.environment = dict(keystone.environment(ready["identity"]))
        self.password = ready["password"]

    def reset(self) -> None:
        """Forget faults and calls, and remove every volume and image."""
        self._control("POST", "/reset")

    def add_fault(self, fault: Fault) -> None:
        """Have something go wrong."""
        self._control("POST", "/faults", asdict(fault))

    def set_nova(self, **settings: bool) -> None:
        """Set ``use_loop`` or ``hides_devices``."""
        self._control("POST", "/nova", settings)

    def calls(self) -> list[tuple[str, str, str, int | None, Any]]:
        """Return service, method, path and status of what was asked so far.

        And the JSON that the stand-ins, Cinder and Nova, were sent.
        """
        return [tuple(call) for call in self._control("GET", "/calls")["calls"]]

    def volumes(self) -> list[dict[str, Any]]:
        """Return Cinder's volumes, but for those that are on their way out, by name."""
        found = self._control("GET", "/volumes")["volumes"]
        alive = [each for each in found if each["status"] != "deleting"]
        return sorted(alive, key=lambda each: str(each["name"]))

    def volume_file(self, identifier: str) -> Path:
        """Return where a volume's content is."""
        return self.folder / "volumes" / identifier

    def images(self) -> list[dict[str, Any]]:
        """Return Glance's images, by name."""
        found = self._control("GET", "/images")["images"]
        return sorted(found, key=lambda each: str(each["name"]))

    def image_file(self, identifier: str) -> Path:
        """Return where an image's content is."""
        return self.folder / "glance" / "images" / identifier

    def stop(self) -> None:
        """End all of it, and remove the folder."""
        assert self.child.stdin is not None
        self.child.stdin.close()
        try:
            self.child.wait(30)
        finally:
            self.child.kill()
            self.child.wait()
            if self.child.stdout is not None:
                self.child.stdout.close()
            if not os.environ.get("V2V_KEEP_CLOUD"):  # for a look at the logs
                shutil.rmtree(self.folder, ignore_errors=True)

    def _control(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(self.urls["control"] + path, data=data, method=method)
        request.add_header("Connection", "close")
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return cast(dict[str, Any], json.loads(response.read() or b"{}"))
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.read().decode()}") from error


def start() -> TestCloud:
    """Start a cloud in a folder of its own; it ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="cloud.", dir="/var/tmp"))
    made = subprocess.run(
        [str(ROOT / "scripts" / "services")], stdout=subprocess.PIPE, text=True, check=True
    )
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.services.openstack", str(folder), made.stdout.strip()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        # A Ctrl-C at the terminal is for the tests, which then stop it.
        start_new_session=True,
    )
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        child.wait()
        logs = "\n".join(
            f"--- {path}:\n{path.read_text(errors='replace')[-3000:]}"
            for path in sorted(folder.rglob("*.log"))
        )
        shutil.rmtree(folder, ignore_errors=True)
        raise RuntimeError(f"the cloud did not start:\n{logs}")
    return TestCloud(folder, child, json.loads(line))


# The process of its own.


class _Admin:
    """Requests to the real services as the administrator."""

    def __init__(self) -> None:
        self.identity = self.image = ""
        self._token: str | None = None

    def token(self) -> str:
        if self._token is None:
            password = {
                "user": {
                    "name": keystone.USER,
                    "domain": {"name": "Default"},
                    "password": keystone.PASSWORD,
                }
            }
            body = {
                "auth": {
                    "identity": {"methods": ["password"], "password": password},
                    "scope": {"project": {"name": keystone.PROJECT, "domain": {"name": "Default"}}},
                }
            }
            _, headers, _ = self._ask("POST", f"{self.identity}/v3/auth/tokens", {}, body)
            self._token = headers["X-Subject-Token"]
        return self._token

    def ask(self, method: str, url: str, body: Any = None) -> Any:
        return self._ask(method, url, {"X-Auth-Token": self.token()}, body)[2]

    def knows(self, token: str | None) -> bool:
        """Whether Keystone says that a token is good."""
        if token is None:
            return False
        headers = {"X-Auth-Token": self.token(), "X-Subject-Token": token}
        try:
            return self._ask("GET", f"{self.identity}/v3/auth/tokens", headers)[0] == 200
        except urllib.error.HTTPError:
            return False

    @staticmethod
    def _ask(
        method: str, url: str, headers: Mapping[str, str], body: Any = None
    ) -> tuple[int, Mapping[str, str], Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data=data, method=method)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            request.add_header(name, value)
        with urllib.request.urlopen(request, timeout=60) as response:
            content = response.read()
            return response.status, response.headers, json.loads(content) if content else None


def _uwsgi(services: Path, module: str, path: Path, environment: Mapping[str, str]) -> Any:
    program = [str(services / "bin" / "uwsgi"), "--virtualenv", str(services)]
    program += ["--http-socket", str(path), "--module", f"{module}.wsgi.api:application"]
    program += ["--master", "--enable-threads", "--die-on-term", "--no-orphans"]
    # One request at a time: sqlite refuses two writers, and Glance does not try again.
    program += ["--processes", "1"]
    program += ["--add-header", "Connection: close", "--buffer-size", "65535"]
    return subprocess.Popen(
        program,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=(path.parent / f"{module}-uwsgi.log").open("ab"),
        stderr=subprocess.STDOUT,
    )


def _wait(child: subprocess.Popen[bytes], path: Path) -> None:
    """Wait until a service answers; it may end before it does."""

    def answers() -> bool:
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(_START_TIMEOUT_S)
                client.connect(str(path))
                client.sendall(b"GET / HTTP/1.0\r\nHost: x\r\n\r\n")
                return client.recv(4).startswith(b"HTTP")
        except OSError:
            return False

    wait_until(answers, f"{path} answers", within_s=_START_TIMEOUT_S, of=child)


def _serve(folder: Path, services: Path) -> None:
    shared = Shared()
    admin = _Admin()
    cinder = Cinder(folder / "volumes", admin.knows)
    nova = Nova(cinder, folder / "by-id", admin.knows)
    (folder / "keystone").mkdir()
    sockets = {name: folder / name / "socket" for name in ("keystone", "glance")}
    fronts = {
        "identity": Front("identity", shared, socket_=sockets["keystone"]),
        "image": Front("image", shared, socket_=sockets["glance"]),
        "volume": Front("volume", shared, app=cinder),
        "compute": Front("compute", shared, app=nova),
    }
    url = fronts["identity"].url
    # Not through the fronts, whose faults are for those who are tested.
    hidden = Shared()
    own_identity = Front("own", hidden, socket_=sockets["keystone"])
    own_image = Front("own", hidden, socket_=sockets["glance"])
    admin.identity, admin.image = own_identity.url, own_image.url
    children = []
    try:
        with ThreadPoolExecutor() as pool:
            glance_made = pool.submit(glance.configure, folder / "glance", services)
            environment = keystone.configure(folder / "keystone", services)
            keystone.bootstrap(folder / "keystone", services, url, own_identity.url)
            children.append(_uwsgi(services, "keystone", sockets["keystone"], environment))
            glance_made.result()
            environment = glance.environment(folder / "glance", services, own_identity.url)
            children.append(_uwsgi(services, "glance", sockets["glance"], environment))
            _wait(children[0], sockets["keystone"])
            _fill_catalogue(admin, fronts)
            _wait(children[1], sockets["glance"])
        control = Front("control", hidden, app=_control(shared, cinder, nova, admin))
        urls = {name: front.url for name, front in fronts.items()} | {"control": control.url}
        print(json.dumps({**urls, "password": keystone.PASSWORD}), flush=True)
        sys.stdin.read()  # until the test process ends
    finally:
        shared.ended.set()
        for child in children:
            child.terminate()
        for child in children:
            try:
                child.wait(15)
            except subprocess.TimeoutExpired:
                child.kill()
        nova.release()


def _fill_catalogue(admin: _Admin, fronts: Mapping[str, Front]) -> None:
    for type_, name, url in (
        ("image", "glance", fronts["image"].url),
        ("volumev3", "cinderv3", fronts["volume"].url + "/v3/%(tenant_id)s"),
        ("compute", "nova", fronts["compute"].url + "/v2.1"),
    ):
        body = {"service": {"type": type_, "name": name}}
        service = admin.ask("POST", f"{admin.identity}/v3/services", body)["service"]["id"]
        endpoint = {
            "service_id": service,
            "interface": "public",
            "region_id": keystone.REGION,
            "url": url,
        }
        admin.ask("POST", f"{admin.identity}/v3/endpoints", {"endpoint": endpoint})


def _control(shared: Shared, cinder: Cinder, nova: Nova, admin: _Admin) -> Any:
    def images() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = admin.ask("GET", f"{admin.image}/v2/images")["images"]
        return found

    def answer(request: Request) -> Answer:
        match request.method, request.path:
            case "POST", "/reset":
                with shared.lock:
                    shared.faults.clear()
                    shared.calls.clear()
                    shared.ended.set()
                    shared.ended = type(shared.ended)()
                with cinder.lock:
                    nova.release()
                    nova.use_loop = nova.hides_devices = False
                    for identifier in cinder.volumes:
                        cinder.path(identifier).unlink(missing_ok=True)
                    cinder.volumes.clear()
                for image in images():
                    admin.ask("DELETE", f"{admin.image}/v2/images/{image['id']}")
            case "POST", "/faults":
                with shared.lock:
                    shared.faults.append(Fault(**request.body))
            case "POST", "/nova":
                for name, value in request.body.items():
                    setattr(nova, name, value)
            case "GET", "/calls":
                with shared.lock:
                    return 200, {"calls": shared.calls}
            case "GET", "/volumes":
                with cinder.lock:
                    return 200, {"volumes": list(cinder.volumes.values())}
            case "GET", "/images":
                return 200, {"images": images()}
        return 200, {}

    return answer


if __name__ == "__main__":
    try:
        _serve(Path(sys.argv[1]), Path(sys.argv[2]))
    except (RuntimeError, subprocess.CalledProcessError, http.client.HTTPException, OSError) as why:
        sys.exit(f"the cloud did not start: {why}")
