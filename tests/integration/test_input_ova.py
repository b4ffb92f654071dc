"""Disks of OVAs behind their overlays: read byte for byte wherever they lie, and never changed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from tests import ovas
from tests.conftest import require
from tests.integration.servers import MIB, digest, fragmented
from tests.integration.test_input_disk import content, write
from v2v_async.errors import SourceError, V2VError
from v2v_async.events import Event, Reporter
from v2v_async.input.ova import guest as ova_module
from v2v_async.input.registry import parse_input
from v2v_async.model import SourceGuest
from v2v_async.options import InputOptions
from v2v_async.server import running_servers
from v2v_async.v2vdir import V2VDir

pytestmark = pytest.mark.anyio
SIZE = 16 * MIB
Files = dict[str, ovas.Content]
PACKED = ("gzip", "bzip2", "xz", "zstd", "zip", "stored")
FORMATS = {
    "stream-optimised": ("vmdk", "streamOptimized"),
    "sparse": ("vmdk", "monolithicSparse"),
    "vhd": ("vpc", "dynamic"),
    "fixed-vhd": ("vpc", "fixed"),
    "vhdx": ("vhdx", None),
    "vdi": ("vdi", None),
    "qcow2": ("qcow2", None),
    "raw": ("raw", None),
}


@contextlib.asynccontextmanager
async def served(
    folder: Path, ova: Path, events: list[Event] | None = None, **options: object
) -> AsyncIterator[tuple[V2VDir, SourceGuest]]:
    shutil.rmtree(folder / "v", ignore_errors=True)
    (folder / "v").mkdir()
    v2vdir = V2VDir(folder / "v")
    v2vdir.adopt()
    told: list[Event] = [] if events is None else events
    reporter = Reporter(told.append, "t").for_step("input")
    source = parse_input(InputOptions("ova", (str(ova),), **options))  # type: ignore[arg-type]
    await source.check(reporter)
    async with running_servers(v2vdir) as servers:
        yield v2vdir, await source.setup(v2vdir, servers, reporter)


def state(path: Path) -> object:
    if path.is_dir():
        return {p.name: (digest(p), p.stat().st_mtime_ns) for p in sorted(path.iterdir())}
    return digest(path), path.stat().st_mtime_ns


@pytest.fixture
def raw(short_tmp: Path) -> Path:
    return fragmented(short_tmp / "raw.img", SIZE)


async def check_content(short_tmp: Path, ova: Path, expected: bytes) -> SourceGuest:
    """The disk is ``expected``, takes writes, and the source is as it was."""
    before = state(ova)
    async with served(short_tmp, ova) as (v2vdir, guest):
        assert guest.disks[0].size == SIZE
        endpoint = str(v2vdir.source_socket(1))
        assert await content(endpoint) == expected
        await write(endpoint)
        changed = await content(endpoint)
        assert changed[65536:65544] == b"changed!"
        assert changed[:65536] == expected[:65536]
    assert state(ova) == before
    return guest


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ["tar", "folder", "gzip"])
async def test_each_format(short_tmp: Path, raw: Path, kind: str, name: str) -> None:
    image_format, subformat = FORMATS[name]
    image = ovas.convert(raw, short_tmp / "disk1.vmdk", image_format, subformat)
    ova = ovas.pack(short_tmp / "web.ova", {"web.ovf": ovas.ovf(), "disk1.vmdk": image}, kind)
    guest = await check_content(short_tmp, ova, raw.read_bytes())
    assert guest.disks[0].format == image_format


@pytest.mark.parametrize("kind", [*PACKED, "ustar", "pax"])
async def test_each_way_to_pack(short_tmp: Path, raw: Path, kind: str) -> None:
    """With the disk in a subfolder beside its description, and a manifest."""
    if kind == "zstd":
        require("zstd")
    image = ovas.convert(raw, short_tmp / "a.vmdk", "vmdk", "streamOptimized")
    files: Files = {"web/web.ovf": ovas.ovf("disks/a.vmdk"), "web/disks/a.vmdk": image}
    summed = ovas.manifest({"web.ovf": files["web/web.ovf"], "disks/a.vmdk": image}, "SHA512")
    ova = ovas.pack(short_tmp / "web.ova", {**files, "web/web.mf": summed}, kind)
    await check_content(short_tmp, ova, raw.read_bytes())


@pytest.mark.parametrize("kind", ["tar", "folder", "xz"])
@pytest.mark.parametrize("image_format", ["vmdk", "raw"])
async def test_a_disk_that_is_gzip(
    short_tmp: Path, raw: Path, kind: str, image_format: str
) -> None:
    image = ovas.convert(raw, short_tmp / "a", image_format)
    files: Files = {
        "a.ovf": ovas.ovf("a.vmdk.gz", compression="gzip"),
        "a.vmdk.gz": ovas.gzipped(image),
    }
    ova = ovas.pack(short_tmp / "a.ova", {**files, "a.mf": ovas.manifest(files)}, kind)
    guest = await check_content(short_tmp, ova, raw.read_bytes())
    assert guest.disks[0].format == image_format


async def test_nothing_that_was_unpacked_takes_room_for_zeroes(short_tmp: Path, raw: Path) -> None:
    files: Files = {"a.ovf": ovas.ovf("a.img"), "a.img": raw}
    ova = ovas.pack(short_tmp / "a.ova", files, "gzip")
    async with served(short_tmp, ova) as (v2vdir, _):
        unpacked = (v2vdir.path / "ova-1" / "a.img").stat()
        assert unpacked.st_size == SIZE
        assert unpacked.st_blocks * 512 < SIZE / 2


@pytest.mark.parametrize("kind", ["folder", "gzip"])
@pytest.mark.parametrize(
    "subformat", ["monolithicFlat", "twoGbMaxExtentFlat", "twoGbMaxExtentSparse"]
)
async def test_a_descriptor_with_its_extents(
    short_tmp: Path, raw: Path, kind: str, subformat: str
) -> None:
    folder = short_tmp / "made"
    folder.mkdir()
    ovas.convert(raw, folder / "a.vmdk", "vmdk", subformat)
    parts = {path.name: path for path in folder.iterdir()}
    assert len(parts) == 2
    ova = ovas.pack(short_tmp / "a.ova", {"a.ovf": ovas.ovf("a.vmdk"), **parts}, kind)
    guest = await check_content(short_tmp, ova, raw.read_bytes())
    if kind == "folder":
        assert sorted(Path(name).name for name in guest.disks[0].files) == sorted(parts)


async def test_a_descriptor_in_a_tar_must_be_unpacked(short_tmp: Path, raw: Path) -> None:
    folder = short_tmp / "made"
    folder.mkdir()
    ovas.convert(raw, folder / "a.vmdk", "vmdk", "monolithicFlat")
    parts = {path.name: path for path in folder.iterdir()}
    ova = ovas.pack(short_tmp / "a.ova", {"a.ovf": ovas.ovf("a.vmdk"), **parts})
    with pytest.raises(SourceError, match="can't be read in place") as caught:
        async with served(short_tmp, ova):
            pass
    assert "unpack the OVA with tar" in (caught.value.hint or "")


@pytest.mark.parametrize("kind", ["tar", "gzip"])
async def test_the_highest_snapshot_is_taken(short_tmp: Path, kind: str) -> None:
    old = fragmented(short_tmp / "old.img", SIZE, seed=1)
    new = fragmented(short_tmp / "new.img", SIZE, seed=2)
    files: Files = {
        "a.ovf": ovas.ovf("disk-0-flat.vmdk"),
        "disk-0-flat.vmdk.000000001": new,
        "disk-0-flat.vmdk.000000000": old,
    }
    ova = ovas.pack(short_tmp / "a.ova", files, kind)
    await check_content(short_tmp, ova, new.read_bytes())


async def test_several_disks_of_several_formats_and_an_empty_one(short_tmp: Path) -> None:
    raws = [fragmented(short_tmp / f"{n}.img", SIZE, seed=n) for n in range(3)]
    images = [
        ovas.convert(raw, short_tmp / f"d{n}", image_format)
        for n, (raw, image_format) in enumerate(zip(raws, ("vmdk", "raw", "qcow2"), strict=True))
    ]
    description = ovas.ovf("d0", "d1", "d2", items=None).replace(
        b"</DiskSection>",
        b'<Disk ovf:capacity="3" ovf:capacityAllocationUnits="byte * 2^20" '
        b'ovf:diskId="vmdisk4"/></DiskSection>',
    )
    description = description.replace(
        b"</VirtualHardware", ovas.disk(4).encode() + b"</VirtualHardware"
    )
    files: Files = {"a.ovf": description, **{f"d{n}": image for n, image in enumerate(images)}}
    ova = ovas.pack(short_tmp / "a.ova", files)
    async with served(short_tmp, ova) as (v2vdir, guest):
        assert [disk.format for disk in guest.disks] == ["vmdk", "raw", "qcow2", "raw"]
        for index, raw in enumerate(raws, 1):
            assert await content(str(v2vdir.source_socket(index))) == raw.read_bytes()
        assert await content(str(v2vdir.source_socket(4))) == bytes(3 * MIB)
        await write(str(v2vdir.source_socket(4)))


@pytest.mark.parametrize("kind", ["tar", "folder", "gzip", "zip"])
@pytest.mark.parametrize("algorithm", ["SHA1", "SHA256", "SHA512"])
async def test_a_wrong_checksum(short_tmp: Path, raw: Path, kind: str, algorithm: str) -> None:
    files: Files = {"a.ovf": ovas.ovf("a.img", "b.img"), "a.img": raw}
    files["b.img"] = bytes(SIZE)
    summed = ovas.manifest(files, algorithm)
    files["b.img"] = bytes(SIZE - 1) + b"?"
    ova = ovas.pack(short_tmp / "a.ova", {**files, "a.mf": summed}, kind)
    with pytest.raises(SourceError, match=f"damaged: the {algorithm} of ‘b.img’ is") as caught:
        async with served(short_tmp, ova):
            pass
    assert "‘a.img’" not in caught.value.message
    assert sorted(p.name for p in (short_tmp / "v").iterdir()) == ["log", "state.json"]


async def test_long_reading_tells_how_far_it_is(
    short_tmp: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from v2v_async.input.ova import work as ova_work

    monkeypatch.setattr(ova_work, "_EVENT_EVERY_S", 0.0)
    files: Files = {"a.ovf": ovas.ovf("a.img"), "a.img": raw}
    ova = ovas.pack(short_tmp / "a.ova", {**files, "a.mf": ovas.manifest(files)})
    events: list[Event] = []
    async with served(short_tmp, ova, events):
        pass
    told = [event.details for event in events if event.type == "verifying"]
    assert {"a.img"} <= {details["file"] for details in told if details}
    assert all(d and d["compared"] <= d["total"] for d in told if d and d["total"])
    assert any(event.text and "checking ‘a.img’: " in event.text for event in events)


@pytest.mark.parametrize("kind", ["tar", "gzip", "zstd"])
async def test_cancelled_while_it_reads(
    short_tmp: Path, raw: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread stops, and nothing is left: neither a file nor zstd."""
    from v2v_async.input.ova import unpacking as ova_unpack

    reached = anyio.Event()
    loop_token = anyio.lowlevel.current_token()

    def endless(*arguments: object) -> list[str]:
        anyio.from_thread.run_sync(reached.set, token=loop_token)
        work = arguments[-1]
        while True:  # until it is told to stop
            work.advance(1)  # type: ignore[attr-defined]

    monkeypatch.setattr(ova_unpack, "_one", endless)
    files: Files = {"a.ovf": ovas.ovf("a.img"), "a.img": raw}
    ova = ovas.pack(short_tmp / "a.ova", {**files, "a.mf": ovas.manifest(files)}, kind)

    async def use() -> None:
        async with served(short_tmp, ova):
            raise AssertionError("it was to be cancelled")

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(use)
            await reached.wait()
            group.cancel_scope.cancel()
    assert sorted(p.name for p in (short_tmp / "v").iterdir()) == ["log", "state.json"]


async def test_no_room_to_unpack(
    short_tmp: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: Files = {"a.ovf": ovas.ovf("a.img"), "a.img": raw}
    ova = ovas.pack(short_tmp / "a.ova", files, "gzip")
    monkeypatch.setattr(ova_module, "_room", lambda folder: SIZE - 1)
    with pytest.raises(SourceError, match="needs more than the 16.0 MiB that are free") as caught:
        async with served(short_tmp, ova):
            pass
    assert "TMPDIR" in (caught.value.hint or "")
    assert sorted(p.name for p in (short_tmp / "v").iterdir()) == ["log", "state.json"]
    # An OVA that is read in place needs none.
    async with served(short_tmp, ovas.pack(short_tmp / "b.ova", files)):
        pass


async def test_the_room_goes_while_it_is_unpacked(
    short_tmp: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from v2v_async.input.ova import unpacking as ova_unpack

    def full(self: object, content: bytes) -> None:
        raise self._failed(OSError(28, os.strerror(28)))  # type: ignore[attr-defined]

    monkeypatch.setattr(ova_unpack._SparseFile, "write", full)
    files: Files = {"a.ovf": ovas.ovf("a.img"), "a.img": raw}
    ova = ovas.pack(short_tmp / "a.ova", files, "gzip")
    with pytest.raises(SourceError, match="No space left on device"):
        async with served(short_tmp, ova):
            pass
    assert not (short_tmp / "v" / "ova-1").exists()


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz", "zstd", "zip", "tar"])
async def test_cut_short(short_tmp: Path, raw: Path, kind: str) -> None:
    files: Files = {"a.ovf": ovas.ovf("a.img"), "a.img": raw}
    ova = ovas.pack(short_tmp / "a.ova", files, kind)
    with ova.open("r+b") as file:
        file.truncate(ova.stat().st_size * 3 // 4)
    with pytest.raises(SourceError):
        async with served(short_tmp, ova):
            pass


async def test_qcow2_overlays_in_a_tar(short_tmp: Path, raw: Path) -> None:
    ova = ovas.pack(short_tmp / "a.ova", {"a.ovf": ovas.ovf("a.img"), "a.img": raw})
    async with served(short_tmp, ova, options=(("overlay", "qcow2"),)) as (v2vdir, _):
        assert await content(str(v2vdir.source_socket(1))) == raw.read_bytes()
    assert (v2vdir.path / "overlay-1.qcow2").exists()


@pytest.mark.parametrize("kind", ["tar", "folder"])
async def test_names_with_spaces_commas_and_colons(short_tmp: Path, raw: Path, kind: str) -> None:
    image = ovas.convert(raw, short_tmp / "x", "vmdk", "streamOptimized")
    files: Files = {"a b.ovf": ovas.ovf("my%20disk,1=a:b ü.vmdk"), "my disk,1=a:b ü.vmdk": image}
    ova = ovas.pack(short_tmp / "a: b,c=d.ova", files, kind)
    await check_content(short_tmp, ova, raw.read_bytes())


@pytest.mark.parametrize(
    ("kind", "instead", "said"),
    [
        ("tar", None, "can't be read: No such file"),
        ("gzip", None, "can't be read: No such file"),
        ("gzip", {"b": b""}, "changed: ‘a.img’ is not there any more"),
        ("gzip", {"a.ovf": b"x", "a.img": b"y"}, "changed while it was read"),
        ("zip", {"a.ovf": b"x", "a.img": b"y"}, "changed while it was read"),
    ],
)
async def test_the_source_changes_before_setup(
    short_tmp: Path, raw: Path, kind: str, instead: Files | None, said: str
) -> None:
    files: Files = {"a.ovf": ovas.ovf("a.img"), "a.img": raw}
    summed: Files = {"a.mf": ovas.manifest(files)} if kind == "tar" else {}
    ova = ovas.pack(short_tmp / "a.ova", {**files, **summed}, kind)
    (short_tmp / "v").mkdir()
    v2vdir = V2VDir(short_tmp / "v")
    v2vdir.adopt()
    quiet = Reporter(lambda event: None, "t")
    source = parse_input(InputOptions("ova", (str(ova),)))
    await source.check(quiet)
    ova.unlink()
    if instead is not None:
        ovas.pack(ova, instead, kind)
    async with running_servers(v2vdir) as servers:
        with pytest.raises(V2VError, match=said):
            await source.setup(v2vdir, servers, quiet)
