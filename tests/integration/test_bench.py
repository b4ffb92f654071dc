"""bench with real servers: rounds, verification, what is skipped, and that nothing stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import assert_gone, require
from tests.waiting import wait_until
from v2v_async.bench import machine, report
from v2v_async.cli import bench as cli

SUITE = """
version = 1
title = "tiny"
[contestants]
ours = "{ours} copy {flush} {pairs}"
nbdcopy = "{nbdcopy} {flush} {source} {target}"
qemu-img = "{qemu_img} convert -n -W -m 16 {flush} -f raw -O raw {source} {target}"

[[scenario]]
name = "files"
title = "two disks to fresh files"
source = "nbdkit --foreground --unix {socket} --readonly file {file}"
target = "nbdkit --foreground --unix {socket} file {file}"
disk = [{ size = "3M" }, { size = "8M", content = { run = "64K", every = "1M", until = "6M" } }]
promise = { speed = 1000.0 }

[[scenario]]
name = "qcow2"
title = "to qcow2"
source = "nbdkit --foreground --unix {socket} --readonly file {file}"
target = "qemu-nbd --persistent --shared=0 --format=qcow2 --socket={socket} {file}"
target_format = "qcow2"
disk = [{ size = "3M" }]

[[scenario]]
name = "impossible"
title = "a filter that nobody has"
source = "nbdkit --foreground --unix {socket} --filter=unobtainable null size={size}"
target = "nbdkit --foreground --unix {socket} null size={size}"
disk = [{ size = "1M", content = "none" }]

[[scenario]]
name = "huge"
title = "more than any machine has"
source = "nbdkit --foreground --unix {socket} --readonly file {file}"
target = "nbdkit --foreground --unix {socket} null size={size}"
disk = [{ size = "4P" }]
"""

# Stands in for ours where a test is about the runner: it does what it is told by its name.
STAND_IN = """#!/bin/sh
shift
[ "$1" = --no-flush ] && shift
while [ $# -gt 0 ]; do
    nbdcopy "$1" "$2" || exit 1
    {after}
    shift 2
done
"""


@pytest.fixture
def stand_in(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a program in the place of ours."""
    path = short_tmp / "stand-in"
    _write(path, ":")
    monkeypatch.setattr(machine, "ours", lambda: [str(path)])
    return path


def _write(path: Path, after: str) -> None:
    path.write_text(STAND_IN.replace("{after}", after))
    path.chmod(0o755)


def _bench(short_tmp: Path, *words: str, text: str = SUITE) -> tuple[int, report.Report]:
    require("nbdkit", "nbdcopy", "qemu-img", "qemu-nbd")
    (short_tmp / "suite.toml").write_text(text)
    out = short_tmp / "out.json"
    options = ["--suite", str(short_tmp / "suite.toml"), "--scratch", str(short_tmp)]
    status = cli.main([*options, "--json", str(out), *words])
    assert list(short_tmp.glob("v2vb.*")) == [], "the scratch directory stayed"
    return status, report.read(out)


def test_rounds_rotate_are_measured_and_verified(
    short_tmp: Path, stand_in: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    svg = short_tmp / "out.svg"
    words = ["files", "qcow2", "--rounds", "3", "--svg", str(svg)]
    status, made = _bench(short_tmp, *words)
    assert status == 0, made.failures
    assert made.machine["cores"]
    assert {"nbdkit", "nbdcopy", "qemu-img", "python", "v2v-async"} <= set(made.versions)
    for scenario in made.scenarios:
        assert [entry.name for entry in scenario.contestants] == ["ours", "nbdcopy", "qemu-img"]
        for entry in scenario.contestants:
            assert entry.trouble is None
            assert entry.is_verified is True
            assert [run.round for run in entry.runs] == [1, 2, 3]
            assert sorted(run.position for run in entry.runs) == [1, 2, 3], "everyone leads once"
            assert all(run.wall_s > 0 and run.user_s + run.system_s > 0 for run in entry.runs)
            assert all(run.others_cpu_s is not None for run in entry.runs)
    assert any("everything else on the machine used" in line for line in report.circumstances(made))
    files = made.scenarios[0].contestants
    assert [len(entry.argv) for entry in files] == [1, 2, 2], "pairs at once, or a run per disk"
    assert svg.read_text().startswith("<svg")
    captured = capsys.readouterr()
    assert "missed" in captured.out
    assert "files: round 3 of 3: nbdcopy" in captured.err


@pytest.mark.parametrize("flush", [False, True])
def test_all_flush_or_none_does(short_tmp: Path, stand_in: Path, flush: bool) -> None:
    words = ["files", "--rounds", "1", *(["--flush"] if flush else [])]
    status, made = _bench(short_tmp, *words)
    assert status == 0, made.failures
    ours, nbdcopy, qemu_img = (entry.argv[0] for entry in made.scenarios[0].contestants)
    assert ("--no-flush" in ours) is not flush
    assert ("--flush" in nbdcopy) is flush
    assert qemu_img[qemu_img.index("-t") + 1] == ("writeback" if flush else "unsafe")


def test_check_makes_a_missed_promise_fail(short_tmp: Path, stand_in: Path) -> None:
    status, made = _bench(short_tmp, "files", "--rounds", "1", "--check", "--against", "nbdcopy")
    assert status == 1
    assert made.failures == []
    assert len(made.missed) == 1


def test_a_wrong_byte_fails_the_bench(short_tmp: Path, stand_in: Path) -> None:
    _write(stand_in, 'head -c 4096 /dev/zero | nbdcopy - "$2"')
    status, made = _bench(short_tmp, "files", "--rounds", "2", "--against", "nbdcopy")
    ours, theirs = made.scenarios[0].contestants
    assert status == 1
    assert ours.is_verified is False
    assert "wrong bytes" in str(ours.trouble)
    assert len(ours.runs) == 1, "it takes no further part"
    assert theirs.is_verified is True
    assert len(theirs.runs) == 2


def test_a_contestant_that_kills_its_server_is_told(short_tmp: Path, stand_in: Path) -> None:
    _write(stand_in, 'kill -KILL $(cat "${1#*socket=}.pid"); sleep 60')
    text = SUITE.replace("--readonly", "--readonly --pidfile {socket}.pid")
    words = ["files", "--rounds", "1", "--against", "nbdcopy"]
    status, made = _bench(short_tmp, *words, text=text)
    assert status == 1
    assert "went away: killed by SIGKILL" in str(made.scenarios[0].contestants[0].trouble)


def test_what_can_not_run_is_skipped_with_its_reason(short_tmp: Path, stand_in: Path) -> None:
    status, made = _bench(short_tmp, "impossible", "huge", "--rounds", "1")
    assert status == 0
    impossible, huge = made.scenarios
    assert impossible.skipped == "nbdkit has no filter ‘unobtainable’"
    assert "--size-scale" in str(huge.skipped)
    assert impossible.contestants == huge.contestants == []


def test_another_nbdcopy_takes_part_by_its_path(short_tmp: Path, stand_in: Path) -> None:
    other = short_tmp / "other"
    other.write_text('#!/bin/sh\n[ "$1" = --version ] && echo nbdcopy 9.99 && exit\nnbdcopy "$@"\n')
    other.chmod(0o755)
    words = ["files", "--rounds", "1", "--against", str(other), "--against", "nbdcopy"]
    status, made = _bench(short_tmp, *words)
    assert status == 0
    assert made.baseline == "nbdcopy-9.99"
    assert made.versions["nbdcopy-9.99"] == "9.99"
    entry = made.scenarios[0].contestants[1]
    assert (entry.name, entry.argv[0][0]) == ("nbdcopy-9.99", str(other))
    assert entry.is_verified is True


def test_ends_of_ones_own_are_measured_and_compared(short_tmp: Path, stand_in: Path) -> None:
    source, target = short_tmp / "from.img", short_tmp / "to.img"
    source.write_bytes(os.urandom(1 << 20))
    target.write_bytes(bytes(1 << 20))
    words = ["--source", str(source), "--target", str(target), "--overwrite-target"]
    status, made = _bench(short_tmp, *words, "--rounds", "1")
    assert status == 0, made.failures
    assert [entry.is_verified for entry in made.scenarios[0].contestants] == [True] * 3
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("flush", [[], ["--flush"]], ids=["no-flush", "flush"])
def test_ours_really_takes_part(short_tmp: Path, flush: list[str]) -> None:
    status, made = _bench(short_tmp, "files", "qcow2", "--rounds", "1", *flush)
    assert status == 0, made.failures
    for scenario in made.scenarios:
        assert [entry.is_verified for entry in scenario.contestants] == [True] * 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_and_keeps_what_was_measured(
    short_tmp: Path, number: signal.Signals
) -> None:
    require("nbdkit", "nbdcopy", "qemu-img")
    head, files, _, impossible, _ = SUITE.split("[[scenario]]")
    slow = files.replace("file {file}", "--filter=delay file {file} rdelay=30", 1)
    (short_tmp / "suite.toml").write_text("[[scenario]]".join([head, impossible, slow]))
    out = short_tmp / "out.json"
    code = "import sys; from v2v_async.cli.bench import main; sys.exit(main())"
    words = ["--suite", str(short_tmp / "suite.toml"), "--scratch", str(short_tmp)]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words, "--against", "nbdcopy", "--json", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        wait_until(
            lambda: list(short_tmp.glob("v2vb.*/log")), "it measures", within_s=60, of=process
        )
        process.send_signal(number)
        said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    # Alone, without cli/main.py, Python ends itself by SIGINT.
    assert process.returncode in (-number, 128 + number), said
    assert out.exists(), said
    assert [scenario.name for scenario in report.read(out).scenarios] == ["impossible"]
    assert list(short_tmp.glob("v2vb.*")) == []
    assert_gone(str(short_tmp / "v2vb."))
