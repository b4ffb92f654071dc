"""Network disks of a libvirt guest, unplugged in the middle of the copy.

============  =================  ==========================================================
source        back?              outcome
============  =================  ==========================================================
http          after 1 s          nbdkit's retry filter opens it again; every byte is right
http          never              the copy fails after the filter's tries; it says which disk
nbd           at once            every byte is right
nbd           never              as http
============  =================  ==========================================================
"""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

from tests.fault.restarting import Proxy, Restarting
from tests.fault.test_copy_lost import Watch, copy, served_file
from tests.integration.servers import MIB
from tests.integration.test_input_disk import served
from tests.range_server import range_server
from v2v_async.errors import CopyError
from v2v_async.input import overlay
from v2v_async.input.libvirt import domain
from v2v_async.options import CopyOptions, InputOptions

pytestmark = pytest.mark.anyio

SIZE = 8 * MIB


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The filter has a minute by itself; here it has some seconds."""
    hasty = {"retry": ("retries=3", "retry-delay=1", "retry-exponential=yes")}
    monkeypatch.setattr(domain, "RETRY", hasty)
    monkeypatch.setattr(overlay, "RETRY", hasty)


@pytest.fixture
def source(short_tmp: Path) -> Path:
    path = short_tmp / "s.img"
    path.write_bytes(random.Random(2).randbytes(SIZE))
    return path


def guest(folder: Path, protocol: str, name: str, port: int) -> InputOptions:
    path = folder / "guest.xml"
    path.write_text(
        "<domain type='kvm'><name>g</name><devices><disk type='network' device='disk'>"
        f"<driver type='raw'/><source protocol='{protocol}' name='{name}'>"
        f"<host name='127.0.0.1' port='{port}'/></source></disk></devices></domain>"
    )
    return InputOptions("libvirtxml", (str(path),))


def uri(socket: Path) -> str:
    return f"nbd+unix:///?socket={socket}"


@pytest.mark.parametrize("comes_back", [True, False], ids=["back", "gone"])
async def test_http(short_tmp: Path, source: Path, comes_back: bool) -> None:
    target = short_tmp / "t"
    target.write_bytes(b"\xd5" * SIZE)
    timers: list[threading.Timer] = []
    with range_server(short_tmp) as server:

        def unplug() -> None:
            server.unplug()
            if comes_back:
                timers.append(threading.Timer(1, server.plug_in))
                timers[0].start()

        watch = Watch(unplug, landed=SIZE // 4)
        options = CopyOptions(bandwidth=SIZE, retries=3 if comes_back else 0)
        async with served(short_tmp, guest(short_tmp, "http", "s.img", server.port)) as (v2vdir, _):
            pair = (uri(v2vdir.source_socket(1)), str(target))
            if comes_back:
                await copy([pair], watch, options)
            else:
                with pytest.raises(CopyError) as caught:
                    await copy([pair], watch, options)
        for timer in timers:
            timer.join()
    if comes_back:
        assert target.read_bytes() == source.read_bytes()
    else:
        assert caught.value.disk == 1
        assert watch.last[1] == "failed"


@pytest.mark.parametrize("comes_back", [True, False], ids=["back", "gone"])
async def test_nbd(short_tmp: Path, source: Path, comes_back: bool) -> None:
    target = short_tmp / "t"
    target.write_bytes(b"\xd5" * SIZE)
    async with (
        Restarting(served_file(short_tmp, "far", source), short_tmp / "far") as far,
        Proxy(short_tmp / "far") as proxy,
    ):

        def unplug() -> None:
            if not comes_back:
                far.kill()
            proxy.cut()

        watch = Watch(unplug, landed=SIZE // 4)
        options = CopyOptions(bandwidth=SIZE, retries=5 if comes_back else 0)
        async with served(short_tmp, guest(short_tmp, "nbd", "", proxy.port)) as (v2vdir, _):
            pair = (uri(v2vdir.source_socket(1)), str(target))
            if comes_back:
                await copy([pair], watch, options)
            else:
                with pytest.raises(CopyError) as caught:
                    await copy([pair], watch, options)
        assert proxy.cuts > 0
    if comes_back:
        assert target.read_bytes() == source.read_bytes()
    else:
        assert caught.value.disk == 1
        assert watch.last[1] == "failed"
