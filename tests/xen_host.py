"""A stand-in for virsh on a Xen host: the real virsh over libvirt's test driver.

What it says of guests, states and errors is libvirt's own; only the word ``test`` is ``xen`` in it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.conftest import require

RUNNING, SHUT_OFF = 1, 5

_SCRIPT = """#!/bin/sh
# virsh --quiet --connect xen:/// SUBCOMMAND --domain NAME
[ "$1 $2 $3" = "--quiet --connect xen:///" ] || {{ echo "not for xen: $*" >&2; exit 1; }}
shift 3
out=$({virsh} --quiet --connect "test://{node}" "$@") || exit
printf '%s\\n' "$out" | sed "s/<domain type='test'/<domain type='xen'/"
"""


def disk_xml(path: Path, dev: str, *, kind: str = "file", format_: str = "") -> str:
    """Return a disk as Xen's XML has it."""
    attribute = "dev" if kind == "block" else "file"
    driver = f"<driver name='tap' type='{format_}'/>" if format_ else "<driver name='file'/>"
    return (
        f"<disk type='{kind}' device='disk'>{driver}<source {attribute}='{path}'/>"
        f"<target dev='{dev}' bus='xen'/></disk>"
    )


def xen_host(folder: Path, name: str, *disks: str, state: int = SHUT_OFF) -> dict[str, str]:
    """Make a host with one guest in ``folder``; return the environment of its sessions."""
    require("virsh")
    tools = folder / "tools"
    tools.mkdir()
    node = folder / "node.xml"
    node.write_text(
        "<node><cpu><mhz>2000</mhz><model>x86_64</model><active>2</active><nodes>1</nodes>"
        "<sockets>1</sockets><cores>2</cores><threads>1</threads></cpu><memory>8388608</memory>"
        "<domain type='test' xmlns:test='http://libvirt.org/schemas/domain/test/1.0'>"
        f"<name>{name}</name><memory unit='MiB'>768</memory><vcpu>2</vcpu>"
        "<os><type arch='x86_64' machine='xenfv'>hvm</type></os>"
        f"<devices>{''.join(disks)}<interface type='bridge'>"
        "<mac address='00:16:3e:01:02:03'/><source bridge='xenbr0'/></interface></devices>"
        f"<test:runstate>{state}</test:runstate></domain></node>"
    )
    virsh = tools / "virsh"
    virsh.write_text(_SCRIPT.format(virsh=shutil.which("virsh"), node=node))
    virsh.chmod(0o755)
    return {"PATH": f"{tools}:/usr/bin:/bin"}
