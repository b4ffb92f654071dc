"""OVAs from strangers: whatever their bytes, they are read or refused, and nothing else happens."""

from __future__ import annotations

import contextlib
import io
import tarfile
from pathlib import Path

import anyio
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests import ovas
from tests.unit.test_input_ova_files import DESCRIPTOR, archive, qcow2, vhd, vmdk
from v2v_async.errors import SourceError
from v2v_async.events import Reporter
from v2v_async.input.image_header import HEAD, TAIL, read_header
from v2v_async.input.ova.gunzip import PIECE, unpacked
from v2v_async.input.ova.manifest import parse_manifest
from v2v_async.input.ova.members import find_disk
from v2v_async.input.ova.ovf import parse_ovf, parse_units
from v2v_async.input.ova.tar_headers import Member, TarReader, normalised
from v2v_async.input.registry import parse_input
from v2v_async.options import InputOptions

quiet = Reporter(lambda event: None, "t")
OVF = ovas.ovf(
    "a.vmdk",
    "b.vmdk",
    items=ovas.cpu(4, CoresPerSocket=2)
    + ovas.memory()
    + ovas.controller()
    + ovas.disk(1)
    + ovas.disk(2)
    + ovas.item(15, 40, Parent=3, AddressOnParent=7)
    + ovas.nic(30, Connection="VM Network", ResourceSubType="E1000"),
    config='<vmw:Config vmw:key="firmware" vmw:value="efi"/>',
    sections='<DeploymentOptionSection><Configuration ovf:id="a"/></DeploymentOptionSection>',
)
TAR = archive(
    ("a.ovf", OVF, {}), ("b" * 150, b"x" * 700, {}), ("d.vmdk", b"y" * 600, {}), form="pax"
)
NAMES = st.text("abcü ./\\:%0\0\n~-", max_size=30)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """``whole`` with pieces cut out, replaced, doubled or swapped for awkward ones."""
    content = whole
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(content)))
        length = draw(st.integers(0, 40))
        piece = draw(
            st.one_of(
                st.binary(max_size=20),
                st.sampled_from(
                    [b"", b"\0" * 512, b"-1", b"9" * 30, b"<", b"&x;", b"\xff\xfe", b"]]>", b"\x80"]
                ),
                st.just(content[at : at + length] * 2),
            )
        )
        content = content[:at] + piece + content[at + length :]
    return content


@given(damaged(OVF))
@settings(max_examples=300, deadline=None)
def test_descriptions(content: bytes) -> None:
    try:
        read = parse_ovf(content, "‘x.ovf’")
    except SourceError:
        return
    assert read.guest.memory > 0
    assert read.guest.vcpus > 0
    read.guest.model_dump_json()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["3", "4", "5", "6", "10", "14", "15", "16", "17", "20", "", "x"]),
            st.dictionaries(
                st.sampled_from(
                    [
                        *("VirtualQuantity", "CoresPerSocket", "AllocationUnits", "Parent"),
                        *("AddressOnParent", "HostResource", "Connection", "Address"),
                        "ResourceSubType",
                    ]
                ),
                st.sampled_from(
                    [
                        *("", "0", "1", "-1", "3", "4", "+5", " 7 ", "1e3", "0x10", "９", "9" * 40),
                        *("byte * 2^20", "byte * 2^99", "ovf:/disk/vmdisk1", "/disk/vmdisk2"),
                        *("ovf:/disk/", "ovf:/file/file1", "E1000", "ü", "&amp;"),
                    ]
                ),
                max_size=6,
            ),
        ),
        max_size=8,
    )
)
@settings(max_examples=300, deadline=None)
def test_hardware(items: list[tuple[str, dict[str, object]]]) -> None:
    told = "".join(ovas.item(kind, at, **fields) for at, (kind, fields) in enumerate(items))
    with contextlib.suppress(SourceError):
        parse_ovf(ovas.ovf("a", "b", items=told or " "), "‘x.ovf’").guest.model_dump_json()


@given(st.one_of(st.text(max_size=60), st.text("byte* ^0123456789", max_size=40)))
def test_units(text: str) -> None:
    size = parse_units(text)
    assert size is None or 0 < size <= 1 << 62


@given(
    st.one_of(
        st.binary(max_size=200),
        damaged(ovas.manifest({"a": b"", "b c": b"x"}, "SHA1")),
        damaged(ovas.manifest({"a": b"", "b c": b"x"}, "SHA512")),
    )
)
@settings(max_examples=300)
def test_manifests(content: bytes) -> None:
    try:
        for checksum in parse_manifest(content, "‘x.mf’").checksums:
            bytes.fromhex(checksum.digest)
    except SourceError:
        pass


@given(damaged(TAR), st.booleans())
@settings(max_examples=400, deadline=None)
def test_archives(content: bytes, is_file: bool) -> None:
    """Every member that is listed lies within the archive, and its name within the OVA."""
    reader = TarReader(io.BytesIO(content), "‘x’", length=len(content) if is_file else None)
    try:
        for member in reader:
            assert not member.name.startswith("/")
            assert ".." not in member.name.split("/")
            assert member.offset is not None
            if is_file:
                assert member.offset + member.size <= len(content)
            piece = reader.read(100)
            assert piece == content[member.offset :][: min(100, member.size)]
    except SourceError:
        pass


@given(
    st.lists(
        st.tuples(st.text("ab/ü.", min_size=1, max_size=200), st.binary(max_size=1200)), max_size=6
    ),
    st.sampled_from(["gnu", "pax"]),
)
@settings(deadline=None)
def test_archives_are_read_as_tar_reads_them(files: list[tuple[str, bytes]], form: str) -> None:
    packed = archive(*((name, content, {}) for name, content in files), form=form)
    with tarfile.open(fileobj=io.BytesIO(packed)) as theirs:
        expected = [(m.name, m.size, m.offset_data) for m in theirs]
    try:
        ours = [
            (m.name, m.size, m.offset)
            for m in TarReader(io.BytesIO(packed), "x", length=len(packed))
        ]
    except SourceError:
        assert any(".." in name.split("/") or name.startswith("/") for name, _, _ in expected)
        return
    assert ours == [(normalised(name, "x"), size, at) for name, size, at in expected]


@given(NAMES, NAMES, st.lists(NAMES, max_size=5))
@example("a/x.ovf", "..%2f..%2fetc/shadow", [])
def test_names(ovf: str, href: str, others: list[str]) -> None:
    """Nothing but a member is ever found."""
    members: dict[str, Member] = {}
    for name in (ovf, *others):
        try:
            plain = normalised(name, "x")
        except SourceError:
            continue
        members[plain] = Member(plain, 1)
    with contextlib.suppress(SourceError):
        assert find_disk(members, next(iter(members), "x.ovf"), href, "x") in members.values()


IMAGES = [
    *(qcow2(), qcow2(2), vhd(), b"x" * 600 + vhd(), vmdk(descriptor=b"# Disk DescriptorFile\n")),
    DESCRIPTOR.format('RW 1 FLAT "a" 0\nRW 7 SPARSE "b"').encode(),
    b"QED\0" + bytes(80),
    b"COWD" + bytes(600),
]


@given(st.sampled_from(IMAGES).flatmap(damaged))
@settings(max_examples=400)
def test_images(content: bytes) -> None:
    try:
        found = read_header(content[:HEAD], content[-TAIL:], len(content), "‘d’")
    except SourceError:
        return
    for extent in found.extents:
        assert extent.file_name is not None
        assert not set(extent.file_name) & set("/\\:\0")
        assert extent.file_name not in ("", ".", "..")


@given(damaged(ovas.gzipped(b"disk" * 5000) * 2))
@settings(deadline=None)
def test_gzip(content: bytes) -> None:
    file = io.BytesIO(content)
    with contextlib.suppress(SourceError):
        assert all(len(part) <= PIECE for part in unpacked(file.read, "‘x’", lambda count: None))


FILES = {"a.ovf": ovas.ovf("d.img"), "d.img": b"disk" * 300, "a.mf": b"SHA1(a)= " + b"0" * 40}


@pytest.mark.parametrize("kind", ["tar", "pax", "gzip", "bzip2", "xz", "zip"])
def test_whole_files(kind: str, tmp_path: Path) -> None:
    """By the front door, with everything behind it."""
    path = ovas.pack(tmp_path / "a.ova", FILES, kind)

    @given(damaged(path.read_bytes()))
    @settings(max_examples=60, deadline=None)
    def run(content: bytes) -> None:
        path.write_bytes(content)
        source = parse_input(InputOptions("ova", (str(path),)))
        try:
            anyio.run(source.check, quiet)
        except SourceError:
            return
        anyio.run(source.describe)

    run()
