"""-o qemu, json and kubevirt with real servers: made, published, or gone without a trace."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import anyio
import pytest
import yaml
from lxml import etree

from tests.block_devices import loop_device
from tests.conftest import assert_gone, require
from tests.integration.test_output_local import (
    SIZE,
    SOURCE,
    TARGET,
    content,
    expected,
    make,
    reporter,
    write,
)
from tests.kubevirt_api import check
from tests.unit.test_output_qemu import HOSTILE
from tests.waiting import until
from v2v_async.errors import TargetError, UsageError
from v2v_async.events import Event
from v2v_async.options import OutputOptions
from v2v_async.output.contract import Output
from v2v_async.output.kubevirt_yaml import compliant_name
from v2v_async.output.registry import parse_output
from v2v_async.process import is_same, start_time
from v2v_async.server import running_servers
from v2v_async.v2vdir import V2VDir

pytestmark = pytest.mark.anyio
SUFFIXES = {"qemu": ".sh", "json": ".json", "kubevirt": ".yaml"}
MODES = list(SUFFIXES)


@pytest.fixture(autouse=True)
def _installed() -> None:
    require("nbdkit", "qemu-nbd", "qemu-img", "qemu-io")


def output_for(directory: Path, mode: str, **fields: Any) -> Output:
    return parse_output(OutputOptions(mode=mode, storage=str(directory), **fields))


def files_below(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format_", ["raw", "qcow2"])
async def test_disks_and_document(
    v2vdir: V2VDir, directory: Path, tmp_path: Path, mode: str, format_: str
) -> None:
    document = directory / f"web{SUFFIXES[mode]}"
    document.write_text("an earlier guest's")
    await make(v2vdir, output_for(directory, mode, format=format_))
    assert files_below(directory) == sorted(["web-sda", "web-sdb", document.name])
    for index, name in ((1, "web-sda"), (2, "web-sdb")):
        assert content(directory / name, format_, tmp_path) == expected(index)
    assert os.access(document, os.X_OK) == (mode == "qemu") or os.geteuid() == 0
    assert bool(document.stat().st_mode & 0o100) == (mode == "qemu")
    text = document.read_text()
    if mode == "json":
        found = [(d["file"], d["format"], d["size"]) for d in json.loads(text)["disks"]]
        assert found == [(str(directory / f"web-sd{x}"), format_, SIZE) for x in "ab"]
    elif mode == "kubevirt":
        volumes = check(yaml.safe_load(text)).spec.template.spec.volumes
        assert [v.hostDisk.path for v in volumes] == [str(directory / f"web-sd{x}") for x in "ab"]
    else:
        assert f"format={format_},file={directory}/web-sdb" in text


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize("umask", [0o022, 0o077])
@pytest.mark.parametrize("allocation", ["sparse", "preallocated"])
@pytest.mark.parametrize("format_", ["raw", "qcow2"])
@pytest.mark.parametrize("mode", [*MODES, "local"])
async def test_room_owner_and_mode(
    v2vdir: V2VDir, directory: Path, mode: str, format_: str, allocation: str, umask: int
) -> None:
    """As virt-v2v: whoever runs it owns them, and the umask says who else may read them."""
    before = os.umask(umask)
    try:
        await make(v2vdir, output_for(directory, mode, format=format_, allocation=allocation))
    finally:
        os.umask(before)
    for name in ("web-sda", "web-sdb"):
        status = (directory / name).stat()
        assert (status.st_uid, status.st_gid) == (os.geteuid(), os.getegid())
        assert mode_of(directory / name) == 0o666 & ~umask
        held = status.st_blocks * 512
        assert held >= SIZE if allocation == "preallocated" else held < SIZE // 4
    document = directory / f"web{SUFFIXES.get(mode, '.xml')}"
    assert mode_of(document) == (0o777 if mode == "qemu" else 0o666) & ~umask


@pytest.mark.parametrize("mode", [*MODES, "local"])
@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_names(v2vdir: V2VDir, directory: Path, mode: str, name: str) -> None:
    """Refused before anything is made, or made to comply; nothing out of the directory."""
    output = output_for(directory, mode)
    if mode == "kubevirt":
        await make(v2vdir, output, name)
        stem = compliant_name(name)
        document = yaml.safe_load((directory / f"{stem}.yaml").read_text())
        assert document["metadata"]["annotations"]["v2v-async/original-name"] == name
    elif "/" in name or "\n" in name or len(name) > 200:
        with pytest.raises((UsageError, TargetError)):
            await make(v2vdir, output, name)
        assert v2vdir.state.outputs == []
        assert files_below(directory) == []
        return
    else:
        await make(v2vdir, output, name)
        stem = name
    document_name = f"{stem}{SUFFIXES.get(mode, '.xml')}"
    assert sorted(os.listdir(directory)) == sorted([f"{stem}-sda", f"{stem}-sdb", document_name])
    if mode == "local":
        root = etree.parse(directory / document_name).getroot()
        assert root.findtext("name") == name
        assert root.xpath("//disk/source/@file") == [f"{directory}/{name}-sd{x}" for x in "ab"]
    assert os.listdir(directory.parent) == ["out"]


@pytest.mark.parametrize("mode", MODES)
async def test_abandoned_by_another_process(v2vdir: V2VDir, directory: Path, mode: str) -> None:
    (directory / "web-sda").write_text("an earlier guest")
    options = (("json-disks-pattern", "a/%{GuestName}/%{DiskNo}"),) if mode == "json" else ()
    output = output_for(directory, mode, options=options)
    async with running_servers(v2vdir) as servers:
        await output.setup(v2vdir, SOURCE, "web", servers, reporter())
        assert len(files_below(directory)) == 3
    again = V2VDir(v2vdir.path)
    for _ in range(2):
        await output_for(directory, mode, options=options).abandon(again, reporter())
        assert [str(p.relative_to(directory)) for p in directory.rglob("*")] == ["web-sda"]
    assert (directory / "web-sda").read_text() == "an earlier guest"
    assert again.state.objects == []


@pytest.mark.parametrize("mode", MODES)
async def test_finalize_in_another_process(v2vdir: V2VDir, directory: Path, mode: str) -> None:
    async with running_servers(v2vdir) as servers:
        await output_for(directory, mode).setup(v2vdir, SOURCE, "web", servers, reporter())
    await output_for(directory, mode).finalize(V2VDir(v2vdir.path), TARGET, reporter())
    assert files_below(directory) == sorted(["web-sda", "web-sdb", f"web{SUFFIXES[mode]}"])


@pytest.mark.parametrize("mode", MODES)
async def test_finalize_needs_what_setup_made(v2vdir: V2VDir, directory: Path, mode: str) -> None:
    with pytest.raises(TargetError, match="not among the outputs"):
        await output_for(directory, mode).finalize(v2vdir, TARGET, reporter())
    assert os.listdir(directory) == []


@pytest.mark.parametrize("mode", [*MODES, "local"])
async def test_a_document_that_can_not_be_written(
    v2vdir: V2VDir, directory: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = output_for(directory, mode)
    async with running_servers(v2vdir) as servers:
        await output.setup(v2vdir, SOURCE, "web", servers, reporter())

    def full(path: Path, data: bytes) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(TargetError, match="No space left"):
        await output.finalize(v2vdir, TARGET, reporter())
    await output.abandon(v2vdir, reporter())
    assert os.listdir(directory) == []


# -o json: folders of the pattern.


async def test_disks_in_folders_of_the_pattern(
    v2vdir: V2VDir, directory: Path, tmp_path: Path
) -> None:
    (directory / "guests").mkdir()
    pattern = (("json-disks-pattern", "guests/%{GuestName}/disk%{DiskNo}.img"),)
    await make(v2vdir, output_for(directory, "json", options=pattern))
    disks = ["guests/web/disk1.img", "guests/web/disk2.img"]
    assert files_below(directory) == [*disks, "web.json"]
    found = json.loads((directory / "web.json").read_text())
    assert [disk["file"] for disk in found["disks"]] == [str(directory / name) for name in disks]
    assert content(directory / disks[1], "raw", tmp_path) == expected(2)
    assert v2vdir.state.objects == []


async def test_patterns_that_can_not_be(directory: Path) -> None:
    same = output_for(directory, "json", options=(("json-disks-pattern", "disk"),))
    with pytest.raises(UsageError, match="two files would be") as caught:
        await same.check_source(SOURCE, "web", reporter())
    assert "%{DiskNo}" in (caught.value.hint or "")
    document = output_for(directory, "json", options=(("json-disks-pattern", "web.json"),))
    one = SOURCE.model_copy(update={"disks": SOURCE.disks[:1]})
    with pytest.raises(UsageError, match="two files would be"):
        await document.check_source(one, "web", reporter())
    (directory / "a").write_text("a file")
    nested = output_for(directory, "json", options=(("json-disks-pattern", "a/%{DiskNo}"),))
    with pytest.raises(TargetError, match="is not a folder"):
        await nested.check_source(SOURCE, "web", reporter())


async def test_a_folder_that_somebody_uses_stays(v2vdir: V2VDir, directory: Path) -> None:
    options = (("json-disks-pattern", "new/%{DiskNo}"),)
    output = output_for(directory, "json", options=options)
    async with running_servers(v2vdir) as servers:
        await output.setup(v2vdir, SOURCE, "web", servers, reporter())
    (directory / "new" / "other").write_text("somebody else's")
    events: list[Event] = []
    await output.abandon(v2vdir, reporter(events))
    assert files_below(directory) == ["new/other"]
    assert "rmdir" in (events[0].text or "")


# -o kubevirt: disks elsewhere, and disks that are there already.


def places(*paths: Path, **more: str) -> tuple[tuple[str, str], ...]:
    return (*(("disk", str(path)) for path in paths), *more.items())


async def test_disks_elsewhere(v2vdir: V2VDir, directory: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "else,where"
    elsewhere.mkdir()
    options = places(elsewhere / "one", directory / "two")
    await make(v2vdir, output_for(directory, "kubevirt", options=options))
    assert files_below(directory) == ["two", "web.yaml"]
    assert content(elsewhere / "one", "raw", tmp_path) == expected(1)
    document = check(yaml.safe_load((directory / "web.yaml").read_text()))
    paths = [volume.hostDisk.path for volume in document.spec.template.spec.volumes]
    assert paths == [str(elsewhere / "one"), str(directory / "two")]


@pytest.mark.parametrize("format_", ["raw", "qcow2"])
async def test_disks_that_are_there_already(
    v2vdir: V2VDir, directory: Path, tmp_path: Path, format_: str
) -> None:
    """They are larger, hold something, and keep their inodes: a mounted volume has one place."""
    disks = [tmp_path / "pvc 1", tmp_path / "pvc'2"]
    for disk in disks:
        image = ["qemu-img", "create", "-q", "-f", format_, str(disk), str(SIZE + 65536)]
        subprocess.run(image, check=True)
        fill = ["qemu-io", "-f", format_, "-c", f"write -P 9 0 {SIZE}", str(disk)]
        subprocess.run(fill, check=True, capture_output=True)
    before = [disk.stat().st_ino for disk in disks]
    options = places(*disks, create="false")
    await make(v2vdir, output_for(directory, "kubevirt", format=format_, options=options))
    assert files_below(directory) == ["web.yaml"]
    assert [disk.stat().st_ino for disk in disks] == before
    assert [target.is_known_zero for target in v2vdir.state.targets] == [False, False]
    assert v2vdir.state.objects == []
    held = content(disks[1], format_, tmp_path)
    assert held[65536:131072] == bytes([2]) * 65536
    assert held[:65536] == bytes([9]) * 65536  # make() writes no zeroes; the copy does


async def test_abandoned_disks_that_were_there_stay_and_are_named(
    v2vdir: V2VDir, directory: Path, tmp_path: Path
) -> None:
    disks = [tmp_path / "pvc 1", tmp_path / "pvc2"]
    for disk in disks:
        disk.write_bytes(bytes(SIZE))
    output = output_for(directory, "kubevirt", options=places(*disks, create="no"))
    async with running_servers(v2vdir) as servers:
        await output.setup(v2vdir, SOURCE, "web", servers, reporter())
        await anyio.to_thread.run_sync(write, v2vdir.target_socket(1), 1, 0, 65536)
    events: list[Event] = []
    await output.abandon(V2VDir(v2vdir.path), reporter(events))
    assert [event.type for event in events] == ["warning", "warning"]
    assert f"truncate --size=0 '{disks[0]}'" in (events[0].text or "")
    assert disks[0].stat().st_size == SIZE
    # The command that was told empties it.
    subprocess.run((events[0].text or "").rpartition("it with: ")[2], shell=True, check=True)
    assert disks[0].read_bytes() == bytes(SIZE)
    assert os.listdir(directory) == []


async def test_places_that_can_not_be_used(directory: Path, tmp_path: Path) -> None:
    small, absent = tmp_path / "small", tmp_path / "absent"
    small.write_bytes(bytes(SIZE - 512))
    large = tmp_path / "large"
    large.write_bytes(bytes(SIZE))

    async def refused(*paths: Path, error: type[Exception], says: str, **more: Any) -> None:
        output = output_for(directory, "kubevirt", options=places(*paths, **more))
        with pytest.raises(error, match=says):
            await output.check(reporter())
            await output.check_source(SOURCE, "web", reporter())

    await refused(
        large, error=UsageError, says="-oo disk names 1 of the guest's disks, which has 2"
    )
    await refused(large, small, create="false", error=TargetError, says="has 4.0 MiB|has 3.9")
    await refused(large, absent, create="false", error=UsageError, says="does not exist")
    await refused(large, directory, create="false", error=UsageError, says="neither a file nor")
    await refused(large, directory, error=UsageError, says="is not a file")
    await refused(large, absent / "x", error=UsageError, says="there is no folder")
    await refused(large, directory / "web.yaml", error=UsageError, says="where the YAML goes")
    source = SOURCE.model_copy(
        update={"disks": [d.model_copy(update={"files": [str(large)]}) for d in SOURCE.disks]}
    )
    output = output_for(directory, "kubevirt", options=places(large, small, create="false"))
    with pytest.raises(UsageError, match="is read from"):
        await output.check_source(source, "web", reporter())
    for format_, image in (("raw", "-f raw"), ("qcow2", f"-f qcow2 -F raw -b {large}")):
        name = tmp_path / f"as-{format_}"
        subprocess.run(f"qemu-img create -q {image} {name} {SIZE}", shell=True, check=True)
        output = output_for(
            directory, "kubevirt", format="qcow2", options=places(name, name / "x", create="false")
        )
        with pytest.raises((UsageError, TargetError), match="qcow2|backing file"):
            await output.check_source(SOURCE, "web", reporter())


async def test_a_block_device(v2vdir: V2VDir, directory: Path, tmp_path: Path) -> None:
    backing, second = tmp_path / "backing", tmp_path / "second"
    backing.write_bytes(bytes(SIZE))
    second.write_bytes(bytes(SIZE))
    with loop_device(backing) as device:
        options = places(device, second, create="false")
        await make(v2vdir, output_for(directory, "kubevirt", options=options))
    assert backing.read_bytes() == expected(1)
    assert second.read_bytes() == expected(2)


# -o qemu: the guest is started.


async def test_the_guest_is_started_and_stays(
    v2vdir: V2VDir, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "fake-qemu"
    fake.write_text('#!/bin/sh\necho "started in $(pwd)"; exec sleep 600\n')
    fake.chmod(0o755)
    monkeypatch.setenv("QEMU", str(fake))
    monkeypatch.setenv("QEMU_ACCEL", "tcg")
    events: list[Event] = []
    output = output_for(directory, "qemu", options=(("qemu-boot", None),))
    async with running_servers(v2vdir) as servers:
        await output.setup(v2vdir, SOURCE, "web", servers, reporter())
    await output.finalize(v2vdir, TARGET, reporter(events))
    [said] = [event.text or "" for event in events]
    pid = int(said.partition("process ")[2].partition(";")[0])
    started = start_time(pid)
    assert started is not None
    try:
        log = directory / "web.log"
        await until(lambda: log.read_text().startswith("started in "), "it speaks")
        assert os.getsid(pid) == pid, "a session of its own: no signal of ours reaches it"
        # What comes after a guest that is whole does not end it.
        await output.abandon(v2vdir, reporter())
        assert is_same(pid, started)
    finally:
        os.kill(pid, signal.SIGKILL)
    assert_gone(str(fake))


async def test_a_guest_that_can_not_be_started_is_whole(
    v2vdir: V2VDir, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    output = output_for(directory, "qemu", options=(("qemu-boot", None),))
    async with running_servers(v2vdir) as servers:
        await output.setup(v2vdir, SOURCE, "web", servers, reporter())
    (directory / "web.log").mkdir()
    await output.finalize(v2vdir, TARGET, reporter(events))
    assert [event.type for event in events] == ["warning"]
    assert "can't be started" in (events[0].text or "")
    assert files_below(directory) == ["web-sda", "web-sdb", "web.sh"]
