"""libvirt domain XML: what is made of it, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from v2v_async.errors import SourceError
from v2v_async.input.libvirt.domain_xml import MAX_MEMORY, Domain, DomainDisk, parse_domain
from v2v_async.input.xml_source import MAX_SIZE
from v2v_async.model import CpuTopology, SourceTpm

DISK = "<disk type='file' device='disk'><source file='/d'/><target dev='hda' bus='ide'/></disk>"


def parse(before: str = "", devices: str = "", *, disks: str = DISK) -> Domain:
    text = f"<domain type='kvm'><name>g</name>{before}<devices>{disks}{devices}</devices></domain>"
    return parse_domain(text.encode(), "x.xml")


def disk(source: str, *, type_: str = "network", more: str = "") -> DomainDisk:
    [found] = parse(disks=f"<disk type='{type_}' device='disk'>{source}{more}</disk>").disks
    return found


@pytest.mark.parametrize(
    ("memory", "size"),
    [
        ("", 1 << 30),
        ("<memory>1024</memory>", 1 << 20),
        ("<memory unit='bytes'>1048576</memory>", 1 << 20),
        ("<memory unit='b'>1</memory>", 1024),  # KiB, rounded up
        ("<memory unit='KB'>1024</memory>", 1024 * 1000),
        ("<memory unit='MB'>2048</memory>", 2_048_000_000),
        ("<memory unit='M'>2048</memory>", 2 << 30),
        ("<memory unit='MiB'>2048</memory>", 2 << 30),
        ("<memory unit='gib'>2</memory>", 2 << 30),
        ("<memory unit='TiB'>1</memory>", 1 << 40),
        ("<memory> 2097152\n</memory>", 2 << 30),
    ],
)
def test_memory(memory: str, size: int) -> None:
    assert parse(memory).guest.memory == size


def test_processors() -> None:
    assert parse().guest.vcpus == 1
    assert parse("<vcpu>3</vcpu>").guest.vcpus == 3
    guest = parse("<cpu><topology sockets='2' cores='3' threads='2'/></cpu>").guest
    assert guest.vcpus == 12
    assert guest.cpu_topology == CpuTopology(sockets=2, cores=3, threads=2)
    # Without all three there is no topology, but the product counts.
    guest = parse("<cpu><topology sockets='2' threads='2'/></cpu>").guest
    assert (guest.vcpus, guest.cpu_topology) == (4, None)


@pytest.mark.parametrize(
    ("os", "firmware", "secure_boot"),
    [
        ("", "unknown", False),
        ("<os firmware='efi'/>", "uefi", False),
        ("<os firmware='bios'/>", "bios", False),
        ("<os><loader type='pflash' secure='yes'/></os>", "uefi", True),
        ("<os><loader type='pflash' secure='no'/></os>", "uefi", False),
        (
            "<os firmware='efi'><firmware><feature name='secure-boot' enabled='yes'/></firmware>"
            "</os>",
            "uefi",
            True,
        ),
        (
            "<os firmware='efi'><firmware><feature name='secure-boot' enabled='no'/>"
            "<feature name='enrolled-keys' enabled='yes'/></firmware></os>",
            "uefi",
            False,
        ),
    ],
)
def test_firmware(os: str, firmware: str, secure_boot: bool) -> None:
    guest = parse(os).guest
    assert (guest.firmware, guest.secure_boot) == (firmware, secure_boot)


def test_tpm() -> None:
    assert parse().guest.tpm is None
    tpm = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
    assert parse(devices=tpm).guest.tpm == SourceTpm(model="tpm-crb", version="2.0")
    passed = "<tpm><backend type='passthrough'/></tpm>"
    assert parse(devices=passed).guest.tpm == SourceTpm()


def test_the_password_of_the_display_is_not_kept() -> None:
    domain = parse(devices="<graphics type='vnc' passwd='s3cret'/>")
    assert domain.guest.display == "vnc with password"
    assert "s3cret" not in domain.guest.model_dump_json()


def test_what_libvirt_says_of_vmware() -> None:
    namespace = "xmlns:vmware='http://libvirt.org/schemas/domain/vmware/1.0'"
    domain = parse_domain(
        f"<domain type='vmware' {namespace}><name>g</name><devices>{DISK}</devices>"
        "<vmware:datacenterpath>Folder/ha-datacenter</vmware:datacenterpath>"
        "<vmware:moref>vm-123</vmware:moref></domain>".encode(),
        "x",
    )
    assert domain.vmware_datacenter == "Folder/ha-datacenter"
    assert domain.vmware_moref == "vm-123"
    assert parse().vmware_moref is None


def test_a_path_of_vmware_is_kept_as_it_is() -> None:
    found = disk("<source file='[store 1] a/b.vmdk'/>", type_="file")
    assert found.location == "[store 1] a/b.vmdk"


@pytest.mark.parametrize(
    ("source", "uri"),
    [
        ("<source protocol='nbd'><host name='h'/></source>", "nbd://h/"),
        ("<source protocol='nbd'><host name='h' port='10809'/></source>", "nbd://h/"),
        ("<source protocol='nbd' name='a b'><host name='h' port='1'/></source>", "nbd://h:1/a%20b"),
        ("<source protocol='nbd' tls='yes' name='x'><host name='h'/></source>", "nbds://h/x"),
        ("<source protocol='nbd'><host name='::1' port='7'/></source>", "nbd://[::1]:7/"),
        (
            "<source protocol='nbd' name='x'><host transport='unix' socket='/a b'/></source>",
            "nbd+unix:///x?socket=/a%20b",
        ),
        ("<source protocol='http' name='/x.img'><host name='h'/></source>", "http://h/x.img"),
        ("<source protocol='http' name='x'><host name='h' port='80'/></source>", "http://h/x"),
        ("<source protocol='https' name='x'><host name='h' port='443'/></source>", "https://h/x"),
        ("<source protocol='https' name='x'><host name='h' port='80'/></source>", "https://h:80/x"),
        (
            "<source protocol='https' name='/ü/a%20b' query='a=1&amp;b=2'>"
            "<host name='h'/></source>",
            "https://h/%C3%BC/a%2520b?a=1&b=2",
        ),
    ],
)
def test_network_disks(source: str, uri: str) -> None:
    found = disk(source)
    assert (found.kind, found.location, found.verify) == ("network", uri, True)


def test_a_certificate_that_nobody_checks() -> None:
    source = "<source protocol='https' name='x'><host name='h'/><ssl verify='no'/></source>"
    assert not disk(source).verify


SHA = "ab" * 32


@pytest.mark.parametrize(
    ("element", "checksum", "fail"),
    [
        ("", None, "error"),
        (f"<checksum method='sha256' fail='error'> {SHA}\n</checksum>", ("sha256", SHA), "error"),
        (
            f"<checksum method='sha256' fail='err'>{SHA.upper()}</checksum>",
            ("sha256", SHA),
            "error",
        ),
        (f"<checksum method='sha256' fail='warn'>{SHA}</checksum>", ("sha256", SHA), "warn"),
        (f"<checksum method='sha256' fail='warning'>{SHA}</checksum>", ("sha256", SHA), "warn"),
        ("<checksum method='md5' fail='print'/>", ("md5", ""), "print"),
        (f"<checksum method='sha256' fail='ignore'>{SHA}</checksum>", None, "error"),
        (f"<checksum method='sha256'>{SHA}</checksum>", None, "error"),
    ],
)
def test_checksum(element: str, checksum: tuple[str, str] | None, fail: str) -> None:
    found = disk("<source file='/d'/>", type_="file", more=element)
    assert (found.checksum, found.checksum_fail) == (checksum, fail)


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        ("<hostdev/><hostdev/>", "2 host device(s)"),
        ("<interface type='direct'/>", "1 network interface(s) attached directly"),
        ("<graphics type='sdl'/>", "display of type ‘sdl’"),
        ("<sound model='theremin'/>", "‘theremin’"),
        ("<disk type='file' device='lun'><source file='/x'/></disk>", "SCSI device(s)"),
        ("<disk type='file' device='disk'/>", "without a source"),
        ("<disk type='vhostuser' device='disk'/>", "of type ‘vhostuser’"),
        ("<disk device='disk'><source file='/x'/></disk>", "of no type"),
        ("<disk type='volume' device='disk'><source volume='v'/></disk>", "without a source"),
        (
            "<disk type='network' device='disk'><source protocol='rbd' name='x'/></disk>",
            "the protocol ‘rbd’",
        ),
        ("<disk type='network' device='disk'><source/></disk>", "no protocol"),
        (
            "<disk type='network' device='disk'><source protocol='nbd' name='x'/></disk>",
            "without a host",
        ),
        ("<disk type='file' device='cdrom'><target dev='hd12'/></disk>", "‘hd12’"),
        ("<disk type='file' device='cdrom'><target dev='sr-1'/></disk>", "‘sr-1’"),
    ],
)
def test_what_is_left_out_is_told(devices: str, said: str) -> None:
    domain = parse(devices=devices)
    assert len(domain.disks) == 1
    assert [text for text in domain.warnings if said in text], domain.warnings


HOSTILE = {
    "empty": (b"", "is not well-formed XML"),
    "no XML": (b"QFI\xfb\x00\x00\x00\x03", "is not well-formed XML"),
    "half": (b"<domain type='kvm'><name>g", "is not well-formed XML"),
    "another root": (b"<network/>", "its root element is <network>"),
    "a namespace": (b"<domain xmlns='urn:x' type='kvm'/>", "root element"),
    "an unknown encoding": (
        b"<?xml version='1.0' encoding='moon'?><domain/>",
        "is not well-formed XML",
    ),
    "a document type": (b"<!DOCTYPE domain><domain type='kvm'/>", "document type"),
    "entities": (
        b"<!DOCTYPE d [<!ENTITY a 'x'><!ENTITY b '&a;&a;&a;&a;&a;&a;&a;'>]><domain>&b;</domain>",
        "document type",
    ),
    "an external entity": (
        b"<!DOCTYPE d [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><domain type='kvm'><name>&x;"
        b"</name></domain>",
        "document type",
    ),
    "an external entity in UTF-16": (
        "<?xml version='1.0' encoding='UTF-16'?><!DOCTYPE d [<!ENTITY x SYSTEM "
        "'file:///etc/passwd'>]><domain>&x;</domain>".encode("utf-16"),
        "document type",
    ),
    "an undefined entity": (
        b"<domain type='kvm'><name>&x;</name></domain>",
        "is not well-formed XML",
    ),
    "too large": (b"<domain>" + b" " * MAX_SIZE + b"</domain>", "too large"),
    "deep": (
        b"<domain>" + b"<a>" * 100_000 + b"</a>" * 100_000 + b"</domain>",
        "is not well-formed XML",
    ),
    "control characters": (
        b"<domain type='kvm'><name>\x01</name></domain>",
        "is not well-formed XML",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_documents(name: str) -> None:
    content, said = HOSTILE[name]
    with pytest.raises(SourceError, match=said) as caught:
        parse_domain(content, "x.xml")
    assert "x.xml" in caught.value.message
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ("<domain><name>g</name></domain>", "<domain> has no type"),
        ("<domain type=''><name>g</name></domain>", "<domain> has no type"),
        ("<domain type='kvm'/>", "<name> is missing or empty"),
        ("<domain type='kvm'><name> \n</name></domain>", "<name> is missing or empty"),
        ("<domain type='kvm'><name>g</name></domain>", "has no disks that can be read"),
    ],
)
def test_what_must_be_there(document: str, said: str) -> None:
    with pytest.raises(SourceError, match=said):
        parse_domain(document.encode(), "x.xml")


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("<memory>-1</memory>", "<memory> is -1"),
        ("<memory>0</memory>", "<memory> is 0"),
        ("<memory>much</memory>", "<memory> is ‘much’"),
        ("<memory>1e9</memory>", "not a number"),
        ("<memory>1.5</memory>", "not a number"),
        ("<memory>٣</memory>", "not a number"),
        ("<memory>--5</memory>", "not a number"),
        ("<memory>" + "9" * 5000 + "</memory>", "not a number"),
        ("<memory unit='furlong'>1</memory>", "unknown unit ‘furlong’"),
        (f"<memory unit='bytes'>{MAX_MEMORY + 1}</memory>", "more than any machine has"),
        ("<memory unit='EiB'>999999999999</memory>", "more than any machine has"),
        ("<vcpu>0</vcpu>", "<vcpu> is 0"),
        ("<vcpu>-4</vcpu>", "<vcpu> is -4"),
        ("<vcpu>65536</vcpu>", "<vcpu> is 65536"),
        ("<cpu><topology sockets='0' cores='1' threads='1'/></cpu>", "sockets=…> is 0"),
        ("<cpu><topology sockets='9999' cores='9999'/></cpu>", "too many"),
    ],
)
def test_absurd_numbers(before: str, said: str) -> None:
    with pytest.raises(SourceError, match=said) as caught:
        parse(before)
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    ("element", "said"),
    [
        ("<disk type='file' device='disk'><source file=''/></disk>", "is empty"),
        (
            "<disk type='file'><source file='/d'><slices><slice type='storage' offset='1' "
            "size='2'/></slices></source></disk>",
            "a slice of a larger image",
        ),
        ("<disk type='file' device='disk'><source file='a&#10;b'/></disk>", "not one line"),
        (
            "<disk type='network'><source protocol='nbd'><host name='u:p@h'/></source></disk>",
            "host",
        ),
        (
            "<disk type='network'><source protocol='http'><host name='h/x?'/></source></disk>",
            "host",
        ),
        (
            "<disk type='network'><source protocol='nbd'><host name='h' port='0'/></source></disk>",
            "its port is 0",
        ),
        (
            "<disk type='network'><source protocol='nbd'><host name='h' port='99999'/></source>"
            "</disk>",
            "its port is 99999",
        ),
        (
            "<disk type='network'><source protocol='nbd'><host transport='unix'/></source></disk>",
            "Unix socket has no name",
        ),
        (
            "<disk type='file'><source file='/d'/><checksum method='crc32' fail='error'>ab"
            "</checksum></disk>",
            "unknown method ‘crc32’",
        ),
        (
            "<disk type='file'><source file='/d'/><checksum method='md5' fail='error'>xyz"
            "</checksum></disk>",
            "is no md5",
        ),
    ],
)
def test_disks_that_make_no_sense(element: str, said: str) -> None:
    with pytest.raises(SourceError, match=said) as caught:
        parse(disks=element)
    assert "disk 1" in caught.value.message


def test_nothing_is_fetched(tmp_path: Path) -> None:
    """An XInclude or a schema that names a file is only text."""
    (tmp_path / "x").write_text("stolen")
    domain = parse(
        f"<xi:include xmlns:xi='http://www.w3.org/2001/XInclude' href='{tmp_path}/x'/>"
        f"<description>&lt;!ENTITY {tmp_path}/x&gt;</description>"
    )
    assert "stolen" not in repr(domain)
