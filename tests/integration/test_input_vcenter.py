"""-ic vpx:// over HTTPS: a server that behaves like vCenter's, real libvirt, real nbdkit."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import anyio
import pytest

from tests.conftest import require
from tests.integration.servers import MIB, digest, fragmented
from tests.integration.test_input_disk import content, served, write
from tests.vcenter import DATACENTER, DATASTORE, PASSWORD, Guest, VCenter, make_certificate
from v2v_async import libvirt_connection, vsphere
from v2v_async.copy.step import copy
from v2v_async.errors import SourceError, V2VError
from v2v_async.events import Reporter
from v2v_async.input.registry import parse_input
from v2v_async.input.vmware import vcenter as vcenter_module
from v2v_async.input.vmware.server_guest import VmwareInput
from v2v_async.input.vmware.uri import parse_datastore_path
from v2v_async.libvirt_connection import FoundDomain
from v2v_async.options import CopyOptions, InputOptions, OutputOptions
from v2v_async.output.registry import parse_output
from v2v_async.secret import Secret
from v2v_async.server import running_servers
from v2v_async.v2vdir import V2VDir

pytestmark = pytest.mark.anyio
SIZE = 4 * MIB
quiet = Reporter(lambda event: None, "t")
NAME = "My 100% gäst+é"


@pytest.fixture
def vcenter(short_tmp: Path) -> Iterator[VCenter]:
    require("openssl", "nbdkit")
    disks = [fragmented(short_tmp / f"{n}.img", SIZE, seed=n) for n in range(2)]
    with VCenter(short_tmp, Guest(NAME, disks)) as running:
        yield running


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second between two tries, and as many as the slowest machine needs."""
    fast = {
        "retry": ("retries=30", "retry-delay=1", "retry-exponential=no"),
        "retry-request": ("retry-request-retries=2", "retry-request-delay=1"),
    }
    monkeypatch.setattr(VmwareInput, "retry", fast)
    monkeypatch.setattr(vcenter_module, "RENEW_S", 1)


def options(vcenter: VCenter, **changes: object) -> InputOptions:
    given = InputOptions(
        arguments=(vcenter.guest.name,), connection=vcenter.uri, password=Secret(PASSWORD)
    )
    return dataclasses.replace(given, **changes)  # type: ignore[arg-type]


async def test_the_guest_is_described_by_libvirt(vcenter: VCenter) -> None:
    source = parse_input(options(vcenter))
    await source.check(quiet)
    guest = await source.describe()
    assert (guest.name, guest.hypervisor, guest.vcpus) == (NAME, "vmware", 2)
    assert guest.memory == 1024 * MIB
    assert [disk.size for disk in guest.disks] == [SIZE, SIZE]
    assert guest.disks[0].source == f"[{DATASTORE}] {NAME}/{NAME}.vmdk"
    assert guest.disks[0].controller == "scsi"
    assert guest.nics[0].mac == "00:50:56:aa:bb:cc"
    assert guest.nics[0].vnet == "VM Network"


@pytest.mark.parametrize("overlay", ["cow", "qcow2"])
async def test_disks_are_read_and_never_written(
    vcenter: VCenter, short_tmp: Path, overlay: str
) -> None:
    before = [digest(disk) for disk in vcenter.guest.disks]
    given = options(vcenter, options=(("overlay", overlay),))
    async with served(short_tmp, given) as (v2vdir, guest):
        assert [disk.size for disk in guest.disks] == [SIZE, SIZE]
        for index, disk in enumerate(vcenter.guest.disks, 1):
            expected = disk.read_bytes()
            endpoint = str(v2vdir.source_socket(index))
            assert await content(endpoint) == expected
            await write(endpoint)
            changed = await content(endpoint)
            assert changed[65536:65544] == b"changed!"
            assert changed[:65536] == expected[:65536]
    assert [digest(disk) for disk in vcenter.guest.disks] == before
    assert {r.method for r in vcenter.requests} == {"HEAD", "GET"}
    assert {r.by for r in vcenter.reads()} == {"session"}


async def test_one_session_serves_all_disks(vcenter: VCenter, short_tmp: Path) -> None:
    async with served(short_tmp, options(vcenter)) as (v2vdir, _):
        for index in (1, 2):
            await content(str(v2vdir.source_socket(index)))
    assert Counter(r.by for r in vcenter.requests)["password"] == 1


async def test_disks_are_read_without_a_proxy(
    vcenter: VCenter, short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (short_tmp / "v").mkdir()
    v2vdir = V2VDir(short_tmp / "v")
    v2vdir.adopt()
    source = parse_input(options(vcenter))
    await source.check(quiet)
    for name in ("https_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with running_servers(v2vdir) as servers:
        await source.setup(v2vdir, servers, quiet)
        expected = vcenter.guest.disks[0].read_bytes()
        assert await content(str(v2vdir.source_socket(1))) == expected


@pytest.mark.usefixtures("hasty")
async def test_a_session_that_ends_is_renewed(vcenter: VCenter, short_tmp: Path) -> None:
    async with served(short_tmp, options(vcenter)) as (v2vdir, _):
        logins = Counter(r.by for r in vcenter.requests)["password"]
        for cookie in vcenter.sessions:
            vcenter.sessions[cookie] = 2
        expected = vcenter.guest.disks[0].read_bytes()
        assert await content(str(v2vdir.source_socket(1))) == expected
    by = Counter((r.by, r.status) for r in vcenter.requests)
    assert by["refused", 401] >= 1
    assert by["password", 200] == logins + 1


def now_and_then(fault: str) -> Callable[[str, str], str | None]:
    """Every third GET of a disk fails."""
    counts: Counter[str] = Counter()

    def before(method: str, path: str) -> str | None:
        if method != "GET" or not path.endswith("-flat.vmdk"):
            return None
        counts["GET"] += 1
        return fault if counts["GET"] % 3 == 2 else None

    return before


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("fault", ["503", "drop", "half", "401"])
async def test_what_goes_wrong_now_and_then_is_tried_again(
    vcenter: VCenter, short_tmp: Path, fault: str
) -> None:
    async with served(short_tmp, options(vcenter)) as (v2vdir, _):
        vcenter.before = now_and_then(fault)
        expected = vcenter.guest.disks[0].read_bytes()
        assert await content(str(v2vdir.source_socket(1))) == expected


@pytest.mark.usefixtures("hasty")
async def test_a_server_that_starts_again_in_mid_copy(vcenter: VCenter, short_tmp: Path) -> None:
    """It forgets its sessions, and is away for more than a second."""
    restarts: list[threading.Timer] = []

    def before(method: str, path: str) -> str | None:
        if method == "GET" and not restarts:
            restarts.append(threading.Timer(1.5, vcenter.start))
            vcenter.stop()
            restarts[0].start()
            return "drop"
        return None

    async with served(short_tmp, options(vcenter)) as (v2vdir, _):
        vcenter.before = before
        for index, disk in enumerate(vcenter.guest.disks, 1):
            assert await content(str(v2vdir.source_socket(index))) == disk.read_bytes()
    assert restarts
    restarts[0].join()


@pytest.mark.usefixtures("hasty")
async def test_a_disk_that_can_not_be_opened_at_first(vcenter: VCenter, short_tmp: Path) -> None:
    """Each new connection opens it, which is a HEAD; here the sessions are lost as well."""
    async with served(short_tmp, options(vcenter)) as (v2vdir, _):
        answers = iter(["503", "drop"])
        vcenter.before = lambda method, path: next(answers, None) if method == "HEAD" else None
        vcenter.sessions.clear()
        expected = vcenter.guest.disks[0].read_bytes()
        assert await content(str(v2vdir.source_socket(1))) == expected
    assert next(answers, None) is None


async def test_a_server_that_does_not_come_back_fails_its_disk(
    vcenter: VCenter, short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VmwareInput, "retry", {"retry": ("retries=1", "retry-delay=1")})
    given = options(vcenter)
    async with served(short_tmp, given) as (v2vdir, guest):

        def before(method: str, path: str) -> str | None:
            if method == "GET" and vcenter.guest.names()[1] in path:
                vcenter.stop()
                return "drop"
            return None

        vcenter.before = before
        output = parse_output(OutputOptions(mode="null"))
        async with running_servers(v2vdir) as targets:
            await output.setup(v2vdir, guest, guest.name, targets, quiet)
            with pytest.raises(V2VError) as caught, anyio.fail_after(60):
                await copy(v2vdir, guest, CopyOptions(retries=0), quiet)
    assert caught.value.disk in (1, 2)
    log = v2vdir.log("input", caught.value.disk).read_text()
    assert "nbdkit: curl[" in log  # its own words: refused, cut off, or no session
    assert " error: " in log


# What is wrong before anything is served.


async def refused(given: InputOptions) -> SourceError:
    with pytest.raises(SourceError) as caught:
        await parse_input(given).check(quiet)
    assert PASSWORD not in str(vars(caught.value))
    assert caught.value.hint
    return caught.value


async def test_a_wrong_password(vcenter: VCenter) -> None:
    error = await refused(options(vcenter, password=Secret("hunter2")))
    assert "incorrect user name or password" in error.message
    assert "%5c" in (error.hint or "")


async def test_a_guest_that_is_not_there(vcenter: VCenter) -> None:
    error = await refused(options(vcenter, arguments=("other",)))
    assert "has no guest ‘other’" in error.message
    assert NAME in (error.hint or "")


async def test_a_guest_that_runs(vcenter: VCenter) -> None:
    vcenter.guest.power = "poweredOn"
    error = await refused(options(vcenter))
    assert f"‘{NAME}’ is running" in error.message


async def test_a_path_that_leads_nowhere(vcenter: VCenter) -> None:
    wrong = vcenter.uri.replace("esxi.example.com", "other")
    error = await refused(options(vcenter, connection=wrong))
    assert "Could not find" in error.message
    assert "/DATACENTER/HOST" in (error.hint or "")


async def test_a_certificate_that_is_not_trusted(vcenter: VCenter) -> None:
    checked = vcenter.uri.removesuffix("?no_verify=1")
    error = await refused(options(vcenter, connection=checked))
    assert "ertificate" in error.message
    assert "?no_verify=1" in (error.hint or "")


@pytest.mark.parametrize(
    ("status", "said", "hint"),
    [
        ("401", "wrong user or password", "-ip"),
        ("403", "may not read", "Browse datastore"),
        ("404", f"{NAME}-flat.vmdk’ is not there, in the datacenter ‘{DATACENTER}’", "-it vddk"),
        ("503", "answers 503", "maxSessionCount"),
    ],
)
async def test_what_the_server_may_say_of_a_disk(
    vcenter: VCenter, monkeypatch: pytest.MonkeyPatch, status: str, said: str, hint: str
) -> None:
    monkeypatch.setattr(vcenter_module, "_PAUSE_S", 0)
    first = f"{NAME}/{NAME}-flat.vmdk"
    vcenter.before = lambda method, path: status if path == first else None
    error = await refused(options(vcenter))
    assert said in error.message
    assert hint in (error.hint or "")
    assert error.disk == 1


async def test_a_server_that_is_busy_for_a_moment(
    vcenter: VCenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vcenter_module, "_PAUSE_S", 0)
    answers = iter(["503", "503"])
    vcenter.before = lambda method, path: next(answers, None) if method == "HEAD" else None
    await parse_input(options(vcenter)).check(quiet)


async def test_all_disks_that_are_missing_are_told_together(vcenter: VCenter) -> None:
    for name in list(vcenter.files):
        if name.endswith("-flat.vmdk"):
            del vcenter.files[name]
    with pytest.raises(SourceError, match="2 disks can't be used") as caught:
        await parse_input(options(vcenter)).check(quiet)
    for name in vcenter.guest.names():
        assert f"‘[{DATASTORE}] {NAME}/{name}-flat.vmdk’ is not there" in caught.value.message


async def test_a_snapshot_is_not_taken_for_its_base(short_tmp: Path) -> None:
    """Its base is there under the plain name: reading that would be yesterday's disk."""
    require("openssl", "nbdkit")
    disk = fragmented(short_tmp / "1.img", SIZE)
    guest = Guest("g", [disk], disk_names=["g-000001"])
    with VCenter(short_tmp, guest) as vcenter:
        vcenter.files["g/g-flat.vmdk"] = vcenter.files.pop("g/g-000001-flat.vmdk")
        with pytest.raises(SourceError, match="g-000001.vmdk’ is a snapshot") as caught:
            await parse_input(options(vcenter)).check(quiet)
        assert "delete the guest's snapshots" in (caught.value.hint or "")


async def test_a_disk_that_only_looks_like_a_snapshot_is_read(short_tmp: Path) -> None:
    require("openssl", "nbdkit")
    disk = fragmented(short_tmp / "1.img", SIZE)
    with VCenter(short_tmp, Guest("g", [disk], disk_names=["g-000001"])) as vcenter:
        await parse_input(options(vcenter)).check(quiet)


@pytest.mark.parametrize("trusted", [True, False], ids=["ours", "another's"])
async def test_certificates_are_checked_against_the_authorities_of_the_environment(
    vcenter: VCenter, short_tmp: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    """libvirt knows only the system's authorities, so here its answer is made beforehand."""
    async with libvirt_connection.connected(vcenter.uri, Secret(PASSWORD)) as connection:
        found = await connection.domain(NAME)

    class Known:
        async def domain(self, name: str) -> FoundDomain:
            return found

    @contextlib.asynccontextmanager
    async def connected(uri: str, password: Secret) -> AsyncIterator[Known]:
        yield Known()

    monkeypatch.setattr("v2v_async.input.vmware.server_guest.connected", connected)
    other, _ = make_certificate(short_tmp, "other")
    monkeypatch.setenv("SSL_CERT_FILE", str(vcenter.certificate if trusted else other))
    given = options(vcenter, connection=vcenter.uri.removesuffix("?no_verify=1"))
    if not trusted:
        error = await refused(given)
        assert f"the certificate of ‘127.0.0.1:{vcenter.port}’ is not trusted" in error.message
        assert "?no_verify=1" in (error.hint or "")
        assert error.disk is None
        return
    async with served(short_tmp, given) as (v2vdir, _):
        expected = vcenter.guest.disks[1].read_bytes()
        assert await content(str(v2vdir.source_socket(2))) == expected


# The session, by itself.


def login(vcenter: VCenter, **changes: object) -> vsphere.Login:
    given = vsphere.Login("127.0.0.1", vcenter.port, vcenter.user, PASSWORD, verify=False)
    return dataclasses.replace(given, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"port": 1}, "can't be reached: Connection refused"),
        ({"host": "no-such-host.invalid"}, "the host ‘no-such-host.invalid’ is not known"),
        ({"verify": True}, "the certificate of ‘127.0.0.1:.*’ is not trusted"),
    ],
)
async def test_a_server_that_can_not_be_asked(
    vcenter: VCenter, changes: dict[str, object], said: str
) -> None:
    for ask in (lambda to: vsphere.head(to, "https://x/folder/y?z"), vsphere.thumbprint):
        with pytest.raises(SourceError, match=said):
            ask(login(vcenter, **changes))


async def test_a_server_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsphere, "TIMEOUT_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        with pytest.raises(SourceError, match="does not answer within"):
            vsphere.thumbprint(vsphere.Login("127.0.0.1", port, "u", "p", verify=False))


async def test_a_server_without_tls() -> None:
    def answer(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.socket() as plain:
        plain.bind(("127.0.0.1", 0))
        plain.listen()
        thread = threading.Thread(target=answer, args=(plain,))
        thread.start()
        port = plain.getsockname()[1]
        with pytest.raises(SourceError, match="does not speak TLS"):
            vsphere.thumbprint(vsphere.Login("127.0.0.1", port, "u", "p", verify=False))
        thread.join()


async def test_the_thumbprint_is_openssls(vcenter: VCenter) -> None:
    told = subprocess.run(
        ["openssl", "x509", "-in", str(vcenter.certificate), "-noout", "-fingerprint", "-sha1"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert told.strip().partition("=")[2] == vsphere.thumbprint(login(vcenter))


async def test_the_program_that_renews_a_session(vcenter: VCenter, short_tmp: Path) -> None:
    """What nbdkit runs: its files are ours alone, and no password is told where it fails."""
    path = parse_datastore_path(f"[{DATASTORE}] {NAME}/{NAME}.vmdk")
    url = path.url(f"127.0.0.1:{vcenter.port}", DATACENTER)
    program = vsphere.write_login(short_tmp / "vcenter", login(vcenter), None)
    modes = {entry.name: entry.stat().st_mode & 0o777 for entry in program.parent.iterdir()}
    assert modes == {"login": 0o600, "session": 0o600, "lock": 0o600, "cookie": 0o700}
    assert program.parent.stat().st_mode & 0o777 == 0o700

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run([program, url], capture_output=True, text=True)

    first = run()
    assert first.stdout.strip() in vcenter.sessions
    assert run().stdout == first.stdout
    vcenter.sessions.clear()
    second = run()
    assert second.stdout != first.stdout
    assert second.stdout.strip() in vcenter.sessions
    vcenter.password = "changed"
    vcenter.sessions.clear()
    refused = run()
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert "gives no session: 401" in refused.stderr
    vcenter.stop()
    gone = run()
    assert gone.returncode == 1
    assert "can't be reached" in gone.stderr
    assert len(gone.stderr.splitlines()) == 1
    (program.parent / "login").unlink()
    broken = run()
    assert broken.stderr == "the session can't be renewed: FileNotFoundError\n"
