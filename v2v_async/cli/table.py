"""Every option of the convert command: virt-v2v(1)'s own, and ours. One table, three readers.

:mod:`.getopt` parses by it; :func:`parser` makes rich help and shell completion of it;
``docs/command-line.md`` is checked against it. Long and short spellings follow virt-v2v 2.2
to 2.12.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from v2v_async.cli.getopt import Option

GROUPS = {
    "input": ("input", "where the guest comes from; everything there is only read"),
    "output": ("output", "where the converted guest goes"),
    "conversion": ("conversion", "handed on to virt-v2v-in-place"),
    "network": ("network mapping", "repeat for several networks, bridges or NICs"),
    "copy": ("copy", "how the disks are copied"),
    "disk": ("what is copied", None),
    "speed": ("speed and limits", "what is left out is found out, and adjusted while it runs"),
    "safety": ("safety", None),
    "screen": ("screen", "what you and other programs see"),
    "general": ("other", None),
}
"""Group of an option: its title and a line of explanation."""


def _required(*names: str, metavar: str, **rest: Any) -> Option:
    return Option(names, metavar=metavar, argument="required", **rest)


def _alias(*names: str, metavar: str | None = "VALUE") -> Option:
    """Return an old spelling: accepted, but not shown."""
    return Option(names, metavar=metavar, argument="required" if metavar else "none")


INPUT = (
    _required("-i", metavar="MODE", group="input",
              help="disk (or local), libvirt (the default), libvirtxml, ova or vmx",
              once=True),
    _required("-if", metavar="FORMAT", help="format of the disks; default: found out",
              group="input", once=True),
    _required("-ic", metavar="URI", help="libvirt URI to read from", group="input", once=True),
    _required("-io", metavar="NAME[=VALUE]", help="option of the input; ‘?’ lists them",
              group="input"),
    _required("-ip", metavar="FILE", help="file with the input's password", group="input",
              once=True, files="file"),
    _required("-it", metavar="TRANSPORT", help="ssh or vddk", group="input",
              once=True),
)  # fmt: skip

OUTPUT = (
    _required("-o", metavar="MODE", help="local (or disk), null; default: libvirt", group="output",
              once=True),
    _required("-os", metavar="DIR", help="directory for the disks and the XML", group="output",
              once=True, files="directory"),
    _required("-of", metavar="FORMAT", help="raw (default) or qcow2", group="output",
              once=True),
    _required("-oa", metavar="ALLOCATION", help="sparse (default) or preallocated", group="output",
              once=True),
    _required("-on", metavar="NAME", help="new name of the guest", group="output", once=True),
    _required("-oo", metavar="NAME[=VALUE]", help="option of the output; ‘?’ lists them",
              group="output"),
    _required("-oc", metavar="URI", help="where the output is managed", group="output", once=True),
    _required("-op", metavar="FILE", help="file with the output's password", group="output",
              once=True, files="file"),
)  # fmt: skip

CONVERSION = (
    _required("--root", metavar="ROOT", help="ask, single, first or /dev/…: which of several "
              "operating systems", group="conversion"),
    _required("--key", metavar="SELECTOR", help="LUKS key: ID:key:PASSPHRASE, ID:file:FILE or "
              "ID:clevis", group="conversion"),
    Option(("--keys-from-stdin",), help="read passphrases from stdin", group="conversion"),
    Option(("--echo-keys",), help="show passphrases while they are typed", group="conversion"),
    _required("--block-driver", metavar="DRIVER", help="virtio-blk or virtio-scsi for Windows "
              "(not built yet)", group="conversion", once=True, not_built=True),
    _required("--memsize", "-m", metavar="MB", help="memory of the appliance (not built yet)",
              group="conversion", not_built=True),
    _required("--smp", metavar="N", help="CPUs of the appliance (not built yet)",
              group="conversion", not_built=True),
)  # fmt: skip

NETWORK = (
    _required("-n", "--network", metavar="[IN:]OUT", help="connect network IN (or all) to OUT",
              group="network"),
    _required("-b", "--bridge", metavar="[IN:]OUT", help="connect bridge IN (or all) to OUT",
              group="network"),
    _required("--mac", metavar="MAC:KIND:OUT", help="one NIC; KIND is network, bridge, or ip with "
              "ADDRESS[,GATEWAY[,LENGTH[,DNS…]]]", group="network"),
)  # fmt: skip

COPY = (
    _required("--parallel", metavar="N", help="disks copied at once; default: all of them",
              group="copy"),
    _required("--max-connections", metavar="N", help="connections of all disks together",
              group="copy"),
    _required("--bandwidth", metavar="RATE", help="over all disks: bits a second, or bytes as "
              "50MB/s", group="copy", once=True),
    _required("--bandwidth-file", metavar="FILE", help="the same from a file, which may change "
              "meanwhile", group="copy", once=True, files="file"),
    _required("--retries", metavar="N", help="tries again after a failed request or a lost "
              "connection; default 5", group="copy"),
    Option(("--verify",), help="read both sides again and compare", group="copy"),
    _required("--copier", metavar="NAME", help="native (default), nbdcopy or qemu-img",
              group="copy"),
    _required("--overlap", metavar="MODE", help="copy while the guest is converted: auto (default: "
              "large local disks), on or off", group="copy"),
    _required("--overlap-waste", metavar="SIZE|N%", help="how much may be copied in vain before "
              "the copy waits for the conversion; default 20%", group="copy"),
)  # fmt: skip

SCREEN = (
    Option(("-q", "--quiet"), help="only warnings and errors", group="screen"),
    Option(("-v", "--verbose"), help="debugging messages too", group="screen"),
    Option(("-x",), help="trace libguestfs calls, in the log of the conversion", group="screen"),
    Option(("--machine-readable",), metavar="FORMAT", argument="optional",
           help="virt-v2v's messages for programs, to stdout, file:NAME, fd:N or stream:stderr; "
           "alone: list what is supported", group="screen"),
    _required("--events", metavar="FILE|fd:N", help="every event as a line of JSON",
              group="screen", files="file"),
    Option(("--colours", "--colors", "--colour", "--color"), group="screen",
           help="colours even where there is no terminal"),
    Option(("--wrap",), help="accepted; lines are wrapped on a terminal only", group="screen"),
)  # fmt: skip

GENERAL = (
    Option(("--print-source",), help="describe the source guest and stop"),
    Option(("-V", "--version"), help="show the version and stop"),
    Option(("--help", "-h"), help="show this help and stop"),
)

# Old spellings of -ip, -io and -oo, and what virt-v2v accepts and ignores.
ALIASES = (
    _alias("--password-file", metavar="FILE"),
    *(_alias(f"--vddk-{n}") for n in (
        "config", "cookie", "libdir", "nfchostport", "port", "snapshot", "thumbprint",
        "transports")),
    *(_alias(f"--vdsm-{n}") for n in (
        "compat", "image-uuid", "ovf-flavour", "ovf-output", "vm-uuid", "vol-uuid")),
    _alias("--compressed", metavar=None),
    _alias("--qemu-boot", metavar=None),
    _alias("--no-trim"),
    _alias("--vmtype"),
    _alias("--in-place", metavar=None),
    _alias("--debug-gc", metavar=None),
)  # fmt: skip

_CUSTOMIZE_WITH_ARGUMENT = (
    "append-line", "chmod", "chown", "commands-from-file", "copy", "copy-in", "delete", "edit",
    "firstboot", "firstboot-command", "firstboot-install", "hostname", "inject-blnsvr",
    "inject-qemu-ga", "inject-virtio-win", "install", "link", "mkdir", "move", "password",
    "password-crypto", "root-password", "run", "run-command", "scrub", "sm-attach",
    "sm-credentials", "ssh-inject", "tar-in", "timezone", "touch", "truncate",
    "truncate-recursive", "uninstall", "upload", "write",
)  # fmt: skip
_CUSTOMIZE_FLAGS = (
    "no-logfile", "no-selinux-relabel", "selinux-relabel", "sm-register", "sm-remove",
    "sm-unregister", "update",
)  # fmt: skip
CUSTOMIZE = (
    *(_alias(f"--{name}") for name in _CUSTOMIZE_WITH_ARGUMENT),
    *(_alias(f"--{name}", metavar=None) for name in _CUSTOMIZE_FLAGS),
)
"""virt-customize(1)'s operations, which virt-v2v-in-place takes from 2.6 on."""

SHOWN = (*INPUT, *OUTPUT, *CONVERSION, *NETWORK, *COPY, *SCREEN, *GENERAL)
OPTIONS: tuple[Option, ...] = (*SHOWN, *ALIASES, *CUSTOMIZE)

_EPILOG = (
    "Every option of virt-v2v(1) is accepted, in virt-v2v's spelling, and virt-customize(1)'s "
    "operations too. What this version has not built yet is refused by name. "
    "Example: virt-v2v-async -i disk system.img data.img -o local -os /var/tmp"
)


def parser(
    prog: str,
    options: Sequence[Option] = SHOWN,
    description: str = "Convert a guest to run on KVM, copying all its disks at once.",
    epilog: str | None = _EPILOG,
    *,
    usage: str | None = None,
    words: tuple[str, str] | None = ("GUEST", "disk images, or URIs, of the guest: system first"),
) -> argparse.ArgumentParser:
    """Return an argparse parser that only shows help and completion: it never parses.

    ``words`` are the metavariable and the help of what is not an option; None: nothing is.
    """
    from v2v_async.cli.help import HelpFormatter, completed_by

    made = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [-i MODE] [-i…] [-o MODE] [-o…] [options] GUEST …"
        if options is SHOWN
        else usage,
        description=description,
        epilog=epilog,
        add_help=False,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    if words is not None:
        metavar, meaning = words
        completed_by(made.add_argument("guest", metavar=metavar, nargs="*", help=meaning), "file")
    groups: dict[str, Any] = {}
    for option in options:
        if option.group not in groups:
            groups[option.group] = made.add_argument_group(*GROUPS[option.group])
        shown: dict[str, Any] = {"help": (option.help or "").replace("%", "%%")}
        if option.argument == "none":
            shown["action"] = "store_true"
        else:
            shown["metavar"] = option.metavar
            shown["nargs"] = "?" if option.argument == "optional" else None
        # The short name first: ‘-q, --quiet’.
        names = sorted(option.names, key=lambda name: len(name) > 2)
        completed_by(groups[option.group].add_argument(*names, **shown), option.files)
    return made
