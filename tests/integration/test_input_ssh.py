"""-i vmx -it ssh and -ic xen+ssh:// against a real sshd: served whole, never written, no secret."""

from __future__ import annotations

import os
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.servers import MIB, digest, fragmented
from tests.integration.test_input_disk import content, quiet, served, write
from tests.sshd import Sshd, running_sshd
from tests.unit.test_vmdk_descriptor import ESXI
from tests.xen_host import RUNNING, disk_xml, xen_host
from v2v_async.errors import SourceError, V2VError
from v2v_async.input.registry import parse_input
from v2v_async.options import InputOptions
from v2v_async.secret import Secret
from v2v_async.ssh import LoginError

pytestmark = pytest.mark.anyio
SIZE = 4 * MIB
PASSWORD = "hunter2-Pa$$wort ü"


@pytest.fixture
def sshd(short_tmp: Path) -> Iterator[Sshd]:
    with running_sshd(short_tmp) as server:
        yield server


def esxi_disk(folder: Path, name: str = "web", *, seed: int = 1) -> bytes:
    """Write a disk as ESXi has it; return its bytes."""
    flat = fragmented(folder / f"{name}-flat.vmdk", SIZE, seed=seed)
    text = ESXI.replace("guest-flat", f"{name}-flat").replace("8192", str(SIZE // 512))
    (folder / f"{name}.vmdk").write_text(text)
    return flat.read_bytes()


def vmx(folder: Path, *names: str) -> Path:
    lines = [f'scsi0:{n}.fileName = "{name}"\n' for n, name in enumerate(names)]
    path = folder / "my web #1.vmx"
    path.write_text('displayName = "web"\nmemSize = "512"\n' + "".join(lines))
    return path


def vmx_options(
    server: Sshd, path: Path, *, password: str | None = None, more: tuple[tuple[str, str], ...] = ()
) -> InputOptions:
    return InputOptions(
        "vmx",
        (server.uri(path),),
        transport="ssh",
        options=(*server.io_options, *more),
        password=Secret(password) if password else None,
    )


def xen_options(server: Sshd, name: str = "web", **more: object) -> InputOptions:
    options = InputOptions(
        "libvirt",
        (name,),
        connection=f"xen+ssh://{server.user}@{server.host}:{server.port}",
        options=server.io_options,
        **more,  # type: ignore[arg-type]
    )
    assert options.kind == "xen-ssh"
    return options


async def problem(options: InputOptions) -> V2VError:
    with pytest.raises(V2VError) as caught:
        await parse_input(options).check(quiet)
    return caught.value


async def test_disks_of_esxi(short_tmp: Path, sshd: Sshd) -> None:
    """Two flat disks, one by an absolute name as on another datastore."""
    (short_tmp / "other store").mkdir()
    contents = [esxi_disk(short_tmp), esxi_disk(short_tmp / "other store", "logs", seed=2)]
    path = vmx(short_tmp, "web.vmdk", f"{short_tmp}/other store/logs.vmdk")
    before = {file: digest(file) for file in short_tmp.rglob("*.vm*")}
    async with served(short_tmp, vmx_options(sshd, path)) as (v2vdir, guest):
        assert guest.name == "web"
        assert [(disk.format, disk.size, disk.controller) for disk in guest.disks] == [
            ("raw", SIZE, "scsi"),
            ("raw", SIZE, "scsi"),
        ]
        assert guest.disks[1].source.endswith("/other%20store/logs-flat.vmdk")
        for index, expected in enumerate(contents, 1):
            endpoint = str(v2vdir.source_socket(index))
            assert await content(endpoint) == expected
            await write(endpoint)
            assert (await content(endpoint))[65536:65544] == b"changed!"
    assert {file: digest(file) for file in before} == before


@pytest.mark.parametrize("overlay", [None, "qcow2"])
async def test_a_sparse_image(short_tmp: Path, sshd: Sshd, overlay: str | None) -> None:
    """qemu reads it through an nbdkit of its own."""
    raw = fragmented(short_tmp / "raw.img", SIZE)
    disk = short_tmp / "a.vmdk"
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "vmdk", str(raw), str(disk)], check=True
    )
    before = digest(disk)
    more = (("overlay", overlay),) if overlay else ()
    options = vmx_options(sshd, vmx(short_tmp, "a.vmdk"), more=more)
    async with served(short_tmp, options) as (v2vdir, guest):
        assert (guest.disks[0].format, guest.disks[0].size) == ("vmdk", SIZE)
        endpoint = str(v2vdir.source_socket(1))
        assert await content(endpoint) == raw.read_bytes()
        await write(endpoint)
    assert digest(disk) == before


def readable_by_others(secret: str) -> list[str]:
    """Return what of any process shows ``secret``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                if secret.encode() in (process / name).read_bytes():
                    found.append(f"{process}/{name}")
            except OSError:
                continue
    return found


def files_with(folder: Path, secret: str) -> list[Path]:
    return [
        path
        for path in folder.rglob("*")
        if stat.S_ISREG(path.lstat().st_mode) and secret.encode() in path.read_bytes()
    ]


@pytest.mark.parametrize("source", ["vmx", "xen-ssh"])
async def test_a_password_is_nowhere_to_be_read(
    short_tmp: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = short_tmp / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    expected = esxi_disk(short_tmp)
    environment = {}
    if source == "xen-ssh":
        disk = disk_xml(short_tmp / "web-flat.vmdk", "xvda")
        environment = xen_host(short_tmp, "web", disk)
    with running_sshd(short_tmp, password=PASSWORD, environment=environment) as server:
        if source == "vmx":
            options = vmx_options(server, vmx(short_tmp, "web.vmdk"), password=PASSWORD)
        else:
            options = xen_options(server, password=Secret(PASSWORD))
        async with served(short_tmp, options) as (v2vdir, _):
            assert await content(str(v2vdir.source_socket(1))) == expected
            assert readable_by_others(PASSWORD) == []
            assert files_with(short_tmp, PASSWORD) == []
        assert "hunter" not in server.log()
        if source == "vmx":
            options = vmx_options(server, vmx(short_tmp, "web.vmdk"), password="wrong")
        else:
            options = xen_options(server, password=Secret("wrong"))
        refused = await problem(options)
        assert isinstance(refused, LoginError)
        assert "refused the login" in refused.message
        assert "wrong" not in refused.message
        assert server.log().count("Failed password") == 1, "hosts lock users out"
    assert list(temporary.iterdir()) == []


async def test_a_host_that_is_not_known(short_tmp: Path, sshd: Sshd) -> None:
    path = vmx(short_tmp, "web.vmdk")
    sshd.known_hosts.write_text("")
    error = await problem(vmx_options(sshd, path))
    assert "its host key is not known" in error.message
    assert f"ssh -p {sshd.port} {sshd.user}@127.0.0.1" in str(error.hint)
    error = await problem(xen_options(sshd))
    assert "its host key is not known" in error.message


async def test_a_host_with_another_key(short_tmp: Path, sshd: Sshd) -> None:
    path = vmx(short_tmp, "web.vmdk")
    other = sshd.identity.with_suffix(".pub").read_text()
    sshd.known_hosts.write_text(f"[{sshd.host}]:{sshd.port} {other}")
    for options in (vmx_options(sshd, path), xen_options(sshd)):
        error = await problem(options)
        assert "its host key is not the one that is known" in error.message
        assert f"ssh-keygen -R '[127.0.0.1]:{sshd.port}'" in str(error.hint)


async def test_a_key_that_is_refused(short_tmp: Path, sshd: Sshd) -> None:
    (sshd.folder / "authorized_keys").write_text("")
    for options in (vmx_options(sshd, vmx(short_tmp, "web.vmdk")), xen_options(sshd)):
        error = await problem(options)
        assert "it refused the login" in error.message
        assert "ssh-agent" in str(error.hint)


async def test_nobody_listens(short_tmp: Path, sshd: Sshd) -> None:
    sshd.kill()
    for options in (vmx_options(sshd, vmx(short_tmp, "web.vmdk")), xen_options(sshd)):
        assert "it refused the connection" in (await problem(options)).message


async def test_a_configuration_that_is_not_there(short_tmp: Path, sshd: Sshd) -> None:
    sshd.known_hosts.unlink()
    for options in (vmx_options(sshd, vmx(short_tmp, "web.vmdk")), xen_options(sshd)):
        error = await problem(options)
        assert "-io ssh-known-hosts" in error.message
        assert error.exit_status == 2


async def test_a_vmx_file_that_is_not_there(short_tmp: Path, sshd: Sshd) -> None:
    error = await problem(vmx_options(sshd, short_tmp / "no.vmx"))
    assert "/no.vmx’ can't be opened: there is no such file" in error.message
    assert "can't be read" in (await problem(vmx_options(sshd, short_tmp))).message


async def test_no_permission(short_tmp: Path, sshd: Sshd) -> None:
    config = sshd.folder / "sshd_config"
    lines = [line for line in config.read_text().splitlines() if not line.startswith("Subsystem")]
    config.write_text("\n".join([*lines, "Subsystem sftp internal-sftp -P open"]) + "\n")
    sshd.kill()
    sshd.start()
    error = await problem(vmx_options(sshd, vmx(short_tmp, "web.vmdk")))
    assert "permission denied" in error.message


async def test_all_problems_are_told_together(short_tmp: Path, sshd: Sshd) -> None:
    esxi_disk(short_tmp)
    esxi_disk(short_tmp, "old")
    (short_tmp / "old-flat.vmdk").write_bytes(b"x")
    snapshot = ESXI.replace("#DDB", '#\nparentFileNameHint="web.vmdk"')
    (short_tmp / "web-000001.vmdk").write_text(snapshot)
    split = ESXI.replace("# The Disk", 'RW 8192 VMFS "second-flat.vmdk"\n# The Disk')
    (short_tmp / "split.vmdk").write_text(split)
    mapped = ESXI.replace("VMFS", "VMFSRDM")
    (short_tmp / "mapped.vmdk").write_text(mapped)
    sparse = ESXI.replace("VMFS", "VMFSSPARSE")
    (short_tmp / "sparse.vmdk").write_text(sparse)
    names = ["web", "gone", "old", "web-000001", "split", "mapped", "web-flat", "sparse"]
    path = vmx(short_tmp, *(f"{name}.vmdk" for name in names))
    error = await problem(vmx_options(sshd, path))
    assert isinstance(error, SourceError)
    assert error.message.startswith("7 disks can't be used: ")
    for told in (
        "/gone.vmdk’ can't be opened: there is no such file",
        "/old-flat.vmdk’ has 1 bytes of 4194304",
        "/web-000001.vmdk’: it is a snapshot",
        "/split.vmdk’: it has 2 extents",
        "/mapped.vmdk’: its extent is of the kind VMFSRDM",
        "/web-flat.vmdk’: it is not a VMDK",
        "/sparse.vmdk’: its kind (‘vmfs’) can't be read",
    ):
        assert told in error.message
    assert "/web.vmdk’" not in error.message


async def test_a_sparse_snapshot(short_tmp: Path, sshd: Sshd) -> None:
    create = ["qemu-img", "create", "-q", "-f", "vmdk"]
    subprocess.run([*create, "base.vmdk", "1M"], check=True, cwd=short_tmp)
    subprocess.run(
        [*create, "-b", "base.vmdk", "-F", "vmdk", "a-000001.vmdk"], check=True, cwd=short_tmp
    )
    error = await problem(vmx_options(sshd, vmx(short_tmp, "a-000001.vmdk")))
    assert "it is a snapshot" in error.message
    assert "vddk" in str(error.hint)


async def test_a_sparse_image_that_hides_a_descriptor(short_tmp: Path, sshd: Sshd) -> None:
    header = struct.pack("<4sIIQQQQ", b"KDMV", 1, 3, 0, 128, 1, 20).ljust(512, b"\0")
    (short_tmp / "a.vmdk").write_bytes(header + ESXI.encode().ljust(20 * 512, b"\0"))
    error = await problem(vmx_options(sshd, vmx(short_tmp, "a.vmdk")))
    assert "its header says that it is empty" in error.message


async def test_a_file_that_is_too_large_for_a_vmx_file(short_tmp: Path, sshd: Sshd) -> None:
    with (short_tmp / "big.vmx").open("wb") as file:
        file.truncate(1 << 30)
    error = await problem(vmx_options(sshd, short_tmp / "big.vmx"))
    assert "has 1073741824 bytes" in error.message


# Xen.


async def test_a_guest_of_xen(short_tmp: Path) -> None:
    """A raw file and a qcow2 file."""
    raw = fragmented(short_tmp / "it's a.img", SIZE)
    qcow2 = short_tmp / "b.qcow2"
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(qcow2)], check=True
    )
    disks = (
        disk_xml(raw, "xvda").replace("it's", "it&apos;s"),
        disk_xml(qcow2, "xvdb", format_="qcow2"),
    )
    before = (digest(raw), digest(qcow2))
    with running_sshd(short_tmp, environment=xen_host(short_tmp, "web 1", *disks)) as server:
        async with served(short_tmp, xen_options(server, "web 1")) as (v2vdir, guest):
            assert (guest.name, guest.hypervisor) == ("web 1", "xen")
            assert (guest.memory, guest.vcpus) == (768 * MIB, 2)
            assert [(disk.format, disk.size) for disk in guest.disks] == [
                ("raw", SIZE),
                ("qcow2", SIZE),
            ]
            for index in (1, 2):
                endpoint = str(v2vdir.source_socket(index))
                assert await content(endpoint) == raw.read_bytes()
                await write(endpoint)
    assert (digest(raw), digest(qcow2)) == before


async def test_guests_of_xen_that_can_not_be_had(short_tmp: Path) -> None:
    disk = disk_xml(fragmented(short_tmp / "a.img", MIB), "xvda")
    environment = xen_host(short_tmp, "web", disk, state=RUNNING)
    with running_sshd(short_tmp, environment=environment) as server:
        error = await problem(xen_options(server))
        assert f"‘web’ of ‘{server.user}@127.0.0.1:{server.port}’ is not shut off" in error.message
        assert "‘running’" in error.message
        assert "shutdown web" in str(error.hint)
        error = await problem(xen_options(server, "no $(touch x)'s"))
        assert "there is no guest ‘no $(touch x)'s’" in error.message
        (short_tmp / "tools/virsh").write_text("#!/bin/sh\necho 'error: all is lost' >&2; exit 1\n")
        assert "failed: all is lost" in (await problem(xen_options(server))).message
        (short_tmp / "tools/virsh").write_text("#!/bin/sh\necho shut off; yes | head -c 9000000\n")
        assert "sent more than 4194304 bytes" in (await problem(xen_options(server))).message
        (short_tmp / "tools/virsh").write_text("#!/bin/sh\necho shut off; echo nonsense\n")
        assert isinstance(await problem(xen_options(server)), SourceError)


async def test_a_host_without_virsh(short_tmp: Path) -> None:
    with running_sshd(short_tmp, environment={"PATH": "/bin"}) as server:
        (short_tmp / "none").mkdir()
        config = server.folder / "sshd_config"
        config.write_text(config.read_text().replace("PATH=/bin", f"PATH={short_tmp}/none"))
        for name in ("env", "bash", "sh"):
            os.symlink(f"/bin/{name}", short_tmp / "none" / name)
        server.kill()
        server.start()
        error = await problem(xen_options(server))
        assert "there is no virsh on" in error.message


async def test_disks_of_xen_that_can_not_be_read(short_tmp: Path) -> None:
    """A device (sftp tells no size), one that is gone, and one over another image."""
    base = fragmented(short_tmp / "base.img", MIB)
    top = short_tmp / "top.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw", str(top)],
        check=True,
    )
    split = short_tmp / "split.qcow2"
    data = f"data_file={short_tmp}/split.data"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", data, str(split), "1M"], check=True
    )
    # To qemu's driver any text is a descriptor, and one may name any file of this machine.
    esxi_disk(short_tmp)
    (short_tmp / "text.vmdk").write_text(
        'version=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
        'RW 1 FLAT "/etc/services" 0\n'
    )
    disks = (
        disk_xml(base, "xvda"),
        disk_xml(Path("/dev/zero"), "xvdb", kind="block"),
        disk_xml(short_tmp / "gone.img", "xvdc"),
        disk_xml(top, "xvdd", format_="qcow2"),
        disk_xml(split, "xvde", format_="qcow2"),
        disk_xml(base, "xvdf", format_="vmdk"),
        disk_xml(short_tmp / "web.vmdk", "xvdg", format_="vmdk"),
        disk_xml(short_tmp / "text.vmdk", "xvdh", format_="vmdk"),
    )
    with running_sshd(short_tmp, environment=xen_host(short_tmp, "web", *disks)) as server:
        error = await problem(xen_options(server))
    assert error.message.startswith("7 disks can't be used: ")
    for told in (
        "disk 2: the disk ‘ssh://",
        "/dev/zero’ is a block device: sftp does not tell its size",
        "/gone.img’ can't be opened: there is no such file",
        "/top.qcow2’ names a backing file",
        "/split.qcow2’ names an external data file",
        "/base.img’ can't be read as vmdk: it is raw",
        "/web.vmdk’ is a VMDK descriptor: its content lies in other files",
        "/text.vmdk’ can't be read as vmdk: it is raw",
    ):
        assert told in error.message


async def test_the_format_is_what_if_says(short_tmp: Path) -> None:
    qcow2 = short_tmp / "b.img"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(qcow2), "3M"], check=True)
    environment = xen_host(short_tmp, "web", disk_xml(qcow2, "xvda"))
    with running_sshd(short_tmp, environment=environment) as server:
        source = parse_input(xen_options(server, format="qcow2"))
        await source.check(quiet)
        assert (await source.describe()).disks[0].size == 3 * MIB
