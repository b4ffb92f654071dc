"""-o libvirt without a libvirt: its options, and a guest cut down to what a host offers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lxml import etree

from tests.unit.test_output_domain_xml import source, target
from v2v_async.errors import TargetError, UsageError
from v2v_async.kvm import KvmStatus
from v2v_async.model import Guestcaps, Nic, SourceTpm, TargetGuest
from v2v_async.options import OutputOptions
from v2v_async.output import libvirt_host
from v2v_async.output.domain_xml import Host, TargetDisk, domain_xml
from v2v_async.output.libvirt import LibvirtOutput
from v2v_async.output.libvirt_host import (
    Offer,
    Place,
    ask_offer,
    domain_types,
    fit,
    read_offer,
    with_uuid,
)
from v2v_async.output.registry import parse_output
from v2v_async.output.uefi import UefiFirmware
from v2v_async.secret import Secret

RECORDED = Path(__file__).parent / "recorded" / "libvirt-9.0-q35-qemu.domcaps.xml"
"""virConnectGetDomainCapabilities(None, "x86_64", "q35", "qemu") of Debian 12's libvirt in session
mode, without KVM and swtpm; the list of processors left out."""

KVM = Offer(
    domain_type="kvm",
    cpu_modes=frozenset({"host-passthrough", "host-model", "maximum", "custom"}),
    graphics=frozenset({"vnc", "spice"}),
    has_rng=True,
    tpm_models=frozenset({"tpm-tis", "tpm-crb"}),
    has_uefi=True,
    has_secure_boot=True,
)
HERE = Place(networks={"default": "active"})


def parse(**fields: Any) -> LibvirtOutput:
    output = parse_output(OutputOptions(mode="libvirt", **fields))
    assert isinstance(output, LibvirtOutput)
    return output


# Options.


def test_the_default_pool_is_virt_v2vs() -> None:
    assert parse().storage == "default"
    assert parse(storage="images").storage == "images"


def test_a_password_is_not_shown() -> None:
    assert "s3cret" not in repr(vars(parse(password=Secret("s3cret"))))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "vmdk"}, "-of vmdk"),
        ({"storage": ""}, "-os is empty"),
        ({"options": (("compressed", None),)}, "only possible with -of qcow2"),
        ({"options": (("compresed", None),)}, "no option ‘-oo compresed’"),
        ({"name": "../../etc/passwd"}, "it has a slash"),
        ({"name": "a\nb"}, "control character"),
    ],
)
def test_wrong_options(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(**fields)


# What a host says.


def test_domain_capabilities_of_a_real_host() -> None:
    offer = read_offer(RECORDED.read_bytes(), "qemu")
    assert offer.cpu_modes == {"maximum", "host-model", "custom"}
    assert {"vnc", "spice", "sdl"} < offer.graphics
    assert (offer.has_rng, offer.has_uefi, offer.has_secure_boot) == (True, True, True)
    assert offer.tpm_models == frozenset(), "only one of the host's own could be handed on"


@pytest.mark.parametrize(
    ("old", "new", "field", "expected"),
    [
        ("<value>passthrough</value>", "<value>emulator</value>", "tpm_models", 2),
        ("<value>efi</value>", "", "has_uefi", False),
        ("<value>efi</value>", "", "has_secure_boot", False),
        ("<rng supported='yes'>", "<rng supported='no'>", "has_rng", False),
        ("<graphics supported='yes'>", "<graphics supported='no'>", "graphics", 0),
    ],
)
def test_each_answer_counts(old: str, new: str, field: str, expected: object) -> None:
    text = RECORDED.read_text()
    assert old in text
    found = getattr(read_offer(text.replace(old, new).encode(), "qemu"), field)
    assert (len(found) if isinstance(found, frozenset) else found) == expected


def test_domain_types_are_of_the_architecture_and_not_of_containers() -> None:
    document = b"""<capabilities>
      <guest><os_type>hvm</os_type><arch name='x86_64'><domain type='qemu'/><domain type='kvm'/>
      </arch></guest>
      <guest><os_type>hvm</os_type><arch name='aarch64'><domain type='qemu'/></arch></guest>
      <guest><os_type>exe</os_type><arch name='x86_64'><domain type='lxc'/></arch></guest>
      </capabilities>"""
    assert domain_types(document, "x86_64") == {"qemu", "kvm"}
    assert domain_types(document, "aarch64") == {"qemu"}
    assert domain_types(document, "riscv64") == frozenset()


class FakeConnection:
    """Answers as a host does that has KVM for x86-64."""

    shown = "fake:///"

    def __init__(self, types: tuple[str, ...]) -> None:
        self.types = types

    async def capabilities(self) -> bytes:
        return (
            b"<capabilities><guest><os_type>hvm</os_type><arch name='x86_64'><domain type='qemu'/>"
            b"<domain type='kvm'/></arch></guest></capabilities>"
        )

    async def domain_capabilities(self, arch: str, machine: str, type_: str) -> bytes | None:
        assert (arch, machine) == ("x86_64", "q35")
        return RECORDED.read_bytes() if type_ in self.types else None


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("types", "kvm", "is_here", "expected"),
    [
        (("kvm", "qemu"), "works", True, "kvm"),
        (("kvm", "qemu"), "denied", True, "kvm"),  # to us, not to the daemon
        (("kvm", "qemu"), "broken", True, "qemu"),
        (("kvm", "qemu"), "broken", False, "kvm"),
        (("qemu",), "works", True, "qemu"),
        ((), "works", True, None),
    ],
)
async def test_the_best_type_that_works(
    monkeypatch: pytest.MonkeyPatch,
    types: tuple[str, ...],
    kvm: Any,
    is_here: bool,
    expected: str | None,
) -> None:
    async def probe() -> KvmStatus:
        return KvmStatus(kvm, "as arranged")

    monkeypatch.setattr(libvirt_host, "probe_kvm", probe)
    connection: Any = FakeConnection(types)
    if expected is None:
        with pytest.raises(TargetError, match="can't run x86_64 guests with the machine ‘q35’"):
            await ask_offer(connection, target(), is_here=is_here)
        return
    offer = await ask_offer(connection, target(), is_here=is_here)
    assert offer.domain_type == expected


# Cut down.


def xml_of(guest: TargetGuest, offer: Offer = KVM, place: Place = HERE) -> etree._Element:
    fitted = fit(guest, offer, place)
    disks = {i: TargetDisk(f"/pool/web-sd{i}", "raw") for i in (1, 2)}
    return etree.fromstring(domain_xml(fitted.target, disks, fitted.uefi, fitted.host))


def warnings(guest: TargetGuest, offer: Offer = KVM, place: Place = HERE) -> str:
    return "\n".join(fit(guest, offer, place).warnings)


FULL = target(
    source=source(display="spice", sound="ich9"),
    guestcaps=Guestcaps(virtio_rng=True, virtio_socket=True, virtio_balloon=True),
    nics=[Nic(), Nic(vnet="br0", vnet_type="bridge")],
)


def test_a_host_that_has_everything_gets_the_guest_as_it_is() -> None:
    fitted = fit(FULL, KVM, HERE)
    assert fitted.warnings == ()
    assert fitted.target == FULL
    disks = {i: TargetDisk(f"/{i}", "raw") for i in (1, 2)}
    unchanged = domain_xml(FULL, disks, None)
    assert domain_xml(fitted.target, disks, None, fitted.host) == unchanged
    assert b"<uuid>abc</uuid>" in domain_xml(FULL, disks, None, with_uuid(fitted, "abc"))


def test_without_kvm_the_type_is_qemu_and_it_is_said() -> None:
    offer = read_offer(RECORDED.read_bytes(), "qemu")
    assert xml_of(target(), offer).get("type") == "qemu"
    assert "KVM can't be used for x86_64 guests" in warnings(target(), offer)


def test_processors_without_kvm() -> None:
    offer = read_offer(RECORDED.read_bytes(), "qemu")
    needy = target(guestcaps=Guestcaps(default_cpu=False))
    assert xml_of(needy).xpath("cpu/@mode") == ["host-passthrough"]
    assert xml_of(needy, offer).xpath("cpu/@mode") == ["maximum"]
    assert xml_of(target(), offer).xpath("cpu/@mode") == ["host-model"]


def test_no_vsock_and_no_random_numbers() -> None:
    poor = Offer(**{**{f: getattr(KVM, f) for f in KVM.__slots__}, "has_rng": False})
    place = Place(has_vsock=False, networks=HERE.networks)
    root = xml_of(FULL, poor, place)
    assert root.find("devices/vsock") is None
    assert root.find("devices/rng") is None
    assert "modprobe vhost_vsock" in warnings(FULL, poor, place)
    assert "no random number device" in warnings(FULL, poor, place)


@pytest.mark.parametrize(
    ("display", "offered", "expected", "told"),
    [
        ("window", {"vnc", "sdl"}, "vnc", ""),
        ("sdl", {"vnc", "sdl"}, "vnc", "SDL"),
        ("spice with password", {"vnc"}, "vnc", "no display ‘spice’"),
        ("spice", {"vnc", "spice"}, "spice", ""),
        (None, {"vnc"}, "vnc", ""),
    ],
)
def test_displays(display: str | None, offered: set[str], expected: str, told: str) -> None:
    guest = target(source=source(display=display))
    offer = Offer(domain_type="kvm", graphics=frozenset(offered), has_rng=True)
    [graphics] = xml_of(guest, offer).findall("devices/graphics")
    assert graphics.get("type") == expected
    said = warnings(guest, offer)
    assert told in said
    assert bool(told) == bool(said)


@pytest.mark.parametrize(
    ("model", "offered", "expected"),
    [
        ("tpm-tis", {"tpm-tis", "tpm-crb"}, "tpm-tis"),
        (None, {"tpm-tis", "tpm-crb"}, "tpm-crb"),
        ("tpm-crb", {"tpm-tis"}, "tpm-tis"),
        ("tpm-crb", set(), None),
    ],
)
def test_a_tpm(model: str | None, offered: set[str], expected: str | None) -> None:
    guest = target(source=source(tpm=SourceTpm(model=model, version="1.2")))
    offer = Offer(domain_type="kvm", has_rng=True, tpm_models=frozenset(offered))
    found = xml_of(guest, offer).find("devices/tpm")
    assert (found is None) == (expected is None)
    if found is None:
        assert "apt-get install swtpm" in warnings(guest, offer)
        return
    assert found.get("model") == expected
    assert found.xpath("backend/@type | backend/@version") == ["emulator", "2.0"]
    assert "recovery key" in warnings(guest, offer)
    assert warnings(target(), offer) == ""


def test_a_network_that_is_not_there() -> None:
    """The system's guest keeps it: an administrator will make it. A session can't have it."""
    guest = target(nics=[Nic(mac="52:54:00:00:00:01", vnet="VM Network"), Nic(vnet="lan")])
    for state, told in (("absent", "virsh net-list --all"), ("inactive", "net-start 'VM Network'")):
        place = Place(networks={"VM Network": state, "lan": "active"})  # type: ignore[dict-item]
        kinds = [i.get("type") for i in xml_of(guest, place=place).findall("devices/interface")]
        assert kinds == ["network", "network"]
        assert told in warnings(guest, place=place)
        assert "‘VM Network’" in warnings(guest, place=place)
        session = Place(is_session=True, networks=place.networks)
        first, second = xml_of(guest, place=session).findall("devices/interface")
        assert (first.get("type"), second.get("type")) == ("user", "network")
        assert first.find("source") is None
        assert first.find("mac") is not None
        assert "user-mode" in warnings(guest, place=session)


def test_a_bridge_that_is_not_there() -> None:
    place = Place(networks=HERE.networks, absent_bridges=frozenset({"br0"}))
    assert "no bridge ‘br0’" in warnings(FULL, place=place)


def test_firmware(monkeypatch: pytest.MonkeyPatch) -> None:
    """libvirt chooses where it can; else a file that is known; else there is no such guest."""
    guest, secure = target(firmware="uefi"), target(firmware="uefi", secure_boot=True)
    system = xml_of(guest).find("os")
    assert system is not None
    assert system.get("firmware") == "efi"
    assert system.xpath("firmware/feature[@name='secure-boot']/@enabled") == ["no"]
    feature = xml_of(secure).find("os/firmware/feature")
    assert feature is not None
    assert feature.get("enabled") == "yes"

    none = Offer(domain_type="kvm", has_rng=True)
    found = UefiFirmware("/CODE.fd", "/VARS.fd")
    monkeypatch.setattr(libvirt_host, "find_uefi", lambda arch, secure: None if secure else found)
    assert xml_of(guest, none).findtext("os/loader") == "/CODE.fd"
    with pytest.raises(TargetError, match="UEFI firmware with secure boot") as caught:
        fit(secure, none, HERE)
    assert "ovmf" in (caught.value.hint or "")
    assert fit(target(), none, HERE).uefi is None


def test_the_host_changes_nothing_by_default() -> None:
    disks = {i: TargetDisk(f"/{i}", "raw") for i in (1, 2)}
    assert domain_xml(FULL, disks, None) == domain_xml(FULL, disks, None, Host())
