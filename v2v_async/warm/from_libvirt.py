"""Changed blocks of a libvirt guest: backup jobs while it runs, its bitmaps when it is off.

::

    runs:  checkpoint MARK ┐ at one moment          qemu ──> nbd+unix:///vda?socket=…
           backup job      ┘ since checkpoint SINCE           qemu:dirty-bitmap:backup-vda
    off:   the bitmaps SINCE and newer, in the qcow2 files ──> qemu-nbd --read-only --bitmap

A checkpoint is a bitmap in each qcow2 file. A new one begins empty; to delete one loses nothing,
since libvirt counts what it knows to the one before. So a pass that died is undone by deleting its
mark, and what has changed since the mark before is whole again.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

import anyio
from lxml import etree

from v2v_async import qemu_img, qemu_nbd
from v2v_async.copy.ranges import Ranges
from v2v_async.errors import GuestChangedError, SourceError, V2VError
from v2v_async.events import Reporter
from v2v_async.input.libvirt.domain_xml import parse_domain
from v2v_async.input.xml_source import parse_xml
from v2v_async.libvirt_connection import SOURCE, FoundDomain, NoGuestError, connected_as, is_remote
from v2v_async.redact import redact
from v2v_async.server import Servers
from v2v_async.v2vdir import V2VDir
from v2v_async.warm.changed import Delta, MarkLostError, Opened, dirty_ranges
from v2v_async.warm.libvirt_calls import BackupConnection

_END_TIMEOUT_S = 60.0
_LONGEST_SOCKET = 107
# Where a system's libvirtd keeps what belongs to one running guest, its monitor's socket among it.
_GUEST_FOLDERS = Path("/var/lib/libvirt/qemu")


@dataclass(frozen=True, slots=True)
class LibvirtDisk:
    """A disk: ``device`` is its name in the guest's definition (``vda``).

    ``location`` is how that says where it is: ``path``, or the volume of a pool.
    """

    index: int
    device: str
    location: str
    path: Path
    format: str


class OtherJobError(SourceError):
    """The guest has a backup job of somebody else's; libvirt does one at a time."""


class LibvirtChanges:
    """Implements :class:`~v2v_async.warm.changed.ChangedBlocks`.

    Marks are checkpoints whose names begin with ``prefix``: nobody else's do. ``sockets``: where
    qemu is to make its socket (None: a place is found).
    """

    def __init__(
        self,
        uri: str | None,
        guest: str,
        disks: Sequence[LibvirtDisk],
        prefix: str,
        sockets: Path | None = None,
    ) -> None:
        self._uri = uri
        self._guest = guest
        self._disks = disks
        self._prefix = prefix
        self._sockets = sockets

    @asynccontextmanager
    async def opened(
        self, since: str | None, mark: str, v2vdir: V2VDir, servers: Servers, reporter: Reporter
    ) -> AsyncIterator[Opened]:
        """See :class:`ChangedBlocks`."""
        async with self._connected() as connection:
            found = await connection.domain(self._guest)
            self._check_disks(found)
            if found.activity == "off":
                yield await self._served(since, v2vdir, servers)
                return
            await self._end_job(connection)
            await self._forget(connection, since, reporter)
            async with self._backup(connection, found, since, mark, v2vdir) as opened:
                yield opened

    async def forget(self, keep: str | None, reporter: Reporter) -> None:
        """See :class:`ChangedBlocks`; a backup job that this run left ends too."""
        async with self._connected() as connection:
            try:
                with suppress(OtherJobError):
                    await self._end_job(connection)
                await self._forget(connection, keep, reporter)
            except NoGuestError:
                # Its checkpoints have gone with it; its images may be there.
                if keep is None:
                    await self._remove_bitmaps(reporter)

    # While it runs.

    @asynccontextmanager
    async def _backup(
        self,
        connection: BackupConnection,
        found: FoundDomain,
        since: str | None,
        mark: str,
        v2vdir: V2VDir,
    ) -> AsyncIterator[Opened]:
        if since is not None and since not in await connection.checkpoints(self._guest):
            raise MarkLostError(f"the guest ‘{self._guest}’ has no checkpoint ‘{since}’ any more")
        can_mark = all(disk.format == "qcow2" for disk in self._disks)
        socket = self._socket(found, v2vdir)
        with suppress(OSError):
            socket.unlink(missing_ok=True)
        await connection.begin_backup(
            self._guest,
            backup_xml(socket, self._disks, since),
            checkpoint_xml(mark, self._disks) if can_mark else None,
        )
        try:
            # The moment is the begin of the job, whatever reading the bitmaps takes.
            opened = Opened([], mark if can_mark else None, is_off=False)
            deltas = []
            for disk in self._disks:
                endpoint = f"nbd+unix:///{quote(disk.device)}?socket={quote(str(socket), safe='/')}"
                ranges = None
                if since is not None:
                    ranges = await dirty_ranges(endpoint, f"backup-{disk.device}")
                deltas.append(Delta(disk.index, endpoint, ranges))
            yield Opened(deltas, opened.mark, is_off=False, point=opened.point)
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(_END_TIMEOUT_S):
                # A guest that was shut down meanwhile has taken the job with it.
                with suppress(SourceError):
                    await connection.end_backup(self._guest)
                with suppress(OSError):
                    socket.unlink(missing_ok=True)

    def _socket(self, found: FoundDomain, v2vdir: V2VDir) -> Path:
        """Return where qemu, which may be another user and confined, can make a socket.

        Raises:
            SourceError: its name would be too long.
        """
        folder = self._sockets or self._guest_folder(found) or v2vdir.path
        socket = folder.absolute() / f"{self._prefix}.sock"
        if len(os.fsencode(socket)) > _LONGEST_SOCKET:
            raise SourceError(
                f"‘{socket}’ is too long for the name of a socket", hint="give --socket-dir DIR"
            )
        return socket

    def _guest_folder(self, found: FoundDomain) -> Path | None:
        """Return the folder of a guest that runs under the system's libvirtd."""
        if os.geteuid() != 0 or urlsplit(self._uri or "").path == "/session":
            return None
        number = parse_xml(found.xml, "the guest", "domain").get("id")
        folders = list(_GUEST_FOLDERS.glob(f"domain-{number}-*"))
        return folders[0] if len(folders) == 1 else None

    async def _end_job(self, connection: BackupConnection) -> None:
        """End the backup job that a dead process of this run left.

        Raises:
            OtherJobError: the guest has one of somebody else's.
        """
        job = await connection.backup(self._guest)
        if job is None:
            return
        server = parse_xml(job.encode(), "the backup job", "domainbackup").find("server")
        socket = Path((server.get("socket") if server is not None else None) or "-")
        if socket.name != f"{self._prefix}.sock":
            raise OtherJobError(
                f"the guest ‘{self._guest}’ has a backup job that is not of this migration, and "
                "libvirt does one at a time",
                hint=f"wait for its end: virsh domjobinfo {self._guest}",
            )
        await connection.end_backup(self._guest)
        with suppress(OSError):
            socket.unlink(missing_ok=True)

    # When it is off.

    async def _served(self, since: str | None, v2vdir: V2VDir, servers: Servers) -> Opened:
        known = [[] if since is None else await self._bitmaps(disk, since) for disk in self._disks]
        deltas = []
        for disk, bitmaps in zip(self._disks, known, strict=True):
            endpoint = v2vdir.source_socket(disk.index)
            log = v2vdir.log("input", disk.index)
            ranges = None if since is None else Ranges()
            for bitmap in bitmaps:
                command = qemu_nbd.serve_read_only(
                    str(disk.path), disk.format, endpoint, bitmap=bitmap
                )
                server = await servers.start(endpoint.name, command, log=log)
                for offset, length in await dirty_ranges(str(endpoint), bitmap):
                    assert ranges is not None
                    ranges.add(offset, length)
                await servers.stop(server)
            command = qemu_nbd.serve_read_only(str(disk.path), disk.format, endpoint)
            await servers.start(endpoint.name, command, log=log)
            deltas.append(Delta(disk.index, str(endpoint), ranges))
        # libvirt makes no checkpoint of a guest that is off; what was marked counts on.
        return Opened(deltas, since, is_off=True)

    async def _bitmaps(self, disk: LibvirtDisk, since: str) -> list[str]:
        """Return the bitmaps of this run that together tell what has changed since a mark.

        Raises:
            MarkLostError
        """
        found = await qemu_img.bitmaps(disk.path)
        ours = [name for name in found if name.startswith(f"{self._prefix}-")]
        if since not in ours:
            raise MarkLostError(f"‘{disk.path}’ has no bitmap ‘{since}’ any more", disk=disk.index)
        broken = [name for name in ours if not found[name]]
        if broken:
            raise MarkLostError(
                f"the bitmap ‘{broken[0]}’ of ‘{disk.path}’ was not saved: its qemu was killed",
                disk=disk.index,
            )
        return ours

    # Both.

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[BackupConnection]:
        async with connected_as(BackupConnection, self._uri, None, SOURCE) as connection:
            yield connection

    def _check_disks(self, found: FoundDomain) -> None:
        """See that the guest has the disks that it had, where they were.

        Raises:
            GuestChangedError
        """
        domain = parse_domain(found.xml, f"the guest ‘{found.name}’")
        now = [(disk.device, disk.location) for disk in domain.disks]
        if now != [(disk.device, disk.location) for disk in self._disks]:
            told = ", ".join(f"{device}: {location}" for device, location in now)
            raise GuestChangedError(
                f"the guest ‘{self._guest}’ has other disks than when the migration began: {told}",
                hint="take back what was changed; or begin anew: v2v-async warm abort, then start",
            )

    async def _forget(
        self, connection: BackupConnection, keep: str | None, reporter: Reporter
    ) -> None:
        """Delete the checkpoints of this run but ``keep``, the newest first.

        Of a guest that is off they stay as long as one is kept: only qemu can count what they know
        to that one.
        """
        if keep is not None and (await connection.domain(self._guest)).activity == "off":
            return
        ours = [
            name
            for name in await connection.checkpoints(self._guest)
            if name.startswith(f"{self._prefix}-") and name != keep
        ]
        for name in sorted(ours, key=lambda name: int(name.rpartition("-")[2]), reverse=True):
            await connection.delete_checkpoint(self._guest, name, is_needed=keep is not None)
        found = await connection.domain(self._guest)
        if found.activity == "off" and keep is None:
            await self._remove_bitmaps(reporter)

    async def _remove_bitmaps(self, reporter: Reporter) -> None:
        """Remove the bitmaps of this run from images that nobody has open."""
        for disk in self._disks:
            if disk.format != "qcow2" or not disk.path.exists():
                continue
            try:
                for name in await qemu_img.bitmaps(disk.path):
                    if name.startswith(f"{self._prefix}-"):
                        await qemu_img.remove_bitmap(disk.path, name)
            except V2VError as error:
                reporter.warning(
                    f"the bitmaps ‘{self._prefix}-…’ stay in ‘{disk.path}’, where they do no harm: "
                    f"{error.message}; remove them with qemu-img bitmap --remove"
                )


def refuse_remote(uri: str | None) -> None:
    """See that the guest's host is this machine.

    Raises:
        SourceError: it is not.
    """
    if is_remote(uri):
        raise SourceError(
            f"‘-ic {redact(uri or '')}’ is another machine: a guest that runs is read through a "
            "socket of its host",
            hint="run v2v-async warm on that host",
        )


def backup_xml(socket: Path, disks: Sequence[LibvirtDisk], since: str | None) -> str:
    """Return the XML of a backup job that serves these disks on a socket, in pull mode."""
    root = etree.Element("domainbackup", mode="pull")
    if since is not None:
        etree.SubElement(root, "incremental").text = since
    etree.SubElement(root, "server", transport="unix", socket=str(socket))
    listed = etree.SubElement(root, "disks")
    for disk in disks:
        attributes = {"name": disk.device, "type": "file", "exportname": disk.device}
        if since is not None:
            attributes["exportbitmap"] = f"backup-{disk.device}"
        element = etree.SubElement(listed, "disk", attributes)
        # Where the old content goes of what the guest writes meanwhile. libvirt makes and removes
        # it, and 9.0 finds no name of its own for a disk that is listed.
        etree.SubElement(element, "scratch", file=f"{disk.path}.{socket.stem}.scratch")
    return etree.tostring(root, encoding="unicode")


def checkpoint_xml(name: str, disks: Sequence[LibvirtDisk]) -> str:
    """Return the XML of a checkpoint of these disks."""
    root = etree.Element("domaincheckpoint")
    etree.SubElement(root, "name").text = name
    listed = etree.SubElement(root, "disks")
    for disk in disks:
        etree.SubElement(listed, "disk", name=disk.device, checkpoint="bitmap")
    return etree.tostring(root, encoding="unicode")
