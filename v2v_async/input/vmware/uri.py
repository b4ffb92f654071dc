"""How VMware and libvirt name things: ``vpx://`` URIs, datastore paths, and the URLs of disks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import parse_qs, quote, unquote, urlsplit

from v2v_async.errors import SourceError, UsageError
from v2v_async.redact import redact

# What libvirt's esx driver logs in as where the URI names nobody.
_USERS = {"vpx": "administrator"}
_DATASTORE_PATH = re.compile(r"\[(?P<datastore>[^\]]+)\] (?P<stem>.+)\.vmdk")
_SNAPSHOT = re.compile(r"-\d{6}")


@dataclass(frozen=True, slots=True)
class VmwareUri:
    """``vpx://[USER@]HOST[:PORT]/DATACENTER/[CLUSTER/]HOST``, or ``esx://[USER@]HOST[:PORT]``.

    ``port`` is None where the URI has none; ``path`` are its decoded parts. ``verify``: check the
    server's certificate.
    """

    text: str
    scheme: str
    user: str
    host: str
    port: int | None
    path: tuple[str, ...]
    verify: bool

    @property
    def datacenter(self) -> str | None:
        """The datacenter, where the path can mean only one: folders and clusters look alike."""
        if self.scheme == "vpx":
            return self.path[0] if len(self.path) == 2 else None
        return "ha-datacenter"  # a single host has exactly this one


def parse_uri(text: str) -> VmwareUri:
    """Read an ``-ic`` URI.

    Raises:
        UsageError: it is none, or has a password in it.
    """
    shown = redact(text)
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"-ic ‘{shown}’ is not a URI: {error}") from error
    if not parts.hostname:
        raise UsageError(f"-ic ‘{shown}’ names no server", hint="write vpx://USER@SERVER/…")
    if parts.password is not None:
        raise UsageError(
            f"-ic ‘{shown}’ has a password in it, which everybody on this machine can read",
            hint="take it out, and write it into a file for -ip",
        )
    path = tuple(unquote(part) for part in parts.path.split("/") if part)
    if parts.scheme == "vpx" and len(path) < 2:
        raise UsageError(
            f"-ic ‘{shown}’ does not name the datacenter and the host that runs the guest",
            hint="write vpx://USER@VCENTER/DATACENTER/HOST, or /DATACENTER/CLUSTER/HOST",
        )
    verify = parse_qs(parts.query).get("no_verify", ["0"])[-1] != "1"
    user = unquote(parts.username) if parts.username else _USERS.get(parts.scheme, "root")
    return VmwareUri(text, parts.scheme, user, parts.hostname, port, path, verify)


@dataclass(frozen=True, slots=True)
class DatastorePath:
    """``[DATASTORE] STEM.vmdk``: the small file that describes a disk, beside its content."""

    datastore: str
    stem: str

    @property
    def is_snapshot(self) -> bool:
        """Whether it is named as the changes since a snapshot are."""
        return _SNAPSHOT.fullmatch(self.stem[-7:]) is not None

    def __str__(self) -> str:
        return f"[{self.datastore}] {self.stem}.vmdk"

    @property
    def content(self) -> str:
        """The file with the content of the disk, as people see it."""
        return f"[{self.datastore}] {self.stem}-flat.vmdk"

    def url(self, address: str, datacenter: str) -> str:
        """Return the URL of the disk's content. ``address``: HOST or HOST:PORT."""
        return (
            f"https://{address}/folder/{quote(self.stem)}-flat.vmdk"
            f"?dcPath={quote(datacenter)}&dsName={quote(self.datastore)}"
        )


def parse_datastore_path(text: str) -> DatastorePath:
    """Read a disk's place as libvirt's esx driver tells it.

    Raises:
        SourceError: it is not on a datastore.
    """
    match = _DATASTORE_PATH.fullmatch(text)
    if match is None or ".." in match["stem"].split("/"):
        raise SourceError(
            f"the disk ‘{redact(text)}’ is not a file on a datastore ([DATASTORE] NAME.vmdk)",
            hint="a raw device can't be read over HTTPS: use -it vddk",
        )
    return DatastorePath(match["datastore"], match["stem"])
