"""Servers that will not start, will not stop, or go away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import anyio
import pytest

from tests.conftest import ROOT, assert_gone, processes_naming
from tests.integration.servers import serve
from v2v_async import nbdkit, server
from v2v_async.errors import DependencyError, ServerExitedError, ServerStartError
from v2v_async.process import ServerCommand
from v2v_async.server import running_servers
from v2v_async.v2vdir import V2VDir

pytestmark = pytest.mark.anyio


async def test_a_server_that_exits_at_once_says_why(short_tmp: Path) -> None:
    with pytest.raises(ServerStartError, match="No such file") as caught:
        async with running_servers(V2VDir(short_tmp)) as servers:
            await serve(servers, "in1", short_tmp, "file", f"file={short_tmp}/absent")
    assert caught.value.log == short_tmp / "in1.log"
    assert "absent" in caught.value.stderr_tail
    assert V2VDir(short_tmp).state.processes == []


@pytest.mark.parametrize("is_detached", [False, True])
async def test_a_server_does_not_inherit_what_logs_in_to_a_cloud(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch, is_detached: bool
) -> None:
    monkeypatch.setenv("OS_PASSWORD", "hunter2")
    monkeypatch.setenv("OS_USERNAME", "demo")
    async with running_servers(V2VDir(short_tmp), detached=is_detached) as servers:
        one = await serve(servers, "in1", short_tmp, "memory", "size=1M")
        environment = Path(f"/proc/{one.process.pid}/environ").read_bytes().split(b"\0")
        await servers.stop_all()
    assert b"OS_USERNAME=demo" in environment
    assert not [each for each in environment if each.startswith(b"OS_PASSWORD=")]


async def test_a_server_that_never_answers(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "READY_TIMEOUT_S", 0.3)
    command = ServerCommand("sleep", ("sleep", "1000"), short_tmp / "in1")
    with pytest.raises(ServerStartError, match="did not answer"):
        async with running_servers(V2VDir(short_tmp)) as servers:
            await servers.start("in1", command, log=short_tmp / "log")


async def test_a_server_that_can_not_open_its_disk_says_so_at_once(short_tmp: Path) -> None:
    with pytest.raises(ServerStartError, match="can't serve the disk") as caught:
        with anyio.fail_after(30):
            async with running_servers(V2VDir(short_tmp)) as servers:
                refuse = ["open=echo ENOENT no such disk >&2; exit 1", "get_size=echo 1M"]
                await serve(servers, "in1", short_tmp, "eval", *refuse)
    assert "no such disk" in caught.value.stderr_tail


async def test_a_server_that_accepts_and_says_nothing(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "READY_TIMEOUT_S", 1.0)
    mute = (
        "import socket,time,sys; s=socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); "
        "s.listen(); c=s.accept(); time.sleep(1000)"
    )
    socket = short_tmp / "in1"
    command = ServerCommand("mute", (sys.executable, "-c", mute, str(socket)), socket)
    with pytest.raises(ServerStartError, match="did not answer"):
        async with running_servers(V2VDir(short_tmp)) as servers:
            await servers.start("in1", command, log=short_tmp / "log")


async def test_a_program_that_is_not_installed(short_tmp: Path) -> None:
    command = ServerCommand("x", ("/nonexistent/nbdkit",), short_tmp / "in1")
    with pytest.raises((DependencyError, ServerStartError), match="nonexistent"):
        async with running_servers(V2VDir(short_tmp)) as servers:
            await servers.start("in1", command, log=short_tmp / "log")


async def test_a_plugin_that_is_not_installed(short_tmp: Path) -> None:
    features = await nbdkit.probe()
    with pytest.raises(DependencyError, match="plugin ‘nosuch’ and the filter ‘neither’"):
        nbdkit.serve(features, short_tmp / "s", "nosuch", [], filters=["neither"])


async def test_a_server_that_dies_cancels_the_block_with_the_reason(short_tmp: Path) -> None:
    reached = False
    with pytest.raises(ServerExitedError, match="in1 .*killed by SIGKILL") as caught:
        async with running_servers(V2VDir(short_tmp)) as servers:
            one = await serve(servers, "in1", short_tmp, "null", "size=1M")
            await serve(servers, "in2", short_tmp, "null", "size=1M")
            os.kill(one.process.pid, signal.SIGKILL)
            await anyio.sleep_forever()
            reached = True
    assert not reached
    assert caught.value.status == -signal.SIGKILL
    assert not (short_tmp / "in2").exists()


async def test_a_server_that_ignores_sigterm_is_killed(short_tmp: Path) -> None:
    async with running_servers(V2VDir(short_tmp)) as servers:
        stubborn = await serve(servers, "in1", short_tmp, "null", "size=1M")
        os.kill(stubborn.process.pid, signal.SIGSTOP)  # it can't even handle the signal
        began = time.monotonic()
        await stubborn.stop(grace_s=0.3)
        assert time.monotonic() - began < 5
        assert stubborn.process.returncode == -signal.SIGKILL


async def test_a_detached_server_stays_and_is_known(short_tmp: Path) -> None:
    from v2v_async.connection import export_info
    from v2v_async.steps import stop_recorded

    v2vdir = V2VDir(short_tmp)
    async with running_servers(v2vdir, detached=True) as servers:
        await serve(servers, "in1", short_tmp, "null", "size=1M")
    assert (await export_info(str(short_tmp / "in1"))).size == 1 << 20
    assert v2vdir.state.processes[0].is_alive
    assert await stop_recorded(v2vdir) == 1
    assert_gone(str(short_tmp))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_servers_die_with_their_parent(short_tmp: Path, how: signal.Signals) -> None:
    """Also where it has no chance to clean up: nbdkit and qemu-nbd alike."""
    script = f"""
import anyio, pathlib, subprocess
from tests.integration.servers import serve, serve_qcow2
from v2v_async.server import running_servers
from v2v_async.v2vdir import V2VDir
async def main():
    folder = pathlib.Path({str(short_tmp)!r})
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", folder / "q", "1M"], check=True)
    async with running_servers(V2VDir(folder)) as servers:
        await serve(servers, "in1", folder, "null", "size=1M")
        await serve_qcow2(servers, "out1", folder, folder / "q")
        print("ready", flush=True)
        await anyio.sleep_forever()
anyio.run(main)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert parent.stdout is not None
    with parent, parent.stdout:
        assert parent.stdout.readline() == "ready\n"
        assert len(processes_naming(str(short_tmp / "in1"))) == 1
        assert len(processes_naming(str(short_tmp / "out1"))) == 1
        parent.send_signal(how)
        parent.wait()
    assert_gone(str(short_tmp))
