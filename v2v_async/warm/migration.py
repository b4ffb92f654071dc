"""One warm migration: its passes, and what they leave.

::

    targets served ──> state: pass N begins at mark A, makes mark B ──> source opened
    ──> what has changed is copied and flushed ──> state: the targets are of B ──> A is removed

A pass that dies leaves a mixture on the targets, and the state that says from which mark it began:
the next one begins there again, so that nothing is forgotten whenever a process is killed.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

from v2v_async.copy.engine import own_rate
from v2v_async.copy.ranges import Ranges
from v2v_async.copy.step import copy_ranges
from v2v_async.errors import CopyError, SourceError, TargetError, UsageError
from v2v_async.events import Bytes, Reporter
from v2v_async.in_place.journal import Journal
from v2v_async.libvirt_connection import refuse_active
from v2v_async.options import CopyOptions, InputOptions, OutputOptions
from v2v_async.output.contract import Output
from v2v_async.output.directory import DirectoryOutput
from v2v_async.output.registry import parse_output
from v2v_async.server import Servers, running_servers
from v2v_async.steps import run_output_setup, step, stop_recorded
from v2v_async.units import format_lapse, format_size
from v2v_async.v2vdir import V2VDir, boot_id
from v2v_async.warm.changed import ChangedBlocks, MarkLostError, Opened
from v2v_async.warm.compare import copy_different, empty_table, read_table, save_table
from v2v_async.warm.from_input import InputChanges
from v2v_async.warm.from_libvirt import LibvirtChanges, LibvirtDisk
from v2v_async.warm.from_vmware import VmwareChanges
from v2v_async.warm.state import Pass, PassDisk, WarmFolder, WarmState
from v2v_async.warm.vmware_calls import VmwareDisk
from v2v_async.warm.watched import WatchedGuest


def parse_target(options: OutputOptions) -> DirectoryOutput:
    """Return the output of a warm migration: one whose disks can be written again and again.

    Raises:
        UsageError: it is none.
    """
    output: Output = parse_output(options)
    if not isinstance(output, DirectoryOutput):
        raise UsageError(
            f"-o {options.mode}: a warm migration writes its disks again in each pass, which is "
            "done for disks that are files in a directory",
            hint="use -o local, qemu, json or kubevirt; what they make can be imported",
        )
    if output.disks.is_compressed:
        raise UsageError(
            "-oo compressed: a compressed disk can't be written again",
            hint="leave it out; afterwards: qemu-img convert -c",
        )
    return output


def _changes(state: WarmState, options: InputOptions) -> ChangedBlocks:
    """Return who tells what has changed."""
    if options.kind == "libvirt":
        disks = [
            LibvirtDisk(
                disk.index, disk.device or "", disk.location, Path(disk.path or ""), disk.format
            )
            for disk in state.disks
        ]
        sockets = None if state.socket_dir is None else Path(state.socket_dir)
        return LibvirtChanges(
            options.connection, options.arguments[0], disks, state.prefix, sockets
        )
    if state.machine is not None:
        return VmwareChanges(
            options,
            state.machine.moref,
            [
                VmwareDisk(int(disk.device or 0), disk.location, disk.size, None)
                for disk in state.disks
            ],
            state.prefix,
            was_tracked=state.machine.was_tracked,
            is_tracking=state.method == "tracking",
        )
    return InputChanges(options, state.bitmap)


class _LandingJournal(Journal):
    """The journal of a conversion of the targets; when it goes, it is known that all has landed."""

    def __init__(self, migration: Migration) -> None:
        super().__init__(migration.folder.path / "landing")
        self._migration = migration

    def remove(self) -> None:
        """Remove it: all of it has landed."""
        self._migration.update(phase="converted")
        super().remove()


class Migration:
    """A migration whose folder this process holds. ``state`` is what ``warm.json`` says."""

    def __init__(self, folder: WarmFolder, state: WarmState, reporter: Reporter) -> None:
        self.folder = folder
        self.state = state
        self.reporter = reporter.for_guest(state.guest)
        self.output = parse_target(state.output.given)
        options = state.input.read()
        self.changed = _changes(state, options)
        self.watched: WatchedGuest | None = None
        if options.kind in ("libvirt", "vddk"):
            self.watched = WatchedGuest(options.connection, options.arguments[0], options.password)

    @property
    def v2vdir(self) -> V2VDir:
        """Where servers, logs and the records of the targets are."""
        return self.folder.v2vdir

    @property
    def journal(self) -> Journal:
        """What the conversion changed, on its way to the targets."""
        return _LandingJournal(self)

    @property
    def name(self) -> str:
        """The target guest's name."""
        return self.state.output.name or self.state.guest

    def update(self, **changes: object) -> None:
        """Change the state, and have it on the disk."""
        state = self.state.model_copy(update=changes)
        self.folder.save(state)
        self.state = state

    async def adopt(self) -> None:
        """End what a dead process left running."""
        self.v2vdir.adopt()
        if self.v2vdir.state.boot_id == boot_id():
            await stop_recorded(self.v2vdir)
        self.v2vdir.update(boot_id=boot_id(), owner=None, processes=[], run=self.reporter.run)

    async def run_pass(self, options: CopyOptions) -> Pass | None:
        """Copy what has changed since the last pass, or everything; return what was done.

        None: the guest is off, and nothing has changed. When this raises or is cancelled, or its
        process is killed, the next pass copies the same and what has changed since.

        Raises:
            V2VError: with step, disk and log, as far as they apply.
        """
        stamps = _stamps(self.state)
        if self._is_copied(stamps) and await self._is_off():
            return None
        number = 1 + max((each.number for each in self._all_passes()), default=0)
        async with running_servers(self.v2vdir) as servers:
            had_died = self.state.current is not None
            is_held = await self._serve_targets(servers)
            if not is_held:
                self.update(is_whole=False, base=None, phase="syncing", stamps=None)
            since = self.state.base if self.state.is_whole else None
            mark = f"{self.state.prefix}-{number}"
            began = time.time()
            current = Pass(number=number, since=since, mark=mark, began=began)
            self.update(current=current, phase="syncing", stamps=None)
            async with AsyncExitStack() as stack:
                async with step("input", self.v2vdir, self.reporter) as mine:
                    opened = await self._open(stack, since, mark, servers, mine)
                async with step("copy", self.v2vdir, self.reporter) as mine:
                    if self.state.method == "digests":
                        disks = await self._copy_different(opened, had_died, options, mine)
                    else:
                        disks = await self._copy_ranges(opened, options, mine)
            if opened.is_off and _stamps(self.state) != stamps:
                raise SourceError(
                    f"the disks of ‘{self.state.guest}’ were written while they were copied, "
                    "though it was off",
                    hint="who has them open? Then go on with sync or cutover",
                )
        done = current.model_copy(
            update={
                "point": opened.point,
                "duration_s": time.time() - began,
                "is_off": opened.is_off,
                "is_all": self._is_all(opened),
                "disks": disks,
            }
        )
        # Of a libvirt guest that runs the files say nothing: they are written all the time.
        says_all = opened.is_off or self.watched is None
        self.update(
            base=opened.mark,
            is_whole=True,
            current=None,
            passes=[*self.state.passes, done],
            stamps=stamps if says_all else None,
        )
        await self._forget_older()
        self.reporter.emit("message", _told(done), details=done.model_dump())
        return done

    def _is_all(self, opened: Opened) -> bool:
        """Whether a pass copied everything, so that it says nothing of how much changes."""
        if self.state.method == "digests":
            return not self.state.is_whole
        return any(delta.ranges is None for delta in opened.deltas)

    def _all_passes(self) -> Iterator[Pass]:
        yield from self.state.passes
        if self.state.current is not None:
            yield self.state.current

    def _is_copied(self, stamps: list[tuple[int, ...]] | None) -> bool:
        """Whether the targets hold what the source's files held when they were last written."""
        state = self.state
        return (
            state.is_whole
            and state.current is None
            and stamps is not None
            and state.stamps == stamps
            and bool(self.v2vdir.state.targets)
        )

    async def _is_off(self) -> bool:
        """Whether the guest is known to be off; of other sources the stamps have to do."""
        return self.watched is None or (await self.watched.activity()).activity == "off"

    async def _serve_targets(self, servers: Servers) -> bool:
        """Serve the targets, making them where there are none; return whether they hold a copy."""
        source = self.v2vdir.read_source()
        state = self.v2vdir.state
        if not (state.targets or state.outputs):
            await run_output_setup(
                self.v2vdir, self.output, source, self.name, servers, self.reporter
            )
            return False
        async with step("output", self.v2vdir, self.reporter) as mine:
            return await self.output.reopen(self.v2vdir, source, self.name, servers, mine)

    async def _open(
        self,
        stack: AsyncExitStack,
        since: str | None,
        mark: str,
        servers: Servers,
        reporter: Reporter,
    ) -> Opened:
        """Open the source; where a mark is lost, all of it."""
        if self.state.method == "digests" and self.watched is not None:
            since = None
        try:
            opened = await stack.enter_async_context(
                self.changed.opened(since, mark, self.v2vdir, servers, reporter)
            )
        except MarkLostError as error:
            reporter.warning(
                f"what has changed since the last pass is not known any more: {error.message}; "
                "everything is copied again"
            )
            opened = await stack.enter_async_context(
                self.changed.opened(None, mark, self.v2vdir, servers, reporter)
            )
        if opened.is_off and since is None and self.state.method == "checkpoints":
            reporter.message(
                "the guest is off, so that no checkpoint can be made: if it is started before the "
                "cutover, the next pass copies everything again"
            )
        return opened

    async def _copy_ranges(
        self, opened: Opened, options: CopyOptions, reporter: Reporter
    ) -> list[PassDisk]:
        source = self.v2vdir.read_source()
        endpoints = {delta.index: delta.endpoint for delta in opened.deltas}
        ranges: dict[int, Ranges] = {
            delta.index: delta.ranges for delta in opened.deltas if delta.ranges is not None
        }
        copied = await copy_ranges(self.v2vdir, source, endpoints, ranges, options, reporter)
        return [
            _done(delta.index, each, delta.ranges)
            for delta, each in zip(opened.deltas, copied, strict=True)
        ]

    async def _copy_different(
        self, opened: Opened, had_died: bool, options: CopyOptions, reporter: Reporter
    ) -> list[PassDisk]:
        """Copy by digests, one disk after the other: reading it is what takes the time."""
        done = []
        for disk, delta in zip(self.v2vdir.read_source().disks, opened.deltas, strict=True):
            mine = reporter.for_disk(disk.index)
            target = str(self.v2vdir.target_socket(disk.index))
            path = self.folder.digests(disk.index)
            table = read_table(path, disk.size) if self.state.is_whole and not had_died else None
            is_new = any(
                each.index == disk.index and each.is_known_zero
                for each in self.v2vdir.state.targets
            )
            if table is None:
                table = empty_table(disk.size)
                if not is_new:
                    mine.message("the target is read first: a pass over it did not come to its end")
                    await copy_different(target, None, table, _quietly(mine))
            # From now on the table is of no use to others: `current` says that the pass had begun.
            async with own_rate(options, mine) as throttle:
                landed = await copy_different(
                    delta.endpoint, target, table, mine, delta.ranges, throttle
                )
            if options.verify:
                await _verify(target, table, mine)
            save_table(path, table)
            done.append(_done(disk.index, landed, None))
        return done

    async def _forget_older(self) -> None:
        """Remove the marks that no pass starts from any more; the next pass would, too."""
        try:
            await self.changed.forget(self.state.base, self.reporter)
        except SourceError as error:
            self.reporter.warning(f"a mark that is not needed any more stays: {error.message}")

    async def refuse_running(self) -> None:
        """See that the guest is off, as far as that can be known.

        Raises:
            SourceError
        """
        if self.watched is not None:
            refuse_active(await self.watched.activity(), self.state.input.connection)

    async def target_files(self) -> list[Path]:
        """Return where the target's disks are now, in their order.

        Raises:
            TargetError: one has not been made.
        """
        state = self.v2vdir.state
        source = self.v2vdir.read_source()
        finals = [str(path) for path in self.output.disk_paths(len(source.disks), self.name)]
        found = {record.final: Path(record.temporary) for record in state.outputs}
        missing = [final for final in finals if final not in found]
        if missing:
            raise TargetError(f"‘{missing[0]}’ has not been made")
        return [found[final] for final in finals]


def _stamps(state: WarmState) -> list[tuple[int, ...]] | None:
    """Return what changes when somebody writes to the source's files; None: it can't be known."""
    found: list[tuple[int, ...]] = []
    for disk in state.disks:
        if disk.path is None:
            return None
        try:
            status = os.stat(disk.path)
        except OSError:
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        found.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return found


def _done(index: int, landed: Bytes, ranges: Ranges | None) -> PassDisk:
    copied = landed.copied + landed.zero
    return PassDisk(
        index=index, changed=ranges.total if ranges is not None else copied, copied=landed.copied
    )


def _told(done: Pass) -> str:
    what = "everything" if done.is_all else f"{format_size(done.changed)} that had changed"
    return (
        f"pass {done.number}: {what}, {format_size(done.copied)} copied in "
        f"{format_lapse(done.duration_s)}"
    )


async def _verify(target: str, table: bytearray, reporter: Reporter) -> None:
    """See that a target holds what a table says.

    Raises:
        CopyError: it does not, or can't be read.
    """
    found = bytearray(len(table))
    await copy_different(target, None, found, _quietly(reporter))
    if found != table:
        raise CopyError(
            "the target does not hold what was written to it",
            disk=reporter.disk,
            hint="something is wrong with the storage; sync reads the target anew",
        )


def _quietly(reporter: Reporter) -> Reporter:
    """Return a reporter for the same place whose events nobody gets."""
    return Reporter(lambda event: None, reporter.run, disk=reporter.disk)
