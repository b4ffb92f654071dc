"""VMDK descriptors: what they name, and that nothing outside their folder is read for one."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from v2v_async.errors import SourceError
from v2v_async.input.vmdk_descriptor import (
    Extent,
    embedded_range,
    parse_descriptor,
    parse_embedded,
)
from v2v_async.input.vmx.vmdk_chain import check_vmdk

pytestmark = pytest.mark.anyio

ESXI = """# Disk DescriptorFile
version=1
encoding="UTF-8"
CID=fffffffe
parentCID=ffffffff
createType="vmfs"

# Extent description
RW 8192 VMFS "guest-flat.vmdk"

# The Disk Data Base
#DDB

ddb.adapterType = "lsilogic"
ddb.virtualHWVersion = "13"
"""


def test_a_disk_of_esxi() -> None:
    found = parse_descriptor(ESXI.encode())
    assert found.create_type == "vmfs"
    assert found.parent is None
    assert found.extents == [Extent(8192, "VMFS", "guest-flat.vmdk")]
    assert found.extents[0].is_flat


def test_a_snapshot_names_its_parent() -> None:
    text = ESXI.replace("parentCID=ffffffff", "parentCID=fffffffe").replace(
        "createType", 'parentFileNameHint="/vmfs/volumes/x/base.vmdk"\ncreateType'
    )
    assert parse_descriptor(text.encode()).parent == "/vmfs/volumes/x/base.vmdk"


def test_several_extents() -> None:
    text = ESXI.replace(
        'RW 8192 VMFS "guest-flat.vmdk"',
        'RW 10 FLAT "a.vmdk" 5\nRW 20 ZERO\nRDONLY 30 SPARSE "b c.vmdk"',
    )
    assert parse_descriptor(text.encode()).extents == [
        Extent(10, "FLAT", "a.vmdk", 5),
        Extent(20, "ZERO"),
        Extent(30, "SPARSE", "b c.vmdk"),
    ]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"guest-flat.vmdk"', '"/etc/shadow"', "in another folder: ‘/etc/shadow’"),
        ('"guest-flat.vmdk"', '"../../etc/shadow"', "in another folder"),
        ('"guest-flat.vmdk"', '".."', "in another folder"),
        ('"guest-flat.vmdk"', '"C:\\\\x.vmdk"', "not a file"),
        ('"guest-flat.vmdk"', '"a\\\\b.vmdk"', "in another folder"),
        ('"guest-flat.vmdk"', '"\udcff.vmdk"', "not UTF-8: ‘[?].vmdk’"),
        ('"guest-flat.vmdk"', '"json:{}"', "not a file: ‘json:{}’"),
        ('"guest-flat.vmdk"', '"nbd://host/x"', "not a file"),
        # qemu reads an extent over the ends of lines.
        ("RW 8192 VMFS", "RW\n8192\nFLAT", "makes no sense"),
        ("RW 8192 VMFS ", "RW 8192 VMFS\n", "without a file: 'RW 8192 VMFS'"),
        ("RW 8192 VMFS", "  RW  many FLAT", "makes no sense"),
        ("RW 8192 VMFS", "RW 8192 vmfs", "type vmfs, which is not known"),
        ("createType", "nothing", "no createType"),
        ("parentCID=ffffffff", "parentCID=12345678", "does not name its parent"),
        ("#DDB", '# parentFileNameHint = "/etc/shadow"', "makes no sense"),
        ("#DDB", '# parentFileNameHint="json:{}"', "a parent that is not a file"),
        ("#DDB", '#\0\nparentFileNameHint="x.vmdk"', "parentFileNameHint that makes no sense"),
        ("#DDB", 'parentFileNameHint=""', "parentFileNameHint that makes no sense"),
    ],
)
def test_what_qemu_would_follow_is_refused(old: str, new: str, said: str) -> None:
    assert old in ESXI
    with pytest.raises(SourceError, match=said):
        parse_descriptor(ESXI.replace(old, new).encode(errors="surrogateescape"))


@given(st.one_of(st.binary(max_size=300), st.text(max_size=300).map(lambda t: (ESXI + t).encode())))
def test_any_descriptor_is_understood_or_refused(content: bytes) -> None:
    try:
        found = parse_descriptor(content)
    except SourceError:
        return
    assert all("/" not in (extent.file_name or "") for extent in found.extents)


# As qemu's block/vmdk.c reads a descriptor: from the beginning of every line by sscanf(3), to which
# the ends of lines are white space like any other.
_SCANNED = re.compile(rb'\s*+(\S{1,10}+)\s*+([+-]?[0-9]++)\s*+(\S{1,10}+)\s*+"([^\n\r"]{1,511}+)')
_OPENED = (b"FLAT", b"VMFS", b"SPARSE", b"VMFSSPARSE", b"SESPARSE")


def opened_by_qemu(content: bytes) -> set[bytes]:
    text = content.split(b"\0")[0]
    starts = [0, *(at + 1 for at, byte in enumerate(text) if byte == 10)]
    found = [match for at in starts if (match := _SCANNED.match(text, at))]
    return {m[4] for m in found if m[1] == b"RW" and m[3] in _OPENED and int(m[2]) > 0}


def parent_to_qemu(content: bytes) -> bytes | None:
    text = content.split(b"\0")[0]
    _, found, rest = text.partition(b"parentFileNameHint")
    name, quote, _ = rest[2:].partition(b'"')
    return name if found and quote else None


PIECES = st.lists(
    st.one_of(
        st.sampled_from(['RW 8 FLAT "a" 0\n', 'RW 9 VMFS "b"\n', "RW 1 ZERO\n", "# x\n"]),
        st.sampled_from(
            [
                *(
                    "RW 8 VMFSSPARSE",
                    "RW 8 FLAT\n",
                    "RW 8",
                    "RW\n",
                    "RDONLY",
                    " ",
                    "\n",
                    "\t",
                    "\v",
                ),
                *("\r", "\0", "8", "-8", "#", "FLAT", "VMFS", "SPARSE", "ZERO", '"a"', '"b.vmdk"'),
                *('"/etc/shadow"', '"', "parentFileNameHint", '="p.vmdk"', '=""', "x", "ü"),
            ]
        ),
    ),
    max_size=12,
).map("".join)


@given(PIECES)
@example('RW 8 FLAT\n"/etc/shadow" 0')
@example('RW\n8\nVMFSSPARSE"/etc/shadow"')
@settings(max_examples=1000)
def test_qemu_opens_nothing_else_than_what_was_read(pieces: str) -> None:
    content = (ESXI + pieces).encode()
    try:
        found = parse_descriptor(content)
    except SourceError:
        return
    assert opened_by_qemu(content) <= {str(e.file_name).encode() for e in found.extents}
    parent = parent_to_qemu(content)
    assert (None if parent is None else parent.decode()) == found.parent


@given(PIECES, PIECES, st.booleans())
@settings(max_examples=500)
def test_an_embedded_descriptor_is_read_as_qemu_does(at: str, elsewhere: str, same: bool) -> None:
    content = (ESXI + at).encode()
    behind_the_header = content if same else elsewhere.encode()
    try:
        found = parse_embedded(content, behind_the_header)
    except SourceError:
        return
    parent = parent_to_qemu(behind_the_header)
    assert found is not None
    assert (None if parent is None else parent.decode()) == found.parent


@given(st.binary(max_size=80))
def test_any_header_is_understood_or_refused(head: bytes) -> None:
    try:
        place = embedded_range(head)
    except SourceError:
        return
    assert place is None or place[1] > 0


def flat(folder: Path, name: str = "guest", text: str = ESXI, size: int = 8192 * 512) -> Path:
    """Write a disk as ESXi has it."""
    (folder / f"{name}.vmdk").write_text(text.replace("guest-flat", f"{name}-flat"))
    with (folder / f"{name}-flat.vmdk").open("wb") as file:
        file.truncate(size)
    return folder / f"{name}.vmdk"


def create(*words: str | Path) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "vmdk", *map(str, words)], check=True)


async def test_a_disk_has_its_extents_among_its_files(tmp_path: Path) -> None:
    checked = await check_vmdk(flat(tmp_path))
    assert checked.source.format == "vmdk"
    assert checked.source.size == 8192 * 512
    assert checked.files == (str(tmp_path / "guest.vmdk"), str(tmp_path / "guest-flat.vmdk"))


@pytest.mark.parametrize(
    "kind", ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "streamOptimized"]
)
async def test_the_kinds_of_qemu(tmp_path: Path, kind: str) -> None:
    create("-o", f"subformat={kind}", tmp_path / "a.vmdk", "3M")
    checked = await check_vmdk(tmp_path / "a.vmdk")
    assert checked.source.size == 3 << 20
    assert {Path(file) for file in checked.files} == set(tmp_path.iterdir())


async def test_a_chain_of_snapshots(tmp_path: Path) -> None:
    """The parent may be in another folder: linked clones are so."""
    (tmp_path / "base").mkdir()
    create(tmp_path / "base/a.vmdk", "3M")
    create("-b", tmp_path / "base/a.vmdk", "-F", "vmdk", tmp_path / "a-000001.vmdk")
    create("-b", "a-000001.vmdk", "-F", "vmdk", tmp_path / "a-000002.vmdk")
    checked = await check_vmdk(tmp_path / "a-000002.vmdk")
    assert checked.files[:3] == (
        str(tmp_path / "a-000002.vmdk"),
        str(tmp_path / "a-000001.vmdk"),
        str(tmp_path / "base/a.vmdk"),
    )


async def test_a_chain_that_goes_round(tmp_path: Path) -> None:
    text = ESXI.replace("#DDB", '#\nparentFileNameHint="guest.vmdk"')
    with pytest.raises(SourceError, match="goes round"):
        await check_vmdk(flat(tmp_path, text=text))


async def test_a_parent_that_is_no_vmdk(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("root:x:0:0\n")
    text = ESXI.replace("#DDB", f'#\nparentFileNameHint="{tmp_path}/secret"')
    with pytest.raises(SourceError, match="secret’ is not a VMDK"):
        await check_vmdk(flat(tmp_path, text=text))


async def test_an_extent_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    disk = flat(tmp_path / "d")
    with (tmp_path / "elsewhere").open("wb") as file:
        file.truncate(8192 * 512)
    (tmp_path / "d/guest-flat.vmdk").unlink()
    (tmp_path / "d/guest-flat.vmdk").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SourceError, match="is a link to"):
        await check_vmdk(disk)


async def test_a_sparse_file_that_hides_a_descriptor(tmp_path: Path) -> None:
    """Where the header says that there is no data, qemu follows the descriptor inside."""
    text = ESXI.replace('VMFS "guest-flat.vmdk"', 'FLAT "/etc/hostname"').encode()
    header = struct.pack("<4sIIQQQQ", b"KDMV", 1, 3, 0, 128, 1, 20).ljust(512, b"\0")
    (tmp_path / "a.vmdk").write_bytes(header + text.ljust(20 * 512, b"\0"))
    with pytest.raises(SourceError, match="in another folder: ‘/etc/hostname’"):
        await check_vmdk(tmp_path / "a.vmdk")


@pytest.mark.parametrize("at", [0, 30])
async def test_a_sparse_file_with_a_parent_where_only_qemu_looks(tmp_path: Path, at: int) -> None:
    """Its header says that its descriptor is elsewhere, or that it has none."""
    (tmp_path / "secret").write_text("root:x:0:0\n")
    header = struct.pack("<4sIIQQQQ", b"KDMV", 1, 3, 2048, 128, at, 20 if at else 0)
    hint = f'parentFileNameHint="{tmp_path}/secret"\n'.encode()
    content = header.ljust(512, b"\0") + hint.ljust(29 * 512, b"\0") + ESXI.encode()
    (tmp_path / "a.vmdk").write_bytes(content.ljust(64 * 512, b"\0"))
    with pytest.raises(SourceError, match="and another to qemu"):
        await check_vmdk(tmp_path / "a.vmdk")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda d: (d / "guest-flat.vmdk").unlink(), "its extent .*: No such file"),
        (lambda d: (d / "guest.vmdk").unlink(), "guest.vmdk’: No such file"),
        (lambda d: (d / "guest-flat.vmdk").write_bytes(b"x"), "has 1 bytes of 4194304"),
        (lambda d: (d / "guest.vmdk").write_bytes(b"COWD" * 200), "but an extent of a snapshot"),
        (lambda d: (d / "guest.vmdk").write_bytes(b"x" * 600), "guest.vmdk’ is not a VMDK$"),
        (lambda d: (d / "guest.vmdk").write_bytes(b"KDMV"), "header of the VMDK is cut off"),
        (
            lambda d: (d / "guest.vmdk").write_text(ESXI.replace(" VMFS ", " VMFSRDM ")),
            "mapped to a device of its ESXi host",
        ),
    ],
)
async def test_a_disk_that_is_not_whole(tmp_path: Path, spoil, said: str) -> None:  # type: ignore[no-untyped-def]
    disk = flat(tmp_path)
    spoil(tmp_path)
    with pytest.raises(SourceError, match=said) as caught:
        await check_vmdk(disk)
    assert str(disk) in caught.value.message


async def test_the_bytes_of_a_disk_in_place_of_its_descriptor(tmp_path: Path) -> None:
    flat(tmp_path)
    with pytest.raises(SourceError, match="its descriptor is ‘guest.vmdk’"):
        await check_vmdk(tmp_path / "guest-flat.vmdk")
