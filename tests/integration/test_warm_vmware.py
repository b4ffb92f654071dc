"""VMware's change tracking: real pyvmomi, libvirt and nbdkit, against a stand-in for the server.

What a pass would copy, put over what the pass before left, is what the disks held at its moment.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import anyio.lowlevel
import pytest

from tests.conftest import require
from tests.integration.servers import MIB, fragmented
from tests.integration.test_input_disk import content
from tests.tracked_machine import GRAIN, Pages, TrackedMachine, options_of, tracked_machine
from tests.vcenter import PASSWORD, Fault
from v2v_async.errors import GuestChangedError, SourceError, UsageError, V2VError
from v2v_async.events import Event, Reporter
from v2v_async.options import InputOptions
from v2v_async.secret import Secret
from v2v_async.server import running_servers
from v2v_async.v2vdir import V2VDir
from v2v_async.warm import changed_areas, from_vmware, vmware_calls
from v2v_async.warm.from_vmware import VmwareChanges, look

pytestmark = pytest.mark.anyio
SIZE = 8 * MIB
PREFIX = "v2v-async-test"
OTHERS = "before the upgrade"


@pytest.fixture
def machine(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrackedMachine]:
    require("openssl", "nbdkit")
    monkeypatch.setattr(vmware_calls, "_POLL_S", 0.01)
    monkeypatch.setattr(from_vmware, "_PAUSE_S", 0.01)
    disks = [fragmented(short_tmp / f"{n}.img", SIZE, seed=n) for n in range(2)]
    with tracked_machine(short_tmp, disks) as made:
        for name, value in made.installed.environment.items():
            monkeypatch.setenv(name, value)
        yield made


class Passes:
    """Passes over a machine, and what they would have written."""

    def __init__(self, machine: TrackedMachine, folder: Path, found: from_vmware.FoundMachine):
        self.machine = machine
        self.events: list[Event] = []
        self.reporter = Reporter(self.events.append, "t")
        self.place = V2VDir.create(folder)
        self.changes = VmwareChanges(
            options_of(machine),
            found.moref,
            found.disks,
            PREFIX,
            was_tracked=found.is_tracked,
            is_tracking=found.can_be_tracked,
        )
        self.targets = [bytearray(SIZE) for _ in machine.disks]
        self.mark: str | None = None
        self.number = 0

    async def run(self, *, writing: bool = True) -> list[int | None]:
        """Make a pass; return how much of each disk it copied, None being all."""
        self.number += 1
        name = f"{PREFIX}-{self.number}"
        copied: list[int | None] = []
        async with (
            running_servers(self.place) as servers,
            self.changes.opened(self.mark, name, self.place, servers, self.reporter) as opened,
        ):
            frozen = list(self.machine.snapshots.values())[-1]
            assert frozen.name == name
            expected = [path.read_bytes() for path in frozen.files]
            if writing:
                self.machine.write_here_and_there(3)
            for target, delta, wanted in zip(self.targets, opened.deltas, expected, strict=True):
                read = await content(delta.endpoint)
                assert read == wanted
                ranges = delta.ranges if delta.ranges is not None else [(0, SIZE)]
                for offset, length in ranges:
                    target[offset : offset + length] = read[offset : offset + length]
                copied.append(None if delta.ranges is None else delta.ranges.total)
                assert target == wanted
        self.mark = opened.mark
        assert opened.is_off is (self.machine.guest.power == "poweredOff")
        assert self.names() == []
        return copied

    def names(self) -> list[str]:
        """The names of this run's snapshots."""
        found = [each.name for each in self.machine.snapshots.values()]
        return [name for name in found if name.startswith(PREFIX)]

    def said(self) -> str:
        return "\n".join(str(event) for event in self.events)


@pytest.fixture
async def passes(machine: TrackedMachine, short_tmp: Path) -> Passes:
    return Passes(machine, short_tmp, await look(options_of(machine)))


@pytest.mark.parametrize(
    "pages",
    [
        Pages(),
        Pages(most=3),
        Pages(most=1, is_shuffled=True),
        Pages(most=4, is_shuffled=True, is_doubled=True),
        Pages(holes=MIB),
        Pages(most=2, holes=3 * GRAIN, is_shuffled=True),
    ],
    ids=["one page", "cut off", "one by one", "doubled", "empty pages", "all of it"],
)
async def test_passes(machine: TrackedMachine, passes: Passes, pages: Pages) -> None:
    machine.pages = pages
    assert await passes.run() == [None, None]
    for _ in range(9 if pages == Pages() else 3):
        machine.write_here_and_there(4)
        copied = await passes.run()
        assert all(each is not None and each < SIZE for each in copied), copied
    machine.guest.power = "poweredOff"
    await passes.run(writing=False)
    assert await passes.run(writing=False) == [0, 0]
    assert passes.targets == [each.path.read_bytes() for each in machine.disks]
    await passes.changes.forget(None, passes.reporter)
    assert machine.is_tracked
    assert not machine.snapshots
    for text in (passes.said(), passes.mark or ""):
        assert PASSWORD not in text


async def test_a_page_that_was_cut_off_without_saying_so(
    machine: TrackedMachine, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2000 areas are what a server tells at once; whatever it says, it is asked for the rest."""
    monkeypatch.setattr(changed_areas, "FULL_PAGE", 5)
    machine.pages = Pages(most=5, lies=True)
    await passes.run()
    for _ in range(3):
        machine.write_here_and_there(30)
        await passes.run()


async def test_what_is_written_in_between_is_of_the_next_pass(
    machine: TrackedMachine, passes: Passes
) -> None:
    """The mark is of the snapshot's moment, not of when it was asked for."""
    await passes.run(writing=False)
    machine.write(0, 5 * GRAIN, b"after the first")
    assert await passes.run(writing=False) == [GRAIN, 0]
    real = machine.snapshot

    def late(name: str) -> str:
        reference = real(name)
        machine.write(1, 7 * GRAIN, b"after the snapshot, before the question")
        return reference

    machine.snapshot = late  # type: ignore[method-assign]
    assert await passes.run(writing=False) == [0, 0]
    machine.snapshot = real  # type: ignore[method-assign]
    assert await passes.run(writing=False) == [0, GRAIN]


async def test_a_question_that_fails_is_asked_again(
    machine: TrackedMachine, passes: Passes
) -> None:
    await passes.run()
    machine.pages = Pages(most=2)
    machine.write_here_and_there(5)
    machine.faults = [Fault("FileFault", "Error caused by file"), "drop", Fault("SystemError", "?")]
    copied = await passes.run()
    assert None not in copied
    assert "it is asked again" in passes.said()


@pytest.mark.parametrize("how", ["files", "unknown", "reset", "reverted"])
async def test_a_disk_whose_changes_are_not_known_is_copied_whole(
    machine: TrackedMachine, passes: Passes, how: str
) -> None:
    """And only that one."""
    await passes.run()
    await passes.run()
    machine.write_here_and_there(5)
    match how:
        case "files":
            machine.faults = [Fault("FileFault", "Error caused by file …-ctk.vmdk")] * 4
        case "unknown":
            machine.faults = [Fault("InvalidArgument", "A specified parameter was not correct")]
        case "reset":
            machine.reset(0)
        case "reverted":
            machine.disks[0].number = 0
    [first, second] = await passes.run()
    assert first is None
    assert second is not None
    assert "all of the disk is copied again" in passes.said()
    assert None not in await passes.run()


async def test_a_server_that_does_not_answer_ends_the_pass(
    machine: TrackedMachine, passes: Passes
) -> None:
    """The next one copies the same: nothing is taken for unchanged, nothing stays there."""
    await passes.run()
    machine.write_here_and_there(5)
    machine.faults = ["drop"] * 8
    with pytest.raises(V2VError, match="can't be reached"):
        await passes.run()
    machine.faults = []
    assert passes.names() == []
    machine.write_here_and_there(5)
    assert None not in await passes.run()


async def test_a_pass_that_died(machine: TrackedMachine, passes: Passes) -> None:
    """Its snapshot goes with the next one, and so does one that was still being made."""
    other = machine.snapshot(OTHERS)
    await passes.run()
    machine.write_here_and_there(5)
    async with running_servers(passes.place) as servers:
        died = passes.changes.opened(
            passes.mark, f"{PREFIX}-7", passes.place, servers, passes.reporter
        )
        await died.__aenter__()  # and its process is killed
        assert passes.names() == [f"{PREFIX}-7"]
        machine.task_lasts = 5
        machine._start_task("createSnapshot", lambda: machine._make(f"{PREFIX}-8"))
        assert None not in await passes.run()
        assert [each.name for each in machine.snapshots.values()] == [OTHERS]
        with suppress(V2VError):
            await died.__aexit__(None, None, None)
    await passes.changes.forget(None, passes.reporter)
    assert list(machine.snapshots) == [other]


async def test_a_snapshot_that_can_not_be_removed_is_removed_later(
    machine: TrackedMachine, passes: Passes
) -> None:
    machine.refusals["RemoveSnapshot_Task"] = Fault("TaskInProgress", "Another task is already")
    with pytest.raises(AssertionError):
        await passes.run()  # all of it went well, but for the snapshot that is still there
    assert "stays for now" in passes.said()
    assert passes.names() == [f"{PREFIX}-1"]
    machine.refusals.clear()
    await passes.run()


async def test_cancelled_in_the_middle(machine: TrackedMachine, passes: Passes) -> None:
    machine.task_lasts = 3
    scope = anyio.CancelScope()
    with scope:
        async with (
            running_servers(passes.place) as servers,
            passes.changes.opened(None, f"{PREFIX}-1", passes.place, servers, passes.reporter),
        ):
            scope.cancel()
            await anyio.lowlevel.checkpoint()
    assert passes.names() == []
    assert machine.calls.count("CreateSnapshot_Task") == 1


@pytest.mark.parametrize("needs_a_cycle", [False, True])
async def test_tracking_is_switched_on_and_off_again(
    machine: TrackedMachine, short_tmp: Path, needs_a_cycle: bool
) -> None:
    machine.track(wanted=False)
    machine.needs_a_cycle = needs_a_cycle
    passes = Passes(machine, short_tmp, await look(options_of(machine)))
    assert await passes.run() == [None, None]
    assert machine.is_tracked
    assert "switched on" in passes.said()
    machine.write_here_and_there(5)
    assert None not in await passes.run()
    await passes.changes.forget(passes.mark, passes.reporter)
    assert machine.is_tracked
    other = machine.snapshot(OTHERS)
    await passes.changes.forget(None, passes.reporter)
    assert machine.is_tracked
    assert "stays on" in passes.said()
    machine.remove(other)
    await passes.changes.forget(None, passes.reporter)
    await passes.changes.forget(None, passes.reporter)
    assert not machine.is_tracked


async def test_a_machine_that_can_not_be_tracked(machine: TrackedMachine, short_tmp: Path) -> None:
    """Each pass reads a snapshot, all of it."""
    machine.can_be_tracked = machine.is_tracked = False
    passes = Passes(machine, short_tmp, await look(options_of(machine)))
    for _ in range(2):
        assert await passes.run() == [None, None]
        assert passes.mark is None
    assert not machine.is_tracked
    assert "ReconfigVM_Task" not in machine.calls


async def test_what_is_refused_before(machine: TrackedMachine) -> None:
    given = options_of(machine)
    for name in ("vddk-snapshot", "vddk-file"):
        with pytest.raises(UsageError, match=name):
            await look(_with(given, (name, "x")))
    machine.is_tracked = False
    machine.snapshot(OTHERS)
    with pytest.raises(SourceError, match="has snapshots"):
        await look(given)
    machine.is_tracked = True
    machine.disks[1].mode = "independent_persistent"
    with pytest.raises(SourceError, match="independent") as caught:
        await look(given)
    assert caught.value.disk == 2


async def test_a_disk_that_libvirt_leaves_out(
    machine: TrackedMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be missing on the target."""
    told = machine._devices([*machine.guest.names()], ["52/1", "52/1"])
    more = told.replace("2000", "2100").replace("2001", "2101").replace(".vmdk", "_nvme.vmdk")
    monkeypatch.setattr(machine, "_devices", lambda *_: told + more)
    with pytest.raises(SourceError, match=r"does not tell of: .*_nvme\.vmdk"):
        await look(options_of(machine))


async def test_a_user_who_may_not(machine: TrackedMachine, passes: Passes) -> None:
    machine.refusals["CreateSnapshot_Task"] = Fault("NoPermission", "Permission was denied.")
    with pytest.raises(SourceError, match="not allowed to make a snapshot") as caught:
        await passes.run()
    assert "Create and Remove snapshot" in (caught.value.hint or "")
    machine.vcenter.password = "another"
    with pytest.raises(SourceError, match="does not let") as caught:
        await passes.run()
    assert PASSWORD not in f"{caught.value}{caught.value.hint}{passes.said()}"


async def test_another_disk_is_noticed(machine: TrackedMachine, passes: Passes) -> None:
    await passes.run()
    with machine.disks[1].path.open("ab") as file:
        file.write(bytes(MIB))
    with pytest.raises(GuestChangedError, match="larger"):
        await passes.run()


async def test_a_machine_that_is_gone(machine: TrackedMachine, passes: Passes) -> None:
    await passes.run()
    machine.guest.moref = "vm-99"
    await passes.changes.forget(None, passes.reporter)


def _with(given: InputOptions, *more: tuple[str, str]) -> InputOptions:
    return InputOptions(
        arguments=given.arguments,
        connection=given.connection,
        password=Secret(PASSWORD),
        transport=given.transport,
        options=(*given.options, *more),
    )
