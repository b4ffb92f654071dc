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
    "openstack": "openstack.cinder:OpenstackOutput",
    "qemu": "qemu:QemuOutput",
    "rhv": "ovirt.storage_domain:RhvOutput",
    "rhv-upload": "ovirt.upload:RhvUploadOutput",
    "vdsm": "ovirt.vdsm:VdsmOutput",
}
"""Name of the output: its module and class, imported when asked for: each brings libraries."""


def output_class(name: str) -> type[Output]:
    """Return the class of an output.

    Raises:
        UsageError: there is no such output.
    """
    place = KINDS.get(name)
    if place is None:
        raise UsageError(
            f"-o {name}: there is no such output", hint=f"known are: {', '.join(KINDS)}"
        )
    module, _, class_name = place.partition(":")
    found: type[Output] = getattr(import_module(f"v2v_async.output.{module}"), class_name)
    return found


def parse_output(options: OutputOptions) -> Output:
    """Return the output that ``-o`` asks for, its options checked, nothing touched.

    Raises:
        UsageError: there is no such output, or one of its options is wrong.
    """
    return output_class(options.mode).parse(options)
