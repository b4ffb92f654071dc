"""What tests of -o rhv-upload share: the daemon, the engine, and a proxy that cuts connections."""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import require
from tests.services.engine import PASSWORD, Engine
from tests.services.imageio import Imageio
from v2v_async.options import OutputOptions
from v2v_async.output.ovirt.upload import RhvUploadOutput
from v2v_async.output.registry import parse_output
from v2v_async.secret import Secret


def short_folder() -> Path:
    """A folder whose name leaves room for those of Unix sockets."""
    return Path(tempfile.mkdtemp(prefix="vt.", dir="/var/tmp"))


@pytest.fixture(scope="module")
def imageio() -> Iterator[Imageio]:
    """The daemon that the tests of a module share; it outlives all of their transfers."""
    require("nbdkit", "qemu-nbd", "qemu-img", "qemu-io", "openssl")
    folder = short_folder()
    try:
        with Imageio(folder) as daemon:
            yield daemon
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def own_imageio(short_tmp: Path) -> Iterator[Imageio]:
    """A daemon that a test may kill."""
    folder = short_tmp / "imageio"
    folder.mkdir()
    with Imageio(folder) as daemon:
        yield daemon


@pytest.fixture
def engine(imageio: Imageio, short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """An engine with the shared daemon; its disks are in ``short_tmp/engine``."""
    monkeypatch.setattr("v2v_async.output.ovirt.session._FIRST_PAUSE_S", 0.01)
    folder = short_tmp / "engine"
    folder.mkdir()
    with Engine(folder, imageio) as made:
        yield made


def output_for(engine: Engine, *options: tuple[str, str | None], **fields: Any) -> RhvUploadOutput:
    """The output with an engine's login."""
    given = {"connection": engine.url, "storage": "data-1", "password": Secret(PASSWORD)}
    made = parse_output(OutputOptions(mode="rhv-upload", options=options, **{**given, **fields}))
    assert isinstance(made, RhvUploadOutput)
    return made


@dataclass
class Cut:
    """What the proxy does: end a connection after so many bytes to the server, so many times."""

    after: int
    times: int


class CuttingProxy:
    """A TCP proxy in front of imageio that cuts connections; ``with CuttingProxy(port) as p``."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.cut = Cut(0, 0)
        self.cuts = 0
        self.refuses = False
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []

    def __enter__(self) -> CuttingProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.end_all()

    def end_all(self) -> None:
        """End what is open."""
        with self._lock:
            for each in self._open:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
                each.close()
            self._open.clear()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.refuses:
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            with self._lock:
                self._open += [client, server]
            for source, target, counts in ((client, server, True), (server, client, False)):
                threading.Thread(
                    target=self._pass, args=(source, target, counts), daemon=True
                ).start()

    def _pass(self, source: socket.socket, target: socket.socket, counts: bool) -> None:
        passed = 0
        with suppress(OSError):
            while part := source.recv(1 << 16):
                passed += len(part)
                with self._lock:
                    is_cut = counts and self.cuts < self.cut.times and passed > self.cut.after
                    self.cuts += is_cut
                if is_cut:
                    target.send(part[: len(part) // 2])  # half a request arrives
                    break
                target.sendall(part)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
