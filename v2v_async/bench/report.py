"""What was measured: every single run, the figures drawn from it, and the JSON file of both.

The file's ``version`` is 1; who reads it survives keys that it does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from v2v_async.bench.suite import OURS, Kind, Promise
from v2v_async.errors import UsageError
from v2v_async.units import format_size

_NOISY = 0.1
"""At 0.16, on two cores, nbdcopy against itself went from 0.78 to 1.10 in single rounds."""

Measure = Literal["time", "cpu", "memory"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore")


class Run(_Record):
    """One run of one contestant. ``position`` is its turn in the round, from 1.

    ``others_cpu_s`` is what everything else on the machine used meanwhile, the kernel's own threads
    included: noise.
    """

    round: int
    position: int
    wall_s: float
    user_s: float
    system_s: float
    peak_bytes: int | None = None
    servers_cpu_s: float
    others_cpu_s: float | None = None

    @property
    def cpu_s(self) -> float:
        """The contestant's own CPU time."""
        return self.user_s + self.system_s


class ContestantReport(_Record):
    """One contestant's runs. ``trouble`` says why there are none, or why there are no more.

    ``is_verified``: its copy was compared with the source and is right; None: not compared.
    """

    name: str
    kind: Kind
    argv: list[list[str]] = []
    runs: list[Run] = []
    trouble: str | None = None
    is_skipped: bool = False
    is_verified: bool | None = None

    def median(self, figure: Callable[[Run], float | None]) -> float | None:
        """Return the median of a figure over the runs; None when it is not known of any."""
        known = [value for run in self.runs if (value := figure(run)) is not None]
        return median(known) if known else None


class ScenarioReport(_Record):
    """One scenario. ``skipped`` says why it was not run."""

    name: str
    title: str
    promise: Promise = Promise()
    servers: list[list[str]] = []
    skipped: str | None = None
    contestants: list[ContestantReport] = []

    def contestant(self, name: str) -> ContestantReport | None:
        """Return a contestant that has runs; None when there is none of that name."""
        for contestant in self.contestants:
            if contestant.name == name and contestant.runs:
                return contestant
        return None

    def ratio(self, figure: Callable[[Run], float], other: str) -> float | None:
        """Return the median, over the rounds, of the other's figure divided by ours.

        In a round both met the same noise, so their ratio tells more than that of two medians.
        """
        ours, theirs = self.contestant(OURS), self.contestant(other)
        if ours is None or theirs is None:
            return None
        by_round = {run.round: figure(run) for run in theirs.runs}
        ratios = [
            by_round[run.round] / figure(run)
            for run in ours.runs
            if run.round in by_round and figure(run) > 0
        ]
        return median(ratios) if ratios else None


class Report(_Record):
    """A whole measurement. ``baseline`` is who the promises are about, if they took part."""

    version: Literal[1] = 1
    made: str
    suite: str
    rounds: int
    size_scale: float = 1.0
    flush: bool = False
    scratch: str = ""
    baseline: str | None = None
    machine: dict[str, str | int | float] = {}
    versions: dict[str, str] = {}
    scenarios: list[ScenarioReport] = []

    @property
    def names(self) -> list[str]:
        """Every contestant that ran, ours first."""
        found = [c.name for s in self.scenarios for c in s.contestants if c.runs]
        return sorted(dict.fromkeys(found), key=lambda name: name != OURS)

    @property
    def failures(self) -> list[str]:
        """What makes the measurement itself fail: ours failed, or anybody's copy was wrong."""
        return self._troubles(
            lambda entry: (
                entry.is_verified is False or (entry.kind == OURS and not entry.is_skipped)
            )
        )

    @property
    def troubles(self) -> list[str]:
        """What went wrong with any contestant."""
        return self._troubles(lambda entry: True)

    def _troubles(self, is_wanted: Callable[[ContestantReport], bool]) -> list[str]:
        return [
            f"{scenario.name}: {entry.name}: {entry.trouble}"
            for scenario in self.scenarios
            for entry in scenario.contestants
            if entry.trouble is not None and is_wanted(entry)
        ]

    @property
    def missed(self) -> list[str]:
        """The promises that were not kept."""
        return [
            f"{row.scenario}, {row.measure}: {row.figure}, wanted {row.wanted}"
            for row in rows(self)
            if row.is_kept is False
        ]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a figure of every contestant, and what was promised about it."""

    scenario: str
    measure: Measure
    cells: dict[str, str]
    figure: str
    wanted: str
    is_kept: bool | None


def rows(report: Report, *, all_measures: bool = False) -> list[Row]:
    """Return the table's lines: the time always, CPU and memory where something is promised."""
    return [
        row
        for scenario in report.scenarios
        if scenario.skipped is None
        for row in _rows_of(scenario, report, all_measures=all_measures)
    ]


def _rows_of(scenario: ScenarioReport, report: Report, *, all_measures: bool) -> list[Row]:
    promise, baseline = scenario.promise, report.baseline
    made = []
    speed = scenario.ratio(lambda run: run.wall_s, baseline) if baseline else None
    made.append(
        Row(
            scenario.name,
            "time",
            _cells(scenario, lambda run: run.wall_s, _seconds),
            f"{speed:.2f}× as fast" if speed is not None else "",
            _at_least(promise),
            None if speed is None or promise.speed is None else speed >= promise.speed,
        )
    )
    made += _cpu_row(scenario, baseline, all_measures=all_measures)
    if promise.memory is not None or all_measures:
        ours = scenario.contestant(OURS)
        known = [run.peak_bytes for run in ours.runs if run.peak_bytes] if ours else []
        peak = max(known, default=None)
        is_known = peak is not None and promise.memory is not None
        made.append(
            Row(
                scenario.name,
                "memory",
                _cells(scenario, lambda run: run.peak_bytes, format_size),
                f"{format_size(peak)} at most" if peak is not None else "",
                f"≤ {format_size(promise.memory)}" if promise.memory else "",
                (peak or 0) <= (promise.memory or 0) if is_known else None,
            )
        )
    return made


def _cpu_row(scenario: ScenarioReport, baseline: str | None, *, all_measures: bool) -> list[Row]:
    promise = scenario.promise
    if promise.cpu is None and promise.cpu_seconds is None and not all_measures:
        return []
    figure, wanted, is_kept = "", "", None
    ours = scenario.contestant(OURS)
    if promise.cpu_seconds is not None:
        wanted = f"≤ {_seconds(promise.cpu_seconds)}"
        seconds = ours.median(lambda run: run.cpu_s) if ours else None
        if seconds is not None:
            figure, is_kept = _seconds(seconds), seconds <= promise.cpu_seconds
    else:
        wanted = f"≤ {promise.cpu:g}×" if promise.cpu is not None else ""
        ratio = scenario.ratio(lambda run: run.cpu_s, baseline) if baseline else None
        if ratio:
            figure = f"{1 / ratio:.2f}× its CPU"
            is_kept = 1 / ratio <= promise.cpu if promise.cpu is not None else None
    cells = _cells(scenario, lambda run: run.cpu_s, _seconds)
    return [Row(scenario.name, "cpu", cells, figure, wanted, is_kept)]


def _at_least(promise: Promise) -> str:
    if promise.speed is None:
        return ""
    return f"≥ {promise.speed:g}" + (f" (aim {promise.aim:g})" if promise.aim else "")


def _cells(
    scenario: ScenarioReport, figure: Callable[[Run], float | None], show: Callable[[float], str]
) -> dict[str, str]:
    cells = {}
    for contestant in scenario.contestants:
        value = contestant.median(figure)
        if value is not None:
            cells[contestant.name] = show(value)
    return cells


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if value < 0.1 else f"{value:.2f} s"


def markdown(report: Report) -> str:
    """Return the table and what it ran on, for a README."""
    names = report.names
    header = ["scenario", *names, f"against {report.baseline or 'nothing'}", "wanted", ""]
    lines = [_line(header), _line(["---"] * len(header))]
    verdict = {True: "kept", False: "**missed**", None: ""}
    for row in rows(report):
        name = row.scenario if row.measure == "time" else f"{row.scenario}, {row.measure}"
        cells = [row.cells.get(contestant, "") for contestant in names]
        lines.append(_line([name, *cells, row.figure, row.wanted, verdict[row.is_kept]]))
    return "\n".join([*lines, "", *(f"- {line}" for line in circumstances(report))])


def noise(report: Report) -> float | None:
    """Return the share of the processors that went to everything else during the runs, 0 to 1."""
    runs = [run for s in report.scenarios for c in s.contestants for run in c.runs]
    wall_s = sum(run.wall_s for run in runs) * float(report.machine.get("cores", 0))
    others = [run.others_cpu_s for run in runs if run.others_cpu_s is not None]
    return sum(others) / wall_s if others and wall_s else None


def circumstances(report: Report) -> list[str]:
    """Say what the figures are and what they came from."""
    machine = report.machine
    lines = [
        f"{report.made}, {report.rounds} rounds, medians"
        + (f", sizes × {report.size_scale:g}" if report.size_scale != 1 else "")
        + (", all flush" if report.flush else ""),
        ", ".join(f"{name} {version}" for name, version in report.versions.items()),
    ]
    if machine:
        lines.insert(
            1,
            f"{machine.get('cpu')}, {machine.get('cores')} cores, "
            f"{format_size(float(machine.get('memory', 0)))} of memory, {machine.get('system')}, "
            f"kernel {machine.get('kernel')}, load {machine.get('load')} at the start, "
            f"disks in {report.scratch}",
        )
    if (share := noise(report)) is not None:
        note = "" if share < _NOISY else ": too noisy for small differences, let the machine rest"
        lines.append(f"everything else on the machine used {share:.0%} of the processors{note}")
    skipped = [f"{s.name}: skipped: {s.skipped}" for s in report.scenarios if s.skipped]
    return (
        lines + skipped + [trouble for trouble in report.troubles if trouble not in report.failures]
    )


def read(path: Path) -> Report:
    """Read a JSON file that ``bench --json`` wrote.

    Raises:
        UsageError: it is something else.
    """
    try:
        return Report.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{path}: not a report of bench: {place}: {first['msg']}") from error


def write(report: Report, path: Path) -> None:
    """Write the JSON file."""
    path.write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
