"""Which inputs there are."""

from __future__ import annotations

from v2v_async.errors import NotBuiltError, UsageError
from v2v_async.input.contract import Input
from v2v_async.input.disk import DiskInput
from v2v_async.options import InputOptions

BUILT: dict[str, type[Input]] = {"disk": DiskInput, "local": DiskInput}
KNOWN = ("disk", "libvirt", "libvirtxml", "local", "ova", "vmx")


def parse_input(options: InputOptions) -> Input:
    """Return the input that ``-i`` names, its options checked.

    Raises:
        NotBuiltError: virt-v2v has it, this version has not.
        UsageError: there is no such input, or its options are wrong.
    """
    kind = BUILT.get(options.mode)
    if kind is not None:
        return kind.parse(options)
    if options.mode in KNOWN:
        raise NotBuiltError(
            f"the input ‘-i {options.mode}’",
            hint=f"built in this version: {', '.join(sorted(BUILT))}; or use virt-v2v(1)",
        )
    raise UsageError(
        f"unknown input ‘-i {options.mode}’", hint=f"the inputs are: {', '.join(KNOWN)}"
    )
