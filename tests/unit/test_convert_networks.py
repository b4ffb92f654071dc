"""-n, -b and --mac."""

from __future__ import annotations

import pytest

from v2v_async.convert.networks import NetworkMap
from v2v_async.errors import UsageError
from v2v_async.model import Nic
from v2v_async.options import MacMapping, NetworkOptions

MAC = "52:54:00:AB:cd:01"


def test_without_options_nothing_changes() -> None:
    nic = Nic(mac=MAC, vnet="br0", vnet_type="bridge")
    assert NetworkMap(NetworkOptions()).map(nic) is nic


@pytest.mark.parametrize(
    ("nic", "kind", "vnet"),
    [
        (Nic(mac=MAC.lower(), vnet="a"), "bridge", "by-mac"),
        (Nic(mac="52:54:00:00:00:99", vnet="a"), "network", "by-name"),
        (Nic(vnet="b"), "network", "other-networks"),
        (Nic(vnet="a", vnet_type="bridge"), "bridge", "other-bridges"),
        (Nic(vnet="br0", vnet_type="bridge"), "bridge", "by-bridge"),
    ],
    ids=["mac wins", "name", "default network", "a network’s name is no bridge’s", "bridge"],
)
def test_order(nic: Nic, kind: str, vnet: str) -> None:
    options = NetworkOptions(
        networks=(("a", "by-name"), (None, "other-networks")),
        bridges=(("br0", "by-bridge"), (None, "other-bridges")),
        macs=(MacMapping(MAC, "bridge", "by-mac"),),
    )
    mapped = NetworkMap(options).map(nic)
    assert (mapped.vnet_type, mapped.vnet, mapped.original_vnet) == (kind, vnet, nic.vnet)
    assert mapped.mac == nic.mac


def test_a_static_address_moves_nothing() -> None:
    nic = Nic(mac=MAC)
    options = NetworkOptions(macs=(MacMapping(MAC, "ip", "10.0.0.2"),))
    assert NetworkMap(options).map(nic) is nic


@pytest.mark.parametrize(
    "options",
    [
        NetworkOptions(networks=(("a", "x"), ("a", "y"))),
        NetworkOptions(networks=((None, "x"), (None, "y"))),
        NetworkOptions(bridges=(("a", "x"), ("a", "x"))),
        NetworkOptions(
            macs=(MacMapping(MAC, "bridge", "x"), MacMapping(MAC.upper(), "network", "y"))
        ),
    ],
)
def test_contradictions(options: NetworkOptions) -> None:
    with pytest.raises(UsageError, match="given twice"):
        NetworkMap(options)


def test_addresses_that_no_interface_has() -> None:
    options = NetworkOptions(macs=(MacMapping(MAC, "bridge", "x"),))
    assert NetworkMap(options).unused_macs([Nic(mac="52:54:00:00:00:01")]) == [MAC.lower()]
    assert NetworkMap(options).unused_macs([Nic(mac=MAC)]) == []
