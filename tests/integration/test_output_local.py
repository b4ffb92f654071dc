"""-o local and -o null with real servers: made, written, published, or gone without a trace."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.conftest import require
from v2v_async.errors import ServerStartError, TargetError, UsageError, V2VError
from v2v_async.events import Event, Reporter
from v2v_async.model import (
    Guestcaps,
    Inspection,
    SourceDisk,
    SourceGuest,
    TargetBuses,
    TargetGuest,
)
from v2v_async.options import OutputOptions
from v2v_async.output.contract import Output
from v2v_async.output.registry import parse_output
from v2v_async.server import running_servers
from v2v_async.v2vdir import V2VDir


@pytest.fixture(autouse=True)
def _installed() -> None:
    require("nbdkit", "qemu-nbd", "qemu-img", "qemu-io")


SIZE = 4 << 20
SOURCE = SourceGuest(
    name="web",
    memory=1 << 30,
    vcpus=1,
    disks=[
        SourceDisk(index=i, source=f"/src{i}", format="qcow2", size=SIZE, allocated=0)
        for i in (1, 2)
    ],
)
TARGET = TargetGuest(
    name="web",
    source=SOURCE,
    guestcaps=Guestcaps(),
    inspection=Inspection(osinfo="debian12"),
    firmware="bios",
    buses=TargetBuses(virtio_blk=[1, 2]),
    boot_disk=1,
)


def output_for(directory: Path, **fields: Any) -> Output:
    return parse_output(replace(OutputOptions(mode="local", storage=str(directory)), **fields))


def reporter(events: list[Event] | None = None) -> Reporter:
    return Reporter((events if events is not None else []).append, "run").for_guest("web")


def write(socket: Path, pattern: int, offset: int, length: int) -> None:
    """Write as the copy would, with somebody else's NBD client."""
    subprocess.run(
        [
            "qemu-io",
            "-f",
            "raw",
            "-c",
            f"write -P {pattern} {offset} {length}",
            "-c",
            "flush",
            f"nbd+unix:///?socket={socket}",
        ],
        check=True,
        capture_output=True,
    )


async def run(*argv: str) -> subprocess.CompletedProcess[bytes]:
    return await anyio.run_process(argv, check=False)


def content(path: Path, format_: str, tmp_path: Path) -> bytes:
    plain = tmp_path / "plain"
    subprocess.run(
        ["qemu-img", "convert", "-f", format_, "-O", "raw", str(path), str(plain)], check=True
    )
    return plain.read_bytes()


async def make(v2vdir: V2VDir, output: Output, name: str = "web") -> None:
    """Run an output from check to finalize, with a little data on each disk."""
    await output.check(reporter())
    await output.check_source(SOURCE, name, reporter())
    async with running_servers(v2vdir) as servers:
        await output.setup(v2vdir, SOURCE, name, servers, reporter())
        for disk in SOURCE.disks:
            await anyio.to_thread.run_sync(
                write, v2vdir.target_socket(disk.index), disk.index, 65536, 65536
            )
    await output.finalize(v2vdir, TARGET.model_copy(update={"name": name}), reporter())


def expected(index: int) -> bytes:
    return bytes(65536) + bytes([index]) * 65536 + bytes(SIZE - 131072)


@pytest.mark.anyio
@pytest.mark.parametrize("allocation", ["sparse", "preallocated"])
@pytest.mark.parametrize("format_", ["raw", "qcow2"])
async def test_disks_and_xml(
    v2vdir: V2VDir, directory: Path, tmp_path: Path, format_: str, allocation: str
) -> None:
    (directory / "web-sda").write_text("an earlier guest")
    await make(v2vdir, output_for(directory, format=format_, allocation=allocation))
    assert sorted(os.listdir(directory)) == ["web-sda", "web-sdb", "web.xml"]
    for index, name in ((1, "web-sda"), (2, "web-sdb")):
        path = directory / name
        assert content(path, format_, tmp_path) == expected(index)
        assert (path.stat().st_blocks * 512 >= SIZE) == (allocation == "preallocated")
    # As virt-v2v makes them: 0666 less the umask.
    umask = os.umask(0o077)
    os.umask(umask)
    assert (directory / "web-sda").stat().st_mode & 0o777 & umask == 0
    xml = (directory / "web.xml").read_text()
    assert f'file="{directory}/web-sdb"' in xml
    assert f'type="{format_}"' in xml
    states = [(t.index, t.is_known_zero) for t in v2vdir.state.targets]
    assert states == [(1, True), (2, True)]


@pytest.mark.anyio
async def test_compressed_clusters(v2vdir: V2VDir, directory: Path, tmp_path: Path) -> None:
    await make(v2vdir, output_for(directory, format="qcow2", options=(("compressed", None),)))
    path = directory / "web-sda"
    assert content(path, "qcow2", tmp_path) == expected(1)
    checked = await run("qemu-img", "check", "--output=json", str(path))
    assert '"compressed-clusters": 1' in checked.stdout.decode()
    assert all((t.max_connections, t.request_size) == (1, 65536) for t in v2vdir.state.targets)


@pytest.mark.anyio
async def test_until_finalize_the_earlier_files_are_there_and_abandon_leaves_only_them(
    v2vdir: V2VDir, directory: Path
) -> None:
    (directory / "web-sda").write_text("an earlier guest")
    output = output_for(directory)
    async with running_servers(v2vdir) as servers:
        await output.setup(v2vdir, SOURCE, "web", servers, reporter())
        assert (directory / "web-sda").read_text() == "an earlier guest"
        assert len(os.listdir(directory)) == 3
    # Another process cleans up: it has only the directory.
    await output_for(directory).abandon(V2VDir(v2vdir.path), reporter())
    assert os.listdir(directory) == ["web-sda"]
    assert (directory / "web-sda").read_text() == "an earlier guest"
    await output.abandon(v2vdir, reporter())


@pytest.mark.anyio
async def test_setup_that_fails_half_way_leaves_nothing(
    v2vdir: V2VDir, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = output_for(directory)
    second = v2vdir.target_socket(2)
    second.mkdir()  # its server can't listen there
    with pytest.raises((ServerStartError, OSError, V2VError)):
        async with running_servers(v2vdir) as servers:
            await output.setup(v2vdir, SOURCE, "web", servers, reporter())
    assert len(v2vdir.state.outputs) >= 1
    await output.abandon(v2vdir, reporter())
    assert os.listdir(directory) == []


@pytest.mark.anyio
async def test_a_full_file_system(v2vdir: V2VDir, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = await run("mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(small))
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        output = output_for(small, allocation="preallocated")
        with pytest.raises(TargetError, match="preallocated disks need"):
            await output.check_source(SOURCE, "web", reporter())
        # The room goes between the check and the making.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("v2v_async.output.files.free_space", lambda directory: 1 << 40)
            with pytest.raises(TargetError, match="No space left") as caught:
                async with running_servers(v2vdir) as servers:
                    await output.setup(v2vdir, SOURCE, "web", servers, reporter())
        assert "-os DIR" in (caught.value.hint or "")
        await output.abandon(v2vdir, reporter())
        assert os.listdir(small) == []
    finally:
        assert (await run("umount", str(small))).returncode == 0


@pytest.mark.anyio
async def test_sparse_disks_that_may_not_fit_are_a_warning(directory: Path) -> None:
    events: list[Event] = []
    huge = SOURCE.model_copy(
        update={"disks": [SOURCE.disks[0].model_copy(update={"size": 1 << 60, "allocated": None})]}
    )
    await output_for(directory).check_source(huge, "web", reporter(events))
    assert [event.type for event in events] == ["warning"]


@pytest.mark.anyio
async def test_where_it_can_not_write(tmp_path: Path, directory: Path) -> None:
    (tmp_path / "file").touch()
    for bad, message in ((tmp_path / "absent", "does not exist"), (tmp_path / "file", "is not a")):
        with pytest.raises(UsageError, match=message):
            await output_for(bad).check(reporter())
    (directory / "web.xml").mkdir()
    with pytest.raises(TargetError, match="is a directory"):
        await output_for(directory).check_source(SOURCE, "web", reporter())


@pytest.mark.parametrize("name", ["../escaped", "a/b", "..", "a\0b"])
def test_no_name_leads_out_of_the_directory(
    v2vdir: V2VDir, directory: Path, tmp_path: Path, name: str
) -> None:
    async def attempt() -> None:
        async with running_servers(v2vdir) as servers:
            await output_for(directory).setup(v2vdir, SOURCE, name, servers, reporter())

    with pytest.raises(UsageError, match="can't be the name"):
        anyio.run(attempt)
    assert os.listdir(directory) == []
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.anyio
@pytest.mark.parametrize("name", ['we<b> & "co"', "a,b=c", "-dash", "café 😀"])
@pytest.mark.parametrize("format_", ["raw", "qcow2"])
async def test_awkward_names(
    v2vdir: V2VDir, directory: Path, tmp_path: Path, name: str, format_: str
) -> None:
    await make(v2vdir, output_for(directory, format=format_), name)
    assert sorted(os.listdir(directory)) == sorted([f"{name}-sda", f"{name}-sdb", f"{name}.xml"])
    assert content(directory / f"{name}-sda", format_, tmp_path) == expected(1)
    require("virsh")
    xml = str(directory / f"{name}.xml")
    defined = await run("virsh", "-c", "test:///default", "define", xml)
    assert defined.returncode == 0, defined.stderr


@pytest.mark.anyio
async def test_finalize_needs_what_setup_made(v2vdir: V2VDir, directory: Path) -> None:
    with pytest.raises(TargetError, match="not among the outputs"):
        await output_for(directory).finalize(v2vdir, TARGET, reporter())
    assert os.listdir(directory) == []


@pytest.mark.anyio
async def test_null_takes_everything_and_keeps_nothing(v2vdir: V2VDir, directory: Path) -> None:
    output = parse_output(OutputOptions(mode="null"))
    await output.check(reporter())
    async with running_servers(v2vdir) as servers:
        await output.setup(v2vdir, SOURCE, "web", servers, reporter())
        await anyio.to_thread.run_sync(write, v2vdir.target_socket(2), 7, 0, 65536)
    await output.finalize(v2vdir, TARGET, reporter())
    await output.abandon(v2vdir, reporter())
    assert v2vdir.state.outputs == []
    assert [t.is_known_zero for t in v2vdir.state.targets] == [True, True]
