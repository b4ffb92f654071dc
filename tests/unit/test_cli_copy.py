"""``v2v-async copy``, nbdcopy by us and ``v2v-async shim``, with an engine that does nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import ROOT, require
from v2v_async.cli import copy, copy_words, shim
from v2v_async.cli.main import main, nbdcopy
from v2v_async.nbdcopy import find_nbdcopy

# An engine that does nothing; HOW says how it ends.
FAKE = """
import os, sys, types
from dataclasses import dataclass
from typing import Any
from v2v_async.errors import CopyError
from v2v_async.events import Bytes

@dataclass(frozen=True)
class CopyJob:
    index: int
    source: Any
    target: Any

@dataclass(frozen=True)
class DiskResult:
    index: int
    bytes: Bytes
    digest: Any

async def copy_disks(jobs, reporter, options):
    how = os.environ["HOW"]
    done = Bytes(total=100, data=100, copied=100)
    for job in jobs:
        disk = reporter.for_disk(job.index)
        disk.emit("planned", bytes=Bytes(total=100, data=100))
        disk.debug(f"{job.source} to {job.target}")
        disk.emit("progress", bytes=Bytes(total=100, data=100, copied=50))
        disk.warning("slow")
    if how == "fail":
        raise CopyError("no luck", disk=1, offset=4096, hint="try luck")
    if how == "several":
        raise ExceptionGroup("disks", [CopyError("one", disk=1), CopyError("two", disk=2)])
    if how == "bug":
        raise RuntimeError("odd")
    for job in jobs:
        reporter.for_disk(job.index).emit("finished", bytes=done, duration_s=1.0)
        if job.target.fd is not None:
            os.write(job.target.fd, b"content")
    digest = f"hash-{options.digest}" if options.digest else None
    return [DiskResult(job.index, done, digest) for job in jobs]

fake = types.ModuleType("v2v_async.copy.schedule")
fake.CopyJob, fake.copy_disks, fake.DiskResult = CopyJob, copy_disks, DiskResult
sys.modules["v2v_async.copy.schedule"] = fake
from v2v_async.cli.main import main, nbdcopy
status = nbdcopy(sys.argv[2:]) if sys.argv[1] == "nbdcopy" else main(sys.argv[1:])
if os.environ.get("MODULES"):
    print(" ".join(sorted(sys.modules)), file=sys.stderr)
sys.exit(status)
"""


def fake(
    *argv: str, how: str = "done", cwd: Path | None = None, fds: Sequence[int] = (), **more: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HOW": how, "PYTHONPATH": str(ROOT), **more}
    return subprocess.run(
        [sys.executable, "-c", FAKE, *argv],
        env=environment,
        cwd=cwd,
        pass_fds=fds,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two disks and a folder in it."""
    (tmp_path / "a").write_bytes(b"a" * 512)
    (tmp_path / "b").write_bytes(b"b" * 512)
    (tmp_path / "dir").mkdir()
    return tmp_path


def test_copy_shows_plain_lines(folder: Path) -> None:
    done = fake("copy", "a", "x", cwd=folder)
    assert done.returncode == 0
    assert "copy, disk 1: 100 B copied" in done.stdout
    assert done.stderr == "v2v-async copy: warning: copy, disk 1: slow\n"


def test_copy_quiet(folder: Path) -> None:
    done = fake("copy", "-q", "a", "x", cwd=folder)
    assert (done.returncode, done.stdout) == (0, "")


def test_copy_to_stdout_keeps_stdout_for_the_disk(folder: Path) -> None:
    done = fake("copy", "-v", "--digest", "a", "-", cwd=folder)
    assert done.returncode == 0
    assert done.stdout == "content"
    assert "disk 1: 100 B copied" in done.stderr
    assert "hash-sha256/64k\n" in done.stderr


@pytest.mark.parametrize(
    "option", ["--machine-readable", "--machine-readable=fd:2", "--events=fd:1", "--progress=1"]
)
def test_nothing_else_may_be_sent_to_stdout_then(folder: Path, option: str) -> None:
    done = fake("copy", option, "a", "-", cwd=folder)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "stdout" in done.stderr


def test_copy_failed(folder: Path) -> None:
    failed = fake("copy", "-q", "a", "x", how="fail", cwd=folder)
    assert failed.returncode == 1
    assert failed.stderr.endswith(
        "v2v-async copy: error: no luck\n  where: disk 1, offset 4096\n  hint:  try luck\n"
    )
    several = fake("copy", "a", "x", "b", "y", how="several", cwd=folder)
    assert several.returncode == 1
    assert "error: one" in several.stderr
    assert "two" in several.stderr


def test_machine_readable_and_events(folder: Path) -> None:
    done = fake("copy", "--machine-readable", "--events=e", "a", "x", cwd=folder)
    assert re.findall("^[0-9]+/[0-9]+$", done.stdout, re.MULTILINE) == [
        "50/100",
        "99/100",
        "100/100",
    ]
    events = [json.loads(line) for line in (folder / "e").read_text().splitlines()]
    assert [e["type"] for e in events if e.get("step") == "copy" and "disk" not in e] == [
        "started",
        "finished",
    ]
    assert events[-1]["type"] == "finished"


def test_progress_to_a_descriptor(folder: Path) -> None:
    with (folder / "p").open("w") as stream:
        fd = stream.fileno()
        for program in ("copy", "nbdcopy"):
            done = fake(program, f"--progress={fd}", "a", "x", cwd=folder, fds=[fd])
            assert done.returncode == 0
    assert (folder / "p").read_text() == "0/100\n50/100\n99/100\n100/100\n" * 2


def test_a_descriptor_that_is_closed_is_never_written(folder: Path) -> None:
    # nbdcopy says nothing about it. By the time of the first line it may be a disk's descriptor.
    for fd in range(5, 15):
        done = fake("nbdcopy", f"--progress={fd}", "a", "x", cwd=folder, V2V_ASYNC_EVENTS="e")
        assert (done.returncode, done.stderr) == (0, "")
    for line in (folder / "e").read_text().splitlines():
        assert json.loads(line)["run"]


def test_bar(folder: Path) -> None:
    done = fake("nbdcopy", "-p", "a", "x", cwd=folder)
    assert done.stdout == ""
    assert done.stderr.startswith("▖   0% [-")
    assert done.stderr.endswith("█ 100% [" + "*" * 40 + "]\n")
    assert "100%" in fake("copy", "-p", "a", "x", cwd=folder).stderr
    failed = fake("nbdcopy", "-p", "a", "x", how="fail", cwd=folder)
    assert failed.stderr.splitlines()[-2] == "nbdcopy: disk 1, offset 4096: no luck"


def test_digests(folder: Path) -> None:
    assert fake("copy", "-q", "--digest=md5", "a", "x", cwd=folder).stdout == "hash-md5/64k\n"
    two = fake("copy", "-q", "--digest", "a", "x", "b", "y", cwd=folder)
    assert two.stdout == "hash-sha256/64k  x\nhash-sha256/64k  y\n"
    to_file = fake("nbdcopy", "--blkhash", "--blkhash-file=h", "a", "x", cwd=folder)
    assert (to_file.returncode, to_file.stdout) == (0, "")
    assert (folder / "h").read_text() == "hash-sha256/64k\n"
    for program in ("copy", "nbdcopy"):
        lost = fake(program, "--blkhash", "--blkhash-file=dir", "a", "x", cwd=folder)
        assert lost.returncode == 1
        assert "hash-sha256/64k" in lost.stderr  # not lost: reading the disks again takes hours


def test_digest_lines_are_harmless_to_a_terminal() -> None:
    assert (
        copy.digest_lines([("a\x1b[2J", "1"), ("b", None)]) == "1  a\N{REPLACEMENT CHARACTER}[2J\n"
    )


def test_nbdcopy_is_silent(folder: Path) -> None:
    done = fake("nbdcopy", "a", "x", cwd=folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    verbose = fake("nbdcopy", "-v", "a", "x", cwd=folder)
    assert verbose.stdout == ""
    assert "a to x" in verbose.stderr


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("fail", "nbdcopy: disk 1, offset 4096: no luck\nnbdcopy: try luck\n"),
        ("several", "nbdcopy: disk 1: one\nnbdcopy: disk 2: two\n"),
        ("bug", "nbdcopy: internal error: RuntimeError: odd\n"),
    ],
)
def test_nbdcopy_failed(how: str, said: str, folder: Path) -> None:
    failed = fake("nbdcopy", "a", "x", how=how, cwd=folder)
    assert (failed.returncode, failed.stdout, failed.stderr) == (1, "", said)


def test_nbdcopy_adds_its_events_where_the_environment_says(folder: Path) -> None:
    for _ in range(2):
        done = fake("nbdcopy", "a", "x", cwd=folder, V2V_ASYNC_EVENTS="events")
        assert (done.returncode, done.stderr) == (0, "")
    events = [json.loads(line) for line in (folder / "events").read_text().splitlines()]
    assert [e["type"] for e in events if "step" not in e] == ["started", "finished"] * 2
    assert events[0]["details"]["arguments"] == ["a", "x"]
    # That it can't be written is no reason not to copy.
    assert fake("nbdcopy", "a", "x", cwd=folder, V2V_ASYNC_EVENTS="no/e").returncode == 0


@pytest.mark.parametrize(
    "argv", [[], ["a"], ["a", "x", "b"], ["--bogus", "a", "x"], ["-C", "0", "a", "x"], ["a", "["]]
)
def test_nbdcopy_exits_1_for_a_wrong_command_line(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert nbdcopy(argv) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("nbdcopy: ")


def test_nbdcopy_answers(capsys: pytest.CaptureFixture[str]) -> None:
    require("nbdcopy")

    def ours(argument: str) -> str:
        assert nbdcopy([argument]) == 0
        return capsys.readouterr().out

    def real(argument: str) -> str:
        return subprocess.run(
            [find_nbdcopy(), argument], capture_output=True, text=True, check=True
        ).stdout

    for listing in ("--long-options", "--short-options"):
        missing = set(real(listing).splitlines()) - set(ours(listing).splitlines())
        assert missing == set()
    for name in real("--long-options").split():
        assert name in ours("--help") or name == "--help"
    assert ours("-V").splitlines()[:2] == real("-V").splitlines()[:2]
    assert ours("--version") == ours("-V")


def test_a_link_named_nbdcopy_is_nbdcopy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/opt/x/nbdcopy", "-V"])
    assert main() == 0
    assert capsys.readouterr().out.startswith("nbdcopy ")


def test_copy_answers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["copy", "--version"]) == 0
    assert capsys.readouterr().out.startswith("v2v-async copy ")
    monkeypatch.setenv("COLUMNS", "90")
    assert main(["copy", "--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 90
    for option in copy_words.COPY:
        assert option.help is None or option.name in text
    assert "\n  v2v-async copy nbd://server/disk local.img\n" in text


def test_every_option_is_in_the_documentation() -> None:
    text = (ROOT / "docs" / "command-line.md").read_text()
    shown = [o for o in copy_words.COPY if o.help is not None]
    assert [name for o in shown for name in o.names if f"`{name}" not in text] == []


# Start-up.

_HEAVY = {"pydantic", "rich", "lxml", "guestfs"}


@pytest.mark.parametrize(
    "argv", [["--version"], ["copy", "--version"], ["copy", "a", "x"], ["nbdcopy", "a", "x"]]
)
def test_little_is_imported(argv: list[str], folder: Path) -> None:
    done = fake(*argv, cwd=folder, MODULES="1")
    assert done.returncode == 0
    modules = set(done.stderr.splitlines()[-1].split())
    assert "v2v_async.cli.main" in modules
    assert modules & _HEAVY == set()
    if argv[-1] == "--version":
        assert "anyio" not in modules


# The shim.


def test_shim(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a folder" / "bin"
    for _ in range(2):  # its own it replaces
        assert main(["shim", str(folder)]) == 0
        assert capsys.readouterr().out == f"export PATH='{folder}':$PATH\n"
    program = folder / "nbdcopy"
    assert stat.S_IMODE(program.stat().st_mode) == 0o755
    assert sorted(path.name for path in folder.iterdir()) == [".v2v-async-shim", "nbdcopy"]
    (tmp_path / "json.py").write_text("raise SystemExit('taken for Python’s')")
    said = subprocess.run(
        [program, "-V"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert said.startswith("nbdcopy ")
    assert "v2v-async" in said


def test_the_shim_is_never_taken_for_the_real_one(tmp_path: Path) -> None:
    require("nbdcopy")
    shim.make(tmp_path)
    real = shutil.which("nbdcopy")
    assert find_nbdcopy(f"{tmp_path}:{os.environ['PATH']}") == find_nbdcopy()
    assert real is not None


def test_shim_replaces_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = tmp_path / "nbdcopy"
    program.write_text("#!/bin/sh\n")
    assert main(["shim", str(tmp_path)]) == 1
    assert "was not made by v2v-async" in capsys.readouterr().err
    assert program.read_text() == "#!/bin/sh\n"
    assert not (tmp_path / ".v2v-async-shim").exists()
    program.unlink()
    program.symlink_to("/usr/bin/nbdcopy")
    assert main(["shim", str(tmp_path)]) == 1
    assert program.is_symlink()


@pytest.mark.parametrize("argv", [[], ["a", "b"], ["--x"], [""], ["a:b"]])
def test_shim_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shim", *argv]) == 2
    assert "  hint:  " in capsys.readouterr().err


def test_shim_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shim", "--help"]) == 0
    assert "DIR/nbdcopy" in capsys.readouterr().out
