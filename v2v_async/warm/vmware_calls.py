"""What a warm migration asks of a vSphere server. The only importer of pyvmomi.

Everything in pyvmomi blocks, so that it runs in threads. Nothing here changes what is on a disk.
Source: the vSphere Web Services API: VirtualMachine, VirtualMachineSnapshot, Task.
"""

from __future__ import annotations

import http.client
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar
from xml.parsers.expat import ExpatError

import anyio

from v2v_async import vsphere
from v2v_async.errors import DependencyError, SourceError
from v2v_async.reaching import reaching
from v2v_async.unwaited import run_unwaited

_T = TypeVar("_T")

TIMEOUT_S = 60.0
"""For each answer; a server that tells what has changed on a large disk thinks for a while."""

TASK_TIMEOUT_S = 1800.0
"""For a task of the server: to remove a snapshot means to write what came after it to the disk."""

_POLL_S = 0.5
_CLOSE_TIMEOUT_S = 5.0
# Of vSphere 6.0, which newer ones speak too: no call here has changed since.
_API = "vim.version.version10"
# The tasks that make or remove a snapshot; of their names (``Snapshot.remove``) the end.
_CHANGES_SNAPSHOTS = ("createSnapshot", "createSnapshotEx", "remove")
_PRIVILEGES = (
    "the user's role needs: Virtual machine > Snapshot management > Create and Remove snapshot, "
    "Configuration > Toggle disk change tracking, Provisioning > Allow read-only disk access"
)


class ChangeIdError(SourceError):
    """The server does not know what has changed since a change ID."""


class BusyError(SourceError):
    """The server could not answer now; it may when it is asked again."""


class UntoldError(BusyError):
    """The server could not read what its change tracking has written down."""


class GoneError(SourceError):
    """What was asked about is not there any more."""


@dataclass(frozen=True, slots=True)
class VmwareDisk:
    """A disk of a virtual machine, or of a snapshot of it.

    ``key``: the device's number. ``file``: [DATASTORE] PATH.vmdk. ``size``: bytes.
    ``change_id``: what names its content in the change tracking; None: it is not tracked.
    ``is_snapshotted``: whether snapshots hold its content (an independent disk's they do not).
    """

    key: int
    file: str
    size: int
    change_id: str | None
    is_snapshotted: bool = True


@dataclass(frozen=True, slots=True)
class VirtualMachine:
    """A virtual machine as it is now. ``snapshots``: (reference, name), children after parents."""

    power: Literal["poweredOn", "poweredOff", "suspended"]
    is_tracked: bool
    can_be_tracked: bool
    snapshots: Sequence[tuple[str, str]]
    disks: Sequence[VmwareDisk]


@dataclass(frozen=True, slots=True)
class Page:
    """What has changed in ``start`` to ``start + length``, in bytes: (offset, length) each."""

    start: int
    length: int
    areas: Sequence[tuple[int, int]]


@asynccontextmanager
async def connected(login: vsphere.Login) -> AsyncIterator[VmwareConnection]:
    """Have a session for a block's duration.

    Raises:
        SourceError: the server can't be reached or does not let us in.
        DependencyError: pyvmomi is not installed.
    """
    connection = await run_unwaited(partial(VmwareConnection, login), "vsphere")
    try:
        yield connection
    finally:
        with anyio.CancelScope(shield=True), anyio.move_on_after(_CLOSE_TIMEOUT_S):
            await run_unwaited(connection.close, "vsphere")


class VmwareConnection:
    """A session; virtual machines and snapshots are named by their references (``vm-16``).

    Raises:
        SourceError: by each call: the server can't be reached, or refuses.
    """

    def __init__(self, login: vsphere.Login) -> None:
        self._vim, self._vmodl, stub = _pyvmomi()
        self._login = login
        with self._asking("log in"):
            self._stub = stub(
                host=login.host,
                port=login.port,
                version=_API,
                sslContext=vsphere.tls_context(login),
                httpConnectionTimeout=TIMEOUT_S,
            )
            service = self._vim.ServiceInstance("ServiceInstance", self._stub)
            self._content = service.RetrieveContent()
            try:
                self._content.sessionManager.Login(login.user, login.password)
            except BaseException:
                self._stub.DropConnections()
                raise

    def close(self) -> None:
        """Log out."""
        with suppress(Exception):
            self._content.sessionManager.Logout()
        self._stub.DropConnections()

    async def machine(self, moref: str) -> VirtualMachine:
        """Return a virtual machine as it is.

        Raises:
            GoneError: there is none of that reference.
        """
        return await self._run(partial(self._machine, moref))

    async def track(self, moref: str, *, wanted: bool) -> None:
        """Switch the change tracking on or off; it takes effect with the next snapshot."""

        def call() -> None:
            spec = self._vim.vm.ConfigSpec(changeTrackingEnabled=wanted)
            with self._asking(f"switch change tracking {'on' if wanted else 'off'}"):
                self._wait_for(self._vm(moref).ReconfigVM_Task(spec))

        await self._run(call)

    async def create_snapshot(self, moref: str, name: str, description: str) -> str:
        """Make a snapshot without memory and without quiescing; return its reference."""

        def call() -> str:
            with self._asking("make a snapshot"):
                task = self._vm(moref).CreateSnapshot_Task(name, description, False, False)
                return str(self._wait_for(task)._GetMoId())

        return await self._run(call)

    async def remove_snapshot(self, snapshot: str) -> None:
        """Remove a snapshot, but none of its children; nothing is done where there is none."""

        def call() -> None:
            with suppress(GoneError), self._asking("remove a snapshot"):
                made = self._vim.vm.Snapshot(snapshot, self._stub)
                self._wait_for(made.RemoveSnapshot_Task(removeChildren=False, consolidate=True))

        await self._run(call)

    async def wait_for_snapshots(self, moref: str) -> None:
        """Wait until no snapshot of a machine is being made or removed: a dead process's task."""

        def call() -> None:
            with self._asking("look at the tasks"):
                found = self._properties(self._vm(moref), "recentTask")
                for task in found.get("recentTask", ()):
                    with suppress(self._vmodl.fault.ManagedObjectNotFound):
                        info = self._properties(task, "info")["info"]
                        kind = str(info.descriptionId).rpartition(".")[2]
                        if info.state in ("queued", "running") and kind in _CHANGES_SNAPSHOTS:
                            with suppress(self._vmodl.MethodFault):
                                self._wait_for(task)

        await self._run(call)

    async def disks_of(self, snapshot: str) -> Sequence[VmwareDisk]:
        """Return the disks as they are in a snapshot, with the change IDs of that moment."""

        def call() -> Sequence[VmwareDisk]:
            with self._asking("look at a snapshot"):
                made = self._vim.vm.Snapshot(snapshot, self._stub)
                found = self._properties(made, "config.hardware.device")
                return self._disks(found.get("config.hardware.device", ()))

        return await self._run(call)

    async def changed(
        self, moref: str, snapshot: str, disk: VmwareDisk, since: str, start: int
    ) -> Page:
        """Return a page of what has changed on a disk from ``since`` to a snapshot.

        ``start``: bytes; the page begins there.

        Raises:
            ChangeIdError: that is not known.
            UntoldError, BusyError: it was not told this time.
        """

        def call() -> Page:
            with self._asking(f"say what has changed on ‘{disk.file}’"):
                made = self._vim.vm.Snapshot(snapshot, self._stub)
                try:
                    told = self._vm(moref).QueryChangedDiskAreas(made, disk.key, start, since)
                except self._vmodl.fault.InvalidArgument as fault:
                    raise ChangeIdError(
                        f"{self._login.address} does not know the change ID ‘{since}’ of "
                        f"‘{disk.file}’: {_reason(fault)}"
                    ) from fault
                except self._vim.fault.FileFault as fault:
                    raise UntoldError(
                        f"{self._login.address} can't say what has changed on ‘{disk.file}’: "
                        f"{_reason(fault)}"
                    ) from fault
            return Page(
                told.startOffset,
                told.length,
                [(area.start, area.length) for area in told.changedArea or ()],
            )

        return await self._run(call)

    # All that follows blocks.

    async def _run(self, call: Callable[[], _T]) -> _T:
        return await run_unwaited(call, "vsphere")

    def _vm(self, moref: str) -> Any:
        return self._vim.VirtualMachine(moref, self._stub)

    def _machine(self, moref: str) -> VirtualMachine:
        with self._asking("look at the virtual machine"):
            found = self._properties(
                self._vm(moref),
                "runtime.powerState",
                "config.changeTrackingEnabled",
                "capability.changeTrackingSupported",
                "config.hardware.device",
                "snapshot",
            )
        snapshots = found.get("snapshot")
        return VirtualMachine(
            str(found["runtime.powerState"]),  # type: ignore[arg-type]
            bool(found.get("config.changeTrackingEnabled")),
            bool(found.get("capability.changeTrackingSupported")),
            list(_tree(snapshots.rootSnapshotList)) if snapshots is not None else [],
            self._disks(found.get("config.hardware.device", ())),
        )

    def _disks(self, devices: Sequence[Any]) -> list[VmwareDisk]:
        disks = []
        for device in devices:
            if not isinstance(device, self._vim.vm.device.VirtualDisk):
                continue
            backing = device.backing
            mode = str(getattr(backing, "diskMode", None) or "persistent")
            is_physical = getattr(backing, "compatibilityMode", None) == "physicalMode"
            size = device.capacityInBytes or device.capacityInKB * 1024
            disks.append(
                VmwareDisk(
                    device.key,
                    str(getattr(backing, "fileName", "")),
                    size,
                    getattr(backing, "changeId", None) or None,
                    not mode.startswith("independent") and not is_physical,
                )
            )
        return disks

    def _properties(self, managed: Any, *paths: str) -> dict[str, Any]:
        """Return those of an object's properties that it has, in one question."""
        collector = self._vmodl.query.PropertyCollector
        spec = collector.FilterSpec(
            objectSet=[collector.ObjectSpec(obj=managed)],
            propSet=[collector.PropertySpec(type=type(managed), pathSet=list(paths))],
        )
        told = self._content.propertyCollector.RetrieveContents([spec])
        return {each.name: each.val for found in told for each in found.propSet or ()}

    def _wait_for(self, task: Any) -> Any:
        """Return a task's result.

        Raises:
            SourceError: it takes too long.
            vmodl.MethodFault: it failed.
        """
        ends = time.monotonic() + TASK_TIMEOUT_S
        while True:
            info = self._properties(task, "info")["info"]
            if info.state == "success":
                return info.result
            if info.state == "error":
                raise info.error
            if time.monotonic() > ends:
                raise SourceError(
                    f"a task of {self._login.address} ({info.descriptionId}) has not ended after "
                    f"{TASK_TIMEOUT_S:.0f} s",
                    hint="look at the tasks of the virtual machine there",
                )
            time.sleep(_POLL_S)

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Have what goes wrong said as ours; ``what`` the server was asked to do."""
        fault, vmodl = self._vim.fault, self._vmodl.fault
        server = self._login.address
        try:
            with reaching(
                f"‘{server}’",
                self._login.host,
                option="-ic",
                untrusted="add the certificate of its authority to this machine's, use the name "
                "that the certificate is for, or add ?no_verify=1 to -ic to trust any",
                timeout_s=TIMEOUT_S,
                error=BusyError,
            ):
                yield
        except fault.InvalidLogin as problem:
            raise SourceError(
                f"{server} does not let ‘{self._login.user}’ in: {_reason(problem)}",
                hint="check USER@ in -ic and the file of -ip",
            ) from problem
        except fault.NoPermission as problem:
            raise SourceError(
                f"{server}: ‘{self._login.user}’ is not allowed to {what}", hint=_PRIVILEGES
            ) from problem
        except vmodl.ManagedObjectNotFound as problem:
            raise GoneError(f"{server} can't {what}: it is not there any more") from problem
        except self._vmodl.MethodFault as problem:
            raise BusyError(f"{server} can't {what}: {_reason(problem)}") from problem
        except (ExpatError, http.client.HTTPException, AttributeError, KeyError) as problem:
            # What is not vSphere's API makes pyvmomi stumble in one of these ways.
            raise BusyError(
                f"{server} does not answer as a vSphere server does "
                f"({type(problem).__name__} on the question to {what})",
                hint="check the host and the port in -ic",
            ) from problem


def _tree(snapshots: Sequence[Any]) -> Iterator[tuple[str, str]]:
    for each in snapshots or ():
        yield each.snapshot._GetMoId(), each.name
        yield from _tree(each.childSnapshotList)


def _reason(fault: Any) -> str:
    """Return what a fault says, or else its name."""
    said = getattr(fault, "msg", None) or getattr(fault, "faultMessage", None)
    name = type(fault).__name__.rpartition(".")[2]
    return f"{said} ({name})" if isinstance(said, str) and said else name


def _pyvmomi() -> tuple[Any, Any, Any]:
    try:
        from pyVmomi import vim, vmodl
        from pyVmomi.SoapAdapter import SoapStubAdapter
    except ImportError as error:
        raise DependencyError(
            "pyvmomi, which talks to vSphere servers, is not installed for this Python",
            hint="pip install 'v2v-async[vmware]'",
        ) from error
    return vim, vmodl, SoapStubAdapter
