"""-it vddk: real libvirt and nbdkit, and a stand-in for the plugin (tests/nbdkit-vddk-plugin)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from tests import vddk
from tests.conftest import require
from tests.integration.servers import MIB, digest, fragmented
from tests.integration.test_input_disk import content, served, write
from tests.vcenter import DATASTORE, PASSWORD, USER, Guest, VCenter
from tests.vddk import Vddk
from tests.waiting import until
from v2v_async import nbdkit, vsphere
from v2v_async.connection import connected
from v2v_async.copy.step import copy
from v2v_async.errors import DependencyError, SourceError, V2VError
from v2v_async.events import Event, Reporter
from v2v_async.input.registry import parse_input
from v2v_async.input.vmware import vddk as vddk_module
from v2v_async.input.vmware.server_guest import VmwareInput
from v2v_async.options import CopyOptions, InputOptions, OutputOptions
from v2v_async.output.registry import parse_output
from v2v_async.secret import Secret
from v2v_async.server import running_servers

pytestmark = pytest.mark.anyio
SIZE = 4 * MIB
NAME = "My guest"
quiet = Reporter(lambda event: None, "t")


@pytest.fixture
def vcenter(short_tmp: Path) -> Iterator[VCenter]:
    require("openssl", "nbdkit")
    disks = [fragmented(short_tmp / f"{n}.img", SIZE, seed=n) for n in range(2)]
    with VCenter(short_tmp, Guest(NAME, disks)) as running:
        yield running


@pytest.fixture
def installed(vcenter: VCenter, short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Vddk:
    """The plugin and the library, and what the server accepts."""
    made = vddk.install(short_tmp / "vddk")
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    made.expect(**accepted(vcenter))
    return made


def accepted(vcenter: VCenter) -> dict[str, object]:
    names = zip(vcenter.guest.names(), vcenter.guest.disks, strict=True)
    return {
        "server": "127.0.0.1",
        "port": str(vcenter.port),
        "user": USER,
        "password": PASSWORD,
        "vm": f"moref={vcenter.guest.moref}",
        "thumbprint": thumbprint(vcenter),
        "files": {f"[{DATASTORE}] {NAME}/{name}.vmdk": str(disk) for name, disk in names},
    }


def thumbprint(vcenter: VCenter) -> str:
    return vsphere.thumbprint(vsphere.Login("127.0.0.1", vcenter.port, "", "", verify=False))


def options(vcenter: VCenter, installed: Vddk, *io: tuple[str, str]) -> InputOptions:
    return InputOptions(
        arguments=(NAME,),
        connection=vcenter.uri,
        password=Secret(PASSWORD),
        transport="vddk",
        options=(("vddk-libdir", str(installed.libdir)), *io),
    )


@pytest.mark.parametrize("overlay", ["cow", "qcow2"])
async def test_disks_are_read_and_never_written(
    vcenter: VCenter, installed: Vddk, short_tmp: Path, overlay: str
) -> None:
    before = [digest(disk) for disk in vcenter.guest.disks]
    given = options(vcenter, installed, ("overlay", overlay))
    async with served(short_tmp, given) as (v2vdir, guest):
        assert [disk.size for disk in guest.disks] == [SIZE, SIZE]
        assert guest.disks[1].source == f"[{DATASTORE}] {NAME}/{NAME}_1.vmdk"
        for index, disk in enumerate(vcenter.guest.disks, 1):
            endpoint = str(v2vdir.source_socket(index))
            assert await content(endpoint) == disk.read_bytes()
            await write(endpoint)
            assert (await content(endpoint))[65536:65544] == b"changed!"
    assert [digest(disk) for disk in vcenter.guest.disks] == before
    reads = [tuple(map(int, call.split())) for call in installed.calls("read")]
    assert max(length for _, length in reads) <= vddk_module.MAX_REQUEST


async def test_large_requests_are_split_for_the_server(
    vcenter: VCenter, installed: Vddk, short_tmp: Path
) -> None:
    async with served(short_tmp, options(vcenter, installed)) as (v2vdir, _):
        async with connected(str(v2vdir.source_socket(1))) as connection:
            read = connection.handle.read_now
            assert await anyio.to_thread.run_sync(read, SIZE, 0) == (
                vcenter.guest.disks[0].read_bytes()
            )
    lengths = {int(call.split()[1]) for call in installed.calls("read")}
    assert vddk_module.MAX_REQUEST in lengths
    assert SIZE not in lengths


async def copied(vcenter: VCenter, given: InputOptions, folder: Path) -> list[V2VError]:
    """Copy to nowhere; return what went wrong."""
    async with served(folder, given) as (v2vdir, guest):
        output = parse_output(OutputOptions(mode="null"))
        async with running_servers(v2vdir) as targets:
            await output.setup(v2vdir, guest, guest.name, targets, quiet)
            try:
                with anyio.fail_after(120):
                    await copy(v2vdir, guest, CopyOptions(retries=0), quiet)
            except V2VError as error:
                return [error]
    return []


async def test_holes_are_not_read(vcenter: VCenter, installed: Vddk, short_tmp: Path) -> None:
    assert await copied(vcenter, options(vcenter, installed), short_tmp) == []
    assert installed.calls("extents")
    read = sum(int(call.split()[1]) for call in installed.calls("read"))
    assert 0 < read < 2 * SIZE


async def test_no_extents_where_that_is_wanted(
    vcenter: VCenter, installed: Vddk, short_tmp: Path
) -> None:
    given = options(vcenter, installed, ("vddk-noextents", "true"))
    assert await copied(vcenter, given, short_tmp) == []
    assert not installed.calls("extents")
    assert sum(int(call.split()[1]) for call in installed.calls("read")) >= 2 * SIZE


async def test_several_connections(vcenter: VCenter, installed: Vddk, short_tmp: Path) -> None:
    async with served(short_tmp, options(vcenter, installed)) as (v2vdir, _):
        async with connected(str(v2vdir.source_socket(1))) as connection:
            assert connection.info.can_multi_conn


async def test_the_thumbprint_is_asked_and_told(vcenter: VCenter, installed: Vddk) -> None:
    said: list[Event] = []
    await parse_input(options(vcenter, installed)).check(Reporter(said.append, "t"))
    told = [event.text or "" for event in said]
    assert any(thumbprint(vcenter) in text and "no_verify" in text for text in told)


async def test_a_thumbprint_that_is_given_is_used(vcenter: VCenter, installed: Vddk) -> None:
    wanted = ":".join(["AB"] * 20)
    installed.expect(**accepted(vcenter) | {"thumbprint": wanted})
    given = options(vcenter, installed, ("vddk-thumbprint", wanted.lower()))
    await parse_input(given).check(quiet)


async def test_every_option_arrives(vcenter: VCenter, installed: Vddk) -> None:
    config = installed.folder / "vddk.conf"
    config.touch()
    given = options(
        vcenter,
        installed,
        ("vddk-config", str(config)),
        ("vddk-compression", "fastlz"),
        ("vddk-cookie", "c00kie"),
        ("vddk-nfchostport", "903"),
        ("vddk-port", str(vcenter.port)),
        ("vddk-snapshot", "snapshot-3"),
        ("vddk-transports", "nbdssl:nbd"),
    )
    installed.expect(**accepted(vcenter) | {"snapshot": "snapshot-3", "cookie": "c00kie"})
    await parse_input(given).check(quiet)
    told = json.loads(installed.calls("config")[0])
    assert told == {
        "compression": "fastlz",
        "config": str(config),
        "cookie": "c00kie",
        "file": f"[{DATASTORE}] {NAME}/{NAME}.vmdk",
        "libdir": str(installed.libdir),
        "nfchostport": "903",
        "port": str(vcenter.port),
        "server": "127.0.0.1",
        "snapshot": "snapshot-3",
        "thumbprint": thumbprint(vcenter),
        "transports": "nbdssl:nbd",
        "user": USER,
        "vm": "moref=vm-16",
    }
    assert installed.calls("password")  # from a file of mode 0600: the script checks it


async def test_files_of_ones_own(vcenter: VCenter, installed: Vddk, short_tmp: Path) -> None:
    """The other way round: the guest's second disk comes first."""
    files = [f"[{DATASTORE}] {NAME}/{NAME}_1.vmdk", f"[{DATASTORE}] {NAME}/{NAME}.vmdk"]
    given = options(vcenter, installed, *(("vddk-file", file) for file in files))
    async with served(short_tmp, given) as (v2vdir, guest):
        assert [disk.source for disk in guest.disks] == files
        expected = vcenter.guest.disks[1].read_bytes()
        assert await content(str(v2vdir.source_socket(1))) == expected


async def test_a_connection_that_is_lost_comes_back(
    vcenter: VCenter, installed: Vddk, short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("retries=60", "retry-delay=1", "retry-exponential=no")
    monkeypatch.setattr(VmwareInput, "retry", {"retry": words})
    async with served(short_tmp, options(vcenter, installed)) as (v2vdir, _):
        opened = len(installed.calls("open"))
        installed.fault.touch()
        async with anyio.create_task_group() as group:

            async def mend() -> None:
                # The retry filter opens the disk again after each failure.
                await until(lambda: len(installed.calls("open")) >= opened + 3, "it is tried again")
                installed.fault.unlink()

            group.start_soon(mend)
            expected = vcenter.guest.disks[0].read_bytes()
            assert await content(str(v2vdir.source_socket(1))) == expected


async def test_a_connection_that_is_lost_for_good_fails_its_disk(
    vcenter: VCenter, installed: Vddk, short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VmwareInput, "retry", {"retry": ("retries=1", "retry-delay=1")})
    installed.fault.touch()
    (error,) = await copied(vcenter, options(vcenter, installed), short_tmp)
    assert error.disk in (1, 2)
    log = short_tmp / "v" / "log" / f"input-{error.disk}.log"
    assert "VixDiskLib_Read: The host connection was lost" in log.read_text()


# What is wrong is told before anything is served.


async def refused(given: InputOptions) -> V2VError:
    with pytest.raises(V2VError) as caught:
        await parse_input(given).check(quiet)
    assert PASSWORD not in str(vars(caught.value))
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"password": "other"}, "incorrect user name or password"),
        ({"vm": "moref=vm-17"}, "the virtual machine does not exist"),
        ({"thumbprint": "00"}, "VixDiskLib_ConnectEx: thumbprint"),
    ],
)
async def test_a_server_that_refuses(
    vcenter: VCenter, installed: Vddk, changes: dict[str, object], said: str
) -> None:
    installed.expect(**accepted(vcenter) | changes)
    given = options(vcenter, installed)
    with pytest.raises(SourceError) as caught:
        await parse_input(given).check(quiet)
    assert said in caught.value.message
    assert f"disk 1: the disk ‘[{DATASTORE}] {NAME}/{NAME}.vmdk’" in caught.value.message
    assert PASSWORD not in str(vars(caught.value))


async def test_all_disks_that_are_missing_are_told_together(
    vcenter: VCenter, installed: Vddk
) -> None:
    installed.expect(**accepted(vcenter) | {"files": {}})
    with pytest.raises(SourceError, match="2 disks can't be used") as caught:
        await parse_input(options(vcenter, installed)).check(quiet)
    assert caught.value.message.count("The file was not found") == 2


async def test_the_wrong_number_of_files(vcenter: VCenter, installed: Vddk) -> None:
    error = await refused(options(vcenter, installed, ("vddk-file", "[d] x.vmdk")))
    assert "1 times for 2 disks" in error.message


async def test_no_plugin(vcenter: VCenter, installed: Vddk) -> None:
    if (await nbdkit.probe("/usr/bin/nbdkit")).has_plugin("vddk"):
        pytest.skip("nbdkit has the real plugin")
    (installed.folder / "plugins" / "nbdkit-vddk-plugin").unlink()
    error = await refused(options(vcenter, installed))
    assert isinstance(error, DependencyError)
    assert "plugin ‘vddk’" in error.message
    assert "vddk-libdir" in (error.hint or "")
    assert not vcenter.soap  # told before anybody logs in


async def test_no_library(vcenter: VCenter, installed: Vddk, short_tmp: Path) -> None:
    given = options(vcenter, installed)
    bare = dataclasses.replace(given, options=())
    error = await refused(bare)
    assert "VMware's library is not in ‘/usr/lib64/vmware-vix-disklib’" in error.message
    installed.expect(**accepted(vcenter) | {"default_libdir": str(installed.libdir)})
    await parse_input(bare).check(quiet)

    def libdir(path: Path) -> InputOptions:
        return dataclasses.replace(given, options=(("vddk-libdir", str(path)),))

    error = await refused(libdir(short_tmp / "none"))
    assert "is not a directory" in error.message
    error = await refused(libdir(short_tmp))
    assert "libvixDiskLib.so" in error.message
    error = await refused(libdir(installed.libdir / "lib64"))
    assert f"did you mean -io vddk-libdir={installed.libdir}?" in (error.hint or "")
