"""-n, -b and --mac."""

from __future__ import annotations

import pytest

from v2v_async.cli import values
from v2v_async.convert.networks import NetworkMap
from v2v_async.errors import UsageError
from v2v_async.model import Nic
from v2v_async.options import MacMapping, Mapping, NetworkOptions

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


# Tried with virt-v2v 2.2 (`virt-v2v -i disk /nonexist -o null …`), but for the comments.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("out", (None, "out")),
        ("out:", (None, "out")),
        (":out", (None, "out")),
        ("in:out", ("in", "out")),
        ("in:out:more", ("in", "out:more")),
        (":in:out", (None, "in:out")),
        ("::", (None, ":")),
    ],
)
@pytest.mark.parametrize("option", ["-n", "-b"])
def test_words_as_virt_v2v_reads_them(option: str, text: str, expected: Mapping) -> None:
    assert values.mapping(option, text, ()) == expected


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ((":",), "nothing named"),
        (("",), "nothing named"),
        (("a", "b"), "maps the default twice"),
        (("a:", "b"), "maps the default twice"),
        ((":a", ":b"), "maps the default twice"),
        (("a:b", "a:b"), "maps ‘a’ twice"),
        (("a:b:c", "a:d"), "maps ‘a’ twice"),
    ],
)
@pytest.mark.parametrize("option", ["-n", "-b"])
def test_refused_as_virt_v2v_refuses(option: str, texts: tuple[str, ...], message: str) -> None:
    known: tuple[Mapping, ...] = ()
    with pytest.raises(UsageError, match=f"{option}.*{message}"):
        for text in texts:
            known += (values.mapping(option, text, known),)


@pytest.mark.parametrize(
    "texts",
    [
        ("a:", "a:c"),  # the default and a name
        ("a:b", "b:a"),
        ("a:x", "b:x"),
    ],
)
def test_taken_as_virt_v2v_takes(texts: tuple[str, ...]) -> None:
    known: tuple[Mapping, ...] = ()
    for text in texts:
        known += (values.mapping("-n", text, known),)
    NetworkMap(NetworkOptions(networks=known, bridges=known))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("",), "cannot understand"),
        (("network:a",), "cannot understand"),
        (("52:54:00:01:02:03:foo:a",), "cannot understand"),
        (("52:54:00:01:02:03:NETWORK:a",), "is no kind"),
        (("52:54:00:01:02:03:network:",), "names no network"),  # virt-v2v: a network ‘’
        (("52:54:00:01:02:03:network:a", "52:54:00:01:02:03:network:b"), "twice"),
        (("52:54:00:01:02:0A:network:a", "52:54:00:01:02:0a:bridge:b"), "twice"),
        (("52:54:00:01:02:03:ip:",), "not an IP address"),
        (("52:54:00:01:02:03:ip:xyz",), "not an IP address"),
        (("52:54:00:01:02:03:ip:foo",), "not an IP address"),  # virt-v2v: an address
        (("52:54:00:01:02:03:ip:1.2.3.4,",), "gateway"),
        (("52:54:00:01:02:03:ip:1.2.3.4,,24",), "gateway"),
        (("52:54:00:01:02:03:ip:1.2.3.4,1.1.1.1,129",), "prefix length"),
        (("52:54:00:01:02:03:ip:1.2.3.4,1.1.1.1,-1",), "prefix length"),
        (("52:54:00:01:02:03:ip:1.2.3.4,1.1.1.1,xx",), "prefix length"),
        (("52:54:00:01:02:03:ip:1.2.3.4,1.1.1.1,24,",), "name server 1"),
    ],
)
def test_macs_refused(texts: tuple[str, ...], message: str) -> None:
    known: tuple[MacMapping, ...] = ()
    with pytest.raises(UsageError, match=message):
        for text in texts:
            known += (values.mac(text, known),)


def test_macs_taken_as_virt_v2v_takes_them() -> None:
    known: tuple[MacMapping, ...] = ()
    for rest in ("network:a:b", "ip:1.2.3.4", "ip:::1", "ip:1.2.3.4,1.1.1.1,24,8.8.8.8,9.9.9.9"):
        known += (values.mac(f"{MAC}:{rest}", known),)
    mapped = NetworkMap(NetworkOptions(macs=known)).map(Nic(mac=MAC))
    assert (mapped.vnet_type, mapped.vnet) == ("network", "a:b")


def test_unnamed_bridges_and_networks_follow_the_default() -> None:
    options = NetworkOptions(networks=((None, "lan"),))
    assert NetworkMap(options).map(Nic(vnet="")).vnet == "lan"
    assert NetworkMap(options).map(Nic(vnet="", vnet_type="bridge")).vnet == ""
