"""-o rhv-upload with the real imageio daemon and an engine that speaks the real one's API."""

from __future__ import annotations

import random
import re
import subprocess
from pathlib import Path

import pytest
from lxml import etree

from tests.conftest import processes_naming
from tests.integration.test_output_local import SIZE, SOURCE, TARGET, reporter, write
from tests.ovirt_upload import engine as engine
from tests.ovirt_upload import imageio as imageio
from tests.ovirt_upload import output_for
from tests.services.engine import PASSWORD, Engine, Fault, Transfer
from tests.services.imageio import Imageio
from tests.unit.test_output_ovirt_upload import HOSTILE
from v2v_async import ovirt_engine
from v2v_async.errors import TargetError, UsageError
from v2v_async.events import Event
from v2v_async.model import SourceDisk
from v2v_async.output.contract import Output
from v2v_async.server import running_servers
from v2v_async.v2vdir import V2VDir

pytestmark = pytest.mark.anyio
UUIDS = ["12345678-1234-1234-1234-123456789abc", "12345678-1234-1234-1234-123456789abd"]
_OVF = "{http://schemas.dmtf.org/ovf/envelope/1/}"


async def upload(
    output: Output, v2vdir: V2VDir, noise: bytes = b"", events: list[Event] | None = None
) -> None:
    """All steps, with data in the first disk; the second stays as it is made."""
    mine = reporter(events)
    await output.check(mine)
    await output.check_source(SOURCE, "web", mine)
    async with running_servers(v2vdir) as servers:
        await output.setup(v2vdir, SOURCE, "web", servers, mine)
        socket = v2vdir.target_socket(1)
        write(socket, 0xA5, 4096, 1 << 20)
        if noise:
            path = v2vdir.path / "noise"
            path.write_bytes(noise)
            argv = ["nbdcopy", "--flush", "--", str(path), f"nbd+unix:///?socket={socket}"]
            subprocess.run(argv, check=True)
    await output.finalize(v2vdir, TARGET, mine)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_uploaded_and_read_back(
    engine: Engine, v2vdir: V2VDir, image_format: str, tmp_path: Path
) -> None:
    noise = random.Random(3).randbytes(2 << 20) + bytes(2 << 20)
    events: list[Event] = []
    await upload(output_for(engine, format=image_format), v2vdir, noise, events)
    [vm] = engine.vms.values()
    assert vm.name == "web"
    assert vm.status == "down"
    first, second = (engine.disks[each] for each in vm.disks)
    assert engine.image(first.id, tmp_path / "1") == noise
    assert engine.image(second.id, tmp_path / "2") == bytes(SIZE)
    assert [first.name, second.name] == ["web-000", "web-001"]
    for disk in (first, second):
        assert disk.format == {"raw": "raw", "qcow2": "cow"}[image_format]
        assert disk.sparse
        assert disk.status == "ok"
        assert "uploaded by v2v-async" in disk.description
    assert first.path.stat().st_blocks * 512 < 3 << 20, "sparse"
    assert second.path.stat().st_blocks * 512 < 1 << 20
    for transfer in engine.transfers.values():
        assert transfer.settings == {
            "direction": "upload",
            "format": "raw",
            "inactivity_timeout": "600",
            "timeout_policy": "cancel",
        }
    assert engine.shape()["running"] == []
    assert v2vdir.state.objects == []
    assert engine.tokens == set(), "logged out"
    assert any(vm.id in (event.text or "") for event in events)


async def test_the_guest_is_made_of_an_ovf_that_names_the_disks(
    engine: Engine, v2vdir: V2VDir
) -> None:
    await upload(output_for(engine), v2vdir)
    [vm] = engine.vms.values()
    root = etree.fromstring(vm.ovf)
    disks = root.findall("DiskSection/Disk")
    assert [disk.get(f"{_OVF}diskId") for disk in disks] == vm.disks
    assert [disk.get(f"{_OVF}volume-format") for disk in disks] == ["RAW", "RAW"]
    assert [disk.get(f"{_OVF}volume-type") for disk in disks] == ["Sparse", "Sparse"]
    assert [disk.get(f"{_OVF}boot") for disk in disks] == ["True", "False"]
    assert engine.domain in vm.ovf


async def test_preallocated_has_all_its_room(engine: Engine, v2vdir: V2VDir) -> None:
    await upload(output_for(engine, allocation="preallocated"), v2vdir)
    for disk in engine.disks.values():
        assert not disk.sparse
        assert disk.path.stat().st_blocks * 512 >= SIZE


async def test_all_disks_are_begun_before_one_is_ready(engine: Engine, v2vdir: V2VDir) -> None:
    """And all connections are to the host that has the ticket, several for a disk."""
    await upload(output_for(engine), v2vdir)
    what = [f"{method} {path.rpartition('/')[2]}" for method, path in engine.requests]
    assert what.count("POST disks") == 2
    last_disk = max(n for n, each in enumerate(what) if each == "POST disks")
    assert last_disk < what.index("POST imagetransfers")


async def test_uuids_that_are_given(engine: Engine, v2vdir: V2VDir) -> None:
    options = [("rhv-disk-uuid", each.upper()) for each in UUIDS]
    await upload(output_for(engine, *options), v2vdir)
    [vm] = engine.vms.values()
    assert vm.disks == UUIDS


async def test_a_uuid_that_is_taken(engine: Engine, v2vdir: V2VDir) -> None:
    """Found before the conversion; and when it is taken in between, that disk is left alone."""
    earlier = V2VDir.create(v2vdir.path)
    await upload(output_for(engine), earlier)
    earlier.remove()
    [vm] = engine.vms.values()
    before = engine.shape()
    output = output_for(engine, ("rhv-disk-uuid", UUIDS[0]), ("rhv-disk-uuid", vm.disks[1]))
    with pytest.raises(TargetError, match=f"has a disk {vm.disks[1]} already"):
        await output.check(reporter())
    with pytest.raises(TargetError, match="already"):
        async with running_servers(v2vdir) as servers:
            await output.setup(v2vdir, SOURCE, "other", servers, reporter())
    await output.abandon(v2vdir, reporter())
    assert engine.shape() == before
    assert v2vdir.state.objects == []


async def test_a_disk_that_was_made_and_then_is_not_told_of(engine: Engine, v2vdir: V2VDir) -> None:
    """A question that is refused does not mean that there is no disk: it is taken back."""

    def refuse() -> None:
        if engine.disks:
            raise Fault(500, "Internal Server Error")

    engine.faults["GET disks/*"] = refuse
    output = output_for(engine)
    with pytest.raises(TargetError, match="Internal Server Error"):
        async with running_servers(v2vdir) as servers:
            await output.setup(v2vdir, SOURCE, "web", servers, reporter())
    assert engine.disks
    assert v2vdir.state.objects
    del engine.faults["GET disks/*"]
    await output.abandon(v2vdir, reporter())
    assert engine.disks == {}
    assert v2vdir.state.objects == []


async def test_this_machine_is_one_of_the_hosts(
    engine: Engine,
    imageio: Imageio,
    v2vdir: V2VDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    identity = tmp_path / "vdsm.id"
    identity.write_text("4C4C4544-0051-4610_00:11:22\n".replace(":", "-"))
    engine.hw_id = identity.read_text().strip()
    monkeypatch.setattr("v2v_async.output.ovirt.session.HOST_ID", identity)
    began = len(imageio.log.read_bytes())
    await upload(output_for(engine), v2vdir)
    assert {each.settings["host"] for each in engine.transfers.values()} == {engine.host}
    writes = re.findall(rb"\[(\S+)\] WRITE", imageio.log.read_bytes()[began:])
    assert set(writes) == {b"local"}


async def test_a_host_that_the_engine_does_not_know(
    engine: Engine, v2vdir: V2VDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = tmp_path / "vdsm.id"
    monkeypatch.setattr("v2v_async.output.ovirt.session.HOST_ID", identity)
    for content in ("unknown-1", "x or status=Up", ""):
        identity.write_text(content)
        engine.requests.clear()
        await output_for(engine).check(reporter())
        asked = [path for _, path in engine.requests if "/hosts" in path]
        assert len(asked) == (content == "unknown-1")
    engine.requests.clear()
    await output_for(engine, ("rhv-proxy", None)).check(reporter())
    assert not any("/hosts" in path for _, path in engine.requests)


async def test_through_the_engines_proxy(engine: Engine, v2vdir: V2VDir, tmp_path: Path) -> None:
    await upload(output_for(engine, ("ovirt-proxy", None)), v2vdir)
    [vm] = engine.vms.values()
    assert engine.image(vm.disks[0], tmp_path / "1").count(0xA5) == 1 << 20


async def test_an_old_engine(engine: Engine, v2vdir: V2VDir) -> None:
    """4.2 knows neither formats nor policies of a transfer, and forgets it when it has ended."""
    engine.version = (4, 2)
    engine.has_forgotten_transfers = True
    began: list[dict[str, str]] = []
    serve = engine.serve

    def note(transfer: Transfer) -> None:
        began.append(transfer.settings)
        serve(transfer)

    engine.serve = note
    await upload(output_for(engine), v2vdir)
    assert began == [{"direction": "upload", "inactivity_timeout": "600"}] * 2
    assert len(engine.vms) == 1
    assert engine.transfers == {}


async def test_certificates_are_checked_when_that_is_asked_for(
    engine: Engine, imageio: Imageio, v2vdir: V2VDir, tmp_path: Path
) -> None:
    both = tmp_path / "ca.pem"
    both.write_bytes(engine.certificate.read_bytes() + imageio.certificate.read_bytes())
    events: list[Event] = []
    output = output_for(engine, ("rhv-verifypeer", None), ("rhv-cafile", str(both)))
    await upload(output, v2vdir, events=events)
    assert len(engine.vms) == 1
    assert not any("certificate" in (event.text or "") for event in events)
    with pytest.raises(TargetError, match="certificate of the engine .* is not trusted"):
        await output_for(engine, ("rhv-verifypeer", None)).check(reporter())
    events.clear()
    await output_for(engine).check(reporter(events))
    assert any("is not checked" in (event.text or "") for event in events)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"storage": "lonely"}, "‘lonely’ is not attached to a data center"),
        ({"storage": "nowhere"}, "has no storage domain ‘nowhere’"),
        ({"storage_status": "maintenance"}, "not active but in the state ‘maintenance’"),
        ({"storage_type": "iscsi"}, "raw disks can't be sparse"),
        ({"cluster": "other"}, "has no cluster ‘other’"),
        ({"architecture": "undefined"}, "no processor architecture"),
        ({"password": "wrong"}, "does not let ‘admin@internal’ in: Cannot authenticate"),
        ({"connection": "https://127.0.0.1:1/ovirt-engine/api"}, "can't be reached"),
        ({"connection": "https://no.such.invalid/ovirt-engine/api"}, "is not known"),
        ({"path": "/elsewhere/api"}, "there is no oVirt engine at"),
        ({"path": "/ovirt-engine/v9/api"}, "there is no oVirt engine at"),
    ],
)
async def test_what_is_wrong_is_found_before_the_conversion(
    engine: Engine, change: dict[str, str], message: str
) -> None:
    from v2v_async.secret import Secret

    fields: dict[str, object] = {}
    options: list[tuple[str, str | None]] = []
    for name, value in change.items():
        if name == "cluster":
            options.append(("rhv-cluster", value))
        elif name == "password":
            fields[name] = Secret(value)
        elif name == "path":
            fields["connection"] = engine.url.replace("/ovirt-engine/api", value)
        elif hasattr(engine, name):
            setattr(engine, name, value)
        else:
            fields[name] = value
    with pytest.raises((TargetError, UsageError), match=message) as caught:
        await output_for(engine, *options, **fields).check(reporter())
    assert caught.value.hint
    assert engine.tokens == set()
    assert all(method == "GET" for method, _ in engine.requests)


async def test_what_is_wrong_with_a_guest(engine: Engine, v2vdir: V2VDir) -> None:
    output = output_for(engine)
    for name in HOSTILE:
        with pytest.raises(UsageError, match="can't be the name"):
            await output.check_source(SOURCE, name, reporter())
    odd = SOURCE.model_copy(
        update={"disks": [SourceDisk(index=1, source="x", format="raw", size=1000)]}
    )
    with pytest.raises(TargetError, match="sectors of 512"):
        await output.check_source(odd, "web", reporter())
    many = [SourceDisk(index=n, source="x", format="raw", size=512) for n in range(1, 25)]
    with pytest.raises(UsageError, match="24 disks"):
        await output.check_source(SOURCE.model_copy(update={"disks": many}), "web", reporter())
    with pytest.raises(UsageError, match="given 1 times"):
        await output_for(engine, ("rhv-disk-uuid", UUIDS[0])).check_source(
            SOURCE, "web", reporter()
        )
    await upload(output, v2vdir)
    with pytest.raises(TargetError, match="has a guest ‘web’ already"):
        await output.check_source(SOURCE, "web", reporter())


async def test_the_room_there_is(engine: Engine) -> None:
    engine.available = SIZE
    with pytest.raises(TargetError, match=r"has 4.0 MiB left, and the disks need 8.0 MiB"):
        await output_for(engine, allocation="preallocated").check_source(SOURCE, "web", reporter())
    full = [disk.model_copy(update={"allocated": SIZE}) for disk in SOURCE.disks]
    events: list[Event] = []
    source = SOURCE.model_copy(update={"disks": full})
    await output_for(engine).check_source(source, "web", reporter(events))
    assert any("the disks may need 8.0 MiB" in (event.text or "") for event in events)


async def test_block_storage_is_not_taken_for_zero(engine: Engine, v2vdir: V2VDir) -> None:
    engine.storage_type = "iscsi"
    for fields, known in ({"allocation": "preallocated"}, False), ({"format": "qcow2"}, True):
        output = output_for(engine, **fields)
        async with running_servers(v2vdir) as servers:
            await output.setup(v2vdir, SOURCE, "web", servers, reporter())
        assert [target.is_known_zero for target in v2vdir.state.targets] == [known] * 2
        await output.abandon(v2vdir, reporter())
    assert engine.shape()["disks"] == []


async def test_another_architecture(engine: Engine, v2vdir: V2VDir) -> None:
    engine.architecture = "ppc64"
    v2vdir.write_target(TARGET)
    with pytest.raises(TargetError, match="runs ppc64, and the guest is for x86_64"):
        async with running_servers(v2vdir) as servers:
            await output_for(engine).setup(v2vdir, SOURCE, "web", servers, reporter())
    assert not any(method == "POST" for method, _ in engine.requests)


async def test_a_session_that_ended_while_the_guest_was_converted(
    engine: Engine, v2vdir: V2VDir
) -> None:
    """Every request but the log-in is refused once with an old token; POSTs too, harmlessly."""
    begin = engine.advance

    def end_sessions() -> None:
        begin()
        if len(engine.every_token) < 6:
            engine.tokens.clear()

    engine.advance = end_sessions
    await upload(output_for(engine), v2vdir)
    assert len(engine.every_token) >= 6
    assert len(engine.vms) == 1
    assert len(engine.disks) == 2


async def test_a_call_after_the_end_does_not_log_in_again(engine: Engine) -> None:
    """A call that nobody waits for any more may come late: nobody would end its session."""
    session = ovirt_engine.Engine(output_for(engine).options.login)
    session.get("hosts")
    assert len(engine.tokens) == 1
    session.close()
    with pytest.raises(TargetError, match="the session with the engine .* has ended"):
        session.get("hosts")
    assert engine.tokens == set()
    assert len(engine.every_token) == 1


async def test_no_secret_is_anywhere(engine: Engine, v2vdir: V2VDir) -> None:
    """While disks are served: not in an argv, an environment, a log, an event, a file."""
    events: list[Event] = []
    output = output_for(engine)
    await output.check(reporter(events))
    async with running_servers(v2vdir) as servers:
        await output.setup(v2vdir, SOURCE, "web", servers, reporter(events))
        write(v2vdir.target_socket(1), 1, 0, 4096)
        secrets = [PASSWORD, *engine.every_token, *engine.every_ticket]
        assert len(secrets) >= 4
        for secret in secrets:
            found = [each for each in processes_naming(secret) if "qemu-nbd" not in each]
            assert found == []
        nbdkits = [each.process.pid for each in servers._running]
        for pid in nbdkits:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            assert not any(each.encode() in environment for each in secrets)
        texts = [path.read_bytes() for path in v2vdir.path.rglob("*") if path.is_file()]
        texts += [str(events).encode()]
        assert len(texts) > 3
        for secret in secrets:
            assert not any(secret.encode() in each for each in texts)
    await output.abandon(v2vdir, reporter(events))
    assert engine.shape()["disks"] == []
