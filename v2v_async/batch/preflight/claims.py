"""What a guest takes for itself: its disks and its target, so that nobody else takes them as well.

A claim is compared as text, also with those of a run that began before the last boot. So a file has
two: its real path, and its inode, which finds other names of it but means something only until the
machine boots again, and says so.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

from v2v_async.batch.preflight.problems import Problem, of_guests
from v2v_async.batch.preflight.target_files import TargetFiles
from v2v_async.batch.record.folder import Claim
from v2v_async.model import SourceGuest
from v2v_async.options import InputOptions, OutputOptions
from v2v_async.output.contract import Output
from v2v_async.output.openstack.cinder import OpenstackOutput
from v2v_async.output.openstack.glance import GlanceOutput
from v2v_async.output.ovirt.storage_domain import RhvOutput
from v2v_async.output.ovirt.upload import RhvUploadOutput
from v2v_async.v2vdir import boot_id

_PORTS = {"nbd": 10809, "nbds": 10809, "ssh": 22, "http": 80, "https": 443}
# Where a login to OpenStack says which cloud and project it is for.
_CLOUD = ("os-cloud", "os-auth-url", "os-project-id", "os-project-name", "os-region-name")


@dataclass(frozen=True, slots=True)
class Taken:
    """A claim, and what people know it as. ``is_target``: it is written."""

    claim: Claim
    shown: str
    is_target: bool = False


def taken_sources(guest: str, options: InputOptions, source: SourceGuest) -> list[Taken]:
    """Return what is read for a guest: itself where somebody knows it by name, and its disks."""
    claims = list(_source_claims(guest, options, source))
    return [Taken(claim, shown) for claim, shown in claims]


def taken_targets(
    guest: str, output: Output, options: OutputOptions, name: str, files: TargetFiles | None
) -> list[Taken]:
    """Return what is written for a guest, whose target is ``name``.

    ``files``: those on this machine; None where its disks are not known.
    """
    found = list(_target_guests(guest, output, options, name))
    if files is not None:
        for path in files.names:
            # A link of that name is replaced; it is not what is behind it that is written.
            final = os.path.join(os.path.realpath(path.parent), path.name)
            found.append((Claim("file", final, guest), str(path)))
        for path in files.in_place:
            found += _file_claims(guest, path)
    return [Taken(claim, shown, is_target=True) for claim, shown in found]


def collisions(taken: Iterable[Taken], read: Mapping[str, Iterable[str]]) -> list[Problem]:
    """Return what several guests of one plan take; ``read``: all files that each one reads."""
    by_claim: dict[tuple[str, str], list[Taken]] = {}
    targets: dict[str, Taken] = {}
    for each in taken:
        by_claim.setdefault((each.claim.kind, each.claim.identity), []).append(each)
        if each.is_target and each.claim.kind == "file":
            targets.setdefault(each.claim.identity, each)
    found: dict[tuple[frozenset[str], str], Problem] = {}
    for same in by_claim.values():
        guests = tuple(dict.fromkeys(each.claim.guest for each in same))
        if len(guests) > 1:
            problem = _collision(guests, same)
            # Two guests have many files in common, or none: one of them tells enough.
            found.setdefault((frozenset(guests), problem.hint or ""), problem)
    for guest, files in read.items():
        for file in files:
            target = targets.get(os.path.realpath(file))
            if target is not None and target.claim.guest != guest:
                guests = (target.claim.guest, guest)
                found.setdefault((frozenset(guests), _CHAIN), _chain(guests, target.shown))
    return list(found.values())


_TWICE = "leave all but one of them out"
_CHAIN = "write to another place; a guest that is the source of another belongs into a later plan"
_NAMES = "give each a name of its own: output.name (-on)"


def _collision(guests: tuple[str, ...], same: Sequence[Taken]) -> Problem:
    shown = same[0].shown
    writers = [each.claim.guest for each in same if each.is_target]
    if not writers:
        return of_guests(guests, f"they have the same source, {_quoted(shown)}", _TWICE)
    if len(writers) < len(same):
        readers = [each.claim.guest for each in same if not each.is_target]
        return _chain((writers[0], readers[0]), shown)
    return of_guests(guests, f"they would have the same target, {_quoted(shown)}", _NAMES)


def _chain(guests: tuple[str, str], shown: str) -> Problem:
    message = f"{_quoted(shown)} is written for ‘{guests[0]}’ and read for ‘{guests[1]}’"
    return of_guests(guests, message, _CHAIN)


def _quoted(shown: str) -> str:
    return f"‘{shown}’"


def _source_claims(
    guest: str, options: InputOptions, source: SourceGuest
) -> Iterator[tuple[Claim, str]]:
    host = _host(options.connection)
    match options.kind:
        case "libvirt":
            yield _named_guest(guest, _libvirt(options.connection), source.name)
        case "vcenter" | "vddk" | "xen-ssh":
            yield _named_guest(guest, host, source.name)
    for disk in source.disks:
        if disk.files:
            yield from _file_claims(guest, Path(disk.files[0]))
        elif "://" in disk.source:
            identity = address_of(disk.source)
            yield Claim("disk", identity, guest), identity
        elif disk.source.startswith("["):
            identity = f"{host} {disk.source}"
            yield Claim("disk", identity, guest), identity


def _target_guests(
    guest: str, output: Output, options: OutputOptions, name: str
) -> Iterator[tuple[Claim, str]]:
    if output.name == "libvirt":
        yield _named_guest(guest, _libvirt(options.connection), name)
    elif isinstance(output, RhvOutput):
        storage = output.storage.rstrip("/")
        where = os.path.realpath(storage) if os.path.isdir(storage) else storage
        yield _named_guest(guest, where, name)
    elif isinstance(output, RhvUploadOutput):
        yield _named_guest(guest, output.options.login.address, name)
        for disk in output.options.disk_ids:
            identity = f"{output.options.login.address} {disk}"
            yield Claim("disk", identity, guest), identity
    elif isinstance(output, GlanceOutput | OpenstackOutput):
        settings = output.login.settings
        where = " ".join(
            settings.get(each) or os.environ.get(each.upper().replace("-", "_"), "")
            for each in _CLOUD
        )
        identity = f"{' '.join(where.split()) or 'openstack'} {name}"
        kind = "image" if isinstance(output, GlanceOutput) else "volume"
        yield Claim(kind, identity, guest), name


def _named_guest(guest: str, where: str, name: str) -> tuple[Claim, str]:
    return Claim("guest", f"{where} {name}", guest), f"{name} ({where})"


def _file_claims(guest: str, path: Path) -> Iterator[tuple[Claim, str]]:
    shown = str(path)
    try:
        status = path.stat()
    except OSError:
        status = None
    if status is not None and stat.S_ISBLK(status.st_mode):
        # What a device's name leads to, /dev/dm-3, is another device after the next boot.
        yield Claim("file", os.path.abspath(path), guest), shown
        device = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        yield Claim("device", f"block device {device} (boot {boot_id()})", guest), shown
        return
    yield Claim("file", os.path.realpath(path), guest), shown
    if status is not None:
        device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
        inode = f"inode {status.st_ino} of device {device} (boot {boot_id()})"
        yield Claim("inode", inode, guest), shown


def address_of(uri: str) -> str:
    """Return what a disk's URI means, without who logs in: the same for every way to write it.

    What its query says is left out but for a socket; a hash of the rest, which may be a token,
    tells one from another.
    """
    parts = urlsplit(uri)
    scheme = parts.scheme.lower()
    host = (parts.hostname or "").lower()
    try:
        port = parts.port or _PORTS.get(scheme)
    except ValueError:
        port = None
    query = parse_qs(parts.query)
    socket = query.get("socket", [""])[0]
    base = "nbd" if scheme.startswith("nbd") else scheme
    place = f"unix:{os.path.realpath(socket)}" if socket else f"{host}:{port}" if port else host
    path = quote(parts.path, safe="/%")
    rest = parts.query if parts.query and scheme.startswith("http") else ""
    mark = f"#{hashlib.sha256(rest.encode()).hexdigest()[:16]}" if rest else ""
    return f"{base}://{place}{path}{mark}"


def _host(connection: str | None) -> str:
    return (urlsplit(connection or "").hostname or "").lower()


def _libvirt(uri: str | None) -> str:
    """Return a libvirt URI without who logs in and how."""
    own = "qemu:///system" if os.geteuid() == 0 else "qemu:///session"
    parts = urlsplit(uri or os.environ.get("LIBVIRT_DEFAULT_URI") or own)
    scheme = parts.scheme.partition("+")[0]
    host = (parts.hostname or "").lower()
    socket = "".join(f"?socket={each}" for each in parse_qs(parts.query).get("socket", []))
    return f"{scheme}://{host}{parts.path}{socket}"
