"""-o openstack: a real Keystone, and stand-ins for Cinder and Nova that speak the HTTP API."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.conftest import require
from tests.integration.test_output_local import SIZE, SOURCE, TARGET, expected, reporter, write
from tests.services.cinder import MOST_VOLUMES
from tests.services.front import Fault
from tests.services.nova import APPLIANCE
from tests.services.openstack import TestCloud
from tests.services.openstack_fixture import MARKS
from tests.services.openstack_fixture import cloud as cloud
from tests.services.openstack_fixture import session_cloud as session_cloud
from v2v_async.errors import TargetError, UsageError, V2VError
from v2v_async.events import Event
from v2v_async.options import OutputOptions
from v2v_async.output.contract import Output
from v2v_async.output.openstack import cinder, undo, volumes
from v2v_async.output.registry import parse_output
from v2v_async.secret import Secret
from v2v_async.server import running_servers
from v2v_async.v2vdir import V2VDir

pytestmark = MARKS


@pytest.fixture(autouse=True)
def _installed() -> None:
    require("nbdkit", "qemu-io")


def output_for(cloud: TestCloud, more: tuple[tuple[str, str], ...] = (), **fields: Any) -> Output:
    options = {"server-id": "appliance", "dev-disk-by-id": str(cloud.devices), **dict(more)}
    fields = {"password": Secret(cloud.password), "mode": "openstack", **fields}
    return parse_output(OutputOptions(options=tuple(options.items()), **fields))


@asynccontextmanager
async def copied(v2vdir: V2VDir, output: Output, events: list[Event]) -> AsyncIterator[None]:
    """Set up, write both disks, stop the servers."""
    async with running_servers(v2vdir) as servers:
        await output.setup(v2vdir, SOURCE, "web", servers, reporter(events))
        for disk in SOURCE.disks:
            await anyio.to_thread.run_sync(write, v2vdir.target_socket(disk.index), 0, 0, SIZE)
            await anyio.to_thread.run_sync(
                write, v2vdir.target_socket(disk.index), disk.index, 65536, 65536
            )
    yield


async def make(cloud: TestCloud, v2vdir: V2VDir, **fields: Any) -> list[Event]:
    """Everything from check to finalize, which another instance does, as in a helper."""
    events: list[Event] = []
    output = output_for(cloud, **fields)
    await output.check(reporter(events))
    await output.check_source(SOURCE, "web", reporter(events))
    async with copied(v2vdir, output, events):
        await output_for(cloud, **fields).finalize(V2VDir(v2vdir.path), TARGET, reporter(events))
    return events


def warnings(events: list[Event]) -> list[str]:
    return [event.text or "" for event in events if event.type == "warning"]


def assert_nothing_left(cloud: TestCloud, v2vdir: V2VDir) -> None:
    assert cloud.volumes() == []
    assert list(cloud.devices.iterdir()) == []
    assert v2vdir.state.objects == []


async def test_two_disks(cloud: TestCloud, v2vdir: V2VDir) -> None:
    genid = "4dea22b3-1d52-d8f3-2516-782e98ab3fa0"
    source = SOURCE.model_copy(update={"genid": genid})
    target = TARGET.model_copy(update={"source": source})
    events: list[Event] = []
    options = (("guest-id", "42 & more"), ("availability-zone", "west"))
    output = output_for(cloud, options, storage="fast")
    await output.check(reporter(events))
    await output.check_source(source, "web", reporter(events))
    async with copied(v2vdir, output, events):
        assert [each["status"] for each in cloud.volumes()] == ["in-use", "in-use"]
        again = output_for(cloud, options, storage="fast")
        await again.finalize(V2VDir(v2vdir.path), target, reporter(events))
    made = cloud.volumes()
    assert [each["name"] for each in made] == ["web-sda", "web-sdb"]
    for index, volume in enumerate(made, start=1):
        assert (volume["status"], volume["size"], volume["attachments"]) == ("available", 1, [])
        assert (volume["volume_type"], volume["availability_zone"]) == ("fast", "west")
        assert volume["description"] == f"web disk {index}/2 converted by v2v-async"
        properties = volume["metadata"]
        assert properties.pop("virt_v2v_version").startswith("v2v-async ")
        assert len(properties.pop("virt_v2v_conversion_date")) == len("2026/11/23 12:00:00")
        assert properties == {
            "virt_v2v_guest_name": "web",
            "virt_v2v_disk_index": f"{index}/2",
            "virt_v2v_vm_generation_id": genid,
            "virt_v2v_guest_id": "42 & more",
        }
        with cloud.volume_file(volume["id"]).open("rb") as file:
            assert file.read(SIZE) == expected(index)
    assert [each["bootable"] for each in made] == ["true", "false"]
    assert made[0]["volume_image_metadata"]["hw_disk_bus"] == "virtio"
    assert "volume_image_metadata" not in made[1]
    assert v2vdir.state.objects == []
    assert warnings(events) == []
    assert list(cloud.devices.iterdir()) == []
    assert all(not each.is_known_zero for each in v2vdir.state.targets)
    told = [event.text or "" for event in events if event.type == "message"]
    assert any(f"--volume {made[0]['id']} web" in text for text in told)


async def test_a_block_device(cloud: TestCloud, v2vdir: V2VDir) -> None:
    """As in a real appliance; loop devices stand in for virtio ones."""
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        pytest.skip("loop devices need root")
    cloud.set_nova(use_loop=True)
    await make(cloud, v2vdir)
    for index, volume in enumerate(cloud.volumes(), start=1):
        with cloud.volume_file(volume["id"]).open("rb") as file:
            assert file.read(SIZE) == expected(index)
    loops = subprocess.run(["losetup", "--list"], capture_output=True, text=True, check=True)
    assert str(cloud.folder) not in loops.stdout


async def test_the_disk_that_boots_is_bootable(cloud: TestCloud, v2vdir: V2VDir) -> None:
    target = TARGET.model_copy(update={"boot_disk": 2})
    async with copied(v2vdir, output_for(cloud), []):
        await output_for(cloud).finalize(v2vdir, target, reporter())
    assert [each["bootable"] for each in cloud.volumes()] == ["false", "true"]


# Before the conversion.


async def refused(output: Output, name: str = "web") -> V2VError:
    with pytest.raises(V2VError) as caught:
        await output.check(reporter())
        await output.check_source(SOURCE, name, reporter())
    return caught.value


@pytest.mark.parametrize(
    ("server", "message"),
    [
        ("nobody", "there is no such server"),
        ("app", "there is no such server"),
        ("appl.ance", "there is no such server"),
        ("../../etc", "there is no such server"),
        ("twin", "2 servers have that name"),
        ("asleep", "is SHUTOFF"),
    ],
)
async def test_servers_that_it_can_not_be(cloud: TestCloud, server: str, message: str) -> None:
    error = await refused(output_for(cloud, (("server-id", server),)))
    assert message in error.message
    assert error.hint


async def test_a_server_by_its_uuid(cloud: TestCloud) -> None:
    await output_for(cloud, (("server-id", APPLIANCE),)).check(reporter())


async def test_another_machine_than_the_appliance(
    cloud: TestCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uuid_file = tmp_path / "uuid"
    monkeypatch.setattr(cinder, "_PRODUCT", uuid_file)
    options = OutputOptions(
        mode="openstack",
        password=Secret(cloud.password),
        options=(("server-id", "appliance"),),
    )
    for content, count in ((APPLIANCE.upper(), 0), ("4c4c4544-0042", 1)):
        uuid_file.write_text(content + "\n")
        events: list[Event] = []
        await parse_output(options).check(reporter(events))
        assert len(warnings(events)) == count


async def test_a_volume_type_that_is_not_there(cloud: TestCloud) -> None:
    error = await refused(output_for(cloud, storage="golden"))
    assert error.message == "-os golden: there is no such volume type"
    assert error.hint == "there are: fast, slow"


async def test_the_quota(cloud: TestCloud) -> None:
    limits = {"maxTotalVolumes": MOST_VOLUMES, "totalVolumesUsed": MOST_VOLUMES - 1}
    body = {"limits": {"absolute": limits}}
    cloud.add_fault(Fault("volume", "GET", ".*/limits", status=200, body=body))
    error = await refused(output_for(cloud))
    assert f"is {MOST_VOLUMES} volumes; {MOST_VOLUMES - 1} are used" in error.message


async def test_the_folder_of_devices_is_none(cloud: TestCloud, tmp_path: Path) -> None:
    error = await refused(output_for(cloud, (("dev-disk-by-id", str(tmp_path / "x")),)))
    assert "is not a directory" in error.message


async def test_two_of_a_name(cloud: TestCloud, v2vdir: V2VDir) -> None:
    await make(cloud, v2vdir)
    events: list[Event] = []
    await output_for(cloud).check_source(SOURCE, "web", reporter(events))
    assert len(warnings(events)) == 2
    assert cloud.volumes()[0]["id"] in warnings(events)[0]


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 252, "x" * 300, "\N{PILE OF POO}"])
async def test_names_that_no_volume_can_have(cloud: TestCloud, v2vdir: V2VDir, name: str) -> None:
    assert isinstance(await refused(output_for(cloud), name), UsageError)
    async with running_servers(v2vdir) as servers:
        with pytest.raises(UsageError):
            await output_for(cloud).setup(v2vdir, SOURCE, name, servers, reporter())
    assert_nothing_left(cloud, v2vdir)


@pytest.mark.parametrize("name", ["a'b\"c $(touch /tmp/pwned) ../../ -rf", "x" * 251])
async def test_hostile_names(cloud: TestCloud, v2vdir: V2VDir, name: str) -> None:
    async with running_servers(v2vdir) as servers:
        await output_for(cloud).setup(v2vdir, SOURCE, name, servers, reporter())
    target = TARGET.model_copy(update={"name": name})
    await output_for(cloud).finalize(v2vdir, target, reporter())
    assert [each["name"] for each in cloud.volumes()] == [f"{name}-sda", f"{name}-sdb"]
    assert cloud.volumes()[0]["metadata"]["virt_v2v_guest_name"] == name


# Nothing half-made.

_VOLUMES = "/v3/[0-9a-f]+/volumes"
_ATTACHMENTS = "/v2.1/servers/[^/]+/os-volume_attachments"
SETUP_FAULTS: dict[str, Fault] = {
    **{f"login {n}": Fault("identity", "POST", "/v3/auth/tokens", status=n) for n in (401, 500)},
    "server 500": Fault("compute", "GET", "/v2.1/servers/.*", status=500),
    **{f"make {n}": Fault("volume", "POST", _VOLUMES, status=n) for n in (403, 413)},
    "make 500": Fault("volume", "POST", _VOLUMES, status=500, skip=1, times=1),
    "make, not answered": Fault("volume", "POST", _VOLUMES, drop="after", skip=1, times=1),
    "look 500": Fault("volume", "GET", f"{_VOLUMES}/.*", status=500, skip=1, times=1),
    **{f"attach {n}": Fault("compute", "POST", _ATTACHMENTS, status=n) for n in (400, 403)},
    "attach 500": Fault("compute", "POST", _ATTACHMENTS, status=500, skip=1),
    "attach, not heard": Fault("compute", "POST", _ATTACHMENTS, drop="before", skip=1),
    "attach, not answered": Fault("compute", "POST", _ATTACHMENTS, drop="after", skip=1),
}
FINAL_FAULTS: dict[str, Fault] = {
    **{
        f"detach {n}": Fault("compute", "DELETE", f"{_ATTACHMENTS}/.*", status=n, times=1)
        for n in (403, 500)
    },
    "detach, not answered": Fault(
        "compute", "DELETE", f"{_ATTACHMENTS}/.*", drop="after", skip=1, times=1
    ),
    "look 500": Fault("volume", "GET", f"{_VOLUMES}/.*", status=500, skip=1, times=1),
    "properties 413": Fault("volume", "POST", f"{_VOLUMES}/.*/action", status=413),
    "bootable 500": Fault("volume", "POST", f"{_VOLUMES}/.*/action", status=500, skip=1),
    "metadata 403": Fault("volume", "PUT", f"{_VOLUMES}/.*/metadata", status=403, skip=1),
    "metadata, not answered": Fault("volume", "PUT", f"{_VOLUMES}/.*/metadata", drop="after"),
    "description 500": Fault("volume", "PUT", f"{_VOLUMES}/[^/]*", status=500, skip=1),
}


@pytest.mark.parametrize("way", SETUP_FAULTS)
async def test_a_request_of_setup_fails(cloud: TestCloud, v2vdir: V2VDir, way: str) -> None:
    events: list[Event] = []
    cloud.add_fault(SETUP_FAULTS[way])
    output = output_for(cloud)
    with pytest.raises(TargetError):
        async with running_servers(v2vdir) as servers:
            await output.setup(v2vdir, SOURCE, "web", servers, reporter(events))
    await output_for(cloud).abandon(V2VDir(v2vdir.path), reporter(events))
    if way == "make 500":
        # Cinder may have begun with it before it broke: nobody knows. That is told.
        assert cloud.volumes() == []
        assert len(v2vdir.state.objects) == 1
        [text] = warnings(events)
        assert "openstack volume list --property v2v_async_id=" in text
        return
    assert warnings(events) == []
    assert_nothing_left(cloud, v2vdir)


@pytest.mark.parametrize("way", FINAL_FAULTS)
async def test_a_request_of_finalize_fails(cloud: TestCloud, v2vdir: V2VDir, way: str) -> None:
    events: list[Event] = []
    async with running_servers(v2vdir) as servers:
        await output_for(cloud).setup(v2vdir, SOURCE, "web", servers, reporter())
    cloud.add_fault(FINAL_FAULTS[way])
    with pytest.raises(TargetError):
        await output_for(cloud).finalize(v2vdir, TARGET, reporter(events))
    assert warnings(events) == []
    assert_nothing_left(cloud, v2vdir)


async def test_cinder_can_not_make_a_volume(cloud: TestCloud, v2vdir: V2VDir) -> None:
    with pytest.raises(TargetError, match="is ‘error’ and should be ‘available’") as caught:
        async with running_servers(v2vdir) as servers:
            await output_for(cloud).setup(v2vdir, SOURCE, "break-volume", servers, reporter())
    assert "volume message list" in (caught.value.hint or "")
    await output_for(cloud).abandon(v2vdir, reporter())
    assert_nothing_left(cloud, v2vdir)


async def test_the_device_does_not_appear(
    cloud: TestCloud, v2vdir: V2VDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is another machine, or udev is slow."""
    cloud.set_nova(hides_devices=True)
    with monkeypatch.context() as patch:
        patch.setattr(volumes, "TIMEOUT_S", 1.5)
        with pytest.raises(TargetError, match="does not appear in") as caught:
            async with running_servers(v2vdir) as servers:
                await output_for(cloud).setup(v2vdir, SOURCE, "web", servers, reporter())
    assert "server-id" in (caught.value.hint or "")
    await output_for(cloud).abandon(v2vdir, reporter())
    assert_nothing_left(cloud, v2vdir)


WAYS: dict[str, tuple[Any, str]] = {
    "create": (volumes, "create"),
    "wait": (volumes, "wait_for"),
    "attach": (volumes, "attach"),
    "device": (volumes, "wait_for_device"),
    "detach": (volumes, "detach"),
    "bootable": (cinder, "_make_bootable"),
    "describe": (cinder.OpenstackOutput, "_describe"),
}


@pytest.mark.parametrize(
    ("way", "after"),
    [
        ("create", False),
        ("create", True),
        ("wait", False),
        ("attach", False),
        ("attach", True),
        ("device", True),
        ("detach", False),
        ("detach", True),
        ("bootable", True),
        ("describe", True),
    ],
)
async def test_cancelled_anywhere(
    cloud: TestCloud, v2vdir: V2VDir, monkeypatch: pytest.MonkeyPatch, way: str, after: bool
) -> None:
    scope = anyio.CancelScope()
    holder, name = WAYS[way]
    real = getattr(holder, name)

    async def step(*given: Any) -> Any:
        if not after:
            scope.cancel()
        result = await real(*given)
        scope.cancel()
        return result

    with monkeypatch.context() as patch, scope:
        patch.setattr(holder, name, step)
        async with running_servers(v2vdir) as servers:
            await output_for(cloud).setup(v2vdir, SOURCE, "web", servers, reporter())
        await output_for(cloud).finalize(v2vdir, TARGET, reporter())
    assert scope.cancelled_caught
    await output_for(cloud).abandon(V2VDir(v2vdir.path), reporter())
    assert_nothing_left(cloud, v2vdir)


async def test_what_can_not_be_removed_is_told(
    cloud: TestCloud, v2vdir: V2VDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(undo, "UNDO_TIMEOUT_S", 3.0)
    events: list[Event] = []
    async with running_servers(v2vdir) as servers:
        await output_for(cloud).setup(v2vdir, SOURCE, "web", servers, reporter())
    first, second = cloud.volumes()
    # One that may not be deleted, and one that hangs in between.
    cloud.add_fault(Fault("volume", "DELETE", f"{_VOLUMES}/{first['id']}", status=403))
    body = {"volume": {"id": second["id"], "status": "detaching", "attachments": []}}
    cloud.add_fault(Fault("volume", "GET", f"{_VOLUMES}/{second['id']}", status=200, body=body))
    await output_for(cloud).abandon(v2vdir, reporter(events))
    told = warnings(events)
    assert len(told) == len(v2vdir.state.objects) == 2
    for volume, why in ((first, "403"), (second, "not done within 3 s")):
        [text] = [each for each in told if volume["id"] in each]
        assert why in text
        assert text.endswith(
            f"openstack server remove volume {APPLIANCE} {volume['id']}; "
            f"openstack volume delete {volume['id']}"
        )
    assert len(cloud.volumes()) == 2


async def test_a_cloud_that_is_gone(cloud: TestCloud, v2vdir: V2VDir) -> None:
    events: list[Event] = []
    async with running_servers(v2vdir) as servers:
        await output_for(cloud).setup(v2vdir, SOURCE, "web", servers, reporter())
    gone = (("os-auth-url", "http://127.0.0.1:1/v3"),)
    await output_for(cloud, gone).abandon(v2vdir, reporter(events))
    assert len(warnings(events)) == 2
    assert all("--os-auth-url=http://127.0.0.1:1/v3" not in text for text in warnings(events))
    await output_for(cloud).abandon(v2vdir, reporter(events))
    assert len(warnings(events)) == 2
    assert_nothing_left(cloud, v2vdir)
