"""-o glance and -o openstack, all steps with a replayed conversion, stopped in each of them."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from tests.conftest import program, require
from tests.fault.test_guest_faults import STEPS, Place, kill_server, when
from tests.fault.test_guest_faults import place as place
from tests.services.front import Fault
from tests.services.openstack import TestCloud
from tests.services.openstack_fixture import MARKS
from tests.services.openstack_fixture import cloud as cloud
from tests.services.openstack_fixture import session_cloud as session_cloud
from v2v_async.errors import ServerError, TargetError
from v2v_async.events import Event, Reporter
from v2v_async.guest import convert_guest
from v2v_async.options import GuestOptions, InputOptions
from v2v_async.secret import Secret

pytestmark = MARKS
MODES = ["glance", "openstack"]


def run_options(place: Place, cloud: TestCloud, mode: str) -> GuestOptions:
    """The guest of ``place`` to ``mode``; what is not in the environment is a Secret."""
    given: dict[str, object] = {"mode": mode, "storage": None, "password": Secret(cloud.password)}
    if mode == "glance":
        return place.options(**given, format="qcow2")
    options = (("server-id", "appliance"), ("dev-disk-by-id", str(cloud.devices)))
    return place.options(**given, options=options)


def made(cloud: TestCloud, mode: str) -> list[str]:
    found = cloud.images() if mode == "glance" else cloud.volumes()
    return [each["name"] for each in found]


WHOLE = {"glance": ["web", "web-disk2"], "openstack": ["web-sda", "web-sdb"]}


@pytest.mark.parametrize("mode", MODES)
async def test_a_whole_run_from_libvirtxml(place: Place, cloud: TestCloud, mode: str) -> None:
    """The second kind of source; and its hardware is told to the cloud."""
    xml = place.tmp.parent / "web.xml"
    disks = "".join(
        f"<disk type='file' device='disk'><driver name='qemu' type='{format_}'/>"
        f"<source file='{path}'/><target dev='hd{letter}' bus='ide'/></disk>"
        for path, format_, letter in zip(place.disks, ("raw", "qcow2"), "ab", strict=True)
    )
    xml.write_text(
        "<domain type='kvm'><name>web</name><memory unit='MiB'>1536</memory><vcpu>6</vcpu>"
        "<cpu><topology sockets='1' cores='3' threads='2'/></cpu>"
        f"<os><type arch='x86_64'>hvm</type></os><devices>{disks}</devices></domain>"
    )
    options = replace(
        run_options(place, cloud, mode), input=InputOptions("libvirtxml", (str(xml),))
    )
    events: list[Event] = []
    await convert_guest(options, Reporter(events.append, "t"), tmpdir=place.tmp)
    assert made(cloud, mode) == WHOLE[mode]
    assert list(place.tmp.iterdir()) == []
    if mode == "glance":
        image = cloud.images()[0]
        assert (image["min_ram"], image["hw_cpu_threads"]) == (1536, "2")
        assert image["virtual_size"] == 24 << 20
        uploaded = {e.disk for e in events if e.step == "finalize" and e.type == "finished"}
        assert uploaded == {1, 2, None}
    else:
        volume = cloud.volumes()[0]
        assert volume["volume_image_metadata"]["hw_cpu_threads"] == "2"
        with cloud.volume_file(volume["id"]).open("rb") as file:
            file.seek(1 << 20)
            assert file.read(9) == b"converted"
    place.assert_source_unchanged()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("step", STEPS)
async def test_cancelled_in_each_step(place: Place, cloud: TestCloud, mode: str, step: str) -> None:
    with anyio.CancelScope() as scope:
        reporter, _ = when(step, scope.cancel)
        await convert_guest(run_options(place, cloud, mode), reporter, tmpdir=place.tmp)
    assert scope.cancel_called
    assert made(cloud, mode) == (WHOLE[mode] if step == "cleanup" else [])
    assert list(cloud.devices.iterdir()) == []
    place.assert_nothing_left()


@pytest.mark.parametrize("mode", MODES)
async def test_a_server_killed_in_the_copy(place: Place, cloud: TestCloud, mode: str) -> None:
    reporter, _ = when("copy", lambda: kill_server(place, "out2"))
    with pytest.raises(ServerError, match="out2"):
        await convert_guest(run_options(place, cloud, mode), reporter, tmpdir=place.tmp)
    assert made(cloud, mode) == []
    assert list(cloud.devices.iterdir()) == []
    place.assert_nothing_left()


@pytest.mark.parametrize("mode", MODES)
async def test_the_password_is_nowhere(place: Place, cloud: TestCloud, mode: str) -> None:
    """Not in an argv, an environment, an event, a log or state.json, also when it fails."""
    seen: list[str] = []
    password = cloud.password.encode()
    if mode == "glance":
        cloud.add_fault(Fault("image", "PUT", ".*", status=403))
    else:
        cloud.add_fault(Fault("volume", "PUT", ".*", status=403))

    def emit(event: Event) -> None:
        if password.decode() in event.to_json():
            seen.append(event.to_json())
        if event.type == "progress":
            return
        for pattern in ("[0-9]*/cmdline", "[0-9]*/environ"):
            look_in(Path("/proc"), pattern)
        look_in(place.tmp, "**/*")

    def look_in(folder: Path, pattern: str) -> None:
        for path in folder.glob(pattern):
            if path.is_symlink() or path.is_socket() or path.is_dir():
                continue
            with suppress(OSError):
                if password in path.read_bytes():
                    seen.append(str(path))

    with pytest.raises(TargetError) as caught:
        await convert_guest(run_options(place, cloud, mode), Reporter(emit, "t"), tmpdir=place.tmp)
    assert password.decode() not in f"{vars(caught.value)}"
    assert seen == []
    assert made(cloud, mode) == []


@pytest.mark.parametrize("mode", MODES)
async def test_the_helpers(place: Place, cloud: TestCloud, mode: str) -> None:
    """Setup and final in processes of their own, then clean for a run that stops in between."""
    require("nbdkit")
    password = place.tmp.parent / "password"
    password.write_text(cloud.password + "\n")
    v2vdir = place.tmp / "v2v"
    v2vdir.mkdir()
    options = ["-op", str(password), "-on", "web"]
    if mode == "openstack":
        options += ["-oo", "server-id=appliance", "-oo", f"dev-disk-by-id={cloud.devices}"]

    async def helper(name: str, *words: str) -> None:
        done = await anyio.run_process(
            [*program(f"helper-v2v-{name}"), "--v2vdir", str(v2vdir), *words],
            env={name: value for name, value in os.environ.items() if name != "V2V_ASYNC_CACHE"},
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
        assert cloud.password.encode() not in done.stdout + done.stderr

    await helper("input-disk", *map(str, place.disks))
    await helper("convert")
    await helper(f"output-{mode}", "setup", *options)
    await helper("copy")
    await helper(f"output-{mode}", "final", *options)
    assert made(cloud, mode) == WHOLE[mode]
    done = await anyio.run_process([*program("v2v-async"), "clean", str(v2vdir)], check=False)
    assert made(cloud, mode) == WHOLE[mode], done.stderr.decode()
