"""What -i ova refuses, all of it before any server runs: command lines, and OVAs from strangers."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import ovas
from tests.unit.test_input_ova_files import DESCRIPTOR, archive, qcow2, vmdk
from v2v_async.errors import DependencyError, SourceError, UsageError
from v2v_async.events import Event, Reporter
from v2v_async.input.contract import Input
from v2v_async.input.ova.guest import OvaInput, guest_name
from v2v_async.input.registry import parse_input
from v2v_async.options import InputOptions

pytestmark = pytest.mark.anyio
RAW = b"disk" * 4096
OVF = ovas.ovf()


def source(path: Path) -> Input:
    return parse_input(InputOptions("ova", (str(path),)))


async def check(path: Path) -> list[Event]:
    events: list[Event] = []
    await source(path).check(Reporter(events.append, "t"))
    return events


async def refused(path: Path) -> SourceError:
    with pytest.raises(SourceError) as caught:
        await check(path)
    return caught.value


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (InputOptions("ova"), "takes one argument"),
        (InputOptions("ova", ("",)), "takes one argument"),
        (InputOptions("ova", ("a", "b")), "takes one argument"),
        (InputOptions("ova", ("a",), format="raw"), "‘-if raw’ has no meaning"),
        (InputOptions("ova", ("a",), transport="ssh"), "‘-it ssh’ has no meaning"),
        (InputOptions("ova", ("a",), options=(("x", None),)), "takes no -io x"),
        (InputOptions("ova", ("a",), options=(("overlay", "x"),)), "‘-io overlay=x’"),
    ],
)
def test_a_wrong_command_line(options: InputOptions, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_input(options)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        # As virt-v2v 2.2 --print-source says for an OVF without a name.
        ("/x/db.ova", "db"),
        ("db-sda.ova", "db-sda"),
        ("db.ova.gz", "db.ova.gz"),
        ("db.vmdk", "db"),
        ("db", "db"),
        ("/x/db.ova/", "db"),
        (".ova", "guest"),
        ("db.ovf", "db"),
    ],
)
def test_the_guest_is_named_after_the_file(path: str, name: str) -> None:
    assert guest_name(Path(path)) == name


async def test_what_is_told_of_a_disk(tmp_path: Path) -> None:
    ova = ovas.pack(tmp_path / "a.ova", {"a.ovf": OVF, "disk1.vmdk": RAW})
    read = source(ova)
    events: list[Event] = []
    for _ in range(2):  # as guest.py does; warnings come once
        await read.check(Reporter(events.append, "t"))
    guest = await read.describe()
    assert guest.name == "web"
    assert guest.disks[0].source == f"{ova}: disk1.vmdk"
    assert guest.disks[0].files == [str(ova)]
    assert (guest.disks[0].format, guest.disks[0].size) == ("raw", len(RAW))
    warnings = [event.text for event in events if event.type == "warning"]
    assert len(warnings) == 2
    assert "is no VMDK" in (warnings[0] or "")
    assert "16384 bytes; the OVF says 16777216" in (warnings[1] or "")


async def test_the_ovf_of_several_in_a_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        files = {f"{name}.ovf": ovas.ovf(f"{name}.img", name=name), f"{name}.img": RAW}
        ovas.pack(tmp_path, {**files, f"{name}.mf": ovas.manifest({"no": b""})}, "folder")
    read = source(tmp_path / "b.ovf")
    events: list[Event] = []
    await read.check(Reporter(events.append, "t"))
    assert (await read.describe()).name == "b"
    missing = [event.text for event in events if "‘no’, which is not there" in (event.text or "")]
    assert len(missing) == 1  # of b.mf only
    assert "holds 2 .ovf files" in (await refused(tmp_path)).message


async def test_all_that_is_wrong_with_the_disks_is_told(tmp_path: Path) -> None:
    files = {"a.ovf": ovas.ovf("no.vmdk", "ok.img", "back.qcow2", "empty.img"), "ok.img": RAW}
    ova = ovas.pack(tmp_path / "a.ova", {**files, "back.qcow2": qcow2(backing=1), "empty.img": b""})
    told = (await refused(ova)).message
    assert "3 disks can't be used" in told
    assert "disk 1:" in told
    assert "‘no.vmdk’ as a disk, which is not there" in told
    assert "disk 3:" in told
    assert "names a backing file" in told
    assert "disk 4:" in told
    assert "is empty (0 bytes)" in told


@pytest.mark.parametrize("kind", ["tar", "gzip", "folder", "zip"])
@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"disk1.vmdk": RAW}, "holds no .ovf file"),
        ({"a.ovf": b"not xml", "disk1.vmdk": RAW}, "not well-formed XML"),
        ({"a.ovf": b"<!DOCTYPE x><Envelope/>"}, "declares a document type"),
        ({"a.ovf": OVF}, "‘disk1.vmdk’ as a disk, which is not there"),
        ({"a.ovf": ovas.ovf("../../../etc/shadow")}, "leads out of the OVA"),
        ({"a.ovf": ovas.ovf("/etc/shadow")}, "leads out of the OVA"),
        ({"a.ovf": ovas.ovf("file:///etc/shadow")}, "leads out of the OVA"),
        ({"a.ovf": OVF, "disk1.vmdk": qcow2(backing=104)}, "names a backing file"),
        ({"a.ovf": OVF, "disk1.vmdk": qcow2(features=4)}, "an external data file"),
        ({"a.ovf": OVF, "disk1.vmdk": vmdk(sectors=0)}, "only a descriptor"),
        (
            {"a.ovf": OVF, "disk1.vmdk": vmdk(descriptor=b'parentFileNameHint="/etc/shadow"\n')},
            "names a parent",
        ),
        (
            {
                "a.ovf": OVF,
                "disk1.vmdk": DESCRIPTOR.format('RW 4192256 FLAT "/etc/shadow" 0').encode(),
            },
            "names an extent in another folder: ‘/etc/shadow’",
        ),
        ({"a.ovf": ovas.ovf(compression="gzip"), "disk1.vmdk": RAW}, "gzip"),
        (
            {"a.ovf": ovas.ovf(compression="gzip"), "disk1.vmdk": ovas.gzipped(RAW)[:-5]},
            "damaged",
        ),
        (
            {"a.ovf": OVF, "disk1.vmdk": RAW, "a.mf": ovas.manifest({"../../etc/shadow": b""})},
            "the manifest names ‘../../etc/shadow’, which leads out of the OVA",
        ),
        ({"a.ovf": OVF, "disk1.vmdk": RAW, "a.mf": b"SHA1(a.ovf)= 00"}, "SHA1 has 40"),
        (
            {
                "a.ovf": ovas.ovf("d", file_attributes='ovf:chunkSize="512"'),
                **{f"d.00000000{n}": RAW for n in range(2)},
            },
            "one of several pieces",
        ),
        ({"a.ovf": b"<Envelope>" + b" " * (9 << 20), "disk1.vmdk": RAW}, "too long"),
        ({"a.ovf": OVF, "disk1.vmdk": RAW, "a.mf": b"\n" * (5 << 20)}, "too long"),
    ],
    ids=range(19),
)
async def test_what_a_stranger_may_send(
    tmp_path: Path, files: dict[str, bytes], said: str, kind: str
) -> None:
    ova = ovas.pack(tmp_path / "a.ova", files, kind)
    error = await refused(ova)
    assert said in error.message
    assert error.exit_status == 1


@pytest.mark.parametrize("image_format", ["vmdk", "qcow2"])
async def test_what_qemu_finds_in_an_image_counts_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image_format: str
) -> None:
    """Were there a way around the look at the header, the image would be refused all the same."""
    from v2v_async.input import image_header

    below, image = tmp_path / "below", tmp_path / "d"
    create = ["qemu-img", "create", "-q", "-f", image_format]
    subprocess.run([*create, str(below), "1M"], check=True)
    back = ["-b", str(below), "-F", image_format]
    subprocess.run([*create, *back, str(image)], check=True)
    made = [
        ovas.pack(tmp_path / kind, {"a.ovf": OVF, "disk1.vmdk": image}, kind)
        for kind in ("tar", "folder")
    ]
    for ova in made:
        assert "names a" in (await refused(ova)).message
    monkeypatch.setattr(image_header, "_refuse_parent", lambda *_: None)
    monkeypatch.setattr(image_header, "_names_another", lambda *_: None)
    monkeypatch.setattr(
        image_header, "_qcow2", lambda *_: image_header.ImageHeader("qcow2", 1 << 20)
    )
    for ova in made:
        assert f"has a backing file, ‘{below}’" in (await refused(ova)).message


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda f: (f / "disk1.vmdk").symlink_to("/etc/passwd"), "is a link"),
        (lambda f: (f / "disk1.vmdk").symlink_to("../outside"), "is a link"),
        (lambda f: os.link(f.parent / "outside", f / "disk1.vmdk"), "is a link"),
        (lambda f: (f / "disk1.vmdk").symlink_to("disk1.vmdk"), "is a link"),
        (lambda f: (f / "disk1.vmdk").mkdir(), "which is not there"),
        (lambda f: os.mkfifo(f / "disk1.vmdk"), "is a special file"),
        (lambda f: os.mknod(f / "disk1.vmdk", 0o20600, os.makedev(1, 5)), "is a special file"),
    ],
)
async def test_a_folder_that_leads_elsewhere(
    tmp_path: Path, make: Callable[[Path], None], said: str
) -> None:
    (tmp_path / "outside").write_bytes(RAW)
    folder = ovas.pack(tmp_path / "ova", {"a.ovf": OVF}, "folder")
    try:
        make(folder)
    except PermissionError:
        pytest.skip("making device nodes needs root")
    assert said in (await refused(folder)).message


async def test_a_description_that_is_a_link_out(tmp_path: Path) -> None:
    (tmp_path / "real.ovf").write_bytes(OVF)
    folder = ovas.pack(tmp_path / "ova", {"disk1.vmdk": RAW}, "folder")
    (folder / "a.ovf").symlink_to("../real.ovf")
    assert "is a link" in (await refused(folder)).message


async def test_links_within_a_folder_are_fine(tmp_path: Path) -> None:
    folder = ovas.pack(tmp_path / "ova", {"a.ovf": OVF, "real": RAW}, "folder")
    (folder / "disk1.vmdk").symlink_to("real")
    await check(folder)
    (folder / "disk1.vmdk").unlink()
    os.link(folder / "real", folder / "disk1.vmdk")
    await check(folder)


async def test_extents_that_lead_elsewhere(tmp_path: Path) -> None:
    for number, kind in enumerate(("FLAT", "SPARSE")):
        text = DESCRIPTOR.format(f'RW 8 {kind} "extent" 0').encode()
        folder = ovas.pack(tmp_path / f"{number}", {"a.ovf": OVF, "disk1.vmdk": text}, "folder")
        assert "which is not there" in (await refused(folder)).message
        (folder / "extent").symlink_to("/etc/passwd")
        assert "is a link" in (await refused(folder)).message
    (folder / "extent").unlink()
    (folder / "extent").write_bytes(text)  # a descriptor that names itself
    assert "no sparse extent" in (await refused(folder)).message


LINK = {"type": tarfile.SYMTYPE, "linkname": "/etc/shadow"}
HARD = {"type": tarfile.LNKTYPE, "linkname": "../../etc/shadow"}


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("a.ovf", OVF, {}), ("../../etc/cron.d/x", RAW, {})], "a name that leads out of it"),
        ([("a.ovf", OVF, {}), ("/etc/shadow", RAW, {})], "a name that leads out of it"),
        ([("a.ovf", OVF, {}), ("disk1.vmdk", b"", LINK)], "is a link"),
        ([("a.ovf", OVF, {}), ("disk1.vmdk", b"", HARD)], "is a link"),
        ([("a.ovf", b"", LINK)], "is a link"),
        ([("a.ovf", OVF, {}), ("disk1.vmdk", b"", {"type": b"3"})], "is a special file"),
        (
            [("a.ovf", OVF, {}), ("disk1.vmdk", RAW, {}), ("./disk1.vmdk", b"x", {})],
            "more than once",
        ),
        ([("a.ovf", OVF, {}), ("a.ovf", OVF, {})], "more than once"),
        ([("a.ovf", OVF, {}), ("b/c.ovf", OVF, {})], "holds 2 .ovf files"),
    ],
    ids=range(9),
)
@pytest.mark.parametrize("is_packed", [False, True])
async def test_a_tar_that_leads_elsewhere(
    tmp_path: Path, members: list[tuple[str, bytes, dict[str, object]]], said: str, is_packed: bool
) -> None:
    content = archive(*members)
    ova = tmp_path / "a.ova"
    ova.write_bytes(ovas.gzipped(content) if is_packed else content)
    assert said in (await refused(ova)).message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not an OVA"),
        (b"hello" * 1000, "is not an OVA"),
        (bytes(10240), "is not an OVA"),
        (ovas.gzipped(b""), "but holds no tar"),
        (ovas.gzipped(bytes(10240)), "but holds no tar"),
        (ovas.gzipped(b"hello" * 1000), "is damaged"),
        (b"\x1f\x8bxxxxxxxxxxxxxxxxxx", "can't be read"),
        (b"BZh9xxxxxxxxxxxxxxxxxx", "can't be read"),
        (b"\xfd7zXZ\0xxxxxxxxxxxxx", "can't be read"),
        (b"\x28\xb5\x2f\xfdxxxxxxxxx", "is zstd, but holds no tar"),
        (b"PK\x03\x04xxxxxxxxxxxxxxx", "can't be read"),
        (b"KDMV" + bytes(5000), "is not an OVA"),
        (archive(("a", RAW, {}))[:1000], "ends in the middle of ‘a’"),
    ],
    ids=range(13),
)
async def test_files_that_are_no_ova(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "x").write_bytes(content)
    assert said in (await refused(tmp_path / "x")).message


async def test_what_is_no_file(tmp_path: Path) -> None:
    assert "No such file" in (await refused(tmp_path / "no.ova")).message
    assert "neither a file nor a folder" in (await refused(Path("/dev/null"))).message
    assert "holds no .ovf file" in (await refused(tmp_path)).message


async def test_a_name_that_is_no_unicode(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    ova = ovas.pack(folder, {"a.ovf": OVF, "disk1.vmdk": RAW}, "folder")
    assert "is not UTF-8" in (await refused(ova)).message


async def test_a_manifest_and_a_description_of_gigabytes(tmp_path: Path) -> None:
    """In sparse files, which cost their sender nothing."""
    for name in ("b.ovf", "b.mf"):
        ova = tmp_path / "a.ova"
        first = archive(("a.ovf" if name == "b.mf" else "c", OVF, {}))
        info = tarfile.TarInfo(name)
        info.size = 6 << 30
        with ova.open("wb") as file:
            file.write(first[: 512 + -(-len(OVF) // 512) * 512] + info.tobuf(tarfile.GNU_FORMAT))
            file.truncate(7 << 30)
        assert "is too long: 6.0 GiB" in (await refused(ova)).message
        folder = tmp_path / name.replace(".", "-")
        ovas.pack(folder, {} if name == "b.ovf" else {"a.ovf": OVF}, "folder")
        folder.mkdir(exist_ok=True)
        with (folder / name).open("wb") as file:
            file.truncate(6 << 30)
        assert "is too long: 6.0 GiB" in (await refused(folder)).message


async def test_a_bomb_is_stopped_where_the_room_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from v2v_async.input.ova import guest as ova

    monkeypatch.setattr(ova, "_room", lambda folder: 10 << 20)
    zeroes = bytes(64 << 20)
    inner = ovas.gzipped(zeroes)
    gz = ovas.ovf(compression="gzip")
    for number, (kind, files) in enumerate(
        [
            ("gzip", {"a.ovf": OVF, "disk1.vmdk": zeroes}),
            ("zip", {"a.ovf": OVF, "disk1.vmdk": zeroes}),
            ("tar", {"a.ovf": gz, "disk1.vmdk": inner}),
            ("folder", {"a.ovf": gz, "disk1.vmdk": inner}),
            ("xz", {"a.ovf": gz, "disk1.vmdk": inner}),
            (
                "gzip",
                {"a.ovf": OVF, "disk1.vmdk": RAW, **{f"x{n}": zeroes[: 3 << 20] for n in range(5)}},
            ),
        ]
    ):
        path = ovas.pack(tmp_path / f"{number}", files, kind)
        assert "needs more than the 10.0 MiB" in (await refused(path)).message


async def test_zstd_is_a_program_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.ova").write_bytes(b"\x28\xb5\x2f\xfd")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DependencyError, match="compressed by zstd, and that program") as caught:
        await check(tmp_path / "a.ova")
    assert "apt-get install zstd" in (caught.value.hint or "")


async def test_a_zip_with_a_directory_of_gigabytes(tmp_path: Path) -> None:
    ova = ovas.pack(tmp_path / "a.zip", {"a.ovf": OVF, "disk1.vmdk": RAW}, "zip")
    content = bytearray(ova.read_bytes())
    end = content.rindex(b"PK\x05\x06")
    size = 2 << 30
    with ova.open("wb") as file:
        file.write(content[:end])
        file.truncate(end + size)
        file.seek(end + size)
        content[end + 12 : end + 16] = size.to_bytes(4, "little")
        file.write(content[end:])
    assert "absurdly long directory" in (await refused(ova)).message


async def test_a_zip_with_hostile_members(tmp_path: Path) -> None:
    import zipfile

    ova = tmp_path / "a.ova"
    with zipfile.ZipFile(ova, "w") as archive_:
        archive_.writestr("a.ovf", OVF)
        link = zipfile.ZipInfo("disk1.vmdk")
        link.external_attr = 0o120777 << 16
        archive_.writestr(link, "/etc/shadow")
    assert "is a link" in (await refused(ova)).message
    with zipfile.ZipFile(ova, "w") as archive_:
        archive_.writestr("../../a.ovf", OVF)
    assert "a name that leads out of it" in (await refused(ova)).message


async def test_a_file_that_changes_is_looked_at_again(tmp_path: Path) -> None:
    ova = ovas.pack(tmp_path / "a.ova", {"a.ovf": OVF, "disk1.vmdk": RAW}, "gzip")
    read = source(ova)
    assert isinstance(read, OvaInput)
    quiet = Reporter(lambda event: None, "t")
    await read.check(quiet)
    first = read._archive
    await read.check(quiet)
    assert read._archive is first  # it was not unpacked again
    ovas.pack(ova, {"a.ovf": ovas.ovf(name="other"), "disk1.vmdk": RAW}, "gzip")
    await read.check(quiet)
    assert (await read.describe()).name == "other"


def test_the_builder_writes_what_tar_reads() -> None:
    content = archive(("a", b"x", {}))
    with tarfile.open(fileobj=io.BytesIO(content)) as read:
        assert read.getnames() == ["a"]
