"""``v2v-async copy`` as people run it, and virt-v2v with our nbdcopy."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.conftest import program, require
from tests.integration.servers import MIB, digest, fragmented
from v2v_async.cli import shim
from v2v_async.nbdcopy import find_nbdcopy

SIZE = 6 * MIB + 513


def copy(*argv: str, cwd: Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*program("v2v-async"), "copy", *argv],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        timeout=100,
        check=False,
    )


@pytest.fixture
def folder(short_tmp: Path) -> Path:
    fragmented(short_tmp / "a", SIZE)
    fragmented(short_tmp / "b", SIZE // 2, seed=2)
    return short_tmp


def test_many_disks_of_all_kinds(folder: Path) -> None:
    require("nbdkit", "qemu-nbd", "qemu-img")
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "q.qcow2", str(SIZE // 512 * 512 + 512)],
        cwd=folder,
        check=True,
    )
    done = copy(
        *["a", "x"],
        *["[", "nbdkit", "--filter=log", "file", "b", "logfile=log", "]", "y"],
        *["--events=e", "a", "[", "qemu-nbd", "-f", "qcow2", "q.qcow2", "]"],
        *["b", "-"],
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert digest(folder / "x") == digest(folder / "a")
    assert digest(folder / "y") == digest(folder / "b")
    assert done.stdout == (folder / "b").read_bytes()
    whole = folder / "a-whole"
    whole.write_bytes((folder / "a").read_bytes() + bytes(-SIZE % 512))
    assert digest(folder / "q.qcow2", "qcow2") == digest(whole)
    ended = [json.loads(line) for line in (folder / "e").read_text().splitlines()]
    assert {e["disk"] for e in ended if e["type"] == "finished" and "disk" in e} == {1, 2, 3, 4}
    assert b"disk 4" in done.stderr


def test_stdin_to_a_file_and_a_shorter_disk_over_a_longer(folder: Path) -> None:
    (folder / "x").write_bytes(b"old" * SIZE)
    content = (folder / "a").read_bytes()
    done = copy("-q", "-", "x", cwd=folder, stdin=content)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert (folder / "x").read_bytes() == content


def test_a_disk_that_fails_does_not_stop_the_others(folder: Path) -> None:
    require("nbdkit")
    failing = ["[", "nbdkit", "--filter=error", "pattern", "1M", "error-pread-rate=100%", "]"]
    done = copy("--retries=0", *failing, "x", "a", "y", cwd=folder)
    assert done.returncode == 1
    assert digest(folder / "y") == digest(folder / "a")
    assert b"where: " in done.stderr
    assert b"disk 1" in done.stderr
    assert b"100%" not in done.stdout


def test_a_source_that_is_the_target_is_not_touched(folder: Path) -> None:
    (folder / "link").symlink_to("a")
    before = digest(folder / "a")
    done = copy("a", "link", cwd=folder)
    assert done.returncode == 2
    assert digest(folder / "a") == before


def test_digest_is_the_same_by_any_way(folder: Path) -> None:
    require("nbdkit")
    ways = [
        copy("-q", "--digest", "a", "null:", cwd=folder),
        copy("-q", "--digest", "[", "nbdkit", "file", "a", "]", "x", cwd=folder),
        copy("-q", "--digest", "-", "y", cwd=folder, stdin=(folder / "a").read_bytes()),
    ]
    assert [way.returncode for way in ways] == [0, 0, 0]
    assert len({way.stdout for way in ways}) == 1
    assert re.fullmatch(rb"[0-9a-f]{64}\n", ways[0].stdout)
    other = copy("-q", "--digest", "b", "null:", "a", "z", cwd=folder)
    first, second = other.stdout.decode().splitlines()
    assert second == f"{ways[0].stdout.decode().strip()}  z"
    assert first.endswith("  null:")
    assert first[:64] != second[:64]


@pytest.mark.parametrize("copier", ["native", "nbdcopy", "qemu-img"])
def test_copiers(copier: str, folder: Path) -> None:
    require("nbdcopy", "nbdkit", "qemu-img")
    server = ["[", "nbdkit", "file", "b", "]"] if copier != "qemu-img" else ["b"]
    done = copy(f"--copier={copier}", "a", "x", *server, "y", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert digest(folder / "x") == digest(folder / "a")
    assert digest(folder / "y") == digest(folder / "b")
    assert b"disk 2" in done.stdout


def test_verify_checkpoint_and_limits_together(folder: Path) -> None:
    options = ["--verify", "--repair", "--checkpoint=c", "--max-connections=2", "--parallel=1"]
    limits = ["--bandwidth=1GB/s", "-C2", "-R2", "-T1", "--request-size=64K", "--queue-size=1M"]
    done = copy(*options, *limits, "-S0", "a", "x", "b", "y", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert digest(folder / "x") == digest(folder / "a")
    assert digest(folder / "y") == digest(folder / "b")


def test_a_signal_ends_the_copy_and_its_servers(folder: Path) -> None:
    require("nbdkit")
    slow = ["nbdkit", "--filter=delay", "pattern", "1G", "rdelay=100ms"]
    with subprocess.Popen(
        [*program("v2v-async"), "copy", "--events=fd:1", "[", *slow, f"--pidfile={folder}/p", "]",
         "null:"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:  # fmt: skip
        assert running.stdout is not None
        for line in running.stdout:
            if line.startswith("{") and json.loads(line)["type"] == "progress":
                break
        running.send_signal(signal.SIGTERM)
        rest = running.communicate(timeout=60)[0]
    assert running.returncode == 128 + signal.SIGTERM
    assert '"cancelled"' in rest


def test_a_screen_on_a_terminal(folder: Path) -> None:
    """rich is for terminals; what it shows last is that the disk is done."""
    outer, inner = pty.openpty()
    done = subprocess.Popen(
        [*program("v2v-async"), "copy", "a", "x"],
        cwd=folder,
        stdout=inner,
        stderr=inner,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(inner)
    shown = b""
    try:
        while chunk := os.read(outer, 65536):
            shown += chunk
    except OSError:  # EIO: the last one has closed it
        pass
    finally:
        os.close(outer)
    assert done.wait(60) == 0
    assert "✓" in shown.decode()
    assert digest(folder / "x") == digest(folder / "a")


@pytest.mark.appliance
@pytest.mark.slow
def test_virt_v2v_copies_with_our_nbdcopy(phony_guest: Path, short_tmp: Path) -> None:
    """virt-v2v runs ours; while its server is still there, the real one reads the same disk.

    Two conversions never give the same disk: clocks and random seeds are in it.
    """
    require("virt-v2v", "nbdcopy", "nbdkit")
    ours = shim.make(short_tmp / "shim")
    events, again = short_tmp / "events", short_tmp / "again"
    first = short_tmp / "first"
    first.mkdir()
    wrapper = first / "nbdcopy"
    wrapper.write_text(
        f"#!/bin/sh\n'{ours}' \"$@\" || exit\nexec '{find_nbdcopy()}' \"$1\" '{again}'\n"
    )
    wrapper.chmod(0o755)
    done = subprocess.run(
        ["timeout", "-k5", "800", "virt-v2v", "-v", "-i", "disk", phony_guest / "system.img",
         "-o", "local", "-os", short_tmp],
        env={
            **os.environ,
            "PATH": f"{first}:{os.environ['PATH']}",
            "LIBGUESTFS_BACKEND": "direct",
            "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg",
            "V2V_ASYNC_EVENTS": str(events),
        },
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    told = [json.loads(line) for line in events.read_text().splitlines()]
    assert told[0]["details"]["program"] == "nbdcopy"
    assert told[-1]["type"] == "finished"
    moved = next(e["bytes"] for e in told if e["type"] == "finished" and "bytes" in e)
    assert moved["copied"] > MIB
    assert digest(short_tmp / "system-sda") == digest(again)
    assert digest(again) != digest(phony_guest / "system.img")
    # What virt-v2v asked for was understood: it has nbdcopy draw its bar, too.
    assert re.search(r"nbdcopy 'nbd\+unix://.*--flush", done.stderr)
    assert "100% [****" in done.stderr


def test_what_was_written_to_stdout_before_stays(folder: Path) -> None:
    """A descriptor that is not at its beginning is a stream, and goes on from where it is."""
    disk, out = folder / "some.img", folder / "out"
    disk.write_bytes(b"disk" * 1024)
    with out.open("wb") as file:
        file.write(b"header")
        file.flush()
        subprocess.run([*program("v2v-async"), "copy", str(disk), "-"], stdout=file, check=True)
    assert out.read_bytes() == b"header" + disk.read_bytes()
