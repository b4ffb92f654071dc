"""The programs themselves: exit statuses, what is printed where, signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from v2v_async.cli import helpers
from v2v_async.cli.main import SUBCOMMANDS, main, virt_v2v_async

# A guest module that does as little as the edge needs; HOW says what happens in it.
FAKE = """
import os, sys, types
import anyio
from v2v_async.errors import CopyError
from v2v_async.events import Bytes
from v2v_async.model import SourceDisk, SourceGuest

async def convert_guest(options, reporter, *, tmpdir=None):
    how = os.environ["HOW"]
    step = reporter.for_guest("g").for_step("copy")
    step.emit("started")
    disk = step.for_disk(1)
    disk.emit("planned", bytes=Bytes(total=100, data=100))
    disk.emit("progress", bytes=Bytes(total=100, data=100, copied=50))
    if how == "fail":
        raise CopyError("no luck", guest="g", step="copy", disk=1, hint="try luck")
    if how == "bug":
        raise RuntimeError("odd")
    if how == "wait":
        try:
            print("ready", file=sys.stderr, flush=True)
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                with open(os.environ["FIFO"]) as fifo:  # until the test lets it go on
                    await anyio.to_thread.run_sync(fifo.read)
            print("cleaned", file=sys.stderr, flush=True)
    disk.emit("finished", bytes=Bytes(total=100, data=100, copied=100))
    step.emit("finished")

async def describe_source(options, reporter):
    disk = SourceDisk(index=1, source="a\\x1b[2J.img", format="raw", size=7)
    return SourceGuest(name="g", memory=1, vcpus=1, disks=[disk])

fake = types.ModuleType("v2v_async.guest")
fake.convert_guest, fake.describe_source = convert_guest, describe_source
sys.modules["v2v_async.guest"] = fake
import v2v_async
v2v_async.guest = fake
from v2v_async.cli.main import virt_v2v_async
sys.exit(virt_v2v_async())
"""
GOOD = ["-i", "disk", "a.img", "-o", "null"]


def command(*argv: str) -> list[str]:
    return [sys.executable, "-c", FAKE, *argv]


def environment(how: str, **more: str) -> dict[str, str]:
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "HOW": how, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}


def fake(how: str, *argv: str, pass_fds: Sequence[int] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*argv),
        env=environment(how),
        pass_fds=pass_fds,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_done() -> None:
    done = fake("done", *GOOD)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert re.search(r"^\[ +\d+\.\d\] copy done after", done.stdout, re.MULTILINE)


def test_quiet_says_nothing_when_all_is_well() -> None:
    assert (fake("done", *GOOD, "-q").stdout, fake("done", *GOOD, "-q").stderr) == ("", "")


def test_failed() -> None:
    failed = fake("fail", *GOOD, "--machine-readable")
    assert failed.returncode == 1
    assert failed.stderr == (
        "virt-v2v-async: error: no luck\n  where: guest g, step copy, disk 1\n  hint:  try luck\n"
    )
    last = json.loads([line for line in failed.stdout.splitlines() if line[0] == "{"][-1])
    assert last["type"] == "error"
    assert "no luck" in last["message"]
    assert "50/100\n" in failed.stdout
    assert "100/100" not in failed.stdout


def test_a_bug_is_called_one() -> None:
    assert "Traceback" not in fake("bug", *GOOD).stderr
    traced = fake("bug", *GOOD, "-v")
    assert traced.returncode == 1
    assert "Traceback" in traced.stderr
    assert "RuntimeError: odd" in traced.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cancels_cleans_up_and_sets_the_status(
    number: signal.Signals, tmp_path: Path
) -> None:
    fifo, events = tmp_path / "fifo", tmp_path / "events"
    os.mkfifo(fifo)
    with subprocess.Popen(
        command(*GOOD, f"--events={events}"),
        env=environment("wait", FIFO=str(fifo)),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"
        process.send_signal(number)
        assert f"stopped by {number.name}: cleaning up" in process.stderr.readline()
        # The clean-up is in the middle of something now: opening the FIFO waits for us.
        with fifo.open("w"):
            process.send_signal(number)
            assert "still cleaning up" in process.stderr.readline()
        assert process.stderr.read().endswith("cleaned\n")
    assert process.returncode == 128 + number
    types = [json.loads(line)["type"] for line in events.read_text().splitlines()]
    assert types[-1] == "cancelled"
    assert "finished" not in types


def test_print_source_is_alone_on_stdout() -> None:
    done = fake("done", "-i", "disk", "a.img", "--print-source")
    assert done.returncode == 0
    assert done.stdout.startswith("Source guest information")
    assert "    source name: g\n" in done.stdout
    assert "\x1b" not in done.stdout


def test_events_to_a_full_disk_do_not_end_the_run() -> None:
    done = fake("done", *GOOD, "--events=/dev/full")
    assert done.returncode == 0
    assert done.stderr.count("--events: No space left on device") == 1


def test_a_reader_of_stdout_that_goes_away_does_not_end_the_run() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command(*GOOD),
        env=environment("done"),
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_machine_readable_to_a_descriptor_and_progress_to_stdout(tmp_path: Path) -> None:
    with (tmp_path / "m").open("w") as stream:
        fd = stream.fileno()
        done = fake("done", *GOOD, f"--machine-readable=fd:{fd}", pass_fds=[fd])
    assert done.returncode == 0
    # 99: the disk is done, the copy step not yet.
    messages = (tmp_path / "m").read_text().splitlines()
    assert all(json.loads(line)["type"] == "message" for line in messages)
    assert re.findall(r"^[0-9]+/[0-9]+$", done.stdout, re.MULTILINE) == [
        "50/100",
        "99/100",
        "100/100",
    ]


@pytest.mark.parametrize(
    ("argv", "status", "said"),
    [
        ([], 2, "no subcommand"),
        (["cnvert"], 2, "did you mean convert?"),
        (["-i", "disk"], 2, "options follow a subcommand"),
        (["convert", "--bogus"], 2, "unknown option"),
        (["convert", "-i", "ova", "x", "y", "-o", "null"], 2, "takes one guest: ‘y’ is too much"),
        (["convert", "-i", "ova", "-o", "null"], 2, "-i ova: no guest was named"),
        (["convert", "-i", "libvirtxml", "-it", "ssh", "x", "-o", "null"], 2, "has no meaning"),
        (["convert", "-i", "ova", "-io", "x=y", "x", "-o", "null"], 2, "takes no -io x"),
        (
            ["convert", "-ic", "vpx://u@h/d/e", "g", "-o", "null", "-ip", "/nonexistent"],
            2,
            "-ip ‘/nonexistent’: No such file",
        ),
        (["completion", "fish"], 2, "no such shell"),
        (["clean", "--bogus"], 2, "unknown option"),
        (["convert", *GOOD, "--events=/nonexistent/x"], 2, "No such file or directory"),
        (["convert", *GOOD, "--machine-readable=fd:987"], 2, "Bad file descriptor"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused(
    argv: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == status
    shown = capsys.readouterr()
    assert "v2v-async: error: " in shown.err
    assert said in shown.err
    assert "  hint:  " in shown.err


@pytest.mark.parametrize("argv", [["--help"], ["convert", "--help"], ["clean", "--help"]])
def test_help_fits_80_columns(
    argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 5
    assert max(map(len, lines)) <= 80


def test_help_names_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    text = capsys.readouterr().out
    assert all(re.search(rf"^ +{name}\b", text, re.MULTILINE) for name in SUBCOMMANDS)


def test_version_and_capabilities(capsys: pytest.CaptureFixture[str]) -> None:
    assert virt_v2v_async(["-V"]) == 0
    assert re.fullmatch(r"virt-v2v-async \d+\.\d+\.\d+\n", capsys.readouterr().out)
    assert virt_v2v_async(["--machine-readable"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0] == "virt-v2v"
    assert {"input:disk", "output:local", "output:null", "convert:linux"} <= set(listed)
    assert {"input:disk", "input:libvirt", "input:libvirtxml", "input:ova", "input:vmx"} <= {
        *listed
    }


def test_lists_of_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert virt_v2v_async(["-o", "local", "-oo", "?"]) == 0
    assert "compressed" in capsys.readouterr().out
    assert virt_v2v_async(["-i", "disk", "-io", "?"]) == 0
    assert virt_v2v_async(["-o", "vdsm", "-oo", "?"]) == 0
    assert "vdsm-image-uuid" in capsys.readouterr().out
    assert virt_v2v_async(["-o", "openstack", "-oo", "?"]) == 0
    assert "server-id" in capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "--machine-readable" in script
    if shell == "bash":
        (tmp_path / "c").write_text(script)
        subprocess.run(["bash", "-n", str(tmp_path / "c")], check=True)


@pytest.mark.parametrize(
    ("program", "argv", "said"),
    [
        (helpers.copy, [], "--v2vdir"),
        (helpers.copy, ["--v2vdir", "d", "--parallel", "0"], "--parallel"),
        (helpers.input_disk, ["--v2vdir", "d"], "no disk was named"),
        (helpers.input_disk, ["--v2vdir", "d", "-i", "ova", "x"], "this helper is for -i disk"),
        (helpers.input_vddk, ["--v2vdir", "d", "-i", "libvirt", "x"], "for -i libvirt -it vddk"),
        (helpers.output_local, ["--v2vdir", "d", "-os", "x"], "setup or final"),
        (helpers.output_local, ["--v2vdir", "d", "setup"], "-o local: no directory"),
        (helpers.output_null, ["--v2vdir", "d", "setup", "-o", "local"], "is for -o null"),
        (helpers.convert, ["--v2vdir", "d", "--root", "x"], "--root"),
    ],
)
def test_helpers_refuse(
    program: helpers.Entry, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("helper-v2v-")
    assert said in error


@pytest.mark.parametrize(
    "program",
    [helpers.copy, helpers.input_disk, helpers.convert, helpers.output_local, helpers.output_null],
)
def test_helpers_help(program: helpers.Entry, capsys: pytest.CaptureFixture[str]) -> None:
    assert program(["--help"]) == 0
    assert "--v2vdir DIR" in capsys.readouterr().out
