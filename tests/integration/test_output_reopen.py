"""Outputs after a kill -9: the disks are there again, or all is made anew; never a mixture."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.block_devices import filled, loop_device
from tests.conftest import require
from tests.integration.test_output_glance import output_for as glance
from tests.integration.test_output_libvirt import POOL, Host
from tests.integration.test_output_libvirt import daemon as daemon
from tests.integration.test_output_libvirt import host as host
from tests.integration.test_output_local import SIZE, SOURCE, TARGET, content, reporter, write
from tests.integration.test_output_openstack import output_for as cinder
from tests.integration.test_output_ovirt import DOMAIN, mounts, rhv, tree, vdsm
from tests.integration.test_output_ovirt import export as export
from tests.integration.test_output_ovirt import fake_nfs as fake_nfs
from tests.ovirt_upload import engine as engine
from tests.ovirt_upload import imageio as imageio
from tests.ovirt_upload import output_for as upload
from tests.services.engine import Engine
from tests.services.openstack import TestCloud
from tests.services.openstack_fixture import MARKS
from tests.services.openstack_fixture import cloud as cloud
from tests.services.openstack_fixture import session_cloud as session_cloud
from tests.waiting import until
from v2v_async import openstack_cloud
from v2v_async.connection import connected
from v2v_async.errors import ServerExitedError, TargetError
from v2v_async.events import Event
from v2v_async.options import OutputOptions
from v2v_async.output.contract import Output
from v2v_async.output.openstack import volumes
from v2v_async.output.registry import parse_output
from v2v_async.server import Servers, running_servers
from v2v_async.v2vdir import MadeObject, V2VDir

pytestmark = MARKS

KIB = 1 << 10
FIRST, SECOND = 64 * KIB, 1 << 20
"""Where a disk gets data before the kill, and after it."""


@pytest.fixture(autouse=True)
def _installed() -> None:
    require("nbdkit", "qemu-nbd", "qemu-img", "qemu-io")


def files(directory: Path, mode: str = "local", **fields: Any) -> Output:
    return parse_output(OutputOptions(mode=mode, storage=str(directory), **fields))


def expected(index: int) -> bytes:
    """A disk that was written before and after."""
    disk = bytearray(SIZE)
    disk[FIRST : FIRST + 64 * KIB] = bytes([index]) * 64 * KIB
    disk[SECOND : SECOND + 64 * KIB] = bytes([index + 8]) * 64 * KIB
    return bytes(disk)


def written(content: bytes) -> list[bytes]:
    """Return what is where something was written; a cloud's volumes are not zero elsewhere."""
    return [content[at : at + 64 * KIB] for at in (FIRST, SECOND)]


async def read_export(endpoint: str) -> bytes:
    """Read as much as a disk has; a volume may have more."""
    async with connected(endpoint) as connection:
        assert connection.info.size >= SIZE
        return bytes(await anyio.to_thread.run_sync(connection.handle.read_now, SIZE, 0))


async def write_all(v2vdir: V2VDir, offset: int, add: int = 0) -> None:
    for disk in SOURCE.disks:
        socket = v2vdir.target_socket(disk.index)
        await anyio.to_thread.run_sync(write, socket, disk.index + add, offset, 64 * KIB)


def write_without_flush(socket: Path) -> None:
    """Have a server know of data that its files do not."""
    uri = f"nbd+unix:///?socket={socket}"
    words = ["-c", "write -P 77 3M 64k", "-c", "sigraise 9"]
    subprocess.run(["qemu-io", "-f", "raw", *words, uri], capture_output=True)


async def killed(v2vdir: V2VDir, output: Output) -> None:
    """Set up, write and flush; then the servers die by a kill -9."""
    with suppress(ServerExitedError):
        async with running_servers(v2vdir) as servers:
            await output.setup(v2vdir, SOURCE, "web", servers, reporter())
            await write_all(v2vdir, FIRST)
            for disk in SOURCE.disks:
                socket = v2vdir.target_socket(disk.index)
                await anyio.to_thread.run_sync(write_without_flush, socket)
            for record in v2vdir.state.processes:
                os.kill(record.pid, signal.SIGKILL)
            await read_export(str(v2vdir.target_socket(1)))


@asynccontextmanager
async def reopened(
    v2vdir: V2VDir, output: Output, *, is_held: bool = True, events: list[Event] | None = None
) -> AsyncIterator[Servers]:
    """Reopen, as another process does; what was flushed is there, or nothing is."""
    async with running_servers(v2vdir) as servers:
        mine = reporter(events)
        assert await output.reopen(v2vdir, SOURCE, "web", servers, mine) is is_held
        assert sorted(target.index for target in v2vdir.state.targets) == [1, 2]
        for disk in SOURCE.disks:
            found = await read_export(str(v2vdir.target_socket(disk.index)))
            wanted = bytes([disk.index]) * 64 * KIB if is_held else bytes(64 * KIB)
            assert found[FIRST : FIRST + 64 * KIB] == wanted
        yield servers


async def finish(v2vdir: V2VDir, output: Output) -> None:
    await output.finalize(V2VDir(v2vdir.path), TARGET, reporter())
    assert v2vdir.state.is_finalized


async def go_on(v2vdir: V2VDir, output: Output) -> None:
    """Reopen, copy the rest (what was not flushed, too), and make the guest."""
    async with reopened(v2vdir, output):
        assert not any(target.is_known_zero for target in v2vdir.state.targets)
        for disk in SOURCE.disks:
            socket = v2vdir.target_socket(disk.index)
            await anyio.to_thread.run_sync(write, socket, 0, 3 << 20, 64 * KIB)
        await write_all(v2vdir, SECOND, 8)
    await finish(v2vdir, output)


async def start_over(v2vdir: V2VDir, output: Output, why: str) -> None:
    """Reopen, which says why it can't go on; copy everything, and make the guest."""
    events: list[Event] = []
    async with reopened(v2vdir, output, is_held=False, events=events):
        await write_all(v2vdir, FIRST)
        await write_all(v2vdir, SECOND, 8)
    assert why in " ".join(event.text or "" for event in events if event.type == "warning")
    await finish(v2vdir, output)


JSON_FOLDERS = (("json-disks-pattern", "%{GuestName}/disk%{DiskNo}"),)


@pytest.mark.parametrize("format_", ["raw", "qcow2"])
@pytest.mark.parametrize("mode", ["local", "qemu", "json", "kubevirt"])
async def test_files_are_held(
    v2vdir: V2VDir, directory: Path, tmp_path: Path, mode: str, format_: str
) -> None:
    """And until the end an earlier guest's are untouched."""
    options = JSON_FOLDERS if mode == "json" else ()
    names = ["web/disk1", "web/disk2"] if mode == "json" else ["web-sda", "web-sdb"]
    (directory / "web-sda").write_text("an earlier guest's")
    await killed(v2vdir, files(directory, mode, format=format_, options=options))
    before = sorted(directory.rglob("*"))
    async with reopened(v2vdir, files(directory, mode, format=format_, options=options)):
        assert sorted(directory.rglob("*")) == before
        assert (directory / "web-sda").read_text() == "an earlier guest's"
    await go_on(v2vdir, files(directory, mode, format=format_, options=options))
    for index, name in enumerate(names, 1):
        assert content(directory / name, format_, tmp_path) == expected(index)
        if format_ == "qcow2":
            subprocess.run(["qemu-img", "check", "-q", str(directory / name)], check=True)
    assert not list(directory.rglob(".*"))


async def test_preallocated_room_is_held(v2vdir: V2VDir, directory: Path) -> None:
    await killed(v2vdir, files(directory, allocation="preallocated"))
    await go_on(v2vdir, files(directory, allocation="preallocated"))
    assert (directory / "web-sda").read_bytes() == expected(1)
    assert (directory / "web-sda").stat().st_blocks * 512 >= SIZE


async def test_compressed_is_made_anew(v2vdir: V2VDir, directory: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"format": "qcow2", "options": (("compressed", None),)}
    await killed(v2vdir, files(directory, **options))
    await start_over(v2vdir, files(directory, **options), "compressed twice")
    assert content(directory / "web-sdb", "qcow2", tmp_path) == expected(2)
    assert sorted(os.listdir(directory)) == ["web-sda", "web-sdb", "web.xml"]
    targets = v2vdir.state.targets
    assert [(t.is_known_zero, t.max_connections) for t in targets] == [(True, 1)] * 2


def gone(path: Path) -> None:
    path.unlink()


def shorter(path: Path) -> None:
    os.truncate(path, SIZE // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def another_file(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.rename(path)


def garbage(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"not an image")


@pytest.mark.parametrize(
    ("format_", "harm", "why"),
    [
        ("raw", gone, "not there any more"),
        ("raw", shorter, "has 2097152 bytes"),
        ("raw", another_file, "not the file that was made"),
        ("qcow2", gone, "not there any more"),
        ("qcow2", empty, "failed"),
        ("qcow2", garbage, "failed"),
    ],
)
async def test_a_damaged_disk_makes_all_of_them_new(
    v2vdir: V2VDir,
    directory: Path,
    tmp_path: Path,
    format_: str,
    harm: Callable[[Path], None],
    why: str,
) -> None:
    (directory / "web-sdb").write_text("an earlier guest's")
    await killed(v2vdir, files(directory, format=format_))
    harm(Path(v2vdir.state.outputs[1].temporary))
    async with reopened(v2vdir, files(directory, format=format_), is_held=False):
        assert (directory / "web-sdb").read_text() == "an earlier guest's"
        assert len(list(directory.glob(".*.partial"))) == 2
    harm(Path(v2vdir.state.outputs[1].temporary))
    await start_over(v2vdir, files(directory, format=format_), why)
    assert content(directory / "web-sda", format_, tmp_path) == expected(1)
    assert sorted(os.listdir(directory)) == ["web-sda", "web-sdb", "web.xml"]


async def test_killed_in_setup(v2vdir: V2VDir, directory: Path) -> None:
    """One disk was made, the other only noted."""
    output = files(directory)
    async with running_servers(v2vdir) as servers:
        await output.setup(v2vdir, SOURCE, "web", servers, reporter())
    first, second = v2vdir.state.outputs
    Path(second.temporary).unlink()
    v2vdir.update(targets=[], outputs=[first, second.model_copy(update={"inode": 0})])
    await start_over(v2vdir, files(directory), "not there any more")
    assert sorted(os.listdir(directory)) == ["web-sda", "web-sdb", "web.xml"]


async def test_a_disk_that_somebody_has_open_is_not_taken_for_damaged(
    v2vdir: V2VDir, directory: Path
) -> None:
    """It is tried again later; nothing is removed."""
    await killed(v2vdir, files(directory, format="qcow2"))
    before = sorted(directory.iterdir())
    argv = ["qemu-nbd", "--persistent", "-f", "qcow2", f"--socket={v2vdir.path / 'other'}"]
    with subprocess.Popen([*argv, v2vdir.state.outputs[0].temporary]) as other:
        try:
            await until((v2vdir.path / "other").exists, "the other one has it open", of=other)
            with pytest.raises(TargetError, match="another process"):
                async with running_servers(v2vdir) as servers:
                    output = files(directory, format="qcow2")
                    await output.reopen(v2vdir, SOURCE, "web", servers, reporter())
        finally:
            other.terminate()
    assert sorted(directory.iterdir()) == before
    await go_on(v2vdir, files(directory, format="qcow2"))


async def test_what_is_made_already_is_left_alone(v2vdir: V2VDir, directory: Path) -> None:
    await killed(v2vdir, files(directory))
    await go_on(v2vdir, files(directory))
    for _ in range(2):
        with pytest.raises(TargetError, match="made already"):
            async with running_servers(v2vdir) as servers:
                await files(directory).reopen(v2vdir, SOURCE, "web", servers, reporter())
        await files(directory).abandon(v2vdir, reporter())
    assert (directory / "web-sdb").read_bytes() == expected(2)
    assert sorted(os.listdir(directory)) == ["web-sda", "web-sdb", "web.xml"]


@pytest.mark.parametrize("format_", ["raw", "qcow2"])
async def test_disks_that_were_there_before(
    v2vdir: V2VDir, directory: Path, tmp_path: Path, format_: str
) -> None:
    places = [directory / "a", directory / "b"]
    for place in places:
        create = ["qemu-img", "create", "-q", "-f", format_, str(place), str(SIZE)]
        subprocess.run(create, check=True)
    options = (("create", "false"), *(("disk", str(place)) for place in places))

    def output() -> Output:
        return files(directory, "kubevirt", format=format_, options=options)

    await killed(v2vdir, output())
    await go_on(v2vdir, output())
    for index, place in enumerate(places, 1):
        assert content(place, format_, tmp_path) == expected(index)
    assert v2vdir.state.objects == []
    assert sorted(os.listdir(directory)) == ["a", "b", "web.yaml"]


async def test_a_block_device_and_a_file(v2vdir: V2VDir, directory: Path, short_tmp: Path) -> None:
    with loop_device(filled(short_tmp / "loop", SIZE)) as device:
        (directory / "web-sda").symlink_to(device)
        await killed(v2vdir, files(directory))
        await go_on(v2vdir, files(directory))
        found = device.read_bytes()
    assert found[FIRST : FIRST + 64 * KIB] == b"\1" * 64 * KIB
    assert found[SECOND : SECOND + 64 * KIB] == b"\x09" * 64 * KIB
    assert (directory / "web-sdb").read_bytes() == expected(2)


async def test_null_holds_nothing(v2vdir: V2VDir) -> None:
    def output() -> Output:
        return parse_output(OutputOptions(mode="null"))

    await killed(v2vdir, output())
    async with reopened(v2vdir, output(), is_held=False):
        assert all(target.is_known_zero for target in v2vdir.state.targets)
    await finish(v2vdir, output())


# libvirt


def libvirt(host: Host) -> Output:
    return host.output(format="qcow2")


async def test_a_pool(host: Host, v2vdir: V2VDir, tmp_path: Path) -> None:
    await killed(v2vdir, libvirt(host))
    await go_on(v2vdir, libvirt(host))
    assert host.domains() == ["web"]
    assert host.volumes() == ["web-sda", "web-sdb"]
    assert content(host.pool / "web-sdb", "qcow2", tmp_path) == expected(2)


class Killed(BaseException):
    """Comes where a kill -9 does; nothing is cleaned up after it."""


async def test_defined_and_killed_before_that_was_noted(
    host: Host, v2vdir: V2VDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest and its disks' names are taken back, and both given again."""
    await killed(v2vdir, libvirt(host))
    async with reopened(v2vdir, libvirt(host)):
        await write_all(v2vdir, SECOND, 8)
    update = V2VDir.update

    def dies(self: V2VDir, **changes: object) -> object:
        if "is_finalized" in changes:
            raise Killed
        return update(self, **changes)

    with monkeypatch.context() as patch:
        patch.setattr(V2VDir, "update", dies)
        with pytest.raises(Killed):
            await libvirt(host).finalize(v2vdir, TARGET, reporter())
    assert host.domains() == ["web"]
    assert (host.pool / "web-sda").exists()
    async with reopened(v2vdir, libvirt(host)):
        assert host.domains() == []
        assert not (host.pool / "web-sda").exists()
    await go_on(v2vdir, libvirt(host))
    assert (host.domains(), host.volumes()) == (["web"], ["web-sda", "web-sdb"])
    assert content(host.pool / "web-sda", "qcow2", tmp_path) == expected(1)
    assert POOL in host.uri or host.pool.exists()


# Files of oVirt


async def test_volumes_of_vdsm(v2vdir: V2VDir, export: Path, tmp_path: Path) -> None:
    await killed(v2vdir, vdsm(export, format="qcow2"))
    await go_on(v2vdir, vdsm(export, format="qcow2"))
    last = Path(v2vdir.state.outputs[1].final)
    assert content(last, "qcow2", tmp_path) == expected(2)
    assert sorted(path.name for path in last.parent.iterdir()) == [last.name, f"{last.name}.meta"]


@pytest.mark.parametrize("is_damaged", [False, True])
async def test_an_export_domain(v2vdir: V2VDir, export: Path, is_damaged: bool) -> None:
    before = tree(export)
    await killed(v2vdir, rhv(export))
    if is_damaged:
        Path(v2vdir.state.outputs[0].temporary).unlink()
        await start_over(v2vdir, rhv(export), "not there any more")
    else:
        await go_on(v2vdir, rhv(export))
    made = [row for row in tree(export) if row not in before]
    assert len([row for row in made if row.startswith("d")]) == 3, "two images and a guest"
    assert len([row for row in made if row.startswith("f")]) == 5, "two with .meta, and an OVF"
    disks = [Path(output.final) for output in v2vdir.state.outputs][:2]
    assert [disk.read_bytes() for disk in disks] == [expected(1), expected(2)]
    assert v2vdir.state.objects == []


async def test_an_export_that_is_not_mounted_any_more(
    fake_nfs: Path, v2vdir: V2VDir, export: Path, short_tmp: Path
) -> None:
    """After a boot."""
    await killed(v2vdir, rhv("server:/export"))
    [line] = mounts(short_tmp)
    point = Path(line.split()[1])
    subprocess.run(["umount", str(point)], check=True)
    point.rmdir()
    await go_on(v2vdir, rhv("server:/export"))
    assert mounts(short_tmp) == []
    assert not point.exists()
    disks = (export / DOMAIN / "images").glob("*/*")
    assert expected(2) in [disk.read_bytes() for disk in disks]


# Clouds


@pytest.mark.parametrize("is_detached", [False, True])
async def test_volumes_that_are_there_still(
    cloud: TestCloud, v2vdir: V2VDir, is_detached: bool
) -> None:
    """Attached, or detached already by a finalize that was killed."""
    await killed(v2vdir, cinder(cloud))
    before = sorted(volume["id"] for volume in cloud.volumes())
    if is_detached:
        output: Any = cinder(cloud)
        async with openstack_cloud.connected(output.login) as there:
            server = await volumes.find_server(there, "appliance")
            await volumes.detach(there, server.id, before[0])
    await go_on(v2vdir, cinder(cloud))
    assert sorted(volume["id"] for volume in cloud.volumes()) == before
    found = []
    for volume in before:
        with cloud.volume_file(volume).open("rb") as file:
            found.append(written(file.read(SIZE)))
    assert sorted(found) == [written(expected(index)) for index in (1, 2)]
    assert v2vdir.state.objects == []


async def test_a_volume_that_is_gone(cloud: TestCloud, v2vdir: V2VDir) -> None:
    await killed(v2vdir, cinder(cloud))
    lost = v2vdir.state.objects[1].name
    output: Any = cinder(cloud)
    async with openstack_cloud.connected(output.login) as there:
        await volumes.remove(there, lost)
    events: list[Event] = []
    async with running_servers(v2vdir) as servers:
        again = cinder(cloud)
        assert not await again.reopen(v2vdir, SOURCE, "web", servers, reporter(events))
    assert f"{lost} of disk 2 is not there" in " ".join(event.text or "" for event in events)
    assert len(cloud.volumes()) == 2
    await finish(v2vdir, cinder(cloud))


async def test_a_cloud_that_does_not_answer_loses_nothing(
    cloud: TestCloud, v2vdir: V2VDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    await killed(v2vdir, cinder(cloud))
    before = v2vdir.state.objects
    with monkeypatch.context() as patch:
        patch.setenv("OS_AUTH_URL", "http://127.0.0.1:1")
        with pytest.raises(TargetError):
            async with running_servers(v2vdir) as servers:
                await cinder(cloud).reopen(v2vdir, SOURCE, "web", servers, reporter())
    assert v2vdir.state.objects == before
    await go_on(v2vdir, cinder(cloud))


async def test_images_of_an_upload_that_was_killed(
    cloud: TestCloud, v2vdir: V2VDir, tmp_path: Path
) -> None:
    await killed(v2vdir, glance(cloud, format="qcow2"))
    image = "8a2a1c90-8a3a-4c68-9d5c-0d40a14ffb11"
    v2vdir.add_object(MadeObject(kind="image", name=image))
    output: Any = glance(cloud)
    async with openstack_cloud.connected(output.login) as there:
        body = {"id": image, "name": "web", "disk_format": "raw", "container_format": "bare"}
        await there.call("image", "POST", "/images", body=body)
    await go_on(v2vdir, glance(cloud, format="qcow2"))
    made = cloud.images()
    assert len(made) == 2
    assert image not in [each["id"] for each in made]
    found = [content(cloud.image_file(each["id"]), "qcow2", tmp_path) for each in made]
    assert sorted(found) == sorted([expected(1), expected(2)])


async def test_an_upload_to_an_engine_begins_anew(
    engine: Engine, v2vdir: V2VDir, tmp_path: Path
) -> None:
    await killed(v2vdir, upload(engine))
    before = set(engine.disks)
    (v2vdir.path / "transfer1.json").write_text("left behind")
    async with reopened(v2vdir, upload(engine), is_held=False):
        assert not before & set(engine.disks)
        await write_all(v2vdir, FIRST)
        await write_all(v2vdir, SECOND, 8)
    await finish(v2vdir, upload(engine))
    [vm] = engine.vms.values()
    assert engine.image(vm.disks[1], tmp_path / "2") == expected(2)
    assert len(engine.disks) == 2
