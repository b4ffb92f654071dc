"""A source behind ssh whose host goes away in the middle of a copy: recovered, or a clear error."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import assert_gone
from tests.fault.test_copy_lost import Watch
from tests.integration.servers import MIB, digest
from tests.integration.test_input_disk import quiet, served
from tests.sshd import Sshd, running_sshd
from tests.unit.test_vmdk_descriptor import ESXI
from v2v_async.copy.endpoint import Endpoint, nbd
from v2v_async.copy.schedule import CopyJob, copy_disks
from v2v_async.copy.step import copy as copy_step
from v2v_async.errors import CopyError
from v2v_async.events import Reporter
from v2v_async.input import ssh_files
from v2v_async.input.registry import parse_input
from v2v_async.options import CopyOptions, InputOptions, OutputOptions
from v2v_async.output.registry import parse_output
from v2v_async.server import running_servers
from v2v_async.ssh import LoginError

pytestmark = pytest.mark.anyio

SIZE = 16 * MIB


@pytest.fixture
def sshd(short_tmp: Path) -> Iterator[Sshd]:
    with running_sshd(short_tmp) as server:
        yield server


@pytest.fixture
def vmx(short_tmp: Path) -> Path:
    """A guest with one disk as ESXi has it, without zeroes."""
    (short_tmp / "web-flat.vmdk").write_bytes(random.Random(1).randbytes(SIZE))
    text = ESXI.replace("guest-flat", "web-flat").replace("8192", str(SIZE // 512))
    (short_tmp / "web.vmdk").write_text(text)
    path = short_tmp / "web.vmx"
    path.write_text('scsi0:0.fileName = "web.vmdk"\n')
    return path


def options(server: Sshd, vmx: Path) -> InputOptions:
    return InputOptions("vmx", (server.uri(vmx),), transport="ssh", options=server.io_options)


async def copy(folder: Path, watch: Watch, copying: CopyOptions) -> None:
    jobs = [CopyJob(1, nbd(str(folder / "v/in1")), Endpoint("file", str(folder / "copy")))]
    (folder / "copy").write_bytes(b"\xd5" * SIZE)
    await copy_disks(jobs, Reporter(watch, "t"), copying)


@pytest.mark.parametrize("connections", [1, 4])
async def test_a_host_that_comes_back(
    short_tmp: Path,
    sshd: Sshd,
    vmx: Path,
    connections: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The retry filter logs in again; a connection that was there never hears of it."""
    monkeypatch.setattr(ssh_files, "RETRY", {"retry": ("retries=5", "retry-delay=1")})
    again: list[threading.Timer] = []

    def pull() -> None:
        sshd.kill()
        again.append(threading.Timer(1.5, sshd.start))
        again[0].start()

    watch = Watch(pull, landed=SIZE // 4)
    # A new connection, made while nobody is there, is the copy engine's to make again.
    retries = 0 if connections == 1 else 50
    copying = CopyOptions(bandwidth=SIZE // 2, connections=connections, retries=retries)
    async with served(short_tmp, options(sshd, vmx)) as (v2vdir, _):
        try:
            await copy(short_tmp, watch, copying)
        finally:
            for timer in again:
                timer.join()
        log = v2vdir.log("input", 1).read_text()
    assert digest(short_tmp / "copy") == digest(short_tmp / "web-flat.vmdk")
    assert "read failed: Socket error" in log
    if connections == 1:
        assert watch.of("retrying") == []


async def test_a_host_that_stays_away(
    short_tmp: Path, sshd: Sshd, vmx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_files, "RETRY", {"retry": ("retries=1", "retry-delay=1")})
    watch = Watch(sshd.kill, landed=SIZE // 4)
    copying = CopyOptions(bandwidth=SIZE // 2, connections=2, retries=1)
    async with served(short_tmp, options(sshd, vmx)) as (v2vdir, guest):
        output = parse_output(OutputOptions("null"))
        async with running_servers(v2vdir) as servers:
            await output.setup(v2vdir, guest, "web", servers, quiet)
            with pytest.raises(CopyError) as caught:
                await copy_step(v2vdir, guest, copying, Reporter(watch, "t"))
    assert caught.value.disk == 1
    assert f"its source, ‘{sshd.uri(vmx.parent)}/web-flat.vmdk’, said: " in str(caught.value.hint)
    assert "connect to remote host: 127.0.0.1: Connection refused" in str(caught.value.hint)
    assert_gone(str(short_tmp / "v"))


async def test_a_host_that_goes_between_the_check_and_the_start(
    short_tmp: Path, sshd: Sshd, vmx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_files, "RETRY", {"retry": ("retries=1", "retry-delay=1")})
    source = parse_input(options(sshd, vmx))
    check = type(source).check

    async def check_and_pull(self: object, reporter: Reporter) -> None:
        await check(source, reporter)
        sshd.kill()

    monkeypatch.setattr(type(source), "check", check_and_pull)
    monkeypatch.setattr("tests.integration.test_input_disk.parse_input", lambda _: source)
    with pytest.raises(
        LoginError, match="web-flat.vmdk’ can't be served: can't log in to"
    ) as caught:
        async with served(short_tmp, options(sshd, vmx)):
            pass
    assert f"‘{sshd.user}@127.0.0.1:{sshd.port}’: it refused the connection" in str(caught.value)
    assert caught.value.disk == 1
    assert caught.value.log == short_tmp / "v/log/input-1.log"
