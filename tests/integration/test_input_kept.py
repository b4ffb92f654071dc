"""Overlays that are kept: whatever served them is killed, and what was converted is there again."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import pytest

from tests import ovas
from tests.conftest import require
from tests.integration.request_log import read_logs
from tests.integration.servers import MIB, fragmented, serve
from tests.integration.test_copy_tls import start as start_tls
from tests.integration.test_copy_tls import uri as tls_uri
from tests.integration.test_input_disk import content, quiet
from tests.integration.test_input_libvirt import checksum, file_disk
from tests.integration.test_input_libvirt import options as libvirt_options
from tests.range_server import range_server
from tests.sshd import running_sshd
from tests.waiting import until
from v2v_async.connection import connected
from v2v_async.errors import ServerExitedError, SourceError, V2VError
from v2v_async.input.changes import merged, read_changes
from v2v_async.input.image import DiskSource, FileImage, Image, NbdImage, PluginImage
from v2v_async.input.overlay import OverlayKind, discard, is_kept, serve_overlays, settle
from v2v_async.input.registry import parse_input
from v2v_async.model import SourceDisk, SourceGuest
from v2v_async.options import InputOptions
from v2v_async.secret import Secret
from v2v_async.server import running_servers
from v2v_async.v2vdir import V2VDir

pytestmark = pytest.mark.anyio
SIZE = 4 * MIB
ODD = SIZE + 1000
PASSWORD = "hunter2"


@pytest.fixture(autouse=True)
def _installed() -> None:
    require("nbdkit", "qemu-nbd", "qemu-img")


def kill_servers(v2vdir: V2VDir) -> None:
    """Kill them as a loss of power would: no chance to write anything."""
    for record in v2vdir.state.processes:
        os.kill(record.pid, signal.SIGKILL)


async def convert(endpoint: str) -> bytes:
    """Write as a conversion does, here and there, not flushed at the end; return the content."""
    noise = random.Random(7)
    async with connected(endpoint) as connection:
        handle, size = connection.handle, connection.info.size
        for _ in range(30):
            offset = noise.randrange(size - 70_000)
            handle.write_now(
                memoryview(noise.randbytes(noise.choice([1, 512, 4096, 65536]))), offset
            )
        handle.trim_now(MIB + 512, 2 * MIB)
        handle.write_now(memoryview(bytes(100_000)), MIB)
        handle.flush_now()
        handle.write_now(memoryview(b"the end"), size - 7)
    return await content(endpoint)


async def settled(v2vdir: V2VDir, sources: list[DiskSource], kind: OverlayKind) -> list[bytes]:
    """Convert and settle; then everything is killed. Return what was converted."""
    made: list[bytes] = []
    with pytest.raises(ServerExitedError):
        async with running_servers(v2vdir) as servers:
            sizes = await serve_overlays(sources, kind, v2vdir, servers)
            note_source(v2vdir, sizes)
            for index in range(1, len(sources) + 1):
                made.append(await convert(str(v2vdir.source_socket(index))))
            await settle(v2vdir)
            kill_servers(v2vdir)
            await content(str(v2vdir.source_socket(1)))
    return made


def note_source(v2vdir: V2VDir, sizes: list[int]) -> None:
    disks = [SourceDisk(index=i, source="x", format="raw", size=s) for i, s in enumerate(sizes, 1)]
    v2vdir.write_source(SourceGuest(name="web", memory=MIB, vcpus=1, disks=disks))


async def served_again(v2vdir: V2VDir, sources: list[DiskSource], kind: OverlayKind) -> list[bytes]:
    async with running_servers(v2vdir) as servers:
        sizes = await serve_overlays(sources, kind, v2vdir, servers)
        found = [await content(str(v2vdir.source_socket(i))) for i, _ in enumerate(sizes, 1)]
        assert [len(each) for each in found] == sizes
        await settle(v2vdir)  # nothing is left to be done
    return found


@contextlib.asynccontextmanager
async def source_of(what: str, folder: Path) -> AsyncIterator[DiskSource]:
    """Have a source of some kind, as a check would have found it."""
    raw = fragmented(folder / "raw.img", ODD if "odd" in what else SIZE)
    if what in ("raw", "raw-odd"):
        size = -(-raw.stat().st_size // 512) * 512  # as qemu-img tells it
        yield DiskSource(FileImage(raw), "raw", size)
    elif what in ("qcow2", "vmdk", "vpc"):
        image = ovas.convert(raw, folder / f"disk.{what}", what)
        yield DiskSource(FileImage(image), what, SIZE)
    elif what in ("part", "part-odd", "part-vmdk"):
        inside = raw if what != "part-vmdk" else ovas.convert(raw, folder / "d", "vmdk")
        length = inside.stat().st_size
        archive = folder / "x.tar"
        archive.write_bytes(b"t" * 1024 + inside.read_bytes() + b"t" * 1024)
        format_ = "vmdk" if what == "part-vmdk" else "raw"
        yield DiskSource(FileImage(archive, 1024, length), format_, SIZE)
    elif what == "nbds":
        require("psktool")
        keys = folder / "keys.psk"
        subprocess.run(["psktool", "-u", "alice", "-p", str(keys)], check=True, capture_output=True)
        server = start_tls(folder, "far", f"--tls-psk={keys}", "file", str(raw))
        try:
            yield DiskSource(NbdImage(tls_uri(folder, "far", "alice", keys)), "raw", SIZE)
        finally:
            server.terminate()
            server.wait()
    elif what in ("nbd", "nbd-odd"):
        words = ["nbdkit", "-f", "--exit-with-parent", "-U", str(folder / "far"), "file", str(raw)]
        with subprocess.Popen(words) as far:
            await until((folder / "far").exists, "the server listens", of=far)
            image_: Image = NbdImage(f"nbd+unix:///?socket={folder / 'far'}")
            yield DiskSource(image_, "raw", raw.stat().st_size)
            far.terminate()
    else:
        image = raw if what == "curl" else ovas.convert(raw, folder / "disk.vmdk", "vmdk")
        with range_server(folder) as http:
            url = f"http://127.0.0.1:{http.port}/{image.name}"
            format_ = "raw" if what == "curl" else "vmdk"
            yield DiskSource(PluginImage("curl", (f"url={url}",), url), format_, SIZE)


KINDS = (
    *("raw", "raw-odd", "qcow2", "vmdk", "vpc", "part", "part-odd", "part-vmdk"),
    *("nbd", "nbd-odd", "nbds", "curl", "curl-vmdk"),
)


@pytest.mark.parametrize(
    ("what", "overlay"),
    [*((what, "kept") for what in KINDS), *((what, "qcow2") for what in ("raw", "part", "nbds"))],
)
async def test_what_was_converted_is_there_again(
    short_tmp: Path, v2vdir: V2VDir, what: str, overlay: OverlayKind
) -> None:
    async with source_of(what, short_tmp) as source:
        before = {path: path.read_bytes() for path in short_tmp.iterdir() if path.is_file()}
        [made] = await settled(v2vdir, [source], overlay)
        assert len(made) == (ODD if "odd" in what else SIZE)
        if (image := v2vdir.path / "overlay-1.qcow2").exists() and "curl" not in what:
            subprocess.run(["qemu-img", "check", "-q", "-r", "leaks", image], check=True)
        assert is_kept(v2vdir, 1)
        for _ in range(2):
            assert await served_again(v2vdir, [source], overlay) == [made]
            v2vdir.source_socket(1).touch()  # a dead server's socket is in nobody's way
        assert {path: path.read_bytes() for path in before} == before


async def test_two_disks_of_two_kinds(short_tmp: Path, v2vdir: V2VDir) -> None:
    async with source_of("raw", short_tmp) as raw, source_of("qcow2", short_tmp) as qcow2:
        made = await settled(v2vdir, [raw, qcow2], "kept")
        names = {path.name for path in v2vdir.path.glob("overlay-*")}
        assert names == {
            *("overlay-1.json", "overlay-1.changes"),
            *("overlay-2.json", "overlay-2.qcow2"),
        }
        assert await served_again(v2vdir, [raw, qcow2], "kept") == made


@pytest.mark.parametrize("what", ["raw", "qcow2"])
async def test_half_a_conversion_is_not_kept(short_tmp: Path, v2vdir: V2VDir, what: str) -> None:
    async with source_of(what, short_tmp) as source:
        with pytest.raises(ServerExitedError):
            async with running_servers(v2vdir) as servers:
                await serve_overlays([source], "kept", v2vdir, servers)
                await convert(str(v2vdir.source_socket(1)))
                kill_servers(v2vdir)
                await content(str(v2vdir.source_socket(1)))
        assert not is_kept(v2vdir, 1)
        async with running_servers(v2vdir) as servers:
            await serve_overlays([source], "kept", v2vdir, servers)
            found = await content(str(v2vdir.source_socket(1)))
    assert found == (short_tmp / "raw.img").read_bytes()


@pytest.mark.parametrize("what", ["raw", "qcow2"])
async def test_discarded(short_tmp: Path, v2vdir: V2VDir, what: str) -> None:
    async with source_of(what, short_tmp) as source:
        [made] = await settled(v2vdir, [source], "kept")
        discard(v2vdir)
        assert not list(v2vdir.path.glob("overlay-*"))
        async with running_servers(v2vdir) as servers:
            await serve_overlays([source], "kept", v2vdir, servers)
            found = await content(str(v2vdir.source_socket(1)))
    assert found == (short_tmp / "raw.img").read_bytes() != made


def written(path: Path, _: V2VDir) -> DiskSource:
    with path.open("r+b") as file:
        file.write(b"written since")
    return DiskSource(FileImage(path), "raw", SIZE)


def another(path: Path, _: V2VDir) -> DiskSource:
    return DiskSource(FileImage(fragmented(path.with_name("b.img"), SIZE)), "raw", SIZE)


def another_format(path: Path, _: V2VDir) -> DiskSource:
    return DiskSource(FileImage(path), "qcow2", SIZE)


def damaged_record(path: Path, v2vdir: V2VDir) -> DiskSource:
    (v2vdir.path / "overlay-1.json").write_text('{"version": 1, "kind": "co')
    return DiskSource(FileImage(path), "raw", SIZE)


def lost_content(path: Path, v2vdir: V2VDir) -> DiskSource:
    (v2vdir.path / "overlay-1.changes").unlink()
    return DiskSource(FileImage(path), "raw", SIZE)


def shorter_content(path: Path, v2vdir: V2VDir) -> DiskSource:
    os.truncate(v2vdir.path / "overlay-1.changes", MIB)
    return DiskSource(FileImage(path), "raw", SIZE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (written, "written or replaced since"),
        (another, "it is of"),
        (another_format, "it is of"),
        (damaged_record, "can't be read"),
        (lost_content, "can't be read"),
        (shorter_content, "shorter than it was"),
    ],
)
async def test_what_does_not_fit_is_refused(
    short_tmp: Path,
    v2vdir: V2VDir,
    change: Callable[[Path, V2VDir], DiskSource],
    words: str,
) -> None:
    async with source_of("raw", short_tmp) as source:
        await settled(v2vdir, [source], "kept")
        changed = change(short_tmp / "raw.img", v2vdir)
        with pytest.raises(SourceError, match=words) as caught:
            await served_again(v2vdir, [changed], "kept")
    assert "convert it again" in (caught.value.hint or "")
    assert caught.value.disk == 1


async def test_a_qcow2_over_another_base_is_refused(short_tmp: Path, v2vdir: V2VDir) -> None:
    async with source_of("qcow2", short_tmp) as source:
        await settled(v2vdir, [source], "qcow2")
        overlay, other = v2vdir.path / "overlay-1.qcow2", short_tmp / "other.qcow2"
        other.write_bytes((short_tmp / "disk.qcow2").read_bytes())
        words = ["-u", "-f", "qcow2", "-F", "qcow2", "-b", str(other), str(overlay)]
        rebase = ["qemu-img", "rebase", *words]
        subprocess.run(rebase, check=True)
        with pytest.raises(SourceError, match="lies over"):
            await served_again(v2vdir, [source], "qcow2")


async def test_a_remote_source_of_another_size_is_refused(short_tmp: Path, v2vdir: V2VDir) -> None:
    async with source_of("nbd", short_tmp) as source:
        await settled(v2vdir, [source], "kept")
    (short_tmp / "far").unlink()
    async with source_of("nbd-odd", short_tmp) as source:
        with pytest.raises(SourceError, match=f"has {ODD} bytes now, and had {SIZE}"):
            await served_again(v2vdir, [source], "kept")


async def test_what_goes_with_its_server_is_not_settled(short_tmp: Path, v2vdir: V2VDir) -> None:
    async with source_of("raw", short_tmp) as source, running_servers(v2vdir) as servers:
        note_source(v2vdir, await serve_overlays([source], "cow", v2vdir, servers))
        with pytest.raises(V2VError, match="goes with its server") as caught:
            await settle(v2vdir)
    assert caught.value.hint == "-io overlay=kept"
    assert caught.value.disk == 1


@pytest.mark.parametrize("what", ["raw", "qcow2"])
async def test_settled_too_late(short_tmp: Path, v2vdir: V2VDir, what: str) -> None:
    """What a server had not told anybody is gone with it: that is no conversion to go on from."""
    async with source_of(what, short_tmp) as source:
        async with running_servers(v2vdir) as servers:
            note_source(v2vdir, await serve_overlays([source], "kept", v2vdir, servers))
        with pytest.raises(V2VError, match="not served any more"):
            await settle(v2vdir)
    assert not is_kept(v2vdir, 1)


@pytest.mark.parametrize("format_", ["raw", "vmdk"])
async def test_what_conversion_reads_again_is_kept_and_the_copy_is_not(
    short_tmp: Path, v2vdir: V2VDir, format_: str
) -> None:
    """Whatever the overlay, and for NBD as for plugins; the requests that go far are counted."""
    raw = fragmented(short_tmp / "raw.img", SIZE)
    image = ovas.convert(raw, short_tmp / "far.img", format_)
    log = short_tmp / "far.log"
    uri = f"nbd+unix:///?socket={short_tmp / 'far'}"
    far: Image = NbdImage(uri)
    if format_ != "raw":
        far = PluginImage("nbd", (f"uri={uri}",), "far")

    def reads() -> int:
        return len(read_logs(log).of("Read"))

    async with running_servers(v2vdir) as servers:
        words = (f"file={image}", f"logfile={log}")
        await serve(servers, "far", short_tmp, "file", *words, filters=("log",))
        await serve_overlays([DiskSource(far, format_, SIZE)], "kept", v2vdir, servers)
        async with connected(str(v2vdir.source_socket(1))) as connection:
            read = partial(connection.handle.read_now, 65536)
            wanted = raw.read_bytes()
            v2vdir.converting_mark.touch()
            first = []
            for _ in range(3):
                assert read(MIB) == wanted[MIB : MIB + 65536]
                first.append(reads())
            assert first[1:] == [first[0]] * 2
            v2vdir.converting_mark.unlink()
            after = []
            for _ in range(3):
                assert read(SIZE // 3) == wanted[SIZE // 3 :][:65536]
                after.append(reads())
            assert after[0] < after[1] < after[2]
    assert not [path for path in v2vdir.path.iterdir() if path.name.startswith("nbdkit")]


# The inputs, set up twice in one directory.


async def set_up(
    v2vdir: V2VDir, options: InputOptions, *, convert_it: bool
) -> tuple[SourceGuest, list[bytes]]:
    """Set an input up, as a supervisor does; convert, settle and be killed, or only look."""
    source = parse_input(options)
    await source.check(quiet)
    made: list[bytes] = []
    with contextlib.suppress(ServerExitedError):
        async with running_servers(v2vdir) as servers:
            guest = await source.setup(v2vdir, servers, quiet)
            v2vdir.write_source(guest)
            for disk in guest.disks:
                endpoint = str(v2vdir.source_socket(disk.index))
                made.append(await convert(endpoint) if convert_it else await content(endpoint))
            if convert_it:
                await settle(v2vdir)
                kill_servers(v2vdir)
                await content(endpoint)
    return guest, made


async def twice(v2vdir: V2VDir, options: InputOptions) -> None:
    with_kept = InputOptions(
        **{
            **{name: getattr(options, name) for name in InputOptions.__slots__},
            "options": (*options.options, ("overlay", "kept")),
        }
    )
    guest, made = await set_up(v2vdir, with_kept, convert_it=True)
    again, found = await set_up(v2vdir, with_kept, convert_it=False)
    assert again == guest
    assert found == made
    assert len(made) == len(guest.disks) > 0


@pytest.mark.parametrize("kind", ["tar", "gzip"])
async def test_an_ova_is_unpacked_once(short_tmp: Path, v2vdir: V2VDir, kind: str) -> None:
    raw = fragmented(short_tmp / "raw.img", 16 * MIB)
    disks: dict[str, ovas.Content] = {
        "disk1.vmdk": ovas.convert(raw, short_tmp / "d.vmdk", "vmdk", "streamOptimized"),
        "disk2.img": raw,
    }
    files = {"web.ovf": ovas.ovf(*disks, capacity=16), "web.mf": ovas.manifest(disks), **disks}
    options = InputOptions("ova", (str(ovas.pack(short_tmp / "web.ova", files, kind)),))
    (v2vdir.path / "ova-1").mkdir()  # of an attempt that was killed while it unpacked
    (v2vdir.path / "ova-1" / "disk1.vmdk").write_bytes(b"half")
    await twice(v2vdir, options)
    assert (v2vdir.path / "ova-1").exists() == (kind == "gzip")


async def test_a_checksum_is_of_the_source(short_tmp: Path, v2vdir: V2VDir) -> None:
    raw = fragmented(short_tmp / "raw.img", SIZE)
    await twice(v2vdir, libvirt_options(short_tmp, file_disk(raw, more=checksum(raw))))


async def test_over_ssh_with_a_password(short_tmp: Path, v2vdir: V2VDir) -> None:
    """A password file that a killed run left behind is in nobody's way."""
    from tests.integration.test_input_ssh import esxi_disk, vmx, vmx_options

    with running_sshd(short_tmp, password=PASSWORD) as server:
        esxi_disk(short_tmp)
        options = vmx_options(server, vmx(short_tmp, "web.vmdk"), password=PASSWORD)
        assert options.password is not None
        assert isinstance(options.password, Secret)
        (v2vdir.path / ".ssh-password").write_text("left behind\n")
        await twice(v2vdir, options)
    assert not (v2vdir.path / ".ssh-password").exists()


# What is read from the log.


def test_changes_are_whole_blocks_within_the_disk() -> None:
    assert merged([(5000, 1), (0, 1), (4096, 10), (20_000, 90_000)], 100_000) == [
        (0, 8192),
        (16_384, 100_000 - 16_384),
    ]
    assert merged([(0, 100), (8192, 4096), (4096, 4096)], 1 << 20) == [(0, 12_288)]
    assert merged([], 1 << 20) == []
    assert merged([(4096, 0), (8191, 1)], 1 << 20) == [(4096, 4096)]
    assert merged([(0, 40_000), (4096, 1)], 1 << 20) == [(0, 40_960)]


def test_only_what_changes_a_disk_is_read_from_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "2026-11-23 15:50:37.368963 connection=2 Read id=1 offset=0x0 count=0x2000 ...\n"
        "2026-11-23 15:50:37.389186 connection=2 ...Read id=1 return=0\n"
        "2026-11-23 15:50:37.389186 connection=2 Write id=2 offset=0x10000 count=0x200 fua=0 ...\n"
        "2026-11-23 15:50:37.389186 connection=3 Trim id=1 offset=0x20000 count=0x1000 fua=0 ...\n"
        "2026-11-23 15:50:37.389186 connection=2 ...Write id=2 return=-1 error=ENOSPC\n"
        "2026-11-23 15:50:37.389186 connection=3 Zero id=9 offset=0x30000 count=0x1000 trim=1 ...\n"
        "2026-11-23 15:50:37.389186 connection=3 Flush id=10 ...\n"
    )
    assert read_changes(log, 1 << 20) == [(0x10000, 4096), (0x20000, 4096), (0x30000, 4096)]
