"""The modes of -i and -o, and what virt-v2v calls them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from v2v_async.errors import UsageError
from v2v_async.output.openstack.login_options import LOGIN_HELP, VOLUME_HELP


@dataclass(frozen=True, slots=True)
class Mode:
    """An -o mode. ``options``: what its -oo takes, with an explanation."""

    name: str
    options: tuple[tuple[str, str], ...] = ()
    refused: frozenset[str] = frozenset()


_FEATURES = (
    "virt-v2v",
    "virt-v2v-2.0",
    "virt-v2v-async",
    "libguestfs-rewrite",
    "colours-option",
    "vdsm-compat-option",
    "io/oo",
    "mac-option",
    "mac-ip-option",
    "parallel-option",
    "events-option",
)
_COMPRESSED = ("compressed", "compress the disks (only with -of qcow2)")
_OVERLAY = (
    "overlay",
    "cow, kept or qcow2: what keeps the source from being written (default: cow for raw disks and "
    "NBD, qcow2 for other formats); kept: as cow, but a later run can go on from the conversion",
)

_VDDK = (
    ("vddk-libdir", "the folder of VMware's library: the one that has lib64 in it"),
    (
        "vddk-thumbprint",
        "SHA-1 of the server's certificate, AA:BB:… (default: asked of the server)",
    ),
    ("vddk-compression", "none, zlib, fastlz or skipz: how the server packs what it sends"),
    ("vddk-config", "VDDK's configuration file"),
    ("vddk-cookie", "the cookie of a session with the server, instead of a login"),
    ("vddk-file", "read this [DATASTORE] NAME.vmdk instead; once for each disk, in their order"),
    ("vddk-nfchostport", "the port of the host's NFC service (default: 902)"),
    ("vddk-noextents", "true: do not ask where the data is, which some servers take long to tell"),
    ("vddk-port", "the server's port (default: that of -ic, or 443)"),
    ("vddk-snapshot", "the managed object reference of a snapshot to read"),
    ("vddk-transports", "how to read, the first that works: MODE:MODE:…"),
)


_SSH = (
    ("ssh-config", "the ssh configuration file to read in place of ~/.ssh/config"),
    ("ssh-identity", "a private key to log in with, before those of ~/.ssh"),
    (
        "ssh-known-hosts",
        "the file with the keys of known hosts, in place of ~/.ssh/known_hosts",
    ),
)

_VDSM = (
    (
        "vdsm-image-uuid",
        "UUID of a disk's image folder, which must be there; once for each disk",
    ),
    ("vdsm-vol-uuid", "UUID of a disk's volume; once for each disk"),
    ("vdsm-vm-uuid", "UUID of the new guest"),
    ("vdsm-ovf-output", "the directory that the OVF is written to (default: the current one)"),
    (
        "vdsm-ovf-flavour",
        "rhvexp or ovirt: the OVF of export domains (the default), or the engine's own",
    ),
    ("vdsm-compat", "0.10 or 1.1: the age of qcow2 that is written (default: 0.10)"),
)

_RHV_NAMES = (
    ("cafile", "the engine's certificate authority (ca.pem), to check certificates against"),
    ("cluster", "the cluster that the guest is made in (default: Default)"),
    ("direct", "false: the same as -oo rhv-proxy (default: true)"),
    ("disk-uuid", "UUID of a new disk; once for each disk (default: random)"),
    ("proxy", "send the disks through the engine, where the hosts can't be reached"),
    ("verifypeer", "check the certificates of the engine and its hosts (default: false)"),
)
_RHV_UPLOAD = (
    *((f"rhv-{name}", text) for name, text in _RHV_NAMES),
    # As newer virt-v2v calls them.
    *((f"ovirt-{name}", f"the same as -oo rhv-{name}") for name, _ in _RHV_NAMES),
)


@dataclass(frozen=True, slots=True)
class InputKind:
    """An input as the command line sees it; ``-i libvirt`` is several (InputOptions.kind).

    ``options``: what its -io takes, with an explanation; ``uses``: which of -ic -if -ip -it it
    reads; ``argument``: what the words after the options are, ``most`` how many there may be.
    ``needs_password``: where -ip is not given, a terminal is asked.
    """

    name: str
    argument: str
    options: tuple[tuple[str, str], ...] = (_OVERLAY,)
    uses: frozenset[str] = frozenset()
    most: int | None = 1
    noun: str = "guest"
    needs_password: bool = False


INPUT_KINDS: Mapping[str, InputKind] = {
    "disk": InputKind(
        "-i disk",
        "the guest's disks, or NBD URIs of them, system disk first",
        uses=frozenset({"-if"}),
        most=None,
        noun="disk",
    ),
    "libvirt": InputKind(
        "-i libvirt", "the guest's name or UUID", uses=frozenset({"-ic", "-if", "-ip"})
    ),
    "libvirtxml": InputKind(
        "-i libvirtxml",
        "the file with the guest's libvirt XML",
        uses=frozenset({"-ic", "-if", "-ip"}),
    ),
    "ova": InputKind("-i ova", "the OVA file, or the folder that it was unpacked to"),
    "vmx": InputKind(
        "-i vmx",
        "the guest's VMX file, or ssh://HOST/PATH of it with -it ssh",
        options=(_OVERLAY, *_SSH),
        uses=frozenset({"-ip", "-it"}),
    ),
    "vddk": InputKind(
        "-i libvirt -it vddk",
        "the guest's name",
        options=(_OVERLAY, *_VDDK),
        uses=frozenset({"-ic", "-ip", "-it"}),
        needs_password=True,
    ),
    "vcenter": InputKind(
        "-i libvirt -ic vpx://",
        "the guest's name",
        uses=frozenset({"-ic", "-ip"}),
        needs_password=True,
    ),
    "xen-ssh": InputKind(
        "-i libvirt -ic xen+ssh://",
        "the guest's name",
        options=(_OVERLAY, *_SSH),
        uses=frozenset({"-ic", "-if", "-ip", "-it"}),
    ),
}

INPUTS = ("disk", "libvirt", "libvirtxml", "ova", "vmx")
INPUT_ALIASES = {"local": "disk"}

OUTPUTS: Mapping[str, Mode] = {
    "glance": Mode(
        "glance",
        options=(_COMPRESSED, *LOGIN_HELP.items()),
        refused=frozenset({"-os"}),
    ),
    "json": Mode(
        "json",
        options=(
            _COMPRESSED,
            (
                "json-disks-pattern",
                "where the disks go below DIR, with %{GuestName}, %{DiskNo} (1, 2 …), "
                "%{DiskDeviceName} (sda, sdb …), %% (default: %{GuestName}-%{DiskDeviceName})",
            ),
        ),
        refused=frozenset({"-oc", "-op"}),
    ),
    "kubevirt": Mode(
        "kubevirt",
        options=(
            _COMPRESSED,
            (
                "create",
                "false: the disks of -oo disk are there already, files or block devices "
                "(default: true)",
            ),
            ("disk", "where a disk goes, in place of DIR/NAME-sdX; once for each disk"),
        ),
        refused=frozenset({"-op"}),
    ),
    "libvirt": Mode("libvirt", options=(_COMPRESSED,)),
    # virt-v2v ignores -oc here and refuses -op.
    "local": Mode("local", options=(_COMPRESSED,), refused=frozenset({"-op"})),
    "null": Mode("null", refused=frozenset({"-oa", "-oc", "-op", "-os"})),
    "openstack": Mode("openstack", options=(*VOLUME_HELP.items(), *LOGIN_HELP.items())),
    "qemu": Mode(
        "qemu",
        options=(
            _COMPRESSED,
            ("qemu-boot", "start the guest in the background when it is converted"),
        ),
        refused=frozenset({"-op"}),
    ),
    # virt-v2v ignores -oc here and refuses -op.
    "rhv": Mode("rhv", refused=frozenset({"-op"})),
    "rhv-upload": Mode("rhv-upload", options=_RHV_UPLOAD),
    "vdsm": Mode("vdsm", options=_VDSM, refused=frozenset({"-op"})),
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


def _find(option: str, text: str, names: Sequence[str], aliases: Mapping[str, str]) -> str:
    name = aliases.get(text, text)
    if name not in names:
        near = get_close_matches(text, [*names, *aliases], n=1)
        raise UsageError(
            f"{option}: unknown mode ‘{text}’",
            hint=f"did you mean {option} {near[0]}?"
            if near
            else f"known modes: {', '.join(names)}",
        )
    return name


def input_mode(text: str) -> str:
    """Return the input that ``-i TEXT`` names."""
    return _find("-i", text, INPUTS, INPUT_ALIASES)


def output_mode(text: str) -> Mode:
    """Return the mode that ``-o TEXT`` names."""
    return OUTPUTS[_find("-o", text, tuple(OUTPUTS), OUTPUT_ALIASES)]


Options = tuple[tuple[str, str], ...]


def list_options(option: str, mode: str, options: Options) -> str:
    """Return what ``-io ?`` or ``-oo ?`` prints; ``mode`` as it is written: ``-i disk``."""
    if not options:
        return f"{mode} takes no {option} options.\n"
    lines = [f"{option} options of {mode}:", ""]
    width = max(16, *(len(name) for name, _ in options))
    lines += [f"  {option} {name:<{width}} {text}" for name, text in options]
    return "\n".join(lines) + "\n"


def check_options(
    option: str, mode: str, options: Options, pairs: tuple[tuple[str, str | None], ...]
) -> None:
    """Raise UsageError for a -io or -oo name that is not one of ``options``."""
    known = [name for name, _ in options]
    for name, _ in pairs:
        if name not in known:
            hint = "it takes " + ", ".join(known) if known else f"leave {option} {name} out"
            raise UsageError(f"{mode} takes no {option} {name}", hint=hint)


def capabilities() -> str:
    """Return what ``--machine-readable`` alone prints: in virt-v2v's form.

    Source: virt-v2v(1), MACHINE READABLE OUTPUT.
    """
    lines = list(_FEATURES)
    lines += [f"input:{name}" for name in INPUTS]
    lines += [f"output:{mode.name}" for mode in OUTPUTS.values()]
    lines += ["convert:linux", "convert:windows", "ovf:ovirt", "ovf:rhvexp"]
    return "\n".join(lines) + "\n"
