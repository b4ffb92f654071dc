"""Which outputs there are."""

from __future__ import annotations

from importlib import import_module

from v2v_async.errors import UsageError
from v2v_async.options import OutputOptions
from v2v_async.output.contract import Output

KINDS = {
    "glance": "openstack.glance:GlanceOutput",
    "json": "json_file:JsonOutput",
    "kubevirt": "kubevirt:KubevirtOutput",
    "libvirt": "libvirt:LibvirtOutput",
    "local": "local:LocalOutput",
    "null": "null:NullOutput",
    "openstack": "openstack.cinder:OpenStackOutput",
    "qemu": "qemu:QemuOutput",
    "rhv": "ovirt.storage_domain:RhvOutput",
    "rhv-upload": "ovirt.upload:RhvUploadOutput",
    "vdsm": "ovirt.vdsm:VdsmOutput",
}
"""Name of the output: its module and class, imported when asked for: each brings libraries."""

ALIASES = {
    "disk": "local",
    "osp": "openstack",
    "rhosp": "openstack",
    "ovirt": "rhv",
    "rhev": "rhv",
    "ovirt-upload": "rhv-upload",
    "rhev-upload": "rhv-upload",
}
"""Other names for the same output, as virt-v2v has them."""


def output_class(name: str) -> type[Output]:
    """Return the class of an output.

    Raises:
        UsageError: there is no such output.
    """
    place = KINDS.get(ALIASES.get(name, name))
    if place is None:
        known = ", ".join(sorted({*KINDS, *ALIASES}))
        raise UsageError(f"-o {name}: there is no such output", hint=f"known are: {known}")
    module, _, class_name = place.partition(":")
    found: type[Output] = getattr(import_module(f"v2v_async.output.{module}"), class_name)
    return found


def parse_output(options: OutputOptions) -> Output:
    """Return the output that ``-o`` asks for, its options checked, nothing touched.

    Raises:
        UsageError: there is no such output, or one of its options is wrong.
    """
    return output_class(options.mode).parse(options)
