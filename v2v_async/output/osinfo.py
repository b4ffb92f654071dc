"""libosinfo's identifier of a guest system, for the domain XML.

libguestfs tells the short name (``debian12``, ``win2k22``); libvirt's metadata wants the URI that
osinfo-db gives to the same system. Systems that are not here simply have none.

Source: osinfo-db, ``osinfo-query os``.
"""

from __future__ import annotations

import re

from v2v_async.model import Inspection

_V = r"(?P<v>\d+(?:\.\d+)?)"
_BY_SHORT_NAME: tuple[tuple[str, str], ...] = (
    (r"debian(?P<v>[12]\.\d|3\.1|[3-9]|\d\d)(?:\.\d+)?", "http://debian.org/debian/{v}"),
    (rf"ubuntu{_V}", "http://ubuntu.com/ubuntu/{v}"),
    (rf"fedora{_V}", "http://fedoraproject.org/fedora/{v}"),
    (rf"rhel{_V}", "http://redhat.com/rhel/{v}"),
    (r"centos7", "http://centos.org/centos/7.0"),
    (rf"centos{_V}", "http://centos.org/centos/{v}"),
    (rf"centos-stream{_V}", "http://centos.org/centos-stream/{v}"),
    (rf"almalinux{_V}", "http://almalinux.org/almalinux/{v}"),
    (rf"rocky{_V}", "http://rockylinux.org/rocky/{v}"),
    (rf"ol{_V}", "http://oracle.com/ol/{v}"),
    (rf"opensuse{_V}", "http://opensuse.org/opensuse/{v}"),
    (r"opensusetumbleweed", "http://opensuse.org/opensuse/tumbleweed"),
    (r"sles(?P<v>1[0-4])", "http://suse.com/sles/{v}"),
    (r"sles(?P<v>1[0-4])sp(?P<sp>\d+)", "http://suse.com/sles/{v}.{sp}"),
    (r"sle[sd]?(?P<v>15)", "http://suse.com/sle/{v}"),
    (r"sle[sd]?(?P<v>15)sp(?P<sp>\d+)", "http://suse.com/sle/{v}.{sp}"),
    (r"sled(?P<v>1[0-4])", "http://suse.com/sled/{v}"),
    (r"sled(?P<v>1[0-4])sp(?P<sp>\d+)", "http://suse.com/sled/{v}.{sp}"),
    (r"win(?P<v>2k\d+(?:r2)?|xp|vista|7|8|8\.1|10|11)", "http://microsoft.com/win/{v}"),
)

# libguestfs's distro and what follows it in the URI, where it gave no short name.
_BY_DISTRO = {
    "debian": "http://debian.org/debian/{major}",
    "fedora": "http://fedoraproject.org/fedora/{major}",
    "ubuntu": "http://ubuntu.com/ubuntu/{major}.{minor:02}",
    "rhel": "http://redhat.com/rhel/{major}.{minor}",
    "opensuse": "http://opensuse.org/opensuse/{major}.{minor}",
}


def os_id(inspection: Inspection) -> str | None:
    """Return the URI of the system that was found, None where there is none."""
    if inspection.osinfo:
        for pattern, uri in _BY_SHORT_NAME:
            match = re.fullmatch(pattern, inspection.osinfo)
            if match is not None:
                return uri.format(**match.groupdict())
    if inspection.type == "linux" and inspection.distro in _BY_DISTRO and inspection.major_version:
        return _BY_DISTRO[inspection.distro].format(
            major=inspection.major_version, minor=inspection.minor_version
        )
    return None
