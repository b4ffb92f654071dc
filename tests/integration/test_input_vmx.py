"""-i vmx of local files: disks of every kind behind their overlays, and all that may be wrong."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.integration.servers import MIB, digest, fragmented
from tests.integration.test_input_disk import content, quiet, served, write
from tests.integration.test_input_ssh import SIZE, esxi_disk, vmx
from v2v_async.errors import SourceError
from v2v_async.events import Event, Reporter
from v2v_async.input.registry import parse_input
from v2v_async.options import InputOptions

pytestmark = pytest.mark.anyio


async def problem(path: Path) -> SourceError:
    with pytest.raises(SourceError) as caught:
        await parse_input(InputOptions("vmx", (str(path),))).check(quiet)
    return caught.value


async def test_disks_of_every_kind(short_tmp: Path) -> None:
    """As on ESXi, sparse, split in two, and a snapshot of one: each with the same bytes."""
    expected = esxi_disk(short_tmp)
    raw = short_tmp / "web-flat.vmdk"
    for name, kind in (("sparse", "monolithicSparse"), ("split", "twoGbMaxExtentFlat")):
        convert = ["qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", f"subformat={kind}"]
        subprocess.run([*convert, str(raw), str(short_tmp / f"{name}.vmdk")], check=True)
    snapshot = ["qemu-img", "create", "-q", "-f", "vmdk", "-b", "sparse.vmdk", "-F", "vmdk"]
    subprocess.run([*snapshot, "sparse-000001.vmdk"], check=True, cwd=short_tmp)
    names = ["web.vmdk", "sparse.vmdk", f"{short_tmp}/split.vmdk", "sparse-000001.vmdk"]
    path = vmx(short_tmp, *names)
    before = {file: digest(file) for file in short_tmp.iterdir() if file.is_file()}
    async with served(short_tmp, InputOptions("vmx", (str(path),))) as (v2vdir, guest):
        assert [disk.size for disk in guest.disks] == [SIZE] * 4
        for index in range(1, 5):
            endpoint = str(v2vdir.source_socket(index))
            assert await content(endpoint) == expected
            await write(endpoint)
    assert {file: digest(file) for file in before} == before
    chain = [Path(file).name for file in guest.disks[3].files]
    assert chain == ["sparse-000001.vmdk", "sparse.vmdk"]


async def test_all_problems_are_told_together(short_tmp: Path) -> None:
    esxi_disk(short_tmp)
    (short_tmp / "web-flat.vmdk").write_bytes(b"x")
    (short_tmp / "dir.vmdk").mkdir()
    (short_tmp / "text.vmdk").write_text("hello" * 200)
    path = vmx(short_tmp, "gone.vmdk", "web.vmdk", "dir.vmdk", "text.vmdk", "C:\\x\\web.vmdk")
    error = await problem(path)
    assert error.message.startswith("5 disks can't be used: ")
    for told in (
        "disk 1: the disk ‘",
        "/gone.vmdk’: No such file",
        f"has 1 bytes of {SIZE}",
        "/dir.vmdk’ is not a file",
        "/text.vmdk’ is not a VMDK",
    ):
        assert told in error.message


async def test_one_problem_has_its_hint(short_tmp: Path) -> None:
    error = await problem(vmx(short_tmp, "C:\\x\\web.vmdk"))
    assert error.disk == 1
    assert "one of Windows" in str(error.hint)


async def test_a_file_that_is_no_vmx_file(short_tmp: Path) -> None:
    esxi_disk(short_tmp)
    assert "is a directory" in (await problem(short_tmp)).message
    assert "No such file" in (await problem(short_tmp / "no.vmx")).message
    assert "a VMDK descriptor" in (await problem(short_tmp / "web.vmdk")).message
    os.mkfifo(short_tmp / "pipe")
    assert "is not a file" in (await problem(short_tmp / "pipe")).message
    big = fragmented(short_tmp / "big.vmx", 4 * MIB)
    assert "can't be a VMX file" in (await problem(big)).message


async def test_a_guest_that_may_be_running_is_told(short_tmp: Path) -> None:
    esxi_disk(short_tmp)
    path = vmx(short_tmp, "web.vmdk")
    Path(f"{path}.lck").mkdir()
    events: list[Event] = []
    await parse_input(InputOptions("vmx", (str(path),))).check(Reporter(events.append, "t"))
    assert any("may be running" in (event.text or "") for event in events)


async def test_a_relative_name_of_the_vmx_file(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    esxi_disk(short_tmp)
    path = vmx(short_tmp, "web.vmdk")
    monkeypatch.chdir(short_tmp.parent)
    source = parse_input(InputOptions("vmx", (f"{short_tmp.name}/{path.name}",)))
    await source.check(quiet)
    assert (await source.describe()).disks[0].source == str(short_tmp / "web.vmdk")
