"""What -i disk makes of its arguments, before any server runs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from v2v_async.errors import SourceError, UsageError
from v2v_async.events import Reporter
from v2v_async.input.disk import guest_name
from v2v_async.input.registry import parse_input
from v2v_async.options import InputOptions

pytestmark = pytest.mark.anyio
quiet = Reporter(lambda event: None, "test")


@pytest.mark.parametrize(
    ("argument", "name"),
    [
        # As virt-v2v 2.2 --print-source says for files of these names.
        ("/x/foo-sda", "foo"),
        ("foo-sda.img", "foo-sda"),
        ("foo.img", "foo"),
        ("foo.qcow2", "foo"),
        ("foo.raw", "foo"),
        ("foo.vmdk", "foo"),
        ("foo.bar", "foo.bar"),
        ("foo.tar.img", "foo.tar"),
        ("foo.vhd", "foo.vhd"),
        (".img", "guest"),
    ],
)
def test_the_guest_is_named_as_virt_v2v_names_it(argument: str, name: str) -> None:
    assert guest_name(argument) == name


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("nbd://host/disk1", "disk1"),
        ("nbd://u:p@host:10809/pool/db-sda", "db"),
        ("nbd+unix:///?socket=/x/y", "guest"),
        ("nbd+unix:///web.img?socket=/x/y", "web"),
    ],
)
def test_a_guest_behind_a_uri_is_named_after_the_export(uri: str, name: str) -> None:
    assert guest_name(uri, is_uri=True) == name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (InputOptions("disk"), "no disk was named"),
        (InputOptions("disk", ("a", "b", "a")), "named twice"),
        (InputOptions("disk", ("a",), format="foo"), "unknown format ‘-if foo’"),
        (InputOptions("disk", ("https://h/x",)), "not a kind of URI"),
        (InputOptions("disk", ("nbd://h/x",), format="qcow2"), "an NBD export is raw"),
        (InputOptions("disk", ("a",), options=(("x", "y"),)), "takes no -io x"),
        (InputOptions("disk", ("a",), transport="ssh"), "‘-it ssh’ has no meaning"),
        (InputOptions("tape", ("a",)), "unknown input ‘-i tape’"),
    ],
)
def test_a_wrong_command_line_exits_2(options: InputOptions, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        parse_input(options)
    assert caught.value.exit_status == 2


async def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="No such file") as caught:
        await parse_input(InputOptions("disk", (str(tmp_path / "no.img"),))).check(quiet)
    assert caught.value.disk == 1


async def test_a_directory_and_an_empty_disk_are_told_together(tmp_path: Path) -> None:
    empty = tmp_path / "empty.img"
    empty.touch()
    source = parse_input(InputOptions("disk", (str(tmp_path), str(empty))))
    with pytest.raises(SourceError) as caught:
        await source.check(quiet)
    assert "disk 1" in str(caught.value)
    assert "is a directory" in str(caught.value)
    assert "disk 2" in str(caught.value)
    assert "is empty" in str(caught.value)


async def test_a_pipe_is_no_disk(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="neither a file nor a block device"):
        await parse_input(InputOptions("disk", (str(tmp_path / "pipe"),))).check(quiet)


async def test_a_wrong_format_says_so(tmp_path: Path) -> None:
    disk = tmp_path / "a.img"
    disk.write_bytes(b"x" * 4096)
    source = parse_input(InputOptions("disk", (str(disk),), format="qcow2"))
    with pytest.raises(SourceError, match="as qcow2"):
        await source.check(quiet)


@pytest.mark.parametrize("image_format", ["raw", "qcow2", "vmdk", "vpc", "vhdx", "vdi"])
async def test_formats_are_found_out(tmp_path: Path, image_format: str) -> None:
    disk = tmp_path / "disk"
    create = ["qemu-img", "create", "-q", "-f", image_format, str(disk), "64M"]
    subprocess.run(create, check=True)
    source = parse_input(InputOptions("disk", (str(disk),)))
    await source.check(quiet)
    described = await source.describe()
    assert described.disks[0].format == image_format
    assert described.disks[0].size >= 64 << 20


async def test_nobody_listens(tmp_path: Path) -> None:
    uri = f"nbd+unix:///?socket={tmp_path}/absent"
    with pytest.raises(SourceError, match="can't connect"):
        await parse_input(InputOptions("disk", (uri,))).check(quiet)


async def test_cow_is_for_raw_disks(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "1M"], check=True)
    source = parse_input(InputOptions("disk", (str(disk),), options=(("overlay", "cow"),)))
    with pytest.raises(UsageError, match="overlay=cow"):
        await source.check(quiet)
