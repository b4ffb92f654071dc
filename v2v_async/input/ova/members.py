"""Which of an OVA's files is which: the description, the manifests, a disk that is named.

Pure: of names alone, however the OVA is packed.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from urllib.parse import unquote

from v2v_async.errors import SourceError
from v2v_async.input.ova.tar_headers import Member

Members = Mapping[str, Member]
"""By name, as :func:`~v2v_async.input.ova.tar_headers.normalised` writes it."""


def is_text(name: str) -> bool:
    """Return whether a file is read as a whole: the description or a manifest."""
    return _ends(name, ".ovf") or _ends(name, ".mf")


def find_ovf(members: Members, shown: str) -> Member:
    """Return the OVF.

    Raises:
        SourceError: there is none, or more than one.
    """
    found = [member for name, member in sorted(members.items()) if _ends(name, ".ovf")]
    if not found:
        raise SourceError(
            f"‘{shown}’ holds no .ovf file: it is no OVA",
            hint="an OVA is a tar file, or a folder, with a description that ends in .ovf",
        )
    if len(found) > 1:
        names = ", ".join(f"‘{member.name}’" for member in found[:5])
        raise SourceError(
            f"‘{shown}’ holds {len(found)} .ovf files: {names}",
            hint="unpack it, and give the .ovf file of the guest that is wanted",
        )
    return usable(found[0], shown)


def find_manifests(members: Members, shown: str) -> list[Member]:
    """Return the manifests; most OVAs have one or none."""
    found = [member for name, member in sorted(members.items()) if _ends(name, ".mf")]
    return [usable(member, shown) for member in found]


def find_disk(members: Members, ovf: str, href: str, shown: str) -> Member:
    """Return the file that an OVF (its name in the OVA) names for a disk.

    Where it is not there, but ``HREF.NUMBER`` is, that is a snapshot of it: the highest number is
    the disk's present state (virt-v2v; bug 1570407 of Red Hat).

    Raises:
        SourceError: it is not there, outside the OVA, or no file.
    """
    named = f"‘{shown}’: the OVF names ‘{href[:200]}’ as a disk"
    folder = posixpath.dirname(ovf)
    scheme = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]*):", href)
    path = href
    if scheme is not None and scheme[1].lower() == "file":
        path = re.sub(r"^//[^/]*", "", href[5:]) if href[5:].startswith("//") else href[5:]
    elif scheme is not None and href[scheme.end() :].startswith("//"):
        raise SourceError(
            f"{named}, which is not in the OVA but elsewhere",
            hint="download it, put it beside the OVF, and name it there",
        )
    # As it stands, then as the URI that it should be.
    for text in dict.fromkeys((path, unquote(path))):
        name = inside(folder, text, named)
        if (member := members.get(name)) is not None:
            return usable(member, shown)
        numbered = re.compile(re.escape(name) + r"\.([0-9]{1,18})")
        snapshots = [
            (int(match[1]), other)
            for other in members
            if (match := numbered.fullmatch(other)) is not None
        ]
        if snapshots:
            return usable(members[max(snapshots)[1]], shown)
    raise SourceError(
        f"{named}, which is not there",
        hint="is the OVA whole, or is a file missing beside the OVF?",
    )


def chunks(members: Members, member: Member) -> int:
    """Return in how many numbered pieces a disk may lie of which ``member`` is one."""
    name, _, number = member.name.rpartition(".")
    if not number.isdigit():
        return 1
    return sum(bool(re.fullmatch(re.escape(name) + r"\.[0-9]+", other)) for other in members)


def beside(members: Members, member: Member, name: str, shown: str) -> Member:
    """Return the file of that simple name in the folder of ``member``.

    Raises:
        SourceError: it is not there, or no file.
    """
    found = members.get(posixpath.join(posixpath.dirname(member.name), name))
    if found is None:
        raise SourceError(
            f"‘{shown}’: ‘{member.name}’ says that its content is in ‘{name[:200]}’, which is not "
            "there",
            hint="is the OVA whole, or is a file missing?",
        )
    return usable(found, shown)


def usable(member: Member, shown: str) -> Member:
    """Return ``member``, a plain file.

    Raises:
        SourceError: it is something else.
    """
    what = f"‘{member.name}’ in ‘{shown}’"
    if member.kind == "link":
        raise SourceError(
            f"{what} is a link (symbolic or hard) that leads to another file: refused",
            hint="put a copy of the file there",
        )
    if member.kind == "sparse":
        raise SourceError(
            f"{what} is stored with its holes left out, so it can't be read in place",
            hint="unpack the OVA with tar, and give the folder",
        )
    if member.kind != "file":
        raise SourceError(f"{what} is a {member.kind} file, not a plain one: refused")
    return member


def inside(folder: str, path: str, named: str) -> str:
    """Return the name of ``path``, which is relative to ``folder``, in the OVA."""
    name = posixpath.normpath(posixpath.join(folder, path))
    if name.startswith(("/", "../")) or name == ".." or "\0" in name:
        raise SourceError(
            f"{named}, which leads out of the OVA: refused",
            hint="an OVA that does this is not to be trusted",
        )
    return name


def _ends(name: str, suffix: str) -> bool:
    base = posixpath.basename(name)
    # macOS adds a ._NAME to each NAME.
    return base.lower().endswith(suffix) and not base.startswith("._")
