"""docs/schema/examples: what ``--print-source --machine-readable`` prints, for each type of source.

With ``WRITE_EXAMPLES=1`` in the environment they are written anew.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests import ovas, vddk
from tests.conftest import ROOT, program, require
from tests.sshd import running_sshd
from tests.unit.test_vmdk_descriptor import ESXI
from tests.vcenter import DATASTORE, PASSWORD, USER, Guest, VCenter
from tests.xen_host import disk_xml, xen_host
from v2v_async import vsphere
from v2v_async.input.registry import KINDS
from v2v_async.model import SourceGuest

EXAMPLES = ROOT / "docs" / "schema" / "examples"
SIZE = 4 << 20

DOMAIN = """<domain type='kvm'><name>web</name><genid>8c4a1d9e-3f1b-4a53-9a4e-1f1b2c3d4e5f</genid>
<memory unit='KiB'>4194304</memory><vcpu>4</vcpu>
<os firmware='efi'><type arch='x86_64' machine='pc-q35-7.2'>hvm</type><loader secure='yes'/></os>
<features><acpi/><apic/><smm state='on'/></features>
<cpu mode='custom'><model>Haswell</model><vendor>Intel</vendor>
<topology sockets='1' dies='1' cores='2' threads='2'/></cpu>
<devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='DIR/web.qcow2'/>
<target dev='vda' bus='virtio'/></disk>
<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='DIR/data.img'/>
<target dev='sda' bus='sata'/></disk>
<disk type='file' device='cdrom'><target dev='sdb' bus='sata'/></disk>
<interface type='bridge'><mac address='52:54:00:12:34:56'/><source bridge='br0'/>
<model type='virtio'/></interface>
<graphics type='spice' listen='127.0.0.1'/><sound model='ich9'/>
<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm></devices></domain>"""

VMX = """displayName = "web"
memSize = "4096"
numvcpus = "2"
cpuid.coresPerSocket = "2"
firmware = "efi"
uefi.secureBoot.enabled = "TRUE"
scsi0:0.fileName = "web.vmdk"
ethernet0.virtualDev = "vmxnet3"
ethernet0.networkName = "VM Network"
ethernet0.generatedAddress = "00:0c:29:12:34:56"
ide0:0.present = "TRUE"
ide0:0.deviceType = "cdrom-image"
ide0:0.fileName = "installer.iso"
"""

Source = tuple[list[str], dict[str, str]]
"""The command line of a source, and what its environment needs."""


@contextmanager
def disks(folder: Path) -> Iterator[Source]:
    yield ["-i", "disk", str(folder / "web.qcow2"), str(folder / "data.img")], {}


@contextmanager
def libvirtxml(folder: Path) -> Iterator[Source]:
    path = folder / "web.xml"
    path.write_text(DOMAIN.replace("DIR", str(folder)))
    yield ["-i", "libvirtxml", str(path)], {}


@contextmanager
def libvirt(folder: Path) -> Iterator[Source]:
    off = "<test:runstate>5</test:runstate></domain>"
    name = "xmlns:test='http://libvirt.org/schemas/domain/test/1.0'"
    text = DOMAIN.replace("DIR", str(folder)).replace("</domain>", off)
    text = text.replace("<domain type='kvm'>", f"<domain type='test' {name}>")
    node = folder / "node.xml"
    node.write_text(f"<node>{text}</node>")
    yield ["-i", "libvirt", "-ic", f"test://{node}", "web"], {}


@contextmanager
def ova(folder: Path) -> Iterator[Source]:
    vmdk = ovas.convert(folder / "data.img", folder / "web-1.vmdk", "vmdk", "streamOptimized")
    described = ovas.ovf(
        "web-1.vmdk",
        items=ovas.cpu(2, CoresPerSocket=2)
        + ovas.memory(4096)
        + ovas.controller()
        + ovas.disk()
        + ovas.nic(20, Connection="VM Network", ResourceSubType="VmxNet3"),
        config='<vmw:Config vmw:key="firmware" vmw:value="efi"/>',
    )
    files: dict[str, ovas.Content] = {"web.ovf": described, "web-1.vmdk": vmdk}
    files["web.mf"] = ovas.manifest(files)
    yield ["-i", "ova", str(ovas.pack(folder / "web.ova", files))], {}


@contextmanager
def vmx(folder: Path) -> Iterator[Source]:
    store = folder / "store"
    store.mkdir()
    (store / "web-flat.vmdk").symlink_to(folder / "data.img")
    text = ESXI.replace("guest-flat", "web-flat").replace("8192", str(SIZE // 512))
    (store / "web.vmdk").write_text(text)
    (store / "web.vmx").write_text(VMX)
    with running_sshd(folder) as server:
        options = [word for key, value in server.io_options for word in ("-io", f"{key}={value}")]
        yield ["-i", "vmx", "-it", "ssh", *options, server.uri(store / "web.vmx")], {}


@contextmanager
def xen_ssh(folder: Path) -> Iterator[Source]:
    environment = xen_host(folder, "web", disk_xml(folder / "data.img", "xvda"))
    with running_sshd(folder, environment=environment) as server:
        options = [word for key, value in server.io_options for word in ("-io", f"{key}={value}")]
        uri = f"xen+ssh://{server.user}@{server.host}:{server.port}/"
        yield ["-ic", uri, *options, "web"], {}


@contextmanager
def vcenter(folder: Path) -> Iterator[Source]:
    require("openssl")
    (folder / "vc").mkdir()
    (folder / "vc" / "password").write_text(PASSWORD)
    with VCenter(folder / "vc", Guest("web", [folder / "data.img"])) as server:
        yield ["-ic", server.uri, "-ip", str(folder / "vc" / "password"), "web"], {}


@contextmanager
def with_vddk(folder: Path) -> Iterator[Source]:
    installed = vddk.install(folder / "vddk")
    with vcenter(folder) as (words, _):
        port = int(words[1].partition("@")[2].partition("/")[0].rpartition(":")[2])
        login = vsphere.Login("127.0.0.1", port, "", "", verify=False)
        installed.expect(
            user=USER,
            password=PASSWORD,
            vm="moref=vm-16",
            thumbprint=vsphere.thumbprint(login),
            files={f"[{DATASTORE}] web/web.vmdk": str(folder / "data.img")},
        )
        more = ["-it", "vddk", "-io", f"vddk-libdir={installed.libdir}"]
        yield [*words[:-1], *more, words[-1]], installed.environment


SOURCES: dict[str, Callable[[Path], AbstractContextManager[Source]]] = {
    "disk": disks,
    "libvirt": libvirt,
    "libvirtxml": libvirtxml,
    "ova": ova,
    "vcenter": vcenter,
    "vddk": with_vddk,
    "vmx": vmx,
    "xen-ssh": xen_ssh,
}


def normalised(text: str, folder: Path) -> str:
    """Return the document with what differs from run to run made the same."""
    text = text.replace(str(folder), "/srv")
    text = re.sub(r"ssh://(\w+@)?127\.0\.0\.1:\d+", "ssh://root@host", text)
    document = json.loads(text)
    for disk in document["disks"]:
        # The file system has its own mind about blocks.
        disk["allocated"] = 1 << 20 if disk["allocated"] is not None else None
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def test_each_type_has_one() -> None:
    assert set(SOURCES) == set(KINDS)
    assert {path.name for path in EXAMPLES.iterdir()} == {f"metadata-in-{k}.json" for k in KINDS}


@pytest.mark.parametrize("kind", SOURCES)
def test_an_example_is_what_the_program_prints(kind: str, short_tmp: Path) -> None:
    require("qemu-img", "nbdkit")
    (short_tmp / "data.img").write_bytes(os.urandom(SIZE))
    create = ["qemu-img", "create", "-q", "-f", "qcow2", str(short_tmp / "web.qcow2"), "6G"]
    subprocess.run(create, check=True)
    with SOURCES[kind](short_tmp) as (words, environment):
        done = subprocess.run(
            [*program("virt-v2v-async"), *words, "--print-source", "--machine-readable"],
            env={**os.environ, "TMPDIR": str(short_tmp), **environment},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    # Each line is a JSON object: messages, then the source.
    *messages, last = done.stdout.splitlines()
    assert all("message" in json.loads(line) for line in messages)
    printed = normalised(last, short_tmp)
    assert PASSWORD not in done.stdout + done.stderr
    example = EXAMPLES / f"metadata-in-{kind}.json"
    if os.environ.get("WRITE_EXAMPLES"):
        EXAMPLES.mkdir(exist_ok=True)
        example.write_text(printed)
    assert printed == example.read_text()
    # Nothing in it that the schema does not know.
    parsed = SourceGuest.model_validate_json(printed)
    assert json.loads(parsed.model_dump_json()) == json.loads(printed)
