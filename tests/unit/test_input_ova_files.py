"""Which files an OVA holds, which are meant, and what an image may name: from bytes alone."""

from __future__ import annotations

import io
import os
import struct
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import ovas
from v2v_async.errors import SourceError
from v2v_async.input.image_header import HEAD, TAIL, ImageHeader, read_header
from v2v_async.input.ova.manifest import MAX_SIZE, parse_manifest
from v2v_async.input.ova.members import find_disk, find_ovf
from v2v_async.input.ova.tar_headers import Member, TarReader, looks_like_tar
from v2v_async.input.ova.unpacking import wanted_checksums

if TYPE_CHECKING:
    from typing_extensions import Buffer

FORMS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def listing(content: bytes) -> list[Member]:
    return list(TarReader(io.BytesIO(content), "‘x’", length=len(content)))


def archive(*members: tuple[str, bytes, dict[str, object]], form: str = "gnu") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=FORMS[form]) as tar:
        for name, content, fields in members:
            ovas.add(tar, name, content, **fields)
    return packed.getvalue()


@pytest.mark.parametrize("form", FORMS)
def test_members_and_their_places(form: str) -> None:
    long = "/".join(["folder" * 5] * 5) + "/name" + "x" * 90
    content = archive(
        ("a.ovf", b"<x/>", {}),
        ("./b/", b"", {"type": tarfile.DIRTYPE}),
        ("./b/ü.vmdk", b"y" * 1500, {}),
        (long, b"z" * 512, {}),
        ("empty", b"", {}),
        form=form,
    )
    found = listing(content)
    assert [(m.name, m.size, m.kind) for m in found] == [
        ("a.ovf", 4, "file"),
        ("b", 0, "folder"),
        ("b/ü.vmdk", 1500, "file"),
        (long, 512, "file"),
        ("empty", 0, "file"),
    ]
    assert content[found[2].offset or 0 :][:1500] == b"y" * 1500
    assert content[found[3].offset or 0 :][:512] == b"z" * 512


def test_a_member_of_more_than_8_gib(tmp_path: Path) -> None:
    """In a sparse file: only the header is there."""
    for number in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{number}"
        info = tarfile.TarInfo("big")
        info.size = 20 << 30
        with path.open("wb") as file:
            header = info.tobuf(number)
            file.write(header)
            file.truncate(len(header) + info.size + 1024)
        with path.open("rb") as file:
            found = list(TarReader(file, "‘x’", length=path.stat().st_size))
        assert [(m.name, m.size, m.offset) for m in found] == [("big", 20 << 30, len(header))]


def test_a_sparse_file_of_gnu_tar_is_told(tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as file:
        for at in range(60):
            file.seek(at << 20)
            file.write(b"x" * 4096)
    (tmp_path / "b").write_bytes(b"after")
    for form in ("gnu", "posix"):
        path = tmp_path / f"{form}.tar"
        os.system(f"cd {tmp_path} && tar -S --format={form} -cf {path} a b")
        with path.open("rb") as file:
            found = list(TarReader(file, "‘x’", length=path.stat().st_size))
        assert [m.kind for m in found] == ["sparse", "file"]
        assert path.read_bytes()[found[1].offset or 0 :][:5] == b"after"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../../etc/shadow", "leads out of it"),
        ("a/../../b", "leads out of it"),
        ("/etc/shadow", "leads out of it"),
        ("a/..", "leads out of it"),
    ],
)
def test_names_that_lead_out(name: str, said: str) -> None:
    with pytest.raises(SourceError, match=said):
        listing(archive((name, b"x", {})))


def test_links_and_devices_are_not_files() -> None:
    found = listing(
        archive(
            ("s", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/shadow"}),
            ("h", b"", {"type": tarfile.LNKTYPE, "linkname": "../../etc/shadow"}),
            ("c", b"", {"type": tarfile.CHRTYPE}),
            ("b", b"", {"type": tarfile.BLKTYPE}),
            ("f", b"", {"type": tarfile.FIFOTYPE}),
        )
    )
    assert [m.kind for m in found] == ["link", "link", "special", "special", "special"]


def test_damage() -> None:
    whole = archive(("a", b"x" * 5000, {}), ("b", b"y" * 5000, {}))
    with pytest.raises(SourceError, match="ends in the middle of ‘b’"):
        listing(whole[:8000])
    with pytest.raises(SourceError, match="ends in the middle of a header"):
        listing(whole[:5900])
    with pytest.raises(SourceError, match="checksum is wrong"):
        listing(b"c" + whole[1:])
    assert listing(whole[: 512 + 5120 + 512 + 5000])[1].size == 5000  # only padding is missing
    assert [m.name for m in listing(whole[:512] + whole[512:5632] + bytes(512) + whole[5632:])] == [
        "a",
        "b",
    ]


def test_a_name_of_gigabytes_is_not_read() -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type = b"L"
    info.size = 4 << 30
    with pytest.raises(SourceError, match="whose name or header takes 4294967296 bytes"):
        list(TarReader(io.BytesIO(info.tobuf()), "‘x’"))


def test_members_without_end() -> None:
    header = tarfile.TarInfo("x").tobuf()

    class Endless(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Buffer) -> int:
            view = memoryview(buffer)
            count = len(view) // 512
            view[: count * 512] = header * count
            return count * 512

    with pytest.raises(SourceError, match="more than 10000 files"):
        list(TarReader(io.BufferedReader(Endless()), "‘x’"))


@pytest.mark.parametrize(
    "record", [b"8 path=x\n", b"x path=x\n", b"99999 path=x\n", b"0 a=b\n", b"11 size=x12\n"]
)
def test_pax_headers_that_are_damaged(record: bytes) -> None:
    info = tarfile.TarInfo("x")
    info.type = b"x"
    info.size = len(record)
    content = info.tobuf() + record.ljust(512, b"\0") + tarfile.TarInfo("y").tobuf()
    with pytest.raises(SourceError, match="is damaged"):
        list(TarReader(io.BytesIO(content), "‘x’"))


def test_what_a_tar_begins_with() -> None:
    assert looks_like_tar(archive(("a", b"", {})))
    old = bytearray(archive(("a", b"", {}))[:512])
    old[257:265] = bytes(8)
    old[148:156] = b" " * 8
    old[148:156] = b"%06o\0 " % sum(old)
    assert looks_like_tar(bytes(old))
    for other in (b"", bytes(512), b"KDMV" + bytes(508), b"\xff" * 512):
        assert not looks_like_tar(other)


def members(*names: str) -> dict[str, Member]:
    return {name: Member(name, 1) for name in names}


@pytest.mark.parametrize(
    ("href", "found"),
    [
        ("d.vmdk", "sub/d.vmdk"),
        ("./d.vmdk", "sub/d.vmdk"),
        ("../top.vmdk", "top.vmdk"),
        ("file:d.vmdk", "sub/d.vmdk"),
        ("a%20b.vmdk", "sub/a b.vmdk"),
        ("p%41.vmdk", "sub/p%41.vmdk"),
        ("s.vmdk", "sub/s.vmdk.000000010"),
        ("n.vmdk", "sub/n.vmdk.10"),
    ],
)
def test_which_file_is_the_disk(href: str, found: str) -> None:
    there = members(
        *("sub/x.ovf", "sub/d.vmdk", "top.vmdk", "d.vmdk", "sub/a b.vmdk", "sub/p%41.vmdk"),
        *("sub/s.vmdk.000000009", "sub/s.vmdk.000000010", "sub/s.vmdk.x", "s.vmdk.000000011"),
        *("sub/n.vmdk.9", "sub/n.vmdk.10"),
    )
    assert find_disk(there, "sub/x.ovf", href, "x").name == found


@pytest.mark.parametrize(
    ("href", "said"),
    [
        ("no.vmdk", "which is not there"),
        ("../../etc/shadow", "leads out of the OVA"),
        ("..", "leads out of the OVA"),
        ("/etc/shadow", "leads out of the OVA"),
        ("file:///etc/shadow", "leads out of the OVA"),
        ("file:/etc/shadow", "leads out of the OVA"),
        ("%2e%2e/%2e%2e/etc/shadow", "leads out of the OVA"),
        ("https://host/disk.vmdk", "not in the OVA but elsewhere"),
        ("link", "is a link"),
        ("device", "is a special file"),
        ("folder", "is a folder file"),
        ("sparse", "with its holes left out"),
        ("a\0b", "leads out"),
    ],
)
def test_what_no_disk_may_be(href: str, said: str) -> None:
    there = members("x.ovf")
    for kind in ("link", "special", "folder", "sparse"):
        name = "device" if kind == "special" else kind
        there[name] = Member(name, 0, kind)
    with pytest.raises(SourceError) as caught:
        find_disk(there, "x.ovf", href, "x.ova")
    assert said in caught.value.message


def test_the_description() -> None:
    assert find_ovf(members("a/X.OVF", "a/._X.ovf", "a/x.mf"), "x").name == "a/X.OVF"
    with pytest.raises(SourceError, match="holds no .ovf file"):
        find_ovf(members("a.vmdk"), "x")
    with pytest.raises(SourceError, match="holds 2 .ovf files: ‘a.ovf’, ‘b.ovf’"):
        find_ovf(members("b.ovf", "a.ovf"), "x")


def test_manifests() -> None:
    text = (
        f"SHA1(a.ovf)= {'0' * 40}\r\nSHA256 (b c.vmdk) = {'AB' * 32}\n\nhello\nthere\n"
        f"sha512(d)={'1' * 128}"
    )
    manifest = parse_manifest(text.encode(), "‘x.mf’")
    assert [(c.name, c.algorithm, c.digest[:2]) for c in manifest.checksums] == [
        ("a.ovf", "sha1", "00"),
        ("b c.vmdk", "sha256", "ab"),
        ("d", "sha512", "11"),
    ]
    assert "‘hello’" in manifest.warnings[0]
    assert "1 more lines" in manifest.warnings[1]
    with pytest.raises(SourceError, match="has 4 digits; SHA1 has 40"):
        parse_manifest(b"SHA1(a)= abcd", "‘x.mf’")
    with pytest.raises(SourceError, match="too long"):
        parse_manifest(bytes(MAX_SIZE + 1), "‘x.mf’")


def test_files_of_a_manifest() -> None:
    summed = parse_manifest(ovas.manifest({"a": b"", "../b": b"", "no": b""}), "x").checksums
    found, missing = wanted_checksums(summed, "sub", members("sub/a", "b"), "x")
    assert (set(found), missing) == ({"sub/a", "b"}, ["sub/no"])
    summed = parse_manifest(ovas.manifest({"../../etc/passwd": b""}), "x").checksums
    with pytest.raises(SourceError, match="leads out of the OVA"):
        wanted_checksums(summed, "sub", {}, "x")


def vmdk(sectors: int = 32768, descriptor: bytes = b"", at: int = 1) -> bytes:
    header = struct.pack("<4sIIQQQQIQQQ", b"KDMV", 1, 3, sectors, 128, at, 20, 512, 0, 0, 0)
    return header.ljust(512, b"\0") + descriptor


def qcow2(version: int = 3, backing: int = 0, crypt: int = 0, features: int = 0) -> bytes:
    header = struct.pack(
        *(">4sIQIIQIIQQIIQQ", b"QFI\xfb", version, backing, 0, 16, 1 << 30, crypt),
        *(0, 0, 0, 0, 0, 0, features),
    )
    return header.ljust(104, b"\0")


def vhd(kind: int = 2) -> bytes:
    return b"conectix".ljust(48, b"\0") + struct.pack(">QII", 1 << 30, 0, kind).ljust(464, b"\0")


DESCRIPTOR = '# Disk DescriptorFile\nversion=1\ncreateType="monolithicFlat"\n{}\nddb.x = "/etc"\n'


def look(content: bytes) -> ImageHeader:
    return read_header(content[:HEAD], content[-TAIL:], len(content), "‘d’")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"x" * 4096, ImageHeader("raw", 4096)),
        (vmdk(), ImageHeader("vmdk", 16 << 20)),
        (qcow2(), ImageHeader("qcow2", 1 << 30)),
        (b"x" * 4096 + vhd(), ImageHeader("vpc", 1 << 30)),
        (vhd(3) + b"x" * 4096, ImageHeader("vpc", 1 << 30)),
        (b"vhdxfile", ImageHeader("vhdx")),
        (b"<!DOCTYPE", ImageHeader("raw", 9)),
    ],
)
def test_what_an_image_is(content: bytes, found: ImageHeader) -> None:
    assert look(content) == found


def test_a_descriptor() -> None:
    text = DESCRIPTOR.format('RW 100 FLAT "a-flat.vmdk" 0\nRW 28 SPARSE "b.vmdk"\nRW 8 ZERO')
    found = look(text.encode())
    assert (found.size, [(e.file_name, e.is_sparse) for e in found.extents]) == (
        136 * 512,
        [("a-flat.vmdk", False), ("b.vmdk", True)],
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (qcow2(backing=104), "names a backing file"),
        (qcow2(features=4), "names an external data file"),
        (qcow2(version=1), "qcow of version 1"),
        (qcow2(crypt=1), "encrypted"),
        (qcow2()[:50], "ends within its header"),
        (b"QED\0".ljust(16, b"\0") + struct.pack("<5Q", 1, 0, 0, 0, 1), "names a backing file"),
        (vhd(4), "differencing VHD"),
        (bytes(64) + b"\x7f\x10\xda\xbe" + bytes(8) + b"\4" + bytes(400), "differencing VDI"),
        (vmdk(sectors=0), "it is only a descriptor"),
        (vmdk(descriptor=b'parentFileNameHint="/etc/shadow"'), "names a parent, ‘/etc/shadow’"),
        (vmdk(descriptor=b'parentFileNameHint=""\nparentFileNameHint="/x"'), "names a parent"),
        (vmdk(descriptor=bytes(9000) + b'parentFileNameHint="/x"'), "names a parent, ‘/x’"),
        (vmdk(descriptor=b'parentFileNameHint="\n/etc/shadow"'), "names a parent"),
        (vmdk(at=300, descriptor=b'parentFileNameHint="/x"'), "names a parent, ‘/x’"),
        (vmdk(at=30).ljust(30 * 512) + b'parentFileNameHint="/x"', "names a parent, ‘/x’"),
        (b"COWD" + bytes(600) + b'parentFileNameHint="/x"', "names a parent, ‘/x’"),
        (vmdk()[:20], "the header of the VMDK is cut off"),
        (DESCRIPTOR.format('RW 4192256 FLAT "/etc/shadow" 0').encode(), "folder: ‘/etc/shadow’"),
        (DESCRIPTOR.format('RW 1 FLAT "../x" 0').encode(), "in another folder: ‘../x’"),
        (DESCRIPTOR.format('RW 1 FLAT "nbd:unix" 0').encode(), "not a file: ‘nbd:unix’"),
        (DESCRIPTOR.format('RW\v1\fFLAT\n\n"/etc/shadow" 0').encode(), "makes no sense"),
        (DESCRIPTOR.format('RW 1 VMFSSPARSE"/etc/shadow"').encode(), "makes no sense"),
        (DESCRIPTOR.format('RDONLY 1 FLAT "/etc/shadow" 0').encode(), "folder: ‘/etc/shadow’"),
        (DESCRIPTOR.format('RW 1 VMFSRDM "x"').encode(), "extent of type VMFSRDM"),
        (DESCRIPTOR.format('RW 1 FLAT "" 0').encode(), "makes no sense"),
        (
            DESCRIPTOR.format('RW 1 FLAT "?" 0').encode().replace(b"?", b"\xff"),
            "is not UTF-8",
        ),
        (DESCRIPTOR.format("RW 1 FLAT").encode(), "an extent without a file"),
        (DESCRIPTOR.format("").encode(), "names no content"),
        (
            DESCRIPTOR.format('RW 1 FLAT "x" 0\nparentFileNameHint="y.vmdk"').encode(),
            "names a parent, ‘y.vmdk’",
        ),
        (DESCRIPTOR.format("").encode() + b" " * HEAD, "which is absurd"),
    ],
)
def test_what_no_image_may_be(content: bytes, said: str) -> None:
    with pytest.raises(SourceError) as caught:
        look(content)
    assert said in caught.value.message
