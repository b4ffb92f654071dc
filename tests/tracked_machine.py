"""A virtual machine of the stand-in vCenter (vcenter.py) with snapshots and change tracking.

Its disks are written by :meth:`TrackedMachine.write`, as a guest does. A snapshot keeps their
content, which the stand-in for nbdkit's vddk plugin then serves under the snapshot's reference, and
nothing else: the disks of a machine that runs can't be opened. What has changed is told in pages,
as well or as badly as :attr:`TrackedMachine.pages` wants.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from lxml import etree

from tests import vddk
from tests.vcenter import DATASTORE, PASSWORD, USER, Fault, Guest, VCenter
from tests.vddk import Vddk
from v2v_async import vsphere
from v2v_async.options import InputOptions
from v2v_async.secret import Secret

_VIM = "{urn:vim25}"
_NOW = "2024-01-01T00:00:00Z"
GRAIN = 65536
"""The bytes that a change counts for."""


@dataclass
class TrackedDisk:
    """A disk. ``log``: (number of the moment, grain) of each write since tracking began."""

    key: int
    path: Path
    line: str
    number: int = 1
    log: list[tuple[int, int]] = field(default_factory=list)
    mode: str = "persistent"

    @property
    def change_id(self) -> str:
        return f"{self.line}/{self.number}"


@dataclass
class Snapshot:
    """A snapshot: the disks' files and change IDs at its moment."""

    name: str
    files: list[Path]
    change_ids: list[str | None]
    stems: list[str]


@dataclass
class Pages:
    """How what has changed is told.

    ``most``: areas in a page; ``is_shuffled``: in no order; ``is_doubled``: areas overlap;
    ``holes``: pages describe at most so many bytes, whether something is in them or not;
    ``lies``: a page that was cut off says that it speaks for the whole disk.
    """

    most: int = 2000
    is_shuffled: bool = False
    is_doubled: bool = False
    holes: int | None = None
    lies: bool = False


class TrackedMachine:
    """Answers for the guest of a :class:`VCenter`."""

    def __init__(self, vcenter: VCenter, installed: Vddk, folder: Path) -> None:
        self.vcenter = vcenter
        self.installed = installed
        self.guest = vcenter.guest
        self._folder = folder
        self._random = random.Random(1)
        self.is_tracked = True
        self.can_be_tracked = True
        self.needs_a_cycle = False
        """Whether tracking that was switched on begins when a snapshot was made and removed."""
        self.pages = Pages()
        self.faults: list[Fault | str] = []
        """For the next questions what has changed, in this order; ``drop``: no answer."""
        self.refusals: dict[str, Fault] = {}
        """By the call's name: what it always answers."""
        self.snapshots: dict[str, Snapshot] = {}
        self.asked: list[tuple[int, int]] = []
        """(device, start) of each question what has changed."""
        self.calls: list[str] = []
        self._tasks: dict[str, tuple[int, Callable[[], str]]] = {}
        self.task_lasts = 1
        """Times that a task is looked at before it has ended."""
        self._made = 0
        self.disks = [
            TrackedDisk(2000 + number, path, self._new_line())
            for number, path in enumerate(self.guest.disks)
        ]
        self._stems = self.guest.names()
        vcenter.machine = self
        self._tell()

    def _new_line(self) -> str:
        return " ".join(f"{self._random.randrange(256):02x}" for _ in range(16))

    # What the guest and other people do.

    def write(self, disk: int, offset: int, data: bytes) -> None:
        """Write to a disk, counted from 0."""
        tracked = self.disks[disk]
        with tracked.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)
        for grain in range(offset // GRAIN, (offset + len(data) - 1) // GRAIN + 1):
            tracked.log.append((tracked.number, grain))

    def write_here_and_there(self, times: int = 20) -> None:
        """Write at random, on all disks."""
        for number, tracked in enumerate(self.disks):
            size = tracked.path.stat().st_size
            for _ in range(times):
                data = self._random.randbytes(self._random.choice([512, 4096, 70000]))
                self.write(number, self._random.randrange(0, size - len(data)), data)

    def reset(self, disk: int) -> None:
        """Tracking begins anew, as after a power failure of the host."""
        tracked = self.disks[disk]
        tracked.line, tracked.number, tracked.log = self._new_line(), 1, []

    def snapshot(self, name: str) -> str:
        """Make a snapshot; return its reference."""
        self._made += 1
        reference = f"snapshot-{self._made}"
        files = []
        for tracked in self.disks:
            copy = self._folder / f"{reference}-{tracked.key}"
            shutil.copyfile(tracked.path, copy)
            files.append(copy)
        works = self.is_tracked and not self.needs_a_cycle
        change_ids = [each.change_id if works else None for each in self.disks]
        for tracked in self.disks:
            tracked.number += 1
        stems = self.guest.names()
        self.snapshots[reference] = Snapshot(name, files, change_ids, stems)
        self._tell()
        return reference

    def remove(self, reference: str) -> None:
        """Remove a snapshot."""
        for path in self.snapshots.pop(reference).files:
            path.unlink()
        self.needs_a_cycle = False
        self._tell()

    def _tell(self) -> None:
        """Have the server's files, and what may be opened, as they are now."""
        after = f"-{self._made:06}" if self.snapshots else ""
        self.guest.disk_names = [f"{stem}{after}" for stem in self._stems]
        self.vcenter.files[f"{self.guest.name}/{self.guest.name}.vmx"] = self.guest.vmx().encode()
        newest = list(self.snapshots.items())[-1] if self.snapshots else None
        login = vsphere.Login("127.0.0.1", self.vcenter.port, "", "", verify=False)
        files: dict[str, str] = {}
        wanted: dict[str, str] = {}
        if newest is not None:
            wanted["snapshot"], snapshot = newest
            for stem, path in zip(snapshot.stems, snapshot.files, strict=True):
                files[self._file(stem)] = str(path)
        self.installed.expect(
            server="127.0.0.1",
            port=str(self.vcenter.port),
            user=USER,
            password=PASSWORD,
            vm=f"moref={self.guest.moref}",
            thumbprint=vsphere.thumbprint(login),
            files=files,
            **wanted,
        )

    def _file(self, stem: str) -> str:
        return f"[{DATASTORE}] {self.guest.name}/{stem}.vmdk"

    # What the server answers.

    def inventory(self) -> dict[tuple[str, str], Mapping[str, Any]]:
        """See :class:`tests.vcenter.Machine`."""
        names = self.guest.names()
        ids = [each.change_id if self.is_tracked else None for each in self.disks]
        machine: dict[str, Any] = {
            "config.changeTrackingEnabled": ("xsd:boolean", str(self.is_tracked).lower()),
            "capability.changeTrackingSupported": (
                "xsd:boolean",
                str(self.can_be_tracked).lower(),
            ),
            "config.hardware.device": ("ArrayOfVirtualDevice", self._devices(names, ids)),
            "recentTask": _References([("Task", name) for name in self._tasks]),
        }
        if self.snapshots:
            machine["snapshot"] = ("VirtualMachineSnapshotInfo", self._tree(list(self.snapshots)))
        found: dict[tuple[str, str], Mapping[str, Any]] = {
            ("VirtualMachine", self.guest.moref): {
                key: value.property() if isinstance(value, _References) else value
                for key, value in machine.items()
            }
        }
        for reference, snapshot in self.snapshots.items():
            devices = self._devices(snapshot.stems, snapshot.change_ids)
            found["VirtualMachineSnapshot", reference] = {
                "config.hardware.device": ("ArrayOfVirtualDevice", devices)
            }
        for name in list(self._tasks):
            found["Task", name] = _Asked(partial(self._task, name))
        return found

    def _devices(self, stems: list[str], change_ids: list[str | None]) -> str:
        devices = '<VirtualDevice xsi:type="VirtualPCIController"><key>100</key></VirtualDevice>'
        for tracked, stem, change_id in zip(self.disks, stems, change_ids, strict=True):
            size = tracked.path.stat().st_size
            told = f"<changeId>{change_id}</changeId>" if change_id else ""
            devices += (
                f'<VirtualDevice xsi:type="VirtualDisk"><key>{tracked.key}</key>'
                '<backing xsi:type="VirtualDiskFlatVer2BackingInfo">'
                f"<fileName>{escape(self._file(stem))}</fileName>"
                f"<diskMode>{tracked.mode}</diskMode>{told}</backing>"
                "<controllerKey>1000</controllerKey><unitNumber>0</unitNumber>"
                f"<capacityInKB>{size // 1024}</capacityInKB>"
                f"<capacityInBytes>{size}</capacityInBytes></VirtualDevice>"
            )
        return devices

    def _tree(self, references: list[str], tag: str = "rootSnapshotList") -> str:
        """Each is the child of the one before."""
        if not references:
            return ""
        first, *rest = references
        return (
            f'<{tag}><snapshot type="VirtualMachineSnapshot">{first}</snapshot>'
            f'<vm type="VirtualMachine">{self.guest.moref}</vm>'
            f"<name>{escape(self.snapshots[first].name)}</name><description/><id>1</id>"
            f"<createTime>{_NOW}</createTime><state>poweredOn</state><quiesced>false</quiesced>"
            f"{self._tree(rest, 'childSnapshotList')}</{tag}>"
        )

    def _start_task(self, kind: str, work: Callable[[], str]) -> str:
        name = f"task-{len(self.calls)}"
        self._tasks[f"{name}-{kind}"] = (self.task_lasts, work)
        return f'<returnval type="Task">{name}-{kind}</returnval>'

    def _task(self, name: str) -> tuple[str, str]:
        left, work = self._tasks[name]
        kind = name.rpartition("-")[2]
        if left > 0:
            self._tasks[name] = (left - 1, work)
            state, result = "running", ""
        else:
            state, result = "success", work()
            self._tasks[name] = (0, lambda: result)
        owner = "Snapshot" if kind == "remove" else "VirtualMachine"
        text = (
            f'<key>{name}</key><task type="Task">{name}</task>'
            f"<descriptionId>{owner}.{kind}</descriptionId><state>{state}</state>"
            f"<cancelled>false</cancelled><cancelable>true</cancelable>{result}"
            f"<queueTime>{_NOW}</queueTime><eventChainId>1</eventChainId>"
        )
        return "TaskInfo", text

    def call(self, name: str, call: etree._Element) -> str | Fault | None:
        """See :class:`tests.vcenter.Machine`."""
        self.calls.append(name)
        if name in self.refusals:
            return self.refusals[name]

        def argument(of: str) -> str:
            return call.findtext(f"{_VIM}{of}") or ""

        match name:
            case "QueryChangedDiskAreas":
                return self._changed(
                    argument("snapshot"),
                    int(argument("deviceKey")),
                    int(argument("startOffset")),
                    argument("changeId"),
                )
            case "ReconfigVM_Task":
                wanted = call.findtext(f"{_VIM}spec/{_VIM}changeTrackingEnabled") == "true"
                return self._start_task("reconfigure", lambda: self.track(wanted=wanted))
            case "CreateSnapshot_Task":
                assert (argument("memory"), argument("quiesce")) == ("false", "false")
                label = argument("name")
                return self._start_task("createSnapshot", lambda: self._make(label))
            case "RemoveSnapshot_Task":
                assert argument("removeChildren") == "false"
                reference = argument("_this")
                if reference not in self.snapshots:
                    return Fault("ManagedObjectNotFound", "The object has been deleted.")
                return self._start_task("remove", lambda: self._unmake(reference))
            case "ShutdownGuest":
                self.guest.power = "poweredOff"
                return ""
        return None

    def track(self, *, wanted: bool) -> str:
        """Switch tracking on or off."""
        assert not (wanted and self.snapshots), "tracking begins without snapshots"
        if wanted and not self.is_tracked:
            for number in range(len(self.disks)):
                self.reset(number)
        self.is_tracked = wanted
        return ""

    def _make(self, label: str) -> str:
        reference = self.snapshot(label)
        return (
            '<result xsi:type="ManagedObjectReference" type="VirtualMachineSnapshot">'
            f"{reference}</result>"
        )

    def _unmake(self, reference: str) -> str:
        self.remove(reference)
        return ""

    def _changed(self, reference: str, key: int, start: int, since: str) -> str | Fault:
        self.asked.append((key, start))
        if self.faults:
            return self.faults.pop(0)
        snapshot = self.snapshots[reference]
        place = next(n for n, each in enumerate(self.disks) if each.key == key)
        tracked, now = self.disks[place], snapshot.change_ids[place]
        line, _, first = since.rpartition("/")
        if now is None or now.rpartition("/")[0] != line:
            return Fault("InvalidArgument", "A specified parameter was not correct: changeId")
        numbers = range(int(first) + 1, int(now.rpartition("/")[2]) + 1)
        size = tracked.path.stat().st_size
        if start >= size:
            return Fault("InvalidArgument", "A specified parameter was not correct: startOffset")
        grains = sorted(
            {grain for number, grain in tracked.log if number in numbers and grain * GRAIN >= start}
        )
        return self._page(start, size, grains)

    def _page(self, start: int, size: int, grains: list[int]) -> str:
        pages = self.pages
        end = size if pages.holes is None else min(size, start + pages.holes)
        inside = [grain for grain in grains if grain * GRAIN < end]
        if len(inside) > pages.most:
            inside = inside[: pages.most]
            if not pages.lies:
                end = (inside[-1] + 1) * GRAIN
        areas = [(grain * GRAIN, min(GRAIN, size - grain * GRAIN)) for grain in inside]
        if pages.is_doubled:
            areas += [(offset, length // 2) for offset, length in areas]
        if pages.is_shuffled:
            self._random.shuffle(areas)
        told = "".join(
            f"<changedArea><start>{offset}</start><length>{length}</length></changedArea>"
            for offset, length in areas
        )
        return (
            f"<returnval><startOffset>{start}</startOffset><length>{end - start}</length>{told}"
            "</returnval>"
        )


class _Asked(Mapping[str, Any]):
    """What is made when it is asked for: each look at a task moves it on."""

    def __init__(self, make: Callable[[], tuple[str, str]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[str]:
        return iter(["info"])

    def __len__(self) -> int:
        return 1

    def __contains__(self, name: object) -> bool:
        return name == "info"

    def __getitem__(self, name: str) -> Any:
        return self._make()


@dataclass
class _References:
    refs: list[tuple[str, str]]

    def property(self) -> tuple[str, str]:
        inner = "".join(
            f'<ManagedObjectReference type="{kind}" xsi:type="ManagedObjectReference">{name}'
            "</ManagedObjectReference>"
            for kind, name in self.refs
        )
        return "ArrayOfManagedObjectReference", inner


@contextmanager
def tracked_machine(folder: Path, disks: list[Path], name: str = "g") -> Iterator[TrackedMachine]:
    """Have a vCenter with a machine that runs."""
    with VCenter(folder, Guest(name, disks, power="poweredOn")) as vcenter:
        kept = folder / "snapshots"
        kept.mkdir()
        yield TrackedMachine(vcenter, vddk.install(folder / "vddk"), kept)


def options_of(machine: TrackedMachine) -> InputOptions:
    """Return what names the machine as a source."""
    return InputOptions(
        arguments=(machine.guest.name,),
        connection=machine.vcenter.uri,
        password=Secret(PASSWORD),
        transport="vddk",
        options=(("vddk-libdir", str(machine.installed.libdir)),),
    )
