"""Run scenarios: rounds in which every contestant has its turn on servers of its own.

::

    scenario ── source files made, in the page cache
      round 1: A B C     round 2: B C A     round 3: C A B
                 └─ fresh target files, sync, servers start ──> contestant, timed ──> servers end
                                                           (first round: its copy is compared)
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from v2v_async.bench import content, machine
from v2v_async.bench.machine import busy_seconds
from v2v_async.bench.programs import Child, cpu_seconds, race, running_server
from v2v_async.bench.report import ContestantReport, Run, ScenarioReport
from v2v_async.bench.suite import Contestant, Disk, Kind, Scenario, Suite, fill, split
from v2v_async.errors import UsageError, V2VError, VerifyError
from v2v_async.redact import redact, redact_argv
from v2v_async.units import MIB, format_size

_FLUSH: dict[Kind, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "ours": (("--no-flush",), ()),
    "nbdcopy": ((), ("--flush",)),
    "qemu-img": (("-t", "unsafe"), ("-t", "writeback")),
}
"""What {flush} is, without and with flushing: the defaults of the three differ."""

_LONGEST_SOCKET = 100
"""A Unix socket's name has at most 107 bytes (unix(7))."""

_SPARE = 64 * MIB
"""What file systems and logs take beside the disks."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A program that takes part wherever a suite has a command for its kind."""

    name: str
    kind: Kind
    program: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ends:
    """Where one disk is copied from and to, and the files behind that where there are any."""

    source: str
    target: str
    source_file: Path | None = None
    target_file: Path | None = None


class Runner:
    """Runs scenarios in ``scratch``, an empty directory, and tells ``tell`` of each run."""

    def __init__(
        self,
        suite: Suite,
        contenders: Sequence[Contender],
        scratch: Path,
        *,
        rounds: int,
        flush: bool = False,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        if len(str(scratch)) + len("/t99") > _LONGEST_SOCKET:
            raise UsageError(
                f"{scratch}: too long a name for Unix sockets", hint="choose --scratch /var/tmp"
            )
        self._suite = suite
        self._contenders = list(contenders)
        self._scratch = scratch
        self._rounds = rounds
        self._flush = flush
        self._tell = tell
        self._sources: dict[tuple[Disk, int], Path] = {}

    def run(self, scenario: Scenario, *, later: Sequence[Scenario] = ()) -> ScenarioReport:
        """Run one scenario. Source files that ``later`` ones need too are kept for them."""
        report = ScenarioReport(name=scenario.name, title=scenario.title, promise=scenario.promise)
        report.skipped = self.reason_to_skip(scenario)
        if report.skipped is not None:
            self._tell(f"{scenario.name}: skipped: {report.skipped}")
            return report
        report.servers = [split(line) for line in (scenario.source, scenario.target) if line]
        contestants = self._suite.contestants_of(scenario)
        entered: dict[str, tuple[Contender, Contestant]] = {}
        for contender in self._contenders:
            if contender.kind not in contestants:
                continue
            entered[contender.name] = (contender, contestants[contender.kind])
            entry = ContestantReport(name=contender.name, kind=contender.kind)
            if shutil.which(contender.program[0]) is None:
                entry.trouble = f"{contender.program[0]} is not installed"
                entry.is_skipped = True
            report.contestants.append(entry)
        try:
            sources = self._make_sources(scenario)
            for round_ in range(1, self._rounds + 1):
                turns = [c for c in report.contestants if c.trouble is None]
                first = (round_ - 1) % len(turns) if turns else 0
                for position, entry in enumerate(turns[first:] + turns[:first], start=1):
                    self._turn(scenario, entry, *entered[entry.name], sources, round_, position)
        finally:
            self._drop_files(later)
        return report

    def reason_to_skip(self, scenario: Scenario) -> str | None:
        """Return what a scenario needs and this machine has not; None when it can run."""
        for line in (scenario.source, scenario.target):
            if line is not None and (reason := machine.missing_for(split(line))):
                return reason
        data = sum(disk.data_bytes for disk in scenario.disks)
        on_disk = data * (scenario.has_source_file + scenario.has_target_file)
        kept = sum(path.stat().st_blocks * 512 for path in self._sources.values())
        free = shutil.disk_usage(self._scratch).free + kept
        smaller = "try --size-scale 0.25, or another --scratch"
        if on_disk and on_disk + _SPARE > free:
            return f"needs {format_size(on_disk)} in {self._scratch}, {smaller}"
        # The page cache holds source and target, or both would be measured against the disk.
        if on_disk + _SPARE > machine.memory("MemAvailable") + kept:
            return f"needs {format_size(on_disk)} of free memory for the page cache, {smaller}"
        return None

    def _turn(
        self,
        scenario: Scenario,
        entry: ContestantReport,
        contender: Contender,
        contestant: Contestant,
        sources: list[Path | None],
        round_: int,
        position: int,
    ) -> None:
        """Let one contestant run once. What goes wrong is its trouble, and ends its part."""
        log = self._scratch / "log"
        log.unlink(missing_ok=True)
        try:
            with ExitStack() as stack:
                ends, servers = self._open_ends(scenario, sources, stack)
                commands = self._commands(scenario, contender, contestant, ends)
                if not entry.argv:
                    entry.argv = [redact_argv(command) for command in commands]
                before, busy = cpu_seconds([server.pid for server in servers]), busy_seconds()
                cost = race(
                    commands,
                    parallel=contestant.parallel,
                    log=log,
                    servers=servers,
                    limit_s=scenario.limit_s,
                )
                busy = busy_seconds() - busy
                used = cpu_seconds([server.pid for server in servers]) - before
            entry.runs.append(
                Run(
                    round=round_,
                    position=position,
                    wall_s=cost.wall_s,
                    user_s=cost.user_s,
                    system_s=cost.system_s,
                    peak_bytes=cost.peak_bytes,
                    servers_cpu_s=used,
                    others_cpu_s=max(0.0, busy - used - cost.user_s - cost.system_s),
                )
            )
            self._tell(
                f"{scenario.name}: round {round_} of {self._rounds}: {entry.name}: "
                f"{cost.wall_s:.2f} s, CPU {cost.user_s + cost.system_s:.2f} s"
                + (f", {format_size(cost.peak_bytes)}" if cost.peak_bytes else "")
            )
            if round_ == 1:
                self._verify(scenario, entry, ends)
        except (V2VError, OSError) as error:
            entry.trouble = redact(str(error))
            self._tell(f"{scenario.name}: {entry.name} failed: {entry.trouble}")

    def _verify(self, scenario: Scenario, entry: ContestantReport, ends: list[Ends]) -> None:
        """Compare what is kept with its source. A wrong byte is the contestant's end."""
        for pair in ends:
            if pair.source_file is not None and pair.target_file is not None:
                source, target = str(pair.source_file), str(pair.target_file)
            elif scenario.ends and pair.target != "null:":
                source, target = pair.source, pair.target
            else:
                continue
            try:
                content.compare(source, target, target_format=scenario.target_format)
            except VerifyError:
                entry.is_verified = False
                raise
            entry.is_verified = True

    def _make_sources(self, scenario: Scenario) -> list[Path | None]:
        """Make the source files that are not there yet, and read all once."""
        if not scenario.has_source_file:
            return [None for _ in scenario.disks]
        paths: list[Path | None] = []
        for number, disk in _numbered(scenario):
            path = self._sources.get((disk, number))
            if path is None:
                path = self._scratch / f"source{len(self._sources)}.img"
                self._tell(f"{scenario.name}: making {format_size(disk.data_bytes)} of data")
                self._sources[disk, number] = path
                content.make(path, disk, seed=number)
            content.warm(path)
            paths.append(path)
        return paths

    def _open_ends(
        self, scenario: Scenario, sources: list[Path | None], stack: ExitStack
    ) -> tuple[list[Ends], list[Child]]:
        """Make targets and start servers; the stack ends these. Targets stay for verifying."""
        if scenario.source is None or scenario.target is None:
            return [Ends(source, target) for source, target in scenario.ends], []
        targets = []
        for number, disk in enumerate(scenario.disks):
            target = self._scratch / f"target{number}.img" if scenario.has_target_file else None
            if target is not None and (scenario.fresh or not target.exists()):
                content.remove(target)
                content.make_target(target, disk.size, scenario.target_format)
            targets.append(target)
        # What the contestant before us wrote is not to be written back while we are timed.
        os.sync()
        ends, servers = [], []
        for number, disk in enumerate(scenario.disks):
            uris = []
            for side, line, file in (
                ("s", scenario.source, sources[number]),
                ("t", scenario.target, targets[number]),
            ):
                socket = self._scratch / f"{side}{number}"
                values = {
                    "socket": [str(socket)],
                    "size": [str(disk.size)],
                    "file": [str(file or "")],
                }
                log = self._scratch / f"{side}{number}.log"
                argv = fill(split(line), values)
                servers.append(stack.enter_context(running_server(argv, socket, log)))
                uris.append(f"nbd+unix:///?socket={quote(str(socket))}")
            ends.append(Ends(uris[0], uris[1], sources[number], targets[number]))
        return ends, servers

    def _commands(
        self, scenario: Scenario, contender: Contender, contestant: Contestant, ends: list[Ends]
    ) -> list[list[str]]:
        flush = _FLUSH[contender.kind][self._flush or scenario.flush]
        values: dict[str, Sequence[str]] = {
            contender.kind.replace("-", "_"): contender.program,
            "flush": flush,
            "pairs": [end for pair in ends for end in (pair.source, pair.target)],
        }
        words = split(contestant.command)
        if not contestant.is_per_disk:
            return [fill(words, values)]
        return [
            fill(words, {**values, "source": [pair.source], "target": [pair.target]})
            for pair in ends
        ]

    def _drop_files(self, later: Sequence[Scenario]) -> None:
        """Remove the targets, and the sources that no later scenario needs."""
        for path in self._scratch.glob("target*.img"):
            content.remove(path)
        needed = {key for made in later if made.has_source_file for key in _keys(made)}
        for key in [key for key in self._sources if key not in needed]:
            content.remove(self._sources.pop(key))


def _numbered(scenario: Scenario) -> list[tuple[int, Disk]]:
    """Return each disk with a number: equal disks get different contents."""
    return list(enumerate(disk.model_copy(update={"count": 1}) for disk in scenario.disks))


def _keys(scenario: Scenario) -> set[tuple[Disk, int]]:
    return {(disk, number) for number, disk in _numbered(scenario)}
