"""Copies over TLS: pre-shared keys and certificates, named in the URI as nbdcopy takes them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.conftest import require
from tests.integration.servers import MIB, digest, fragmented
from tests.waiting import until, wait_until
from v2v_async.copy.endpoint import nbd
from v2v_async.copy.schedule import CopyJob, copy_disks
from v2v_async.errors import ConnectError
from v2v_async.events import Event, Reporter
from v2v_async.options import CopyOptions

pytestmark = pytest.mark.anyio
SIZE = 9 * MIB + 512


@pytest.fixture
def keys(short_tmp: Path) -> Path:
    """A file with one user's pre-shared key."""
    require("psktool", "nbdkit")
    file = short_tmp / "keys.psk"
    subprocess.run(["psktool", "-u", "alice", "-p", str(file)], check=True, capture_output=True)
    return file


def start(folder: Path, name: str, *words: str) -> subprocess.Popen[bytes]:
    """Start nbdkit with TLS, and wait until it listens."""
    pid_file = folder / f"{name}.pid"
    argv = [
        "nbdkit",
        "--foreground",
        "--exit-with-parent",
        "--tls=require",
        f"--pidfile={pid_file}",
    ]
    server = subprocess.Popen([*argv, "-U", str(folder / name), *words])
    wait_until(pid_file.exists, f"{name} listens", of=server)
    return server


def uri(folder: Path, name: str, user: str, keys: Path) -> str:
    return f"nbds+unix://{user}@/?socket={folder / name}&tls-psk-file={keys}"


async def test_both_sides_over_tls(short_tmp: Path, keys: Path) -> None:
    source = fragmented(short_tmp / "s", SIZE)
    sink = short_tmp / "t"
    with sink.open("wb") as file:
        file.truncate(SIZE)
    servers = [
        start(short_tmp, "in1", f"--tls-psk={keys}", "file", str(source)),
        start(short_tmp, "out1", f"--tls-psk={keys}", "file", str(sink)),
    ]
    events: list[Event] = []
    try:
        ends = [nbd(uri(short_tmp, name, "alice", keys)) for name in ("in1", "out1")]
        results = await copy_disks(
            [CopyJob(1, ends[0], ends[1])], Reporter(events.append, "t"), CopyOptions(verify=True)
        )
    finally:
        for server in servers:
            server.terminate()
            server.wait()
    assert results[0].bytes.landed == SIZE
    assert digest(sink) == digest(source)


async def test_a_user_without_a_key_is_refused(short_tmp: Path, keys: Path) -> None:
    server = start(short_tmp, "in1", f"--tls-psk={keys}", "memory", "1M")
    try:
        with pytest.raises(ConnectError) as caught:
            await copy_disks(
                [CopyJob(1, nbd(uri(short_tmp, "in1", "mallory", keys)), nbd("/nowhere"))],
                Reporter(lambda event: None, "t"),
            )
    finally:
        server.terminate()
        server.wait()
    assert caught.value.disk == 1
    key = keys.read_text().split(":")[1].strip()
    assert key not in str(caught.value)


async def test_an_empty_disk(short_tmp: Path) -> None:
    """Nothing to copy is no error, with all that comes after a copy."""
    servers = []
    for name in ("in1", "out1"):
        argv = [
            "nbdkit",
            "--foreground",
            "--exit-with-parent",
            "-P",
            str(short_tmp / f"{name}.pid"),
        ]
        servers.append(subprocess.Popen([*argv, "-U", str(short_tmp / name), "memory", "0"]))
        await until((short_tmp / f"{name}.pid").exists, f"{name} listens", of=servers[-1])
    try:
        results = await copy_disks(
            [CopyJob(1, nbd(str(short_tmp / "in1")), nbd(str(short_tmp / "out1")))],
            Reporter(lambda event: None, "t"),
            CopyOptions(verify=True, digest="sha256", checkpoint=short_tmp / "state"),
        )
    finally:
        for server in servers:
            server.terminate()
            server.wait()
    assert results[0].bytes.total == 0
    # The digest of no blocks: that of the size alone.
    assert results[0].digest is not None
    assert results[0].digest.startswith("af5570f5a181")
    assert not (short_tmp / "state").exists()
