"""Which input a command line means."""

from __future__ import annotations

import pytest

from v2v_async.errors import UsageError
from v2v_async.input.registry import KINDS, input_class
from v2v_async.options import InputOptions


@pytest.mark.parametrize(
    ("mode", "connection", "transport", "kind"),
    [
        ("disk", None, None, "disk"),
        ("local", None, None, "disk"),
        ("ova", None, None, "ova"),
        ("vmx", None, "ssh", "vmx"),
        ("libvirtxml", None, None, "libvirtxml"),
        ("libvirt", None, None, "libvirt"),
        ("libvirt", "qemu:///system", None, "libvirt"),
        ("libvirt", "test:///x.xml", None, "libvirt"),
        ("libvirt", "qemu+ssh://root@host/system", None, "libvirt"),
        ("libvirt", "vpx://user@vcenter/Datacenter/esxi", None, "vcenter"),
        ("libvirt", "vpx://user@vcenter/Datacenter/esxi", "vddk", "vddk"),
        ("libvirt", "esx://root@esxi", None, "vcenter"),
        ("libvirt", "esx://root@esxi?no_verify=1", "vddk", "vddk"),
        ("libvirt", "xen+ssh://root@xen", None, "xen-ssh"),
        ("libvirt", "xen:///", None, "libvirt"),
        ("libvirt", "vpx:///", None, "libvirt"),
    ],
)
def test_kind(mode: str, connection: str | None, transport: str | None, kind: str) -> None:
    assert InputOptions(mode, ("x",), connection, transport=transport).kind == kind


def test_every_kind_has_a_class() -> None:
    for kind in KINDS:
        assert input_class(kind).name


def test_an_unknown_kind() -> None:
    with pytest.raises(UsageError, match="unknown input"):
        input_class("floppy")
