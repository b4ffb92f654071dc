"""Guests behind ssh, by the real command line from a host's files to the new disks."""

from __future__ import annotations

from pathlib import Path

import pytest
from lxml import etree

from tests.e2e.test_convert import Place, domain_is_accepted
from tests.integration.servers import digest
from tests.integration.test_input_ssh import files_with, readable_by_others
from tests.sshd import Sshd, running_sshd
from tests.unit.test_vmdk_descriptor import ESXI
from tests.xen_host import disk_xml, xen_host

pytestmark = [pytest.mark.appliance, pytest.mark.usefixtures("converting_once")]
PASSWORD = "hunter2-Pa$$wort"


@pytest.fixture
def place(short_tmp: Path) -> Place:
    return Place(short_tmp)


def io_words(server: Sshd) -> list[str]:
    return [word for key, value in server.io_options for word in ("-io", f"{key}={value}")]


def converts(place: Place, source: Path, words: list[str]) -> etree._ElementTree:
    """Convert to files; return the new guest's XML."""
    before = (digest(source), source.stat().st_mtime_ns)
    done = place.run(*words, "-o", "local", "-os", str(place.out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (digest(source), source.stat().st_mtime_ns) == before
    assert sorted(path.name for path in place.out.iterdir()) == ["web-sda", "web.xml"]
    assert list(place.tmp.iterdir()) == []
    assert digest(place.out / "web-sda") != before[0], "it was converted"
    domain_is_accepted(place.out / "web.xml")
    return etree.parse(place.out / "web.xml")


def test_a_guest_of_esxi(place: Place, phony_guest: Path) -> None:
    """A flat disk and its descriptor on the host, a login by password."""
    source = phony_guest / "system.img"
    store = place.folder / "store"
    store.mkdir()
    (store / "web-flat.vmdk").symlink_to(source)
    size = source.stat().st_size // 512
    text = ESXI.replace("guest-flat", "web-flat").replace("8192", str(size))
    (store / "web.vmdk").write_text(text)
    (store / "web.vmx").write_text(
        'displayName = "web"\nmemSize = "768"\nnumvcpus = "2"\nscsi0:0.fileName = "web.vmdk"\n'
        'ethernet0.addressType = "static"\nethernet0.address = "00:50:56:01:02:03"\n'
        'ethernet0.networkName = "VM Network"\n'
    )
    password = place.folder / "password"
    password.write_text(PASSWORD + "\n")
    with running_sshd(place.folder, password=PASSWORD) as server:
        words = ["-i", "vmx", "-it", "ssh", "-ip", str(password), *io_words(server)]
        made = converts(place, source, [*words, server.uri(store / "web.vmx")])
    assert made.findtext("memory") == str(768 * 1024)
    assert made.findtext("vcpu") == "2"
    nic = made.find("devices/interface")
    assert nic is not None
    assert nic.find("mac").get("address") == "00:50:56:01:02:03"  # type: ignore[union-attr]
    password.unlink()
    assert files_with(place.folder, PASSWORD) == []
    assert readable_by_others(PASSWORD) == []


def test_a_guest_of_xen(place: Place, phony_guest: Path) -> None:
    source = phony_guest / "system.img"
    environment = xen_host(place.folder, "web", disk_xml(source, "xvda"))
    with running_sshd(place.folder, environment=environment) as server:
        uri = f"xen+ssh://{server.user}@{server.host}:{server.port}/"
        made = converts(place, source, ["-ic", uri, *io_words(server), "web"])
    assert made.findtext("memory") == str(768 * 1024)
    nic = made.find("devices/interface")
    assert nic is not None
    assert nic.find("source").get("bridge") == "xenbr0"  # type: ignore[union-attr]
