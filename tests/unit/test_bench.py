"""bench without servers: suites and their faults, figures, the table, the plot, the file."""

from __future__ import annotations

import importlib.util
import io
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
from rich.console import Console

from v2v_async.bench import content, machine, plot, programs, report, suite
from v2v_async.bench.report import ContestantReport, Report, Run, ScenarioReport
from v2v_async.bench.suite import Disk, Pieces, Promise, fill, split
from v2v_async.cli import bench as cli
from v2v_async.errors import DependencyError, UsageError, V2VError, VerifyError
from v2v_async.units import GIB, KIB, MIB

ROOT = Path(__file__).parents[2]

SUITE = """
version = 1
title = "one"
[contestants]
nbdcopy = "{nbdcopy} {source} {target}"
[[scenario]]
name = "first"
title = "the first"
source = "nbdkit --unix {socket} file {file}"
target = "nbdkit --unix {socket} null size={size}"
disk = [{ size = "1M" }]
"""


def _suite(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "suite.toml"
    path.write_text(text)
    return path


def test_shipped_suite_promises_what_was_asked_for() -> None:
    wanted = {
        "dense_null": 1.0,
        "dense_file": 1.0,
        "fragmented": 2.0,
        "fragmented_zero": 1.5,
        "slow_source": 3.0,
        "many_disks": 1.4,
        "empty_4t": 1.0,
    }
    scenarios = {made.name: made for made in suite.load().scenario}
    assert {n: s.promise.speed for n, s in scenarios.items() if s.promise.speed} == wanted
    assert scenarios["dense_null"].promise.cpu == 1.1
    assert scenarios["memory_16"].promise.memory == 200 * MIB
    assert len(scenarios["memory_16"].disks) == 16
    assert scenarios["start_up"].promise.cpu_seconds == 0.1
    assert [disk.size for disk in scenarios["many_disks"].disks] == [256 * MIB] * 3 + [2 * GIB]
    assert scenarios["fragmented"].disks[0].data_bytes == 512 * MIB


def test_the_promised_races_have_us_without_tuning_and_all_with_the_same_flush() -> None:
    made = suite.load()
    for scenario in made.scenario:
        for kind, contestant in made.contestants_of(scenario).items():
            if scenario.name != "start_up":
                assert "{flush}" in contestant.command, (scenario.name, kind)
    slow = next(s for s in made.scenario if s.name == "slow_source")
    assert made.contestants_of(slow)["ours"].command == "{ours} copy {flush} {pairs}"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("version = 1", "version = 2", "‘version’"),
        ('"1M"', '"lots"', "scenario ‘first’, ‘disk.0.size’: ‘lots’ is not a size"),
        ("null size={size}", "null size={sice}", "scenario ‘first’, ‘target’: no such placeholder"),
        ('title = "the first"', "titel = 1", "‘first’, ‘titel’: there is no such key"),
        ('name = "first"', 'name = "A B"', "‘name’"),
        ('"1M" }', '"1M", content = "some" }', "‘first’, ‘disk.0.content"),
        ('disk = [{ size = "1M" }]', "", "servers need a [[scenario.disk]]"),
        ("nbdcopy =", "rsync =", "‘contestants.rsync"),
        ('nbdcopy = "{nbdcopy} {source} {target}"', "", "scenario ‘first’ has no contestant"),
        ('"nbdkit --unix {socket} file {file}"', '"nbdkit \'x"', "‘source’: No closing quotation"),
        ("[[scenario]]", "[[scenario", "not TOML"),
    ],
)
def test_a_wrong_suite_says_where(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in SUITE
    path = _suite(tmp_path, SUITE.replace(old, new))
    with pytest.raises(UsageError) as caught:
        suite.load(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


def test_two_scenarios_of_one_name_are_refused(tmp_path: Path) -> None:
    text = SUITE + SUITE[SUITE.index("[[scenario]]") :]
    with pytest.raises(UsageError, match="two scenarios are named ‘first’"):
        suite.load(_suite(tmp_path, text))


def test_a_missing_suite_and_an_unknown_scenario(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        suite.load(tmp_path / "none.toml")
    with pytest.raises(UsageError, match="no scenario ‘frist’") as caught:
        suite.load(_suite(tmp_path, SUITE)).chosen(["frist"])
    assert "first" in str(caught.value.hint)


def test_placeholders_become_whole_words_or_parts_of_one() -> None:
    words = split("{prog} {flush} size={size} 'a b' {pairs}")
    values = {"prog": ["/my dir/x"], "flush": [], "size": ["5"], "pairs": ["a", "b c"]}
    assert fill(words, values) == ["/my dir/x", "size=5", "a b", "a", "b c"]


def test_scaling_keeps_whole_mib_and_the_length_of_pieces() -> None:
    pieces = Pieces(run=64 * KIB, every=MIB, until=8 * GIB)
    disk = Disk(size=16 * GIB, content=pieces).scaled(0.01)
    assert disk.size == 164 * MIB
    assert disk.content == Pieces(run=64 * KIB, every=MIB, until=82 * MIB)
    assert Disk(size=GIB).scaled(1e-9).size == MIB


@pytest.mark.parametrize(
    "disk",
    [
        Disk(size=3 * MIB + 512),
        Disk(size=9 * MIB, content="none"),
        Disk(size=9 * MIB, content=Pieces(run=64 * KIB, every=MIB, until=5 * MIB)),
        Disk(size=5 * MIB, content=Pieces(run=2 * MIB, every=3 * MIB, until=99 * MIB)),
    ],
    ids=["dense", "empty", "pieces", "long-pieces"],
)
def test_disks_have_the_content_that_was_asked_for(tmp_path: Path, disk: Disk) -> None:
    path = tmp_path / "disk"
    content.make(path, disk, seed=1)
    held = path.read_bytes()
    assert len(held) == disk.size
    with path.open("rb") as file:
        ranges = list(content.data_ranges(file.fileno()))
    if isinstance(disk.content, Pieces):
        for offset in range(0, disk.size, 16 * KIB):
            is_data = offset % disk.content.every < disk.content.run
            assert (held[offset] != 0) == (is_data and offset < disk.content.until)
    elif disk.content == "all":
        assert b"\0" not in held
        assert ranges == [(0, disk.size)]
    else:
        assert ranges == []
    blocks = {held[at : at + 4096] for at in range(0, len(held), 4096) if any(held[at : at + 9])}
    assert len(blocks) * 4096 >= disk.data_bytes - 4096  # none twice: a swap would be noticed


def test_a_wrong_byte_is_found_with_its_offset(tmp_path: Path) -> None:
    path, copy = tmp_path / "disk", tmp_path / "copy"
    content.make(path, Disk(size=4 * MIB), seed=1)
    copy.write_bytes(path.read_bytes())
    content.compare(str(path), str(copy))
    with copy.open("r+b") as file:
        file.seek(2 * MIB)
        file.write(bytes(1))
    with pytest.raises(VerifyError) as caught:
        content.compare(str(path), str(copy))
    assert caught.value.offset == 2 * MIB
    copy.unlink()
    with pytest.raises(V2VError, match="can't compare"):
        content.compare(str(path), str(copy))


def test_needs_are_read_from_the_command_lines() -> None:
    line = split("nbdkit -f --unix SOCK --filter=delay --filter=rate pattern size=1 rdelay=5ms")
    assert machine.filters_of(line) == ["delay", "rate"]
    assert machine.plugin_of(line) == "pattern"
    assert machine.plugin_of(split("nbdkit -U SOCK ./plugin.so")) is None
    assert machine.missing_for(["no-such-server"]) == "no-such-server is not installed"
    assert "filter ‘unobtainable’" in str(
        machine.missing_for(["nbdkit", "--filter=unobtainable", "null"])
    )
    assert "plugin ‘noplugin’" in str(machine.missing_for(["nbdkit", "-f", "noplugin"]))
    assert machine.missing_for(["nbdkit", "-f", "null"]) is None


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def _race(tmp_path: Path, *codes: str, parallel: int = 1, limit_s: float = 60) -> programs.Cost:
    return programs.race(
        [_python(code) for code in codes],
        parallel=parallel,
        log=tmp_path / "log",
        servers=[],
        limit_s=limit_s,
    )


def test_cost_is_what_the_program_used_and_not_what_we_use(tmp_path: Path) -> None:
    ours = programs._peak_memory(os.getpid())
    big = ours + 64 * MIB
    cost = _race(tmp_path, f"x = b'1' * {big}")
    assert cost.peak_bytes is not None
    assert big <= cost.peak_bytes < big + 64 * MIB
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    cost = _race(tmp_path, burn)
    assert 0.25 < cost.user_s + cost.system_s < 3
    assert cost.peak_bytes is not None
    assert cost.peak_bytes < ours


def test_peaks_add_up_for_those_that_run_together(tmp_path: Path) -> None:
    big = programs._peak_memory(os.getpid()) + 64 * MIB
    code = f"x = b'1' * {big}"
    alone, together = _race(tmp_path, code, code), _race(tmp_path, code, code, parallel=2)
    assert alone.peak_bytes is not None
    assert together.peak_bytes is not None
    assert alone.peak_bytes < 1.5 * big < together.peak_bytes


def test_a_failing_contestant_says_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(V2VError, match="exit status 3: no such disk"):
        _race(tmp_path, "import sys; print('no such disk', file=sys.stderr); sys.exit(3)")


def test_a_contestant_over_the_limit_is_ended_with_its_children(tmp_path: Path) -> None:
    code = f"import subprocess; subprocess.run(['sh', '-c', 'sleep 600; :', '{tmp_path}'])"
    with pytest.raises(V2VError, match="took longer"):
        _race(tmp_path, code, limit_s=1)
    from tests.conftest import assert_gone

    assert_gone(str(tmp_path))


def test_a_missing_contestant_program_fails(tmp_path: Path) -> None:
    with pytest.raises((V2VError, DependencyError), match="exit status 127|not installed"):
        programs.race(
            [["/no/such/program"]], parallel=1, log=tmp_path / "log", servers=[], limit_s=9
        )


def _contestant(name: str, *walls: float, peak: int = 50 * MIB) -> ContestantReport:
    return ContestantReport.model_validate(
        {
            "name": name,
            "kind": name if name in ("ours", "qemu-img") else "nbdcopy",
            "argv": [[name]],
            "runs": [
                Run(
                    round=number,
                    position=1,
                    wall_s=wall,
                    user_s=wall / 4,
                    system_s=wall / 4,
                    peak_bytes=peak,
                    servers_cpu_s=0.1,
                )
                for number, wall in enumerate(walls, start=1)
            ],
        }
    )


def _report(*scenarios: ScenarioReport) -> Report:
    return Report(
        made="2026-01-01",
        suite="test",
        rounds=3,
        baseline="nbdcopy",
        machine={"cpu": "<b>&", "cores": 2, "memory": GIB},
        versions={"nbdcopy": "1.14"},
        scenarios=list(scenarios),
    )


def _scenario(
    name: str, promise: Promise, *contestants: ContestantReport, skipped: str | None = None
) -> ScenarioReport:
    return ScenarioReport(
        name=name, title=name, promise=promise, contestants=list(contestants), skipped=skipped
    )


def test_the_ratio_is_the_median_of_the_rounds() -> None:
    # Round 2 was noisy for both: the ratio of the medians would be 4 / 2 = 2.
    ours, theirs = _contestant("ours", 1, 10, 2), _contestant("nbdcopy", 3, 30, 4)
    scenario = _scenario("a", Promise(speed=2.5), ours, theirs)
    assert scenario.ratio(lambda run: run.wall_s, "nbdcopy") == 3
    assert scenario.ratio(lambda run: run.wall_s, "qemu-img") is None


def test_rounds_that_one_did_not_finish_do_not_count() -> None:
    scenario = _scenario("a", Promise(), _contestant("ours", 1, 1), _contestant("nbdcopy", 2))
    assert scenario.ratio(lambda run: run.wall_s, "nbdcopy") == 2


def _rows(scenario: ScenarioReport) -> dict[str, tuple[str, bool | None]]:
    return {row.measure: (row.figure, row.is_kept) for row in report.rows(_report(scenario))}


def test_promises_are_judged() -> None:
    promise = Promise(speed=2, cpu=1.1, memory=60 * MIB)
    ours, theirs = _contestant("ours", 2, 2), _contestant("nbdcopy", 4, 4)
    assert _rows(_scenario("a", promise, ours, theirs)) == {
        "time": ("2.00× as fast", True),
        "cpu": ("0.50× its CPU", True),
        "memory": ("50.0 MiB at most", True),
    }
    fat = _contestant("ours", 5, 5, peak=70 * MIB)
    assert _rows(_scenario("a", promise, fat, theirs)) == {
        "time": ("0.80× as fast", False),
        "cpu": ("1.25× its CPU", False),
        "memory": ("70.0 MiB at most", False),
    }
    seconds = _scenario("a", Promise(cpu_seconds=0.9), ours)
    assert _rows(seconds)["cpu"] == ("1.00 s", False)


def test_nothing_is_judged_without_the_one_it_is_about() -> None:
    promise = Promise(speed=2, cpu=1.1, memory=MIB)
    rows = _rows(_scenario("a", promise, _contestant("nbdcopy", 1)))
    assert {kept for _, kept in rows.values()} == {None}


def test_our_failure_and_a_wrong_copy_fail_the_measurement() -> None:
    ours, theirs = _contestant("ours"), _contestant("nbdcopy", 1)
    ours.trouble = "it crashed"
    made = _report(_scenario("a", Promise(), ours, theirs))
    assert made.failures == ["a: ours: it crashed"]
    ours.is_skipped = True
    assert made.failures == []
    theirs.trouble, theirs.is_verified = "wrong bytes", False
    assert made.failures == ["a: nbdcopy: wrong bytes"]
    theirs.is_verified = None
    assert made.failures == []
    assert any("nbdcopy: wrong bytes" in line for line in report.circumstances(made))


def test_a_noisy_machine_is_told() -> None:
    scenario = _scenario("a", Promise(), _contestant("ours", 1, 1), _contestant("nbdcopy", 2))
    assert report.noise(_report(scenario)) is None
    for entry in scenario.contestants:
        for run in entry.runs:
            run.others_cpu_s = 0.1
    assert report.noise(_report(scenario)) == pytest.approx(0.3 / (4 * 2))
    scenario.contestants[0].runs[0].others_cpu_s = 4.0
    assert any("too noisy" in line for line in report.circumstances(_report(scenario)))
    before = machine.busy_seconds()
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    assert machine.busy_seconds() > before


def test_the_plot_is_xml_and_has_every_bar_and_promise() -> None:
    made = _report(
        _scenario(
            "a<b",
            Promise(speed=2),
            _contestant("ours", 1),
            _contestant("nbdcopy", 3),
            _contestant("qemu-img", 40),
        ),
        _scenario("memory", Promise(memory=5), _contestant("ours", 1), _contestant("nbdcopy", 1)),
        _scenario("gone", Promise(), skipped="no nbdkit"),
    )
    root = ElementTree.fromstring(plot.svg(made))
    space = "{http://www.w3.org/2000/svg}"
    titles = [title.text for title in root.iter(f"{space}title")]
    assert {"nbdcopy: 3.00", "qemu-img: 40.00", "promised: 2"} <= set(titles)
    widths = [float(rect.attrib["width"]) for rect in root.iter(f"{space}rect") if len(rect) > 0]
    assert widths == sorted(widths)
    assert len(widths) == 2
    right = float(root.attrib["width"])
    assert all(float(text.attrib["x"]) < right for text in root.iter(f"{space}text"))
    ElementTree.fromstring(plot.svg(_report()))


def test_the_file_is_read_back_and_survives_unknown_keys(tmp_path: Path) -> None:
    scenario = _scenario("a", Promise(speed=1), _contestant("ours", 1), _contestant("nbdcopy", 2))
    made, path = _report(scenario), tmp_path / "r.json"
    report.write(made, path)
    assert report.read(path) == made
    path.write_text(path.read_text().replace('"version": 1', '"version": 1, "new": {}'))
    assert report.read(path) == made
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(UsageError, match="not a report of bench: version"):
        report.read(path)
    with pytest.raises(UsageError, match="No such file"):
        report.read(tmp_path / "none")


def _shown(made: Report) -> str:
    out = io.StringIO()
    cli.show(made, Console(file=out, width=120))
    return out.getvalue()


def test_the_table_is_plain_in_a_pipe_and_says_the_verdict() -> None:
    kept = _scenario("fast", Promise(speed=1), _contestant("ours", 1), _contestant("nbdcopy", 2))
    missed = _scenario("slow", Promise(speed=3), _contestant("ours", 1), _contestant("nbdcopy", 2))
    gone = _scenario("gone", Promise(), skipped="nbdkit has no filter ‘rate’")
    text = _shown(_report(kept, missed, gone))
    assert "\x1b" not in text
    lines = {line.split()[0]: line for line in text.splitlines() if line.split()}
    assert lines["fast"].split()[-1] == "kept"
    assert "2.00× as fast" in lines["fast"]
    assert lines["slow"].split()[-1] == "missed"
    assert "gone: skipped: nbdkit has no filter ‘rate’" in text
    assert _report(kept, missed).missed == ["slow, time: 2.00× as fast, wanted ≥ 3"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nonsense"], "no scenario ‘nonsense’"),
        (["--source", "a"], "go together"),
        (["--source", "a", "--target", "b"], "overwrites the target ‘b’"),
        (["--source", "a", "--target", "null:", "dense_null"], "name no other"),
        (["--against", "rsync"], "nobody of this name"),
        (["--against", "/no/such/nbdcopy"], "does not answer"),
        (["--against", "nbdcopy", "--against", "nbdcopy"], "takes part already"),
        (["--json", "/no/such/dir/x.json", "start_up"], "its directory does not exist"),
        (["--scratch", "/no/such/dir", "start_up"], "no such directory"),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_runs(words: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        cli.main(words)


@pytest.mark.parametrize("word", ["--rounds=0", "--rounds=x", "--size-scale=0", "--size-scale=nan"])
def test_wrong_numbers_are_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([word])
    assert caught.value.code == 2
    assert "is not a" in capsys.readouterr().err


def test_list_names_every_scenario(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--list"]) == 0
    text = capsys.readouterr().out
    for scenario in suite.load().scenario:
        assert f"{scenario.name} " in text


def _pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pages", ROOT / "benchmarks/report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_results_are_pasted_between_the_markers() -> None:
    pages = _pages()
    made = _report(
        _scenario("a", Promise(speed=1), _contestant("ours", 1), _contestant("nbdcopy", 2))
    )
    table = report.markdown(made)
    assert "| a | 1.00 s | 2.00 s | 2.00× as fast | ≥ 1 | kept |" in table
    for page in pages.PAGES:
        once = pages.pasted(page.read_text("utf-8"), table)
        assert table in once
        assert pages.pasted(once, table) == once
        assert once.splitlines()[0] == page.read_text("utf-8").splitlines()[0]
    with pytest.raises(SystemExit):
        pages.pasted("a page without markers", table)
