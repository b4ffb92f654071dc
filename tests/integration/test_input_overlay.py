"""Overlays over what an nbdkit plugin reads: what conversion reads again comes from the overlay."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from tests.conftest import require
from v2v_async.connection import connected
from v2v_async.errors import SourceError, UsageError
from v2v_async.input.image import DiskSource, FileImage, Image, NbdImage, PluginImage
from v2v_async.input.kept import changed_so_far
from v2v_async.input.overlay import (
    CowOverlay,
    OverlayKind,
    Qcow2Overlay,
    choose,
    serve_overlays,
)
from v2v_async.server import running_servers
from v2v_async.v2vdir import V2VDir

pytestmark = pytest.mark.anyio

SIZE = 1 << 20


@pytest.fixture
def disk(short_tmp: Path) -> Path:
    path = short_tmp / "disk.img"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


def logged(disk: Path, log: Path) -> PluginImage:
    """The file plugin as if it were far away; every request that reaches it is in ``log``."""
    return PluginImage("file", (f"file={disk}", f"logfile={log}"), str(disk), filters=("log",))


def reads(log: Path) -> int:
    return sum(" Read " in line and "..." in line for line in log.read_text().splitlines())


async def test_what_conversion_reads_is_read_once(short_tmp: Path, disk: Path) -> None:
    require("nbdkit")
    log = short_tmp / "requests.log"
    v2vdir = V2VDir.create(short_tmp)
    async with running_servers(v2vdir) as servers:
        sizes = await serve_overlays([DiskSource(logged(disk, log), "raw")], None, v2vdir, servers)
        assert sizes == [SIZE]
        async with connected(str(v2vdir.source_socket(1))) as connection:
            read = connection.handle.read_now
            wanted = disk.read_bytes()
            before = reads(log)
            v2vdir.converting_mark.touch()
            for _ in range(3):
                assert read(65536, 65536) == wanted[65536:131072]
            during = reads(log)
            v2vdir.converting_mark.unlink()
            for _ in range(3):
                assert read(65536, 262144) == wanted[262144:327680]
            after = reads(log)
            assert read(65536, 65536) == wanted[65536:131072]
    assert during - before == 1
    assert after - during == 3  # the copy reads each block once: keeping it would only cost room
    assert reads(log) == after
    v2vdir.remove()


@pytest.mark.parametrize("overlay", ["cow", "qcow2"])
async def test_a_plugin_under_either_overlay(
    short_tmp: Path, disk: Path, overlay: OverlayKind
) -> None:
    require("nbdkit", "qemu-nbd")
    v2vdir = V2VDir.create(short_tmp)
    image = logged(disk, short_tmp / "requests.log")
    async with running_servers(v2vdir) as servers:
        await serve_overlays([DiskSource(image, "raw")], overlay, v2vdir, servers)
        async with connected(str(v2vdir.source_socket(1))) as connection:
            handle = connection.handle
            handle.write_now(memoryview(b"x" * 4096), 8192)
            assert handle.read_now(4096, 8192) == b"x" * 4096
            assert handle.read_now(8192, 0) == disk.read_bytes()[:8192]
    assert disk.read_bytes() == random.Random(1).randbytes(SIZE)
    v2vdir.remove()


async def test_a_part_of_a_file(short_tmp: Path, disk: Path) -> None:
    require("nbdkit", "qemu-nbd")
    v2vdir = V2VDir.create(short_tmp)
    part = FileImage(disk, 4096, 65536)
    async with running_servers(v2vdir) as servers:
        sizes = await serve_overlays(
            [DiskSource(part, "raw", 65536), DiskSource(part, "raw", 65536)],
            None,
            v2vdir,
            servers,
        )
        assert sizes == [65536, 65536]
        async with connected(str(v2vdir.source_socket(2))) as connection:
            assert connection.handle.read_now(65536, 0) == disk.read_bytes()[4096:69632]
    v2vdir.remove()


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (FileImage(Path("/d"), 4096, 1024), Qcow2Overlay),
        (FileImage(Path("/d"), 4096, 1000), CowOverlay),
        (NbdImage("nbds://host/x"), CowOverlay),
        (PluginImage("curl", ("url=x",), "x"), CowOverlay),
    ],
)
def test_what_qemu_reads_badly_has_a_cow_that_is_kept(image: Image, kind: type) -> None:
    """Whoever asks for qcow2 wants one that outlives its server."""
    overlay = choose("qcow2", DiskSource(image, "raw"))
    assert type(overlay) is kind
    assert isinstance(overlay, Qcow2Overlay) or overlay.is_kept  # type: ignore[attr-defined]
    assert not choose(None, DiskSource(image, "raw")).is_kept  # type: ignore[attr-defined]
    assert isinstance(choose("kept", DiskSource(image, "vmdk")), Qcow2Overlay)
    with pytest.raises(UsageError, match="is vmdk"):
        choose("cow", DiskSource(image, "vmdk"))


@pytest.mark.parametrize("kind", ["raw", "odd", "part", "qcow2", "qcow2 in part", "far qcow2"])
async def test_a_disk_is_served_as_it_is_beside_its_overlay(
    short_tmp: Path, disk: Path, kind: str
) -> None:
    """Where it is to be copied early: of the same size, unchanged by what is written to it."""
    require("nbdkit", "qemu-nbd", "qemu-img")
    wanted = disk.read_bytes()
    image: Image = FileImage(disk)
    if kind == "odd":
        wanted = wanted[:-100]
        disk.write_bytes(wanted)
    elif kind == "part":
        wanted = wanted[4096:69632]
        image = FileImage(disk, 4096, 65536)
    elif "qcow2" in kind:
        made = short_tmp / "disk.qcow2"
        convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(disk), str(made)]
        subprocess.run(convert, check=True)
        image = FileImage(made)
        if "part" in kind:
            length = made.stat().st_size
            made.write_bytes(bytes(4096) + made.read_bytes())
            image = FileImage(made, 4096, length)
        elif "far" in kind:
            image = logged(made, short_tmp / "requests.log")
    source = DiskSource(image, "qcow2" if "qcow2" in kind else "raw")
    v2vdir = V2VDir.create(short_tmp)
    v2vdir.update(is_overlapped=True)
    async with running_servers(v2vdir) as servers:
        sizes = await serve_overlays([source], None, v2vdir, servers)
        assert sizes == [len(wanted)]
        async with connected(str(v2vdir.source_socket(1))) as connection:
            connection.handle.write_now(memoryview(b"changed!" * 512), 4096)
            async with connected(str(v2vdir.plain_socket(1))) as plain:
                assert plain.info.size == len(wanted)
                assert plain.info.is_read_only
                assert plain.info.can_multi_conn
                assert plain.handle.read_now(len(wanted), 0) == wanted
        assert await changed_so_far(v2vdir, 1) == [(4096, 4096)] or "qcow2" in kind
    v2vdir.remove()


async def test_all_that_is_wrong_is_told(short_tmp: Path, disk: Path) -> None:
    require("nbdkit")
    v2vdir = V2VDir.create(short_tmp)
    gone = DiskSource(FileImage(short_tmp / "gone.img"), "raw", SIZE)
    with pytest.raises(SourceError, match="2 disks can't be used: disk 1: .*; disk 3: "):
        async with running_servers(v2vdir) as servers:
            good = DiskSource(FileImage(disk), "raw", SIZE)
            await serve_overlays([gone, good, gone], None, v2vdir, servers)
    v2vdir.remove()
