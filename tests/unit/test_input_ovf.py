"""What is read of an OVF, and what of it is refused; virt-v2v's text is compared in tests/e2e."""

from __future__ import annotations

import pytest

from tests import ovas
from tests.ovas import SATA, SCSI, controller, cpu, disk, item, memory
from v2v_async.errors import SourceError
from v2v_async.input.ova.ovf import MAX_SIZE, Ovf, parse_ovf, parse_units
from v2v_async.model import CpuTopology

GIB = 1 << 30


def parse(description: bytes) -> Ovf:
    return parse_ovf(description, "‘x.ovf’")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("byte", 1),
        ("byte * 2^20", 1 << 20),
        ("byte*2^30", 1 << 30),
        ("byte * 10^6", 10**6),
        ("bytes * 2^10 * 4", 4096),
        ("byte * 512", 512),
        ("MegaBytes", 1 << 20),
        (" GB ", 1 << 30),
        ("KiloBytes", 1024),
        ("hertz * 10^6", None),
        ("byte * 2^63", None),
        ("byte * 9^99", None),
        ("byte * 2^999999999999", None),
        ("byte * 0", None),
        ("byte * 99999999999999999999999", None),
        ("", None),
    ],
)
def test_allocation_units(text: str, size: int | None) -> None:
    assert parse_units(text) == size


@pytest.mark.parametrize(
    ("amount", "units", "size"),
    [
        (4, "byte * 2^30", 4 * GIB),
        (4096, "byte * 2^20", 4 * GIB),
        (4096, None, 4 * GIB),
        (4194304, "KiloBytes", 4 * GIB),
        (4096, "furlong", 4 * GIB),
    ],
)
def test_memory(amount: int, units: str | None, size: int) -> None:
    read = parse(ovas.ovf(items=cpu() + memory(amount, units) + controller() + disk()))
    assert read.guest.memory == size
    assert [w for w in read.warnings if "furlong" in w] == [
        w for w in read.warnings if units == "furlong"
    ]


def test_topology_and_firmware() -> None:
    config = (
        '<vmw:Config vmw:key="firmware" vmw:value="efi"/>'
        '<vmw:Config vmw:key="bootOptions.efiSecureBootEnabled" vmw:value="true"/>'
    )
    items = cpu(8, CoresPerSocket=4) + controller() + disk()
    guest = parse(ovas.ovf(items=items, config=config)).guest
    assert guest.cpu_topology == CpuTopology(sockets=2, cores=4, threads=1)
    assert (guest.vcpus, guest.firmware, guest.secure_boot) == (8, "uefi", True)
    assert guest.memory == GIB
    plain = parse(ovas.ovf()).guest
    assert (plain.firmware, plain.secure_boot) == ("bios", False)


def test_disks_of_one_controller_are_ordered_by_address() -> None:
    """But the order of controllers is the document's."""
    items = controller(SCSI, 3) + controller(SATA, 4, "AHCI")
    items += disk(1, parent=3, address=1) + disk(2, parent=4, address=0)
    items += disk(3, parent=3, address=0)
    read = parse(ovas.ovf("a", "b", "c", items=items))
    assert [one.href for one in read.disks] == ["c", "b", "a"]
    assert [one.controller for one in read.disks] == ["scsi", "sata", "scsi"]


def test_only_the_default_configuration_counts() -> None:
    sections = (
        '<DeploymentOptionSection><Info/><Configuration ovf:id="small"/>'
        '<Configuration ovf:id="large" ovf:default="true"/></DeploymentOptionSection>'
    )
    small, large = cpu(1), cpu(16).replace("<Item>", '<Item ovf:configuration="large huge">')
    items = small.replace("<Item>", '<Item ovf:configuration="small">') + large
    items += memory(1).replace("<Item>", '<Item ovf:bound="min">') + memory(64, "byte * 2^30")
    guest = parse(ovas.ovf(items=items + controller() + disk(), sections=sections)).guest
    assert (guest.vcpus, guest.memory) == (16, 64 * GIB)


def test_ovf_2_has_items_of_other_names() -> None:
    description = ovas.ovf(items=cpu() + controller() + "STORAGE" + "PORT").decode()
    sasd = 'xmlns="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_StorageAllocationData"'
    storage = disk().replace("rasd:", "").replace("<Item>", f"<StorageItem><x {sasd}/>")
    port = item(10, 9, Connection="LAN").replace("Item>", "EthernetPortItem>")
    description = description.replace("STORAGE", storage.replace("</Item>", "</StorageItem>"))
    description = description.replace("PORT", port).replace("envelope/1", "envelope/2")
    read = parse(description.encode())
    assert [one.href for one in read.disks] == ["disk1.vmdk"]
    assert [one.vnet for one in read.guest.nics] == ["LAN"]


def test_a_disk_without_a_file_is_empty_and_a_file_without_a_disk_is_one() -> None:
    description = ovas.ovf(items=controller() + disk(1)).replace(b'ovf:fileRef="file1" ', b"")
    assert [(d.href, d.capacity) for d in parse(description).disks] == [(None, 16 << 20)]
    direct = ovas.ovf(items=controller() + disk(1).replace("/disk/vmdisk1", "/file/file1"))
    assert [(d.href, d.capacity) for d in parse(direct).disks] == [("disk1.vmdk", None)]


def test_a_collection_of_one_is_that_one() -> None:
    description = ovas.ovf().replace(
        b"<VirtualSystem ", b"<VirtualSystemCollection><VirtualSystem "
    )
    description = description.replace(b"</Envelope>", b"</VirtualSystemCollection></Envelope>")
    assert parse(description).name == "web"


@pytest.mark.parametrize(
    ("description", "said"),
    [
        (b"", "not well-formed XML"),
        (b"<Envelope>", "not well-formed XML"),
        (b"<domain/>", "begins with <domain>, not with <Envelope>"),
        (b"<Envelope/>", "describes no virtual machine"),
        (b"\xff\xfe\x00<", "not well-formed XML"),
        (b'<?xml version="1.0" encoding="no-such"?><Envelope/>', "not well-formed XML"),
        (b"<Envelope><VirtualSystem/><VirtualSystem/></Envelope>", "2 virtual machines"),
        (b"<!DOCTYPE x><Envelope/>", "declares a document type"),
        (ovas.ovf(items=cpu(0) + disk()), "0 virtual processors"),
        (ovas.ovf(items=cpu(10**9) + disk()), "virtual processors are absurd"),
        (ovas.ovf(items=item(3, 1, VirtualQuantity="two") + disk()), "‘two’, which is no number"),
        (ovas.ovf(items=item(3, 1, VirtualQuantity="9" * 5000) + disk()), "is no number"),
        (ovas.ovf(items=memory(-1) + disk()), "is absurd"),
        (ovas.ovf(items=memory(1 << 40) + disk()), "is absurd"),
        (ovas.ovf(config='<vmw:Config vmw:key="firmware" vmw:value="x"/>'), "firmware is ‘x’"),
        (ovas.ovf(items=disk().replace("ovf:/disk/", "nfs:/disk/")), "only ovf:/disk/… and"),
        (ovas.ovf(items=disk(7)), "(‘vmdisk7’) is not described"),
        (ovas.ovf(compression="lzma"), "compressed by ‘lzma’"),
        (ovas.ovf(disk_attributes='ovf:parentRef="d0"'), "only what changed since another"),
        (ovas.ovf().replace(b'ovf:id="file1"', b""), "no file is named for disk 1"),
        (
            ovas.ovf(capacity=None).replace(b'ovf:fileRef="file1"', b""),
            "neither a file nor a size",
        ),
        (b"<Envelope>" + b" " * MAX_SIZE + b"</Envelope>", "is too large"),
    ],
)
def test_what_is_refused(description: bytes, said: str) -> None:
    with pytest.raises(SourceError) as caught:
        parse(description)
    assert said in caught.value.message
    assert "x.ovf" in caught.value.message


LAUGHS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
BOMB = f'<!DOCTYPE x [<!ENTITY l0 "ha">{LAUGHS}]><Envelope><a b="&l9;">&l9;</a></Envelope>'
OUTSIDE = '<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><Envelope>&e;</Envelope>'
PARAMETER = '<!DOCTYPE x [<!ENTITY % p SYSTEM "http://127.0.0.1:1/x"> %p;]><Envelope/>'


@pytest.mark.parametrize("document", [BOMB, OUTSIDE, PARAMETER, '<!DOCTYPE x SYSTEM "a.dtd"><x/>'])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32", "utf-7", "cp037"])
def test_entities_in_any_encoding(document: str, encoding: str) -> None:
    declared = f'<?xml version="1.0" encoding="{encoding}"?>{document}'
    with pytest.raises(SourceError):
        parse(declared.encode(encoding))


def test_text_beside_a_comment_and_attributes_without_namespace() -> None:
    description = ovas.ovf().replace(b"<Name>web", b"<Name><!-- the name -->\n web\t")
    for name in (b"href", b"id", b"diskId", b"fileRef", b"capacity"):
        description = description.replace(b"ovf:" + name + b"=", name + b"=")
    read = parse(description)
    assert (read.name, read.disks[0].href) == ("web", "disk1.vmdk")
