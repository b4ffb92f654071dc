"""-o libvirt with the system's libvirtd, which runs guests as a user of its own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import libvirtd
from tests.conftest import processes_naming, require
from tests.integration.test_output_local import reporter
from tests.integration.test_targets_and_back import (
    MAC,
    PhonyPlace,
    assert_disks,
    assert_guest,
    back,
    convert,
)
from tests.integration.test_targets_and_back import place as place
from tests.integration.test_targets_and_back import recorded as recorded
from v2v_async.errors import TargetError
from v2v_async.options import MacMapping, NetworkOptions, OutputOptions
from v2v_async.output.registry import parse_output

pytestmark = pytest.mark.anyio
NETWORK = (
    f"<network><name>lan</name><forward mode='bridge'/><bridge name='{libvirtd.BRIDGE}'/></network>"
)


@pytest.fixture(scope="module")
def daemon() -> Iterator[tuple[Path, str]]:
    require("libvirtd", "qemu-system-x86_64", "unshare", "ip")
    if os.geteuid() != 0:
        pytest.skip("the system's libvirtd needs root")
    folder = Path(tempfile.mkdtemp(prefix="vt.", dir="/var/tmp"))
    try:
        with libvirtd.system_libvirtd(folder) as uri:
            yield folder, uri
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def host(daemon: tuple[Path, str]) -> Iterator[tuple[str, Path]]:
    """The URI, and the directory of its pool ``images``."""
    folder, uri = daemon
    pool = folder / "pool"
    pool.mkdir(mode=0o711)
    with libvirtd.connection(uri) as libvirt:
        made = libvirt.storagePoolCreateXML(
            f"<pool type='dir'><name>images</name><target><path>{pool}</path></target></pool>"
        )
        network = libvirt.networkCreateXML(NETWORK)
        try:
            yield uri, pool
        finally:
            for domain in libvirt.listAllDomains(0):
                if domain.isActive():
                    domain.destroy()
                domain.undefineFlags(4)  # with its NVRAM
            network.destroy()
            made.destroy()
            shutil.rmtree(pool)


async def test_started_by_another_user(place: PhonyPlace, host: tuple[str, Path]) -> None:
    """UEFI with secure boot, a TPM, a network; nobody but root may read the disks before."""
    require("swtpm", "swtpm_setup")
    uri, pool = host
    output = OutputOptions("libvirt", connection=uri, storage="images")
    networks = NetworkOptions(macs=(MacMapping(MAC, "network", "lan"),))
    umask = os.umask(0o077)
    try:
        await convert(place, "libvirtxml", output, networks)
    finally:
        os.umask(umask)
    disks = [pool / "web-sda", pool / "web-sdb"]
    assert_disks(place, disks, "raw")
    before = [(disk.stat().st_uid, disk.stat().st_mode & 0o777) for disk in disks]
    assert before == [(0, 0o600), (0, 0o600)]
    with libvirtd.connection(uri) as libvirt:
        domain = libvirt.lookupByName("web")
        domain.create()
        assert domain.state()[0] == 1  # running
        assert all(disk.stat().st_uid != 0 for disk in disks), "the daemon gives them to qemu"
        xml = domain.XMLDesc(0)
        emulators = processes_naming(f"{domain.UUIDString()}/tpm2")
        domain.destroy()
    assert "<source network='lan'" in xml
    assert "secure='yes'" in xml
    assert any("swtpm socket" in each for each in emulators), emulators
    assert [(disk.stat().st_uid, disk.stat().st_mode & 0o777) for disk in disks] == before
    source = await back("libvirt", "web", connection=uri)
    assert_guest(source, "libvirtxml", disks, "raw")
    assert [(nic.mac, nic.vnet) for nic in source.nics] == [(MAC, "lan")]


async def test_a_network_that_is_not_there(place: PhonyPlace, host: tuple[str, Path]) -> None:
    """The system's daemon can have it later: the guest is defined with it, and it is said."""
    uri, _ = host
    output = OutputOptions("libvirt", connection=uri, storage="images")
    _, warnings = await convert(place, "disk", output)
    assert any("there is no network ‘default’" in warning for warning in warnings)
    with libvirtd.connection(uri) as libvirt:
        domain = libvirt.lookupByName("web")
        assert "<source network='default'/>" in domain.XMLDesc(2)
        libvirt.networkCreateXML(NETWORK.replace("lan", "default"))
        try:
            domain.create()
            domain.destroy()
        finally:
            libvirt.networkLookupByName("default").destroy()


async def test_the_pool_is_the_systems(host: tuple[str, Path]) -> None:
    uri, _ = host
    output = parse_output(OutputOptions("libvirt", connection=uri))
    with pytest.raises(TargetError, match="no storage pool ‘default’"):
        await output.check(reporter())
