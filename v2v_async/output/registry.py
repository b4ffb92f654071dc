"""Which outputs there are."""

from __future__ import annotations

from v2v_async.errors import NotBuiltError, UsageError
from v2v_async.options import OutputOptions
from v2v_async.output.contract import Output
from v2v_async.output.local import LocalOutput
from v2v_async.output.null import NullOutput

OUTPUTS: dict[str, type[Output]] = {
    "local": LocalOutput,
    "disk": LocalOutput,
    "null": NullOutput,
}
"""As ``-o`` names them, other names for the same one among them."""

NOT_BUILT = (
    "glance",
    "json",
    "kubevirt",
    "libvirt",
    "openstack",
    "ovirt",
    "ovirt-upload",
    "qemu",
    "rhv",
    "rhv-upload",
    "vdsm",
)
"""What virt-v2v(1) has besides, up to 2.10."""


def parse_output(options: OutputOptions) -> Output:
    """Return the output that ``-o`` asks for, its options checked, nothing touched.

    Raises:
        UsageError: there is no such output, or one of its options is wrong.
        NotBuiltError: virt-v2v has it and this program does not yet.
    """
    kind = OUTPUTS.get(options.mode)
    if kind is not None:
        return kind.parse(options)
    if options.mode in NOT_BUILT:
        raise NotBuiltError(
            f"-o {options.mode}",
            hint="write to files with -o local and import those, or use virt-v2v(1)",
        )
    known = ", ".join(sorted({*OUTPUTS, *NOT_BUILT}))
    raise UsageError(f"-o {options.mode}: there is no such output", hint=f"known are: {known}")
