"""Block devices under the names of target disks, as virt-v2v(1) has it: written in place."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import yaml
from lxml import etree

from tests.block_devices import filled, loop_device
from tests.conftest import require
from tests.integration.test_output_local import (
    SIZE,
    SOURCE,
    TARGET,
    expected,
    make,
    reporter,
    write,
)
from v2v_async.errors import TargetError, UsageError, V2VError
from v2v_async.events import Event
from v2v_async.model import SourceGuest
from v2v_async.options import OutputOptions
from v2v_async.output.contract import Output
from v2v_async.output.existing_disks import device_at
from v2v_async.output.registry import parse_output
from v2v_async.server import running_servers
from v2v_async.v2vdir import V2VDir

pytestmark = pytest.mark.anyio
TAIL = 1 << 20
SUFFIXES = {"local": ".xml", "qemu": ".sh", "json": ".json", "kubevirt": ".yaml"}


@pytest.fixture(autouse=True)
def _installed() -> None:
    require("nbdkit", "qemu-img", "qemu-io", "losetup")


@pytest.fixture
def backing(tmp_path: Path) -> Path:
    """What is behind ``device``: larger than the disk, and full of something else."""
    return filled(tmp_path / "backing", SIZE + TAIL)


@pytest.fixture
def device(backing: Path) -> Iterator[Path]:
    with loop_device(backing) as made:
        yield made


def output_for(directory: Path, mode: str = "local", **fields: Any) -> Output:
    return parse_output(OutputOptions(mode=mode, storage=str(directory), **fields))


@pytest.mark.parametrize("allocation", ["sparse", "preallocated"])
@pytest.mark.parametrize("mode", SUFFIXES)
async def test_a_link_to_a_device(
    v2vdir: V2VDir, directory: Path, backing: Path, device: Path, mode: str, allocation: str
) -> None:
    """The first disk is written to the device, the second one to a new file."""
    link = directory / "web-sda"
    link.symlink_to(device)
    output = output_for(directory, mode, allocation=allocation)
    await make(v2vdir, output)
    subprocess.run(["blockdev", "--flushbufs", str(device)], check=True)
    held = backing.read_bytes()
    assert held[65536:131072] == expected(1)[65536:131072]
    # make() writes no zeroes, the copy does (tests/fault/test_device_outputs.py).
    assert held[:65536] + held[131072:] == b"\xaa" * (SIZE + TAIL - 65536)
    assert (directory / "web-sdb").read_bytes() == expected(2)
    assert link.readlink() == device
    assert sorted(os.listdir(directory)) == ["web-sda", "web-sdb", f"web{SUFFIXES[mode]}"]
    targets = {target.index: target.is_known_zero for target in v2vdir.state.targets}
    assert targets == {1: False, 2: True}
    assert v2vdir.state.objects == []
    # The document names the device: the link may go.
    text = (directory / f"web{SUFFIXES[mode]}").read_text()
    if mode == "local":
        root = etree.fromstring(text.encode())
        assert root.xpath("//disk/@type") == ["block", "file"]
        assert root.xpath("//disk/source/@dev") == [str(device)]
        assert root.xpath("//disk/source/@file") == [str(directory / "web-sdb")]
    elif mode == "json":
        named = [disk["file"] for disk in json.loads(text)["disks"]]
        assert named == [str(device), str(directory / "web-sdb")]
    elif mode == "kubevirt":
        volumes = yaml.safe_load(text)["spec"]["template"]["spec"]["volumes"]
        assert volumes[0]["hostDisk"]["path"] == str(device)
    else:
        assert f"format=raw,file={device}" in text


async def test_a_device_node_of_that_name(
    v2vdir: V2VDir, directory: Path, backing: Path, device: Path
) -> None:
    node = directory / "web-sda"
    os.mknod(node, 0o600 | stat.S_IFBLK, device.stat().st_rdev)
    await make(v2vdir, output_for(directory))
    subprocess.run(["blockdev", "--flushbufs", str(device)], check=True)
    assert backing.read_bytes()[65536:131072] == expected(1)[65536:131072]
    root = etree.parse(directory / "web.xml").getroot()
    assert root.xpath("//disk/source/@dev") == [str(node)]
    assert stat.S_ISBLK(node.stat().st_mode)


async def test_finalize_in_another_process(v2vdir: V2VDir, directory: Path, device: Path) -> None:
    link = directory / "web-sda"
    link.symlink_to(device)
    async with running_servers(v2vdir) as servers:
        await output_for(directory).setup(v2vdir, SOURCE, "web", servers, reporter())
    assert [made.name for made in v2vdir.state.objects] == [str(device)]
    # What the link leads to now is not what was written.
    link.unlink()
    with pytest.raises(TargetError, match="not among the outputs"):
        await output_for(directory).finalize(V2VDir(v2vdir.path), TARGET, reporter())
    link.symlink_to(device)
    await output_for(directory).finalize(V2VDir(v2vdir.path), TARGET, reporter())
    assert V2VDir(v2vdir.path).state.objects == []
    assert sorted(os.listdir(directory)) == ["web-sda", "web-sdb", "web.xml"]


async def test_abandoned_it_stays_and_is_named(
    v2vdir: V2VDir, directory: Path, backing: Path, device: Path
) -> None:
    (directory / "web-sdb").symlink_to(device)
    async with running_servers(v2vdir) as servers:
        await output_for(directory).setup(v2vdir, SOURCE, "web", servers, reporter())
        await anyio.to_thread.run_sync(write, v2vdir.target_socket(2), 2, 0, 65536)
    events: list[Event] = []
    for _ in range(2):
        await output_for(directory).abandon(V2VDir(v2vdir.path), reporter(events))
    assert os.listdir(directory) == ["web-sdb"]
    assert backing.stat().st_size == SIZE + TAIL
    [said] = [event.text or "" for event in events]
    assert f"‘{device}’ was there before and stays" in said
    command = said.rpartition("it with: ")[2]
    subprocess.run(command, shell=True, check=True)
    assert backing.read_bytes() == bytes(SIZE + TAIL)


async def refused(
    directory: Path,
    says: str,
    *,
    error: type[V2VError] = UsageError,
    source: SourceGuest = SOURCE,
    **fields: Any,
) -> V2VError:
    """Assert that it is refused before the conversion, and that the device is as it was."""
    output = output_for(directory, **fields)
    with pytest.raises(error, match=says) as caught:
        await output.check(reporter())
        await output.check_source(source, "web", reporter())
    return caught.value


async def test_devices_that_can_not_be(directory: Path, tmp_path: Path, device: Path) -> None:
    link, second = directory / "web-sda", directory / "web-sdb"
    link.symlink_to(device)
    await refused(directory, "which is written as raw", format="qcow2")

    small = filled(tmp_path / "small", SIZE - 4096)
    with loop_device(small) as too_small:
        second.symlink_to(too_small)
        error = await refused(directory, "has 4.0 MiB|has 3.9", error=TargetError)
        assert f"make it {SIZE} bytes long" in (error.hint or "")
    second.unlink()

    with loop_device(filled(tmp_path / "ro", SIZE), "--read-only") as read_only:
        second.symlink_to(read_only)
        await refused(directory, "is read-only", error=TargetError)
    second.unlink()

    # The same device again, by another link and by another node.
    second.symlink_to(device)
    await refused(directory, "are the same disk")
    second.unlink()
    os.mknod(second, 0o600 | stat.S_IFBLK, device.stat().st_rdev)
    await refused(directory, "are the same disk")
    second.unlink()

    second.symlink_to("/dev/no-such-group/volume")
    error = await refused(directory, "‘/dev/no-such-group/volume’, which is not", error=TargetError)
    assert "lvchange" in (error.hint or "")


async def test_a_device_in_use(directory: Path, tmp_path: Path, device: Path) -> None:
    require("mkfs.ext4")
    (directory / "web-sda").symlink_to(device)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(device)], check=True)
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    subprocess.run(["mount", str(device), str(mounted)], check=True)
    try:
        error = await refused(directory, f"‘{device}’ is in use", error=TargetError)
        assert f"lsblk {device}" in (error.hint or "")
    finally:
        subprocess.run(["umount", str(mounted)], check=True)
    await output_for(directory).check_source(SOURCE, "web", reporter())


@pytest.mark.parametrize("read_from", ["the device", "its backing file", "its partition"])
async def test_the_source_is_never_written_to(
    directory: Path, backing: Path, device: Path, read_from: str
) -> None:
    """By whatever name it is read from."""
    (directory / "web-sda").symlink_to(device)
    files = {"the device": [str(device)], "its backing file": ["/absent", str(backing)]}
    if read_from == "its partition":
        require("sfdisk", "partx")
        table = b"label: dos\nstart=2048, size=2048\nstart=4096, size=2048\n"
        subprocess.run(["sfdisk", "-q", str(device)], input=table, check=True)
        if subprocess.run(["partx", "--add", str(device)], capture_output=True).returncode:
            pytest.skip("no partitions of loop devices here")
        files["its partition"] = [f"{device}p1"]
    try:
        second = SOURCE.disks[1].model_copy(update={"files": files[read_from]})
        source = SOURCE.model_copy(update={"disks": [SOURCE.disks[0], second]})
        await refused(directory, "is what the source's disk 2 is read from", source=source)
        if read_from == "its partition":
            # Another partition of the same disk is free.
            (directory / "web-sda").unlink()
            (directory / "web-sda").symlink_to(f"{device}p2")
            error = await refused(directory, "has 1.0 MiB", error=TargetError, source=source)
            assert "bytes long" in (error.hint or "")
    finally:
        if read_from == "its partition":
            subprocess.run(["partx", "--delete", str(device)], check=True)


def test_a_device_keeps_the_name_that_the_first_link_gives_it(tmp_path: Path, device: Path) -> None:
    """Behind /dev/VG/LV is a number that is another volume's after the next boot."""
    first, second, file = tmp_path / "first", tmp_path / "b" / "second", tmp_path / "file"
    second.parent.mkdir()
    stable = Path(f"/dev/v2v-async-test-{os.getpid()}")
    stable.symlink_to(device)
    try:
        second.symlink_to(stable)
        first.symlink_to("b/second")
        assert device_at(first) == stable
        assert device_at(stable) == stable
    finally:
        stable.unlink()
    file.touch()
    (tmp_path / "link").symlink_to(file)
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("file", "link", "dangling", "loop", "absent"):
        assert device_at(tmp_path / name) is None
    with pytest.raises(TargetError, match="is not there"):
        device_at(first)
