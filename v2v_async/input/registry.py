"""Which inputs there are."""

from __future__ import annotations

from importlib import import_module

from v2v_async.errors import UsageError
from v2v_async.input.contract import Input
from v2v_async.options import InputOptions

KINDS = {
    "disk": "disk:DiskInput",
    "libvirt": "libvirt.guest:LibvirtInput",
    "libvirtxml": "libvirt.xml_file:LibvirtXmlInput",
    "ova": "ova.guest:OvaInput",
    "vcenter": "vmware.vcenter:VCenterInput",
    "vddk": "vmware.vddk:VddkInput",
    "vmx": "vmx.guest:VmxInput",
    "xen-ssh": "xen_ssh:XenSshInput",
}
"""InputOptions.kind: its module and class, imported when asked for: each brings libraries."""


def input_class(kind: str) -> type[Input]:
    """Return the class of an input.

    Raises:
        UsageError: there is no such input.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown input ‘-i {kind}’", hint=f"the inputs are: {', '.join(KINDS)}")
    module, _, name = KINDS[kind].partition(":")
    found: type[Input] = getattr(import_module(f"v2v_async.input.{module}"), name)
    return found


def parse_input(options: InputOptions) -> Input:
    """Return the input that the options name, its options checked.

    Raises:
        UsageError: there is no such input, or its options are wrong.
    """
    return input_class(options.kind).parse(options)
