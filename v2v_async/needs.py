"""What v2v-async needs: programs, bindings, plugins, the oldest versions, and who packages them."""

from __future__ import annotations

import os
import platform
import re
import shutil
from dataclasses import dataclass
from typing import Literal

Version = tuple[int, ...]
Manager = Literal["apt", "dnf"]


@dataclass(frozen=True, slots=True)
class Package:
    """The names of the package that has something; empty where a distribution has none."""

    apt: str
    dnf: str


@dataclass(frozen=True, slots=True)
class Binding:
    """A Python module of the distribution; ``code`` prints its version."""

    name: str
    package: Package
    code: str
    minimum: Version = ()
    is_needed: bool = False
    purpose: str = ""


@dataclass(frozen=True, slots=True)
class Program:
    """A program to ask for its version, by ``version_option``."""

    name: str
    package: Package
    minimum: Version = ()
    is_needed: bool = False
    purpose: str = ""
    also_at: str = ""
    version_option: str = "--version"


QEMU_PACKAGE = (
    Package("qemu-system-arm", "qemu-system-aarch64-core")
    if platform.machine() == "aarch64"
    else Package("qemu-system-x86", "qemu-system-x86-core")
)
PROGRAMS = (
    # 1.22 is the oldest with the cow filter's present behaviour; libnbd 1.10 with aio and extents.
    Program("nbdkit", Package("nbdkit", "nbdkit"), (1, 22), True),
    Program("qemu-nbd", Package("qemu-utils", "qemu-img"), (), True),
    Program("qemu-img", Package("qemu-utils", "qemu-img"), (), True),
    Program(
        *("virt-v2v-in-place", Package("virt-v2v", "virt-v2v"), (2, 2), True),
        also_at="/usr/libexec/virt-v2v-in-place",
    ),
    # The first with --pdeathsig.
    Program("setpriv", Package("util-linux", "util-linux"), (2, 33), True),
    Program("nbdcopy", Package("libnbd-bin", "libnbd"), (), False, "bench"),
    Program("nbdinfo", Package("libnbd-bin", "libnbd"), (), False, "looking at exports"),
    Program("virsh", Package("libvirt-clients", "libvirt-client"), (), False, "libvirt"),
    Program(
        *("ssh", Package("openssh-client", "openssh-clients"), (), False, "-it ssh, xen+ssh"),
        version_option="-V",
    ),
    Program("zstd", Package("zstd", "zstd"), (), False, "-i ova, packed by zstd"),
)
BINDINGS = (
    Binding(
        *("nbd", Package("python3-libnbd", "python3-libnbd")),
        "import nbd; print(nbd.NBD().get_version())",
        (1, 10),
        True,
    ),
    Binding(
        *("guestfs", Package("python3-guestfs", "python3-libguestfs")),
        "import guestfs; v = guestfs.GuestFS(python_return_dict=True).version(); "
        "print(v['major'], v['minor'], v['release'], sep='.')",
        purpose="doctor --appliance",
    ),
    Binding(
        *("libvirt", Package("python3-libvirt", "python3-libvirt")),
        "import libvirt; v = libvirt.getVersion(); "
        "print(v // 1000000, v // 1000 % 1000, v % 1000, sep='.')",
        purpose="-i and -o libvirt",
    ),
)
KERNEL_PACKAGE = Package(
    f"linux-image-{'arm64' if platform.machine() == 'aarch64' else 'amd64'}", "kernel-core"
)
DISTRIBUTIONS = ("anyio", "lxml", "pydantic", "rich", "rich-argparse", "shtab")
PLUGINS: dict[str, tuple[bool, str, Package]] = {
    "file": (True, "", Package("nbdkit", "nbdkit-basic-plugins")),
    "nbd": (True, "", Package("nbdkit", "nbdkit-nbd-plugin")),
    "null": (True, "", Package("nbdkit", "nbdkit-basic-plugins")),
    "curl": (False, "vpx://, http disks of libvirt", Package("nbdkit", "nbdkit-curl-plugin")),
    "ssh": (False, "-it ssh, xen+ssh", Package("nbdkit", "nbdkit-ssh-plugin")),
    # Debian builds nbdkit without it.
    "vddk": (False, "-it vddk", Package("", "nbdkit-vddk-plugin")),
    "python": (False, "-o rhv-upload", Package("nbdkit-plugin-python", "nbdkit-python-plugin")),
}
FILTER_PACKAGE = Package("nbdkit", "nbdkit-basic-filters")
FILTERS: dict[str, tuple[bool, str]] = {
    "cow": (True, ""),
    "log": (False, "batch"),
    "offset": (False, "-i ova"),
    **dict.fromkeys(("retry", "retry-request"), (False, "remote sources")),
    **dict.fromkeys(("blocksize", "cacheextents"), (False, "-it vddk")),
    "rate": (False, "bench"),
    **dict.fromkeys(("delay", "error", "noextents", "nozero"), (False, "tests")),
}


def install_command(packages: list[str], manager: Manager) -> str:
    """Return the command that installs ``packages``."""
    sudo = "" if os.getuid() == 0 else "sudo "
    if manager == "apt":
        return f"{sudo}apt-get install --no-install-recommends {' '.join(packages)}"
    return f"{sudo}dnf install {' '.join(packages)}"


def parse_version(text: str) -> Version:
    """Return the first ``1.2`` or ``1.2.3`` in ``text`` as numbers; empty when there is none."""
    match = re.search(r"\d+(?:\.\d+)+", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def package_manager() -> Manager | None:
    """Return which of the two package managers that we know names for is here."""
    if shutil.which("apt-get"):
        return "apt"
    return "dnf" if shutil.which("dnf") else None
