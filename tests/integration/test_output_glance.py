"""-o glance with a real Keystone and a real Glance: images as they should be, or none at all."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import pytest

from tests.conftest import require
from tests.delaying import delaying
from tests.integration.test_output_local import SOURCE, TARGET, content, expected, reporter, write
from tests.services.front import Fault
from tests.services.openstack import TestCloud
from tests.services.openstack_fixture import MARKS
from tests.services.openstack_fixture import cloud as cloud
from tests.services.openstack_fixture import session_cloud as session_cloud
from tests.vcenter import make_certificate
from v2v_async.errors import TargetError, UsageError, V2VError
from v2v_async.events import Event, Reporter
from v2v_async.openstack_cloud import Cloud, CloudError
from v2v_async.options import OutputOptions
from v2v_async.output.contract import Output
from v2v_async.output.openstack import glance
from v2v_async.output.registry import parse_output
from v2v_async.secret import Secret
from v2v_async.server import running_servers
from v2v_async.v2vdir import OutputFile, V2VDir

pytestmark = MARKS


@pytest.fixture(autouse=True)
def _installed() -> None:
    require("nbdkit", "qemu-nbd", "qemu-img", "qemu-io")


def output_for(cloud: TestCloud, **fields: Any) -> Output:
    fields = {"password": Secret(cloud.password), "mode": "glance", **fields}
    return parse_output(OutputOptions(**fields))


@asynccontextmanager
async def copied(v2vdir: V2VDir, output: Output, name: str = "web") -> AsyncIterator[None]:
    """Set up, write both disks, stop the servers."""
    async with running_servers(v2vdir) as servers:
        await output.setup(v2vdir, SOURCE, name, servers, reporter())
        for disk in SOURCE.disks:
            await anyio.to_thread.run_sync(
                write, v2vdir.target_socket(disk.index), disk.index, 65536, 65536
            )
    yield


async def make(cloud: TestCloud, v2vdir: V2VDir, name: str = "web", **fields: Any) -> list[Event]:
    """Everything from check to finalize, which another instance does, as in a helper."""
    events: list[Event] = []
    output = output_for(cloud, **fields)
    await output.check(reporter(events))
    await output.check_source(SOURCE, name, reporter(events))
    async with copied(v2vdir, output, name):
        target = TARGET.model_copy(update={"name": name})
        await output_for(cloud, **fields).finalize(V2VDir(v2vdir.path), target, reporter(events))
    return events


def prepared(v2vdir: V2VDir) -> None:
    """Have what setup and copy leave, without servers."""
    for disk in SOURCE.disks:
        scratch = v2vdir.path / f".disk{disk.index}.partial"
        scratch.write_bytes(bytes([disk.index]) * (2 << 20))
        final = v2vdir.path / f"disk{disk.index}"
        v2vdir.add_output(OutputFile(temporary=str(scratch), final=str(final)))


def warnings(events: list[Event]) -> list[str]:
    return [event.text or "" for event in events if event.type == "warning"]


@pytest.mark.parametrize(
    ("format_", "options"),
    [("raw", ()), ("qcow2", ()), ("qcow2", (("compressed", None),))],
    ids=["raw", "qcow2", "compressed"],
)
async def test_two_disks(
    cloud: TestCloud, v2vdir: V2VDir, tmp_path: Path, format_: str, options: Any
) -> None:
    events = await make(cloud, v2vdir, format=format_, options=options)
    images = cloud.images()
    assert [image["name"] for image in images] == ["web", "web-disk2"]
    for index, image in enumerate(images, start=1):
        assert image["status"] == "active"
        assert (image["disk_format"], image["container_format"]) == (format_, "bare")
        assert (image["min_ram"], image["min_disk"]) == (1024, 1)
        assert image["hw_disk_bus"] == "virtio"
        stored = cloud.image_file(image["id"])
        assert content(stored, format_, tmp_path) == expected(index)
        ends = [each for each in events if each.type == "finished" and each.disk == index]
        assert [each.bytes.copied for each in ends if each.bytes] == [stored.stat().st_size]
    assert v2vdir.state.objects == []
    assert warnings(events) == []
    assert [path.name for path in v2vdir.path.iterdir() if "disk" in path.name] == []


async def refused(output: Output, name: str = "web") -> V2VError:
    with pytest.raises(V2VError) as caught:
        await output.check(reporter())
        await output.check_source(SOURCE, name, reporter())
    return caught.value


# Before the conversion.


async def test_a_wrong_password(cloud: TestCloud) -> None:
    error = await refused(output_for(cloud, password=Secret("wr0ng-one")))
    assert error.message.startswith("Keystone does not accept the login: ")
    assert "openstack token issue" in (error.hint or "")
    assert "wr0ng-one" not in f"{vars(error)} {error.__cause__}"


async def test_nobody_says_who_logs_in(cloud: TestCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cloud.environment:
        monkeypatch.delenv(name)
    error = await refused(output_for(cloud, password=None))
    assert isinstance(error, UsageError)
    assert error.message.startswith("there is no way to log in to OpenStack: ")
    assert "OS_AUTH_URL" in (error.hint or "")
    # All of it may be in options.
    options = [(name.lower().replace("_", "-"), v) for name, v in cloud.environment.items()]
    await output_for(cloud, options=tuple(options)).check(reporter())
    options.remove(("os-auth-url", cloud.environment["OS_AUTH_URL"]))
    connection = cloud.environment["OS_AUTH_URL"]
    await output_for(cloud, options=tuple(options), connection=connection).check(reporter())


async def test_an_entry_of_clouds_yaml(
    cloud: TestCloud, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in cloud.environment:
        monkeypatch.delenv(name)
    names = {name.removeprefix("OS_").lower(): v for name, v in cloud.environment.items()}
    region = names.pop("region_name")
    auth = {name: v for name, v in names.items() if name != "identity_api_version"}
    entry = {"auth": {**auth, "password": cloud.password}, "region_name": region}
    file = tmp_path / "clouds.yaml"
    file.write_text(json.dumps({"clouds": {"here": entry}}))
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(file))
    await output_for(cloud, password=None, options=(("os-cloud", "here"),)).check(reporter())
    error = await refused(output_for(cloud, password=None, options=(("os-cloud", "there"),)))
    assert "Cloud there was not found" in error.message


async def test_another_region(cloud: TestCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OS_REGION_NAME", "mars")
    error = await refused(output_for(cloud))
    assert error.message.startswith("the cloud has no Glance in the region ‘mars’: ")
    assert "catalog list" in (error.hint or "")


async def test_nobody_listens(cloud: TestCloud) -> None:
    error = await refused(output_for(cloud, options=(("os-auth-url", "http://127.0.0.1:1/v3"),)))
    assert "does not answer" in error.message or "can't be asked" in error.message


@pytest.mark.parametrize("status", [401, 403, 500, 503])
async def test_glance_refuses_or_fails(cloud: TestCloud, status: int) -> None:
    cloud.add_fault(Fault("image", "GET", "/v2/schemas/image", status=status))
    error = await refused(output_for(cloud))
    assert isinstance(error, CloudError)
    assert f"(GET: {status} " in error.message
    assert error.hint


async def test_a_format_that_glance_does_not_take(cloud: TestCloud) -> None:
    body = {"properties": {"disk_format": {"enum": [None, "qcow2"]}}}
    cloud.add_fault(Fault("image", "GET", "/v2/schemas/image", status=200, body=body))
    error = await refused(output_for(cloud))
    assert error.message == "this cloud's Glance takes no raw images"
    assert "qcow2" in (error.hint or "")


@pytest.mark.parametrize(
    ("usage", "message"),
    [
        ({"image_count_total": {"limit": 2, "usage": 1}}, "quota of the project is 2 images; 1"),
        ({"image_size_total": {"limit": 9, "usage": 2}}, "is 9 MiB of images; 2 are used"),
        ({"image_size_total": {"limit": 10, "usage": 2}}, None),
        ({"image_size_total": {"limit": -1, "usage": 2}}, None),
    ],
)
async def test_the_quota(cloud: TestCloud, usage: dict[str, Any], message: str | None) -> None:
    cloud.add_fault(Fault("image", "GET", "/v2/info/usage", status=200, body={"usage": usage}))
    if message is None:
        await output_for(cloud).check_source(SOURCE, "web", reporter())
        return
    assert message in (await refused(output_for(cloud))).message


async def test_two_of_a_name(cloud: TestCloud, v2vdir: V2VDir) -> None:
    """As virt-v2v, which makes another one; but it is told."""
    prepared(v2vdir)
    await output_for(cloud).finalize(v2vdir, TARGET, reporter())
    events: list[Event] = []
    await output_for(cloud).check_source(SOURCE, "web", reporter(events))
    told = warnings(events)
    assert len(told) == 2
    for image in cloud.images():
        assert any(image["id"] in text for text in told)


@pytest.mark.parametrize(
    "name",
    ["a'b\"c", "$(touch /tmp/pwned)", "../../etc/passwd", "-rf *", "ü ß 漢字", "x" * 249],
)
async def test_hostile_names(cloud: TestCloud, v2vdir: V2VDir, name: str) -> None:
    await output_for(cloud).check_source(SOURCE, name, reporter())
    prepared(v2vdir)
    target = TARGET.model_copy(update={"name": name})
    await output_for(cloud).finalize(v2vdir, target, reporter())
    assert {image["name"] for image in cloud.images()} == {name, f"{name}-disk2"}


@pytest.mark.parametrize("name", ["", " ", "a\nb", "a\0b", "x" * 250, "x" * 300, "\N{PILE OF POO}"])
async def test_names_that_no_image_can_have(cloud: TestCloud, v2vdir: V2VDir, name: str) -> None:
    error = await refused(output_for(cloud), name)
    assert isinstance(error, UsageError)
    assert "-on NAME" in (error.hint or "")
    async with running_servers(v2vdir) as servers:
        with pytest.raises(UsageError):
            await output_for(cloud).setup(v2vdir, SOURCE, name, servers, reporter())
    assert cloud.images() == []


async def test_no_room_for_the_scratch_disks(
    cloud: TestCloud, v2vdir: V2VDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("v2v_async.output.files.free_space", lambda directory: 1 << 20)
    error = await refused(output_for(cloud, allocation="preallocated"))
    assert "need 8.0 MiB" in error.message
    assert "TMPDIR" in (error.hint or "")
    async with running_servers(v2vdir) as servers:
        with pytest.raises(TargetError) as caught:
            await output_for(cloud, allocation="preallocated").setup(
                v2vdir, SOURCE, "web", servers, reporter()
            )
    assert "TMPDIR" in (caught.value.hint or "")


# Nothing half-made.

_FILE = "/v2/images/.+/file"
FAULTS: dict[str, Fault] = {
    **{f"login {n}": Fault("identity", "POST", "/v3/auth/tokens", status=n) for n in (401, 500)},
    **{f"make {n}": Fault("image", "POST", "/v2/images", status=n) for n in (401, 403, 409, 413)},
    "make 500": Fault("image", "POST", "/v2/images", status=500, skip=1),
    "make, not heard": Fault("image", "POST", "/v2/images", drop="before", skip=1),
    "make, not answered": Fault("image", "POST", "/v2/images", drop="after"),
    **{f"upload {n}": Fault("image", "PUT", _FILE, status=n) for n in (401, 403, 409, 410, 413)},
    "upload 500": Fault("image", "PUT", _FILE, status=500, skip=1),
    "upload, cut": Fault("image", "PUT", _FILE, drop="middle", skip=1),
    "upload, not answered": Fault("image", "PUT", _FILE, drop="after"),
    "look 500": Fault("image", "GET", "/v2/images/[^/]+", status=500, skip=1),
    "not active": Fault(
        "image", "GET", "/v2/images/[^/]+", status=200, body={"status": "queued"}, skip=1
    ),
    "another content": Fault(
        "image", "GET", "/v2/images/[^/]+", status=200, body={"status": "active", "size": 1}
    ),
}


@pytest.mark.parametrize("way", FAULTS)
async def test_a_request_fails(cloud: TestCloud, v2vdir: V2VDir, way: str) -> None:
    """No image is left, the scratch disks stay, and another try succeeds."""
    events: list[Event] = []
    prepared(v2vdir)
    cloud.add_fault(FAULTS[way])
    with pytest.raises(TargetError) as caught:
        await output_for(cloud).finalize(v2vdir, TARGET, reporter(events))
    assert caught.value.message
    assert cloud.images() == []
    assert v2vdir.state.objects == []
    assert warnings(events) == []
    cloud.reset()
    await output_for(cloud).finalize(v2vdir, TARGET, reporter(events))
    assert [image["status"] for image in cloud.images()] == ["active", "active"]


CALLS = {
    "the first image made": ("POST", "/images"),
    "an image looked at": ("GET", "/images/"),
    "uploading": ("PUT", ""),
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", CALLS)
async def test_cancelled(
    cloud: TestCloud, v2vdir: V2VDir, monkeypatch: pytest.MonkeyPatch, call: str, after: bool
) -> None:
    method, start = CALLS[call]
    scope = anyio.CancelScope()
    way = "upload" if method == "PUT" else "call"
    real = getattr(Cloud, way)

    async def stopped(self: Cloud, *given: Any, **named: Any) -> Any:
        is_it = way == "upload" or (given[1] == method and given[2].startswith(start))
        if is_it and not after:
            scope.cancel()
        result = await real(self, *given, **named)
        if is_it:
            scope.cancel()
        return result

    prepared(v2vdir)
    monkeypatch.setattr(Cloud, way, stopped)
    with scope:
        await output_for(cloud).finalize(v2vdir, TARGET, reporter())
    assert scope.cancelled_caught
    monkeypatch.undo()
    assert cloud.images() == []
    assert v2vdir.state.objects == []


async def test_cancelled_in_the_middle_of_an_upload(
    cloud: TestCloud, v2vdir: V2VDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends at once, though Glance never answers."""
    cloud.add_fault(Fault("image", "PUT", _FILE, hang=True))
    monkeypatch.setattr("v2v_async.openstack_cloud._PROGRESS_S", 0.01)
    scope = anyio.CancelScope()
    progress: list[Event] = []
    ended: list[threading.Event] = []
    upload = Cloud._upload

    def noted(self: Cloud, *given: Any) -> None:
        mine = threading.Event()
        ended.append(mine)
        try:
            upload(self, *given)
        finally:
            mine.set()

    monkeypatch.setattr(Cloud, "_upload", noted)

    def emit(event: Event) -> None:
        if event.type == "progress":
            progress.append(event)
            scope.cancel()

    prepared(v2vdir)
    with scope, anyio.fail_after(20):
        await output_for(cloud).finalize(v2vdir, TARGET, Reporter(emit, "run"))
    assert progress
    assert cloud.images() == []
    assert v2vdir.state.objects == []
    # The threads end by themselves when the connection does.
    cloud.reset()
    for each in ended:
        assert await anyio.to_thread.run_sync(each.wait, 20)


async def test_an_image_that_can_not_be_deleted_is_told(cloud: TestCloud, v2vdir: V2VDir) -> None:
    events: list[Event] = []
    prepared(v2vdir)
    cloud.add_fault(Fault("image", "PUT", _FILE, status=500, skip=1))
    cloud.add_fault(Fault("image", "DELETE", ".*", status=403))
    with pytest.raises(TargetError):
        await output_for(cloud).finalize(v2vdir, TARGET, reporter(events))
    left = {image["id"] for image in cloud.images()}
    assert left == {made.name for made in v2vdir.state.objects}
    told = warnings(events)
    assert len(told) == 2
    for identifier in left:
        assert any(text.endswith(f"openstack image delete {identifier}") for text in told)
    cloud.reset()


async def test_the_command_of_another_login(cloud: TestCloud, v2vdir: V2VDir) -> None:
    options = (("os-username", "a b"), ("os-password", "s3cret"), ("verify-server-certificate",
               "false"))  # fmt: skip
    output = output_for(cloud, password=None, options=options)
    assert isinstance(output, glance.GlanceOutput)
    command = output.login.command("image", "delete", "1")
    assert command == "openstack '--os-username=a b' --insecure image delete 1"
    assert "s3cret" not in repr(vars(output))


async def test_certificates_of_the_cloud(
    cloud: TestCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keystone behind TLS, with a certificate that nobody knows."""
    certificate, key = make_certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    plain = urlsplit(cloud.environment["OS_AUTH_URL"])
    assert plain.port is not None
    async with delaying(plain.port, 0.0, tls=tls) as port:
        monkeypatch.setenv("OS_AUTH_URL", f"https://127.0.0.1:{port}{plain.path}")
        with pytest.raises(TargetError, match="the certificate of Keystone is not trusted") as told:
            await output_for(cloud).check(reporter())
        assert "os-cacert" in (told.value.hint or "")
        for option in (("os-cacert", str(certificate)), ("verify-server-certificate", "false")):
            await output_for(cloud, options=(option,)).check(reporter())
