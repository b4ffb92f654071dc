"""``-o libvirt``: disks in a storage pool of a libvirt host, and the guest defined there.

::

    POOL's directory/NAME-sda  NAME-sdb …     hidden names until all is written and flushed
    finalize:  names ──> pool refreshed ──> domain defined ──> done
                 └────────────┴────────────────┴─ on failure: domain undefined, disks removed

Everything has to be new: a domain or a file of the same name is refused before the conversion,
and so nothing that was there is ever replaced or removed. What finalize made is in ``state.json``
until it is the result.
"""

from __future__ import annotations

import os
import secrets
import shlex
import stat
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import anyio
import anyio.lowlevel

from v2v_async.errors import TargetError, UsageError, V2VError
from v2v_async.events import Reporter
from v2v_async.libvirt_connection import is_remote
from v2v_async.model import SourceGuest, TargetGuest
from v2v_async.options import OutputOptions
from v2v_async.output import files
from v2v_async.output.contract import Output, refuse_finalized, reported
from v2v_async.output.domain_xml import TargetDisk, domain_xml
from v2v_async.output.file_disks import COMPRESSED_HELP, FileDisks, check_name
from v2v_async.output.libvirt_calls import FoundPool, TargetConnection, connected
from v2v_async.output.libvirt_host import Fitted, NetworkState, Place, ask_offer, fit, with_uuid
from v2v_async.output.libvirt_pool import DEFAULT_POOL, find_pool, virsh
from v2v_async.redact import redact
from v2v_async.secret import Secret
from v2v_async.server import Servers
from v2v_async.v2vdir import MadeObject, V2VDir

_GUEST, _DISK = "guest", "disk"
# Less than what guest.py gives to abandon: there must be time to tell what could not be removed.
_UNDO_TIMEOUT_S = 40.0


@dataclass(frozen=True, slots=True)
class _Found:
    """The target, reached: the pool, and the disks in its directory."""

    connection: TargetConnection
    pool: FoundPool
    disks: FileDisks


class LibvirtOutput(Output):
    """A guest of a libvirt host."""

    name = "libvirt"
    option_help = {"compressed": COMPRESSED_HELP}

    def __init__(
        self, uri: str | None, storage: str, disks: FileDisks, password: Secret | None
    ) -> None:
        self.uri = uri
        self.storage = storage
        # Their directory is the pool's, which only libvirt knows.
        self._disks = disks
        self._password = password

    @classmethod
    def parse(cls, options: OutputOptions) -> Self:
        """Check -of, -oa, -oo and -on; -os is a pool, ``default`` where it is not given."""
        for option, _ in options.options:
            if option not in cls.option_help:
                raise UsageError(
                    f"-o libvirt has no option ‘-oo {option}’", hint="it has: -oo compressed"
                )
        if options.storage == "":
            raise UsageError("-os is empty", hint="give a pool: virsh pool-list")
        storage = options.storage or DEFAULT_POOL
        disks = FileDisks.parse(replace(options, storage=storage), "-o libvirt")
        if options.name is not None:
            check_name(options.name)
        return cls(options.connection, storage, disks, options.password)

    # Before the conversion.

    async def check(self, reporter: Reporter) -> None:
        """Reach the host and the pool, and see that both mean the same directory."""
        async with self._found() as found:
            await found.disks.check()
            if is_remote(self.uri):
                await self._check_shared(found)

    async def check_source(self, source: SourceGuest, name: str, reporter: Reporter) -> None:
        """Check that the name is free, and that the disks have room."""
        async with self._found() as found:
            await self._check_guest(found, source, name, reporter)

    async def _check_guest(
        self, found: _Found, source: SourceGuest, name: str, reporter: Reporter
    ) -> None:
        check_name(name)
        paths = found.disks.disk_paths(len(source.disks), name)
        await self._refuse_taken(found.connection, name, paths)
        found.disks.check_finals(paths, source.disks)
        found.disks.check_room(source.disks, reporter)

    async def _refuse_taken(
        self, connection: TargetConnection, name: str, paths: Sequence[Path]
    ) -> None:
        if await connection.has_domain(name):
            raise TargetError(
                f"{connection.shown} has a guest ‘{name}’ already",
                hint="give another name with -on NAME, or remove that guest: "
                f"{self._virsh('undefine', name)}",
            )
        for path in paths:
            if os.path.lexists(path):
                raise TargetError(
                    f"‘{path}’ is there already, and may be the disk of another guest",
                    hint=f"give another name with -on NAME, or remove it: {_rm(path)}",
                )

    async def _check_shared(self, found: _Found) -> None:
        """See, by a file, whether the other machine's directory is the one that we write to."""
        probe = found.disks.directory / f".v2v-async.{secrets.token_hex(8)}.probe"
        files.make_empty(probe)
        try:
            await found.connection.refresh_pool(found.pool.uuid)
            is_same = await found.connection.has_volume(found.pool.uuid, probe.name)
        finally:
            probe.unlink()
            with anyio.move_on_after(_UNDO_TIMEOUT_S, shield=True), suppress(V2VError):
                await found.connection.refresh_pool(found.pool.uuid)
        if not is_same:
            raise self._elsewhere(found.pool)

    def _elsewhere(self, pool: FoundPool) -> TargetError:
        return TargetError(
            f"the directory ‘{pool.path}’ of the storage pool ‘{pool.name}’ is on another machine "
            f"({redact(self.uri or '')}): disks can't be written to it from here",
            hint="run v2v-async on that machine; or share the directory (NFS) under the same path; "
            "or write to a directory with -o local, and copy the disks and the XML there",
        )

    # The steps.

    async def setup(
        self, v2vdir: V2VDir, source: SourceGuest, name: str, servers: Servers, reporter: Reporter
    ) -> None:
        """Make empty disks under hidden names in the pool's directory, and serve them."""
        async with self._found() as found:
            await self._check_guest(found, source, name, reporter)
            if v2vdir.metadata_out.exists():
                # What the host can't run is better known before the copy than after it.
                await self._fit(found, v2vdir.read_target())
        paths = found.disks.disk_paths(len(source.disks), name)
        await found.disks.setup(v2vdir, paths, source.disks, servers)

    async def reopen(
        self, v2vdir: V2VDir, source: SourceGuest, name: str, servers: Servers, reporter: Reporter
    ) -> bool:
        """Serve the disks again under their hidden names; there is no guest yet, or not any more.

        Raises:
            TargetError: the host can't be reached, or would not undefine it.
        """
        refuse_finalized(v2vdir)
        async with self._found() as found:
            for made in v2vdir.state.objects:
                if made.kind == _GUEST:
                    await found.connection.undefine(made.name)
                    v2vdir.forget_object(made)
        disks = found.disks
        paths = disks.disk_paths(len(source.disks), name)
        disks.take_back(v2vdir, paths)
        kept = [made for made in v2vdir.state.objects if made.kind != _DISK]
        v2vdir.update(objects=kept)
        problem = await disks.problem(v2vdir, paths, source.disks)
        if problem is not None:
            reporter.warning(f"the disks are made and copied anew: {problem}")
            return await self.start_over(v2vdir, source, name, servers, reporter)
        await disks.serve_again(v2vdir, paths, source.disks, servers)
        return True

    async def finalize(self, v2vdir: V2VDir, target: TargetGuest, reporter: Reporter) -> None:
        """Give the disks their names and define the guest: both, or nothing is left."""
        async with self._found() as found:
            paths = found.disks.disk_paths(len(target.source.disks), target.name)
            fitted = await self._fit(found, target)
            for warning in fitted.warnings:
                reporter.warning(warning)
            domain_uuid = str(uuid.uuid4())
            disks = {
                disk.index: TargetDisk(str(path), found.disks.format)
                for disk, path in zip(target.source.disks, paths, strict=True)
            }
            xml = domain_xml(fitted.target, disks, fitted.uefi, with_uuid(fitted, domain_uuid))
            await self._give_away(found, v2vdir, paths)
            # Slow, so that it comes before the last look at what is there.
            for path in self._hidden(v2vdir, paths):
                await files.sync(path)
            await self._refuse_taken(found.connection, target.name, paths)
            made = [
                MadeObject(kind=_DISK, name=str(path), undo=self._undo_disk(path, found.pool))
                for path in paths
            ]
            made.append(
                MadeObject(kind=_GUEST, name=domain_uuid, undo=self._virsh("undefine", domain_uuid))
            )
            v2vdir.update(objects=[*v2vdir.state.objects, *made])
            try:
                await found.disks.publish(v2vdir, paths, [], is_last=False)
                # libvirt goes on with a call that was given up: we have to know how it ended.
                with anyio.CancelScope(shield=True):
                    await self._refresh(found, reporter)
                    await found.connection.define(xml)
                await anyio.lowlevel.checkpoint_if_cancelled()
            except BaseException as error:
                with anyio.CancelScope(shield=True):
                    await self.abandon(v2vdir, reporter)
                if isinstance(error.__cause__, TimeoutError):
                    # The call is still on its way, and may come after our look.
                    reporter.warning(
                        "libvirt may still define the guest, without disks; if ‘"
                        f"{self._virsh('list', '--all')}’ shows it, remove it with: {made[-1].undo}"
                    )
                raise
            remaining = [each for each in v2vdir.state.objects if each not in made]
            v2vdir.update(objects=remaining, is_finalized=True)

    async def abandon(self, v2vdir: V2VDir, reporter: Reporter) -> None:
        """Undefine the guest and remove the disks that this run made."""
        if v2vdir.state.is_finalized:
            return
        with reported(reporter):
            files.unpublish(v2vdir)
        state = v2vdir.state
        # Noted before they get their names; a file of that name is not ours until then.
        hidden = {file.final for file in state.outputs if os.path.lexists(file.temporary)}
        files.remove_temporary(state.outputs)
        for made in state.objects:
            if made.kind == _DISK and made.name in hidden:
                v2vdir.forget_object(made)
            elif made.kind == _DISK:
                self._remove_disk(v2vdir, made, reporter)
        guests = [made for made in state.objects if made.kind == _GUEST]
        if not guests and not state.outputs:
            return
        problem = f"no answer within {_UNDO_TIMEOUT_S:.0f} s"
        with anyio.move_on_after(_UNDO_TIMEOUT_S, shield=True):
            try:
                async with connected(self.uri, self._password) as connection:
                    for made in guests:
                        await connection.undefine(made.name)
                        v2vdir.forget_object(made)
                    # Somebody else may have had the pool refreshed when our disks were in it.
                    pool = await find_pool(connection, self.uri, self.storage)
                    await connection.refresh_pool(pool.uuid)
            except V2VError as error:
                problem = error.message
        for made in v2vdir.state.objects:
            if made.kind == _GUEST:
                reporter.warning(
                    f"the new guest may be defined, without disks ({problem}); "
                    f"remove it with: {made.undo}"
                )

    # What they consist of.

    @asynccontextmanager
    async def _found(self) -> AsyncIterator[_Found]:
        """Have a connection to the host, and the pool looked up."""
        async with connected(self.uri, self._password) as connection:
            pool = await find_pool(connection, self.uri, self.storage)
            assert pool.path is not None
            directory = Path(pool.path)
            if is_remote(self.uri) and not directory.is_dir():
                raise self._elsewhere(pool)
            yield _Found(connection, pool, replace(self._disks, directory=directory))

    async def _fit(self, found: _Found, target: TargetGuest) -> Fitted:
        connection = found.connection
        is_here = not is_remote(self.uri)
        offer = await ask_offer(connection, target, is_here=is_here)
        is_session = await connection.is_session()
        networks: dict[str, NetworkState] = {}
        bridges = set()
        for nic in target.nics:
            if nic.vnet_type == "network":
                active = await connection.network_is_active(nic.vnet)
                networks[nic.vnet] = (
                    "absent" if active is None else "active" if active else "inactive"
                )
            elif is_here and not _has_interface(nic.vnet):
                bridges.add(nic.vnet)
        return fit(
            target,
            offer,
            Place(
                is_session=is_session,
                has_vsock=not is_here or _has_vsock(is_session=is_session),
                networks=networks,
                absent_bridges=frozenset(bridges),
            ),
        )

    async def _give_away(self, found: _Found, v2vdir: V2VDir, paths: Sequence[Path]) -> None:
        """Give disks to the user whose session's daemon it is, where root makes them.

        The system's daemon changes the owner itself when it starts a guest; a session's can't.
        """
        if os.geteuid() != 0 or not await found.connection.is_session():
            return
        status = found.disks.directory.stat()
        for path in self._hidden(v2vdir, paths):
            try:
                os.chown(path, status.st_uid, status.st_gid)
            except OSError as error:
                raise files.target_error("change the owner of", path, error) from error

    def _hidden(self, v2vdir: V2VDir, paths: Sequence[Path]) -> list[Path]:
        finals = {str(path) for path in paths}
        return [Path(file.temporary) for file in v2vdir.state.outputs if file.final in finals]

    async def _refresh(self, found: _Found, reporter: Reporter) -> None:
        try:
            await found.connection.refresh_pool(found.pool.uuid)
        except TargetError as error:
            # The guest's disks are files; only lists of volumes lack them.
            reporter.warning(
                f"{error.message}; do it by hand: {self._virsh('pool-refresh', found.pool.name)}"
            )

    def _remove_disk(self, v2vdir: V2VDir, made: MadeObject, reporter: Reporter) -> None:
        try:
            Path(made.name).unlink(missing_ok=True)
        except OSError as error:
            reporter.warning(
                f"‘{made.name}’ can't be removed: {error.strerror}; remove it with: {made.undo}"
            )
        else:
            v2vdir.forget_object(made)

    def _undo_disk(self, path: Path, pool: FoundPool) -> str:
        return f"{_rm(path)} && {self._virsh('pool-refresh', pool.name)}"

    def _virsh(self, *words: str) -> str:
        return virsh(self.uri, *words)


def _rm(path: Path) -> str:
    return shlex.join(["rm", str(path)])


def _has_interface(name: str) -> bool:
    # A name with a slash would lead elsewhere, and is none.
    return "/" not in name and Path("/sys/class/net", name).exists()


def _has_vsock(*, is_session: bool) -> bool:
    """Whether libvirt's daemon here can give guests a vsock device."""
    try:
        status = os.stat("/dev/vhost-vsock")
    except OSError:
        return False
    if not is_session:
        return True
    # Root may be connected to another user's session.
    if os.geteuid() == 0:
        return status.st_mode & (stat.S_IROTH | stat.S_IWOTH) == stat.S_IROTH | stat.S_IWOTH
    return os.access("/dev/vhost-vsock", os.R_OK | os.W_OK)
