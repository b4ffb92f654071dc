"""Changed blocks of a VMware guest: a snapshot for each pass, and the change tracking of its disks.

::

    a pass:  what a dead pass left goes ──> snapshot MARK ──> its disks' change IDs (of this moment)
             QueryChangedDiskAreas(MARK, change ID of the pass before), all pages
             nbdkit vddk, snapshot=MARK ──> read ──> the snapshot goes
    mark:    {"2000": "52 … 63/81", …}       a device's number and its change ID: needs no snapshot

The change IDs are the snapshot's, never the running machine's: those would be of a later moment
than the content that is copied, and what was written in between would be lost.

Snapshots have names that begin with the run's prefix; no others are touched. Where the tracking was
off it is switched on, and off again at the end.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import anyio

from v2v_async import vsphere
from v2v_async.copy.ranges import Ranges
from v2v_async.errors import GuestChangedError, SourceError, UsageError
from v2v_async.events import Reporter
from v2v_async.input.libvirt.domain_xml import parse_domain
from v2v_async.input.registry import parse_input
from v2v_async.input.vmware.uri import parse_uri
from v2v_async.input.vmware.vddk import VddkInput
from v2v_async.libvirt_connection import connected as libvirt_connected
from v2v_async.options import InputOptions
from v2v_async.server import Servers, running_servers
from v2v_async.v2vdir import V2VDir
from v2v_async.warm.changed import Delta, Opened
from v2v_async.warm.changed_areas import changed_ranges, is_same_line
from v2v_async.warm.vmware_calls import (
    TASK_TIMEOUT_S,
    BusyError,
    ChangeIdError,
    GoneError,
    Page,
    UntoldError,
    VirtualMachine,
    VmwareConnection,
    VmwareDisk,
    connected,
)

_DESCRIPTION = "of a warm migration by v2v-async, which removes it at the end of its pass"
_TRIES, _PAUSE_S = 4, 1.0
_OURS = ("vddk-file", "vddk-snapshot")


@dataclass(frozen=True, slots=True)
class FoundMachine:
    """What is known before the first pass. ``moref``: the virtual machine's reference.

    ``disks`` are in the order of libvirt's; ``is_tracked``: whether change tracking is on.
    """

    moref: str
    is_tracked: bool
    can_be_tracked: bool
    disks: Sequence[VmwareDisk]


def login_of(options: InputOptions) -> vsphere.Login:
    """Return how one logs in at the server of ``-ic``.

    Raises:
        UsageError: it is no URI, or there is no password.
    """
    uri = parse_uri(options.connection or "")
    if options.password is None:
        raise UsageError(
            "-it vddk needs a password", hint="add -ip FILE: the password is the file's only line"
        )
    return vsphere.Login(
        host=uri.host,
        port=uri.port or vsphere.HTTPS_PORT,
        user=uri.user,
        password=options.password.reveal(),
        verify=uri.verify,
        ca_file=vsphere.ca_file(),
    )


async def look(options: InputOptions) -> FoundMachine:
    """Look at a guest that is to be migrated.

    Raises:
        UsageError: an option does not fit.
        SourceError: a server can't be asked, or the guest's disks can't be read while it runs.
    """
    for name, _ in options.options:
        if name in _OURS:
            raise UsageError(
                f"-io {name}: a warm migration makes a snapshot for each pass, and reads that",
                hint="leave it out",
            )
    login = login_of(options)
    guest = options.arguments[0] if options.arguments else ""
    async with libvirt_connected(options.connection, options.password) as libvirt:
        found = await libvirt.domain(guest)
    domain = parse_domain(found.xml, f"the guest ‘{found.name}’")
    if domain.vmware_moref is None:
        raise SourceError(f"libvirt does not tell the reference of ‘{guest}’ (<vmware:moref>)")
    async with connected(login) as connection:
        machine = await connection.machine(domain.vmware_moref)
    by_file = {disk.file: disk for disk in machine.disks}
    disks = []
    for number, each in enumerate(domain.disks, 1):
        disk = by_file.get(each.location)
        if disk is None:
            raise SourceError(
                f"{login.address} has no disk ‘{each.location}’ in the guest ‘{guest}’",
                disk=number,
                hint="was it changed just now? Try again",
            )
        if not disk.is_snapshotted:
            raise SourceError(
                f"the disk ‘{disk.file}’ is independent, or a raw device in physical mode: "
                "snapshots do not hold its content",
                disk=number,
                hint="change its mode while the guest is off, or shut the guest down and use "
                "v2v-async convert",
            )
        disks.append(disk)
    untold = sorted(set(by_file) - {each.location for each in domain.disks})
    if untold:
        raise SourceError(
            f"the guest ‘{guest}’ has a disk that libvirt does not tell of: ‘{untold[0]}’",
            hint="detach it, or give it another controller: it would not be migrated",
        )
    if machine.can_be_tracked and not machine.is_tracked and machine.snapshots:
        raise SourceError(
            f"the guest ‘{guest}’ has snapshots, and change tracking is off: it can't be switched "
            "on for a guest with snapshots",
            hint="remove its snapshots, or switch change tracking on "
            "(ctkEnabled=TRUE) before they are made",
        )
    return FoundMachine(domain.vmware_moref, machine.is_tracked, machine.can_be_tracked, disks)


def unopened(options: InputOptions, machine: FoundMachine) -> VddkInput:
    """Return the input of a guest that may run: its disks are told about, not opened."""
    source = parse_input(options)
    assert isinstance(source, VddkInput)
    source.accepts_running = True
    source.told_sizes = {disk.file: disk.size for disk in machine.disks}
    return source


class VmwareChanges:
    """Implements :class:`~v2v_async.warm.changed.ChangedBlocks`.

    ``disks``: as :func:`look` found them, in their order. ``prefix``: what the names of this run's
    snapshots begin with. ``was_tracked``: whether change tracking was on before this run;
    ``is_tracking``: whether this run wants it, or reads everything in each pass.
    """

    def __init__(
        self,
        options: InputOptions,
        moref: str,
        disks: Sequence[VmwareDisk],
        prefix: str,
        *,
        was_tracked: bool,
        is_tracking: bool = True,
    ) -> None:
        self._options = options
        self._moref = moref
        self._disks = disks
        self._prefix = prefix
        self._was_tracked = was_tracked
        self._is_tracking = is_tracking

    @asynccontextmanager
    async def opened(
        self, since: str | None, mark: str, v2vdir: V2VDir, servers: Servers, reporter: Reporter
    ) -> AsyncIterator[Opened]:
        """See :class:`ChangedBlocks`."""
        known = _read_mark(since)
        try:
            async with self._connected() as connection:
                machine = await self._ready(connection, reporter)
                point = time.time()
                snapshot, disks = await self._freeze(connection, mark, reporter)
                ranges = [
                    await self._changed(connection, snapshot, disk, known.get(disk.key), reporter)
                    if known
                    else None
                    for disk in disks
                ]
            # Servers of its own: while one has a snapshot's disk open, the snapshot can't go.
            async with running_servers(v2vdir) as mine:
                await self._serve(snapshot, disks, v2vdir, mine, reporter)
                deltas = [
                    Delta(index, str(v2vdir.source_socket(index)), each)
                    for index, each in enumerate(ranges, 1)
                ]
                is_off = machine.power == "poweredOff"
                yield Opened(deltas, self._mark(disks, reporter), is_off=is_off, point=point)
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(TASK_TIMEOUT_S):
                await self._clean(reporter)

    async def forget(self, keep: str | None, reporter: Reporter) -> None:
        """See :class:`ChangedBlocks`: marks are change IDs, and nothing of them is kept there."""
        if keep is not None:
            return
        async with self._connected() as connection:
            try:
                await self._remove_ours(connection)
                machine = await connection.machine(self._moref)
                if self._was_tracked or not self._is_tracking or not machine.is_tracked:
                    return
                if machine.snapshots:
                    reporter.warning(
                        "change tracking, which this migration switched on, stays on: the guest "
                        "has snapshots that are not of this migration"
                    )
                    return
                await connection.track(self._moref, wanted=False)
            except GoneError:
                return

    # The moment of a pass.

    async def _ready(self, connection: VmwareConnection, reporter: Reporter) -> VirtualMachine:
        """Remove what a dead pass left; see that all is as it was, and tracked."""
        await self._remove_ours(connection)
        machine = await connection.machine(self._moref)
        self._check_disks(machine.disks)
        if self._is_tracking and not machine.is_tracked:
            reporter.message("change tracking is switched on, until the migration ends")
            await connection.track(self._moref, wanted=True)
        return machine

    async def _freeze(
        self, connection: VmwareConnection, mark: str, reporter: Reporter
    ) -> tuple[str, list[VmwareDisk]]:
        """Make a snapshot; return its reference, and the disks as they are in it."""
        for is_last in (False, True):
            reporter.message(f"the snapshot ‘{mark}’ is made")
            snapshot = await connection.create_snapshot(self._moref, mark, _DESCRIPTION)
            by_key = {disk.key: disk for disk in await connection.disks_of(snapshot)}
            disks = [by_key[disk.key] for disk in self._disks if disk.key in by_key]
            if len(disks) != len(self._disks):
                raise GuestChangedError("the snapshot has other disks than the guest")
            is_tracked = all(disk.change_id is not None for disk in disks)
            if is_last or is_tracked or not self._is_tracking:
                break
            # Tracking that was switched on begins when a snapshot has been made and removed.
            await connection.remove_snapshot(snapshot)
        return snapshot, disks

    async def _changed(
        self,
        connection: VmwareConnection,
        snapshot: str,
        disk: VmwareDisk,
        since: str | None,
        reporter: Reporter,
    ) -> Ranges | None:
        """Return what has changed on a disk; None: that can't be told, and all of it is copied."""

        async def ask(start: int) -> Page:
            for tries_left in reversed(range(_TRIES)):
                try:
                    return await connection.changed(self._moref, snapshot, disk, since or "", start)
                except BusyError as error:
                    if not tries_left:
                        raise
                    reporter.message(f"{error.message}; it is asked again")
                    await anyio.sleep(_PAUSE_S)
            raise AssertionError("the last try returns or raises")

        if since is None or disk.change_id is None or not is_same_line(since, disk.change_id):
            reporter.warning(
                f"the change tracking of ‘{disk.file}’ has begun anew since the last pass; all of "
                "the disk is copied again"
            )
            return None
        try:
            found, supposed = await changed_ranges(ask, disk.size)
        except (UntoldError, ChangeIdError) as error:
            reporter.warning(f"{error.message}; all of the disk is copied again")
            return None
        if supposed:
            reporter.warning(
                f"the server says nothing of {supposed} bytes of ‘{disk.file}’; they are taken for "
                "changed"
            )
        return found

    async def _serve(
        self,
        snapshot: str,
        disks: Sequence[VmwareDisk],
        v2vdir: V2VDir,
        servers: Servers,
        reporter: Reporter,
    ) -> None:
        """Serve what the snapshot holds."""
        frozen = (
            ("vddk-snapshot", snapshot),
            *(("vddk-file", disk.file) for disk in disks),
        )
        options = replace(self._options, options=(*self._options.options, *frozen))
        source = parse_input(options)
        assert isinstance(source, VddkInput)
        source.accepts_running = True
        await source.check(reporter)
        await source.setup(v2vdir, servers, reporter)

    def _mark(self, disks: Sequence[VmwareDisk], reporter: Reporter) -> str | None:
        if not self._is_tracking:
            return None
        untracked = [disk.file for disk in disks if disk.change_id is None]
        if untracked:
            reporter.warning(
                f"‘{untracked[0]}’ is not tracked, though change tracking is on: the next pass "
                "copies all of it again"
            )
        known = {str(disk.key): disk.change_id for disk in disks if disk.change_id is not None}
        return json.dumps(known, sort_keys=True) if known else None

    def _check_disks(self, now: Sequence[VmwareDisk]) -> None:
        """See that the guest has the disks that it had.

        Raises:
            GuestChangedError
        """
        had = sorted((disk.key, disk.size) for disk in self._disks)
        if sorted((disk.key, disk.size) for disk in now) != had:
            told = ", ".join(f"‘{disk.file}’ of {disk.size} bytes" for disk in now)
            raise GuestChangedError(
                f"the guest ‘{self._options.arguments[0]}’ has other disks, or larger ones, than "
                f"when the migration began: {told}",
                hint="take back what was changed; or begin anew: v2v-async warm abort, then start",
            )

    # What is left there.

    async def _clean(self, reporter: Reporter) -> None:
        """Remove the snapshot of this pass; where that fails it is said, and done by the next."""
        try:
            async with self._connected() as connection:
                await self._remove_ours(connection)
        except GoneError:
            return
        except SourceError as error:
            reporter.warning(
                f"the snapshot of this pass stays for now: {error.message}; the next command "
                "removes it"
            )

    async def _remove_ours(self, connection: VmwareConnection) -> None:
        await connection.wait_for_snapshots(self._moref)
        machine = await connection.machine(self._moref)
        for reference, name in reversed(machine.snapshots):
            if name.startswith(f"{self._prefix}-"):
                await connection.remove_snapshot(reference)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[VmwareConnection]:
        async with connected(login_of(self._options)) as connection:
            yield connection


def _read_mark(mark: str | None) -> dict[int, str]:
    return {} if mark is None else {int(key): each for key, each in json.loads(mark).items()}
