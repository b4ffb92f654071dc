"""The modes of -i and -o, what virt-v2v calls them, and which of them are built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from v2v_async.errors import NotBuiltError, UsageError


@dataclass(frozen=True, slots=True)
class Mode:
    """One -i or -o mode. ``options``: what its -io or -oo takes, with an explanation."""

    name: str
    is_built: bool = False
    options: tuple[tuple[str, str], ...] = ()
    refused: frozenset[str] = frozenset()


_FEATURES = (
    "virt-v2v",
    "virt-v2v-2.0",
    "virt-v2v-async",
    "libguestfs-rewrite",
    "colours-option",
    "io/oo",
    "mac-option",
    "mac-ip-option",
    "parallel-option",
    "events-option",
)
_COMPRESSED = ("compressed", "compress the disks (only with -of qcow2)")
_OVERLAY = (
    "overlay",
    "cow or qcow2: what keeps the source from being written (default: cow for raw disks and NBD, "
    "qcow2 for other formats)",
)

INPUTS: Mapping[str, Mode] = {
    "disk": Mode("disk", is_built=True, options=(_OVERLAY,)),
    "libvirt": Mode("libvirt"),
    "libvirtxml": Mode("libvirtxml"),
    "ova": Mode("ova"),
    "vmx": Mode("vmx"),
}
INPUT_ALIASES = {"local": "disk"}

OUTPUTS: Mapping[str, Mode] = {
    "glance": Mode("glance"),
    "kubevirt": Mode("kubevirt"),
    "libvirt": Mode("libvirt"),
    # virt-v2v ignores -oc here and refuses -op.
    "local": Mode("local", is_built=True, options=(_COMPRESSED,), refused=frozenset({"-op"})),
    "null": Mode("null", is_built=True, refused=frozenset({"-oa", "-oc", "-op", "-os"})),
    "openstack": Mode("openstack"),
    "qemu": Mode("qemu"),
    "rhv": Mode("rhv"),
    "rhv-upload": Mode("rhv-upload"),
    "vdsm": Mode("vdsm"),
}
OUTPUT_ALIASES = {
    "disk": "local",
    "osp": "openstack",
    "rhosp": "openstack",
    "ovirt": "rhv",
    "rhev": "rhv",
    "ovirt-upload": "rhv-upload",
    "rhev-upload": "rhv-upload",
}


def _find(option: str, text: str, modes: Mapping[str, Mode], aliases: dict[str, str]) -> Mode:
    mode = modes.get(aliases.get(text, text))
    if mode is None:
        near = get_close_matches(text, [*modes, *aliases], n=1)
        known = ", ".join(modes)
        raise UsageError(
            f"{option}: unknown mode ‘{text}’",
            hint=f"did you mean {option} {near[0]}?" if near else f"known modes: {known}",
        )
    return mode


def input_mode(text: str) -> Mode:
    """Return the mode that ``-i TEXT`` names."""
    return _find("-i", text, INPUTS, INPUT_ALIASES)


def output_mode(text: str) -> Mode:
    """Return the mode that ``-o TEXT`` names."""
    return _find("-o", text, OUTPUTS, OUTPUT_ALIASES)


def require_built(option: str, mode: Mode, modes: Mapping[str, Mode], *, defaulted: bool) -> None:
    """Raise NotBuiltError unless ``mode`` works in this version."""
    if mode.is_built:
        return
    built = " or ".join(f"{option} {other.name}" for other in modes.values() if other.is_built)
    why = " (the default)" if defaulted else ""
    raise NotBuiltError(
        f"{option} {mode.name}{why}", hint=f"use {built}, or virt-v2v(1) for this guest"
    )


def list_options(option: str, mode_option: str, mode: Mode) -> str:
    """Return what ``-io ?`` or ``-oo ?`` prints."""
    if not mode.options:
        return f"{mode_option} {mode.name} takes no {option} options.\n"
    lines = [f"{option} options of {mode_option} {mode.name}:", ""]
    lines += [f"  {option} {name:<16} {text}" for name, text in mode.options]
    return "\n".join(lines) + "\n"


def check_options(
    option: str, mode_option: str, mode: Mode, pairs: tuple[tuple[str, str | None], ...]
) -> None:
    """Raise UsageError for a -io or -oo name that ``mode`` does not take."""
    known = [name for name, _ in mode.options]
    for name, _ in pairs:
        if name not in known:
            hint = "it takes " + ", ".join(known) if known else f"leave {option} {name} out"
            raise UsageError(f"{mode_option} {mode.name} takes no {option} {name}", hint=hint)


def capabilities() -> str:
    """Return what ``--machine-readable`` alone prints: virt-v2v's form, only what is built.

    Source: virt-v2v(1), MACHINE READABLE OUTPUT.
    """
    lines = list(_FEATURES)
    lines += [f"input:{mode.name}" for mode in INPUTS.values() if mode.is_built]
    lines += [f"output:{mode.name}" for mode in OUTPUTS.values() if mode.is_built]
    lines += ["convert:linux", "convert:windows"]
    return "\n".join(lines) + "\n"
