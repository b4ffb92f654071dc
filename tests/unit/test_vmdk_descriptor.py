"""VMDK descriptors: what they name, and that nothing outside their folder is read for one."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from v2v_async.errors import SourceError
from v2v_async.input.vmx.vmdk_chain import check_vmdk
from v2v_async.input.vmx.vmdk_descriptor import Extent, embedded_range, parse_descriptor

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
        'RW 10 FLAT "a.vmdk" 5\nRW 20 ZERO\nRDONLY 30 sparse "b c.vmdk"',
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
        ('"guest-flat.vmdk"', '"json:{}"', "not a file: ‘json:{}’"),
        ('"guest-flat.vmdk"', '"nbd://host/x"', "not a file"),
        # qemu reads an extent over the ends of lines.
        ("RW 8192 VMFS", "RW\n8192\nFLAT", "makes no sense"),
        ("RW 8192 VMFS", "  RW  many FLAT", "makes no sense"),
        ("createType", "nothing", "no createType"),
        ("parentCID=ffffffff", "parentCID=12345678", "does not name its parent"),
        ("#DDB", '# parentFileNameHint = "/etc/shadow"', "makes no sense"),
        ("#DDB", '# parentFileNameHint="json:{}"', "a parent that is not a file"),
    ],
)
def test_what_qemu_would_follow_is_refused(old: str, new: str, said: str) -> None:
    assert old in ESXI
    with pytest.raises(SourceError, match=said):
        parse_descriptor(ESXI.replace(old, new).encode())


@given(st.one_of(st.binary(max_size=300), st.text(max_size=300).map(lambda t: (ESXI + t).encode())))
def test_any_descriptor_is_understood_or_refused(content: bytes) -> None:
    try:
        found = parse_descriptor(content)
    except SourceError:
        return
    assert all("/" not in (extent.file_name or "") for extent in found.extents)


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
