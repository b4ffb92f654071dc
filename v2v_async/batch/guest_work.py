"""The real work of one guest in a batch: the same steps as ``convert``, one turn at a time.

::

    DIR (a v2v directory) keeps, between two attempts and two supervisors,
    ├ overlay-N.…         what the conversion changed (input/kept.py)
    ├ metadata.in, .out   what is known of the guest
    ├ checkpoint-N/       what has landed of each copy
    ├ log                 a link to the logs of this attempt, which stay when DIR goes
    └ state.json          processes, and the target's half-made disks
"""

from __future__ import annotations

import shutil
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import anyio.to_thread

from v2v_async.copy.engine import Engine
from v2v_async.copy.step import copy_disk
from v2v_async.errors import GuestChangedError, NotKeptError, V2VError
from v2v_async.events import Reporter
from v2v_async.input.kept import is_kept, settle
from v2v_async.input.registry import parse_input
from v2v_async.model import SourceGuest, TargetGuest
from v2v_async.options import GuestOptions
from v2v_async.output.registry import parse_output
from v2v_async.preflight import preflight
from v2v_async.server import Servers, running_servers
from v2v_async.steps import (
    run_convert,
    run_finalize,
    run_input,
    run_output_setup,
    step,
    stop_recorded,
)
from v2v_async.v2vdir import V2VDir, boot_id


@dataclass(frozen=True, slots=True)
class Copying:
    """How a guest's disks are copied: connections by disk, and the groups whose rates hold."""

    connections: Mapping[int, int]
    groups: tuple[str, ...] = ()


def tombstone(path: Path) -> Path:
    """Return the file that says that a guest is done, whose v2v directory may be gone."""
    return path.with_name(f"{path.name}.done")


class SupervisedGuest:
    """One attempt at one guest in the v2v directory ``path``, made if it is not there.

    ``logs`` is the folder of this guest's logs. Construction does no I/O. Implements
    :class:`v2v_async.batch.runner.GuestWork`.
    """

    def __init__(
        self,
        options: GuestOptions,
        path: Path,
        logs: Path,
        engine: Engine,
        copying: Copying,
        reporter: Reporter,
    ) -> None:
        # What cow keeps would be gone with its server.
        others = tuple(pair for pair in options.input.options if pair != ("overlay", "cow"))
        if not any(name == "overlay" for name, _ in others):
            others = (*others, ("overlay", "kept"))
        wanted = replace(options.input, options=others)
        self._options = replace(options, input=wanted)
        self._v2vdir = V2VDir(path)
        self._logs = logs
        self._engine = engine
        self._copying = copying
        self._reporter = reporter
        self._input = parse_input(wanted)
        self._output = parse_output(options.output)
        self._running: Servers | None = None
        self._copies_began: float | None = None

    @asynccontextmanager
    async def servers(self) -> AsyncIterator[None]:
        """See :class:`GuestWork`."""
        await self._adopt()
        async with running_servers(self._v2vdir) as self._running:
            yield
        self._running = None

    async def convert(self) -> None:
        """See :class:`GuestWork`."""
        servers = self._serving()
        options = self._options
        name = options.output.name
        await self._begin_anew()
        source = await preflight(
            self._input, self._output, name, self._v2vdir.path.parent, self._reporter
        )
        source = await run_input(self._v2vdir, self._input, servers, self._reporter)
        self._check_disks(source, [])
        await run_convert(self._v2vdir, source, options.convert, name, self._reporter)
        await settle(self._v2vdir)

    async def reopen(self) -> bool:
        """See :class:`GuestWork`."""
        if tombstone(self._v2vdir.path).exists() or self._v2vdir.state.is_finalized:
            # Only what was for the way is left, if that.
            await self._output.abandon(self._v2vdir, self._reporter)
            await self._remove()
            return False
        if not self._v2vdir.metadata_out.exists() or not self._v2vdir.metadata_in.exists():
            raise NotKeptError(f"what was converted is not in ‘{self._v2vdir.path}’ any more")
        then = self._v2vdir.read_source()
        lost = [each.index for each in then.disks if not is_kept(self._v2vdir, each.index)]
        if lost:
            raise NotKeptError(
                f"what was converted of disk {lost[0]} is not in ‘{self._v2vdir.path}’ any more"
            )
        await self._input.check(self._reporter.for_step("input"))
        source = await run_input(self._v2vdir, self._input, self._serving(), self._reporter)
        self._check_disks(source, [each.source for each in then.disks])
        return True

    async def prepare(self) -> None:
        """See :class:`GuestWork`."""
        source, target = self._documents()
        state = self._v2vdir.state
        servers = self._serving()
        if not (state.targets or state.outputs or state.objects):
            self._forget_copies()
            await run_output_setup(
                self._v2vdir, self._output, source, target.name, servers, self._reporter
            )
            return
        async with step("output", self._v2vdir, self._reporter) as mine:
            is_held = await self._output.reopen(self._v2vdir, source, target.name, servers, mine)
        if not is_held:
            self._forget_copies()

    async def copy(self, disk: int) -> None:
        """See :class:`GuestWork`."""
        source, _ = self._documents()
        if self._copies_began is None:
            self._copies_began = time.monotonic()
            self._v2vdir.update(phase="copy")
            self._reporter.for_step("copy").emit("started")
        options = replace(self._options.copy, checkpoint=self._checkpoint(disk))
        try:
            await copy_disk(
                self._v2vdir,
                source,
                disk,
                self._engine,
                options,
                self._reporter.for_step("copy"),
                groups=self._copying.groups,
                connections=self._copying.connections.get(disk),
            )
        except V2VError as error:
            error.locate(step="copy", disk=disk)
            raise

    async def finalize(self) -> list[str]:
        """See :class:`GuestWork`."""
        _, target = self._documents()
        state = self._v2vdir.state
        made = [output.final for output in state.outputs]
        made += [f"{each.kind} {each.name}" for each in state.objects]
        if self._copies_began is not None:
            duration = time.monotonic() - self._copies_began
            self._reporter.for_step("copy").emit("finished", duration_s=duration)
        await self._serving().stop_all()
        await run_finalize(self._v2vdir, self._output, target, self._reporter)
        # The directory may go before anybody has noted that the guest is done.
        with suppress(OSError):  # state.json says it too
            tombstone(self._v2vdir.path).touch()
            await self._remove()
        return made

    async def abandon(self) -> bool:
        """See :class:`GuestWork`."""
        is_done = tombstone(self._v2vdir.path).exists()
        if self._v2vdir.state_file.exists():
            is_done = is_done or self._v2vdir.state.is_finalized
            await self._end_processes()
            await self._output.abandon(self._v2vdir, self._reporter)
        await self._remove()
        return is_done

    async def suspend(self) -> None:
        """See :class:`GuestWork`."""
        if self._v2vdir.state_file.exists():
            await self._end_processes()

    # What they consist of.

    async def _adopt(self) -> None:
        """Take over the directory from a supervisor that is gone, or make it."""
        path = self._v2vdir.path
        path.mkdir(mode=0o700, exist_ok=True)
        self._link_logs()
        self._v2vdir.adopt()
        await self._end_processes()
        self._v2vdir.update(boot_id=boot_id(), owner=None)

    def _link_logs(self) -> None:
        self._logs.mkdir(parents=True, exist_ok=True)
        link = self._v2vdir.log_directory
        if link.is_symlink() or not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(self._logs, target_is_directory=True)

    async def _begin_anew(self) -> None:
        """Remove what an attempt that did not come to its end has left, on the target too."""
        state = self._v2vdir.state
        if state.outputs or state.objects:
            await self._output.abandon(self._v2vdir, self._reporter)
        tombstone(self._v2vdir.path).unlink(missing_ok=True)
        await self._remove()
        await self._adopt()

    async def _end_processes(self) -> None:
        if self._v2vdir.state.boot_id == boot_id():
            await stop_recorded(self._v2vdir)
        else:
            # Their numbers may be anybody's by now.
            self._v2vdir.update(processes=[])

    async def _remove(self) -> None:
        """Remove the directory, and what the conversion left elsewhere; the logs stay."""

        def remove() -> None:
            for path in map(Path, self._v2vdir.state.files):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    with suppress(OSError):
                        path.unlink()
            self._v2vdir.remove()

        await anyio.to_thread.run_sync(remove)

    def _check_disks(self, source: SourceGuest, then: list[str]) -> None:
        """See that the guest has the disks that it had: all of those are copied, and no other."""
        expected = len(self._copying.connections)
        if len(source.disks) != expected:
            raise GuestChangedError(
                f"the guest has {len(source.disks)} disks now, and had {expected} when the batch "
                "looked at it",
                hint="run it in another batch, as it is now",
            )
        for disk, before in zip(source.disks, then, strict=False):
            if disk.source != before:
                raise GuestChangedError(
                    f"disk {disk.index} is ‘{disk.source}’ now, and was ‘{before}’ when it was "
                    "converted",
                    hint="run it in another batch, as it is now",
                    disk=disk.index,
                )

    def _forget_copies(self) -> None:
        """Remove the checkpoints: what they say has landed was on disks that are gone."""
        for path in self._v2vdir.path.glob("checkpoint-*"):
            shutil.rmtree(path, ignore_errors=True)

    def _checkpoint(self, disk: int) -> Path:
        return self._v2vdir.path / f"checkpoint-{disk}"

    def _documents(self) -> tuple[SourceGuest, TargetGuest]:
        return self._v2vdir.read_source(), self._v2vdir.read_target()

    def _serving(self) -> Servers:
        assert self._running is not None, "servers() is around every step"
        return self._running
