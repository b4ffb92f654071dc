"""The real ovirt-imageio daemon, on free ports, with its own API for tickets."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

from tests.conftest import made_guest, require
from tests.vcenter import make_certificate
from tests.waiting import wait_until

READY_S = 30.0
_CONFIG = """
[daemon]
poll_interval = 0.1
run_dir = {folder}
drop_privileges = false
systemd_enable = false
max_connections = 8

[tls]
enable = true
key_file = {key}
cert_file = {certificate}

[remote]
host = 127.0.0.1
port = {port}

[local]
enable = true
socket = {folder}/local

[control]
transport = unix
socket = {folder}/control
remove_timeout = 5

[handlers]
keys = stderr

[logger_root]
level = DEBUG
handlers = stderr
"""


class Imageio:
    """A running daemon; ``with Imageio(folder) as daemon``."""

    def __init__(self, folder: Path) -> None:
        require("openssl")
        self.folder = folder
        self.certificate, self._key = make_certificate(folder, "imageio")
        self.log = folder / "imageio.log"
        self.local_socket = folder / "local"
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Imageio:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill(signal.SIGTERM)

    @property
    def url(self) -> str:
        """Where it listens for everybody."""
        return f"https://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, on the port it had before if it had one; return when it serves."""
        services = made_guest("services")
        configuration = self.folder / "conf" / "conf.d"
        configuration.mkdir(parents=True, exist_ok=True)
        (configuration / "60-test.conf").write_text(
            _CONFIG.format(
                folder=self.folder, key=self._key, certificate=self.certificate, port=self.port
            )
        )
        began = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                # It must not outlive a test run that is killed.
                ["setpriv", "--pdeathsig", "TERM", "--"]
                + [str(services / "bin" / name) for name in ("python", "ovirt-imageio")]
                + ["--conf-dir", str(self.folder / "conf")],
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

        def said() -> str:
            return self.log.read_bytes()[began:].decode(errors="replace")

        wait_until(
            lambda: "Ready for requests" in said(),
            lambda: f"the daemon is ready: {said()}",
            within_s=READY_S,
            of=self._process,
        )
        found = re.search(r"remote.service listening on \('127.0.0.1', (\d+)\)", said())
        assert found is not None, said()
        self.port = int(found[1])

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End it."""
        if self._process is not None:
            if self._process.poll() is None:
                os.killpg(self._process.pid, number)
            self._process.wait(10)
            self._process = None

    # Its own API, as VDSM uses it.

    def add_ticket(self, ticket: dict[str, Any]) -> None:
        """Let whoever knows ``ticket['uuid']`` read or write what it names."""
        status, said = self._control("PUT", f"/tickets/{ticket['uuid']}", ticket)
        assert status == 200, said

    def ticket(self, uuid: str) -> dict[str, Any] | None:
        """What it knows of a ticket."""
        status, said = self._control("GET", f"/tickets/{uuid}")
        return json.loads(said) if status == 200 else None

    def set_timeout(self, uuid: str, timeout_s: int) -> None:
        """Let a ticket end so much later."""
        status, said = self._control("PATCH", f"/tickets/{uuid}", {"timeout": timeout_s})
        assert status == 200, said

    def remove_ticket(self, uuid: str) -> bool:
        """Take it away; whether there was a daemon to ask."""
        try:
            status, _ = self._control("DELETE", f"/tickets/{uuid}")
        except OSError:
            return False
        return status == 204

    def _control(self, method: str, path: str, body: object = None) -> tuple[int, str]:
        connection = _Local(str(self.folder / "control"))
        try:
            content = None if body is None else json.dumps(body).encode()
            connection.request(method, path, body=content)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()


class _Local(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=30)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(30)
        self.sock.connect(self.path)
