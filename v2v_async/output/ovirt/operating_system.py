"""What oVirt calls a guest system: a number, and a name in the OVF.

Source: oVirt's packaging/conf/osinfo-defaults.properties. Clones of RHEL have no entries there on
purpose (its BZ 1341161): they are RHEL. Later releases than the list knows are its latest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from v2v_async.model import Inspection

_RHEL = ("rhel", "centos", "oraclelinux", "scientificlinux", "rocky", "almalinux")
_ARCHITECTURES = {
    "x86_64": "x86_64",
    "i386": "i386",
    "i686": "i386",
    "ppc64": "ppc64",
    "ppc64le": "ppc64",
    "s390x": "s390x",
}


@dataclass(frozen=True, slots=True)
class OvirtSystem:
    """An entry of oVirt's list. Engines of every age know ``name``."""

    id: int
    name: str


_OTHER = OvirtSystem(0, "Unassigned")
_OTHER_LINUX = {
    "ppc64": OvirtSystem(1002, "other_linux_ppc64"),
    "s390x": OvirtSystem(2002, "other_linux_s390x"),
}
_X86_LINUX = OvirtSystem(5, "OtherLinux")

# By architecture: first major version that it stands for, newest first.
_RHEL_BY_VERSION: dict[str, tuple[tuple[int, OvirtSystem], ...]] = {
    "x86_64": (
        (9, OvirtSystem(34, "rhel_9x64")),
        (8, OvirtSystem(30, "rhel_8x64")),
        (7, OvirtSystem(24, "rhel_7x64")),
        (6, OvirtSystem(19, "RHEL6x64")),
        (5, OvirtSystem(13, "RHEL5x64")),
        (4, OvirtSystem(14, "RHEL4x64")),
        (3, OvirtSystem(15, "RHEL3x64")),
    ),
    "i386": (
        (7, _X86_LINUX),
        (6, OvirtSystem(18, "RHEL6")),
        (5, OvirtSystem(7, "RHEL5")),
        (4, OvirtSystem(8, "RHEL4")),
        (3, OvirtSystem(9, "RHEL3")),
    ),
    "ppc64": (
        (9, OvirtSystem(1009, "rhel_9_ppc64")),
        (8, OvirtSystem(1008, "rhel_8_ppc64")),
        (7, OvirtSystem(1006, "rhel_7_ppc64")),
        (6, OvirtSystem(1003, "rhel_6_ppc64")),
    ),
    "s390x": ((7, OvirtSystem(2003, "rhel_7_s390x")),),
}
_SLES: dict[str, tuple[int, OvirtSystem]] = {
    "x86_64": (11, OvirtSystem(1193, "sles_11")),
    "ppc64": (11, OvirtSystem(1004, "sles_11_ppc64")),
    "s390x": (12, OvirtSystem(2004, "sles_12_s390x")),
}
_UBUNTU_X86: tuple[tuple[tuple[int, int], OvirtSystem], ...] = (
    ((14, 0), OvirtSystem(1256, "ubuntu_14_04")),
    ((13, 10), OvirtSystem(1255, "ubuntu_13_10")),
    ((13, 4), OvirtSystem(1254, "ubuntu_13_04")),
    ((12, 10), OvirtSystem(1253, "ubuntu_12_10")),
    ((12, 4), OvirtSystem(1252, "ubuntu_12_04")),
)
_UBUNTU_OTHER = {
    "ppc64": (14, OvirtSystem(1005, "ubuntu_14_04_ppc64")),
    "s390x": (16, OvirtSystem(2005, "ubuntu_16_04_s390x")),
}

# Windows by version: 32 bits, a 64-bit client, a 64-bit server.
_XP = OvirtSystem(1, "WindowsXP")
_2003X64 = OvirtSystem(10, "Windows2003x64")
_2008X64 = OvirtSystem(16, "Windows2008x64")
_8X64 = OvirtSystem(21, "windows_8x64")
_WINDOWS: dict[tuple[int, int], tuple[OvirtSystem, OvirtSystem, OvirtSystem]] = {
    (5, 1): (_XP, _XP, _XP),
    (5, 2): (OvirtSystem(3, "Windows2003"), _2003X64, _2003X64),
    (6, 0): (OvirtSystem(4, "Windows2008"), _2008X64, _2008X64),
    (6, 1): (
        OvirtSystem(11, "Windows7"),
        OvirtSystem(12, "Windows7x64"),
        OvirtSystem(17, "Windows2008R2x64"),
    ),
    (6, 2): (OvirtSystem(20, "windows_8"), _8X64, OvirtSystem(23, "windows_2012x64")),
    (6, 3): (OvirtSystem(20, "windows_8"), _8X64, OvirtSystem(25, "windows_2012R2x64")),
    (10, 0): (
        OvirtSystem(26, "windows_10"),
        OvirtSystem(27, "windows_10x64"),
        OvirtSystem(29, "windows_2016x64"),
    ),
}
_WINDOWS_11 = OvirtSystem(36, "windows_11")
_WINDOWS_2019 = OvirtSystem(31, "windows_2019x64")


def ovirt_system(found: Inspection) -> OvirtSystem:
    """Return what oVirt calls the system that was found; number 0 where it has no name."""
    architecture = _ARCHITECTURES.get(found.arch, found.arch)
    if found.type == "linux":
        return _linux(found, architecture)
    if found.type == "windows":
        return _windows(found, architecture)
    return _OTHER


def _linux(found: Inspection, architecture: str) -> OvirtSystem:
    major = found.major_version
    if found.distro in _RHEL:
        if (architecture, major) == ("ppc64", 6) and found.minor_version >= 9:
            return OvirtSystem(1007, "rhel_6_9_plus_ppc64")
        for first, system in _RHEL_BY_VERSION.get(architecture, ()):
            if major >= first:
                return system
    elif found.distro == "sles" and architecture in _SLES:
        first, system = _SLES[architecture]
        if major >= first:
            return system
    elif found.distro == "debian" and major >= 7 and architecture in ("x86_64", "i386"):
        # “Debian 7+”; engines before 4.5 do not know debian_9.
        return OvirtSystem(1300, "debian_7")
    elif found.distro == "ubuntu" and architecture in _UBUNTU_OTHER:
        first, system = _UBUNTU_OTHER[architecture]
        if major >= first:
            return system
    elif found.distro == "ubuntu" and architecture in ("x86_64", "i386"):
        for version, system in _UBUNTU_X86:
            if (major, found.minor_version) >= version:
                return system
    return _OTHER_LINUX.get(architecture, _X86_LINUX)


def _windows(found: Inspection, architecture: str) -> OvirtSystem:
    version = (found.major_version, found.minor_version)
    row = _WINDOWS.get(version)
    if row is None or architecture not in ("x86_64", "i386"):
        return _OTHER
    if version == (5, 2) and "XP" in found.product_name:
        return _XP
    if architecture == "i386":
        return row[0]
    if found.product_variant == "Client":
        is_11 = found.osinfo == "win11" or "Windows 11" in found.product_name
        return _WINDOWS_11 if is_11 else row[1]
    # Windows Server since 2016 keeps the version 10.0.
    year = re.search(r"Server (\d{4})", found.product_name)
    if version == (10, 0) and year is not None and int(year[1]) >= 2019:
        return _WINDOWS_2019
    return row[2]
