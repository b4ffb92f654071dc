"""Which outputs there are."""

from __future__ import annotations

from importlib import import_module

from v2v_async.errors import NotBuiltError, UsageError
from v2v_async.options import OutputOptions
from v2v_async.output.contract import Output

KINDS = {
    "json": "json_file:JsonOutput",
    "kubevirt": "kubevirt:KubevirtOutput",
    "libvirt": "libvirt:LibvirtOutput",
    "local": "local:LocalOutput",
    "null": "null:NullOutput",
    "qemu": "qemu:QemuOutput",
    "rhv": "ovirt.storage_domain:RhvOutput",
    "vdsm": "ovirt.vdsm:VdsmOutput",
}
"""Name of the output: its module and class, imported when asked for: each brings libraries."""

NOT_BUILT = ("glance", "openstack", "rhv-upload")
"""What virt-v2v(1) has besides, up to 2.10."""


def output_class(name: str) -> type[Output]:
    """Return the class of an output.

    Raises:
        UsageError: there is no such output.
        NotBuiltError: virt-v2v has it and this program does not yet.
    """
    if name in NOT_BUILT:
        raise NotBuiltError(
            f"-o {name}",
            hint="write to files with -o local and import those, or use virt-v2v(1)",
        )
    place = KINDS.get(name)
    if place is None:
        known = ", ".join(sorted({*KINDS, *NOT_BUILT}))
        raise UsageError(f"-o {name}: there is no such output", hint=f"known are: {known}")
    module, _, class_name = place.partition(":")
    found: type[Output] = getattr(import_module(f"v2v_async.output.{module}"), class_name)
    return found


def parse_output(options: OutputOptions) -> Output:
    """Return the output that ``-o`` asks for, its options checked, nothing touched.

    Raises:
        UsageError: there is no such output, or one of its options is wrong.
        NotBuiltError: virt-v2v has it and this program does not yet.
    """
    return output_class(options.mode).parse(options)
