"""Words of a copy's command line: what they mean, and what is refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, require
from v2v_async.cli import copy_words
from v2v_async.cli.copy_ends import Command, bracketed, pairs
from v2v_async.cli.main import main
from v2v_async.errors import UsageError, V2VError
from v2v_async.options import CopyOptions


def options(*argv: str, is_nbdcopy: bool = False) -> CopyOptions:
    words = copy_words.read(argv, is_nbdcopy=is_nbdcopy)
    return copy_words.options(words, is_nbdcopy=is_nbdcopy)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a disk ``a``, and more to mistake for one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_bytes(b"a" * 512)
    (tmp_path / "b").write_bytes(b"b" * 512)
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "hard").hardlink_to(tmp_path / "a")
    (tmp_path / "dir").mkdir()
    os.mkfifo(tmp_path / "fifo")
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], CopyOptions(keep_going=True)),
        (["--no-flush"], CopyOptions(keep_going=True, flush=False)),
        (["-S", "0"], CopyOptions(keep_going=True, sparse=0)),
        (["-S512"], CopyOptions(keep_going=True, sparse=512)),
        (["--sparse=64k"], CopyOptions(keep_going=True, sparse=65536)),
        (["-T", "0"], CopyOptions(keep_going=True, threads=None)),
        (["-T2", "-C", "8", "-R", "010"],
         CopyOptions(keep_going=True, threads=2, connections=8, requests=10)),
        (["--request-size=33554432"], CopyOptions(keep_going=True, request_size=32 << 20)),
        (["--queue-size", "0"], CopyOptions(keep_going=True, queue_size=1)),
        (["--queue-size=8s"], CopyOptions(keep_going=True, queue_size=4096)),
        (["--target-is-zero"], CopyOptions(keep_going=True, target_is_zero=True)),
        (["--dest"], CopyOptions(keep_going=True, target_is_zero=True)),
        (["--no-extents", "--allocated", "--synchronous"],
         CopyOptions(keep_going=True, extents=False, allocated=True, synchronous=True)),
        (["--repair"], CopyOptions(keep_going=True, verify=True, repair=True)),
        (["--retries=0"], CopyOptions(keep_going=True, retries=0)),
        (["--digest"], CopyOptions(keep_going=True, digest="sha256/64k")),
        (["--blkhash=MD5/4k"], CopyOptions(keep_going=True, digest="md5/4k")),
        (["--bandwidth=8M"], CopyOptions(keep_going=True, bandwidth=1 << 20)),
        (["--bandwidth=50MB/s"], CopyOptions(keep_going=True, bandwidth=50_000_000)),
        (["--bandwidth-file=x"], CopyOptions(keep_going=True, bandwidth_file=Path("x"))),
        (["--checkpoint", "d"], CopyOptions(keep_going=True, checkpoint=Path("d"))),
        (["--copier=qemu-img"], CopyOptions(keep_going=True, copier="qemu-img")),
        (["--parallel=2", "--max-connections=8"],
         CopyOptions(keep_going=True, parallel=2, max_connections=8)),
        (["-C1", "-C2"], CopyOptions(keep_going=True, connections=2)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_options(argv: list[str], expected: CopyOptions) -> None:
    assert options(*argv) == expected


def test_nbdcopy_flushes_only_when_told_to() -> None:
    assert not options(is_nbdcopy=True).flush
    assert options("--flush", is_nbdcopy=True).flush


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["-S", "1000"], "not a power of two"),
        (["-S", "256"], "not a power of two from 512"),
        (["-S", "x"], "-S"),
        (["--request-size=2048"], "from 4096 to 33554432"),
        (["--request-size=64M"], "from 4096 to 33554432"),
        (["--request-size=0"], "power of two"),
        (["--queue-size=x"], "--queue-size"),
        (["-C", "0"], "-C: ‘0’"),
        (["-C", "-1"], "-C: ‘-1’"),
        (["-C", "1x"], "-C: ‘1x’"),
        (["-R", "4294967296"], "-R"),
        (["-T", ""], "-T"),
        (["--retries=-1"], "--retries"),
        (["--parallel=0"], "--parallel"),
        (["--progress=x"], "--progress: ‘x’"),
        (["--progress=-1"], "--progress: ‘-1’"),
        (["--digest=crc"], "--digest: ‘crc’"),
        (["--blkhash=sha256/3"], "--digest"),
        (["--copier=dd"], "--copier: unknown ‘dd’"),
        (["--bandwidth=0"], "--bandwidth"),
        (["--flush", "--no-flush"], "contradict"),
        (["--ver"], "ambiguous"),
        (["--bogus"], "unknown option"),
        (["--flush=1"], "takes no argument"),
        (["-S"], "needs an argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_refused(argv: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        options(*argv)
    assert refused.value.hint


@pytest.mark.parametrize(
    "option", ["--digest", "--parallel=2", "--verify", "-q", "-f", "--no-flush"]
)
def test_by_the_name_nbdcopy_only_its_options_are_known(option: str) -> None:
    with pytest.raises(UsageError, match="unknown option"):
        options(option, is_nbdcopy=True)


def test_brackets() -> None:
    assert bracketed(["a", "[", "x", "[", "--", "]", "b"]) == ["a", Command(("x", "[", "--")), "b"]
    for words, said in ((["["], "without ‘]’"), (["[", "]"], "no command"), (["]"], "without ‘[’")):
        with pytest.raises(UsageError, match=re.escape(said)):
            bracketed(words)


def test_options_between_brackets_belong_to_the_command() -> None:
    argv = ["--flush", "[", "nbdkit", "-p", "--flush=3", "null", "]", "null:"]
    words = copy_words.read(argv, is_nbdcopy=False)
    assert words.words == [Command(("nbdkit", "-p", "--flush=3", "null")), "null:"]
    assert words.progress is None


def test_by_the_name_nbdcopy_they_do_only_after_two_dashes() -> None:
    after = copy_words.read(["--", "[", "nbdkit", "-v", "null", "]", "x"], is_nbdcopy=True)
    assert after.words == [Command(("nbdkit", "-v", "null")), "x"]
    before = copy_words.read(["[", "nbdkit", "-v", "null", "]", "x"], is_nbdcopy=True)
    assert before.words == [Command(("nbdkit", "null")), "x"]
    assert before.has("-v")


def test_the_last_progress_counts() -> None:
    assert copy_words.read(["-p", "--progress=7"], is_nbdcopy=True).progress == 7
    assert copy_words.read(["--progress=7", "--progress"], is_nbdcopy=True).progress == "bar"


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("a", "file"),
        ("link", "file"),
        ("new", "file"),
        ("fifo", "stream"),
        ("/dev/null", "stream"),
        ("nbd://host/export", "nbd"),
        ("nbds+unix:///?socket=x", "nbd"),
        ("nbd+vsock://2", "nbd"),
        ("null:", "null"),
        ("./null:", "file"),
        ("foo:bar", "file"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_kinds_of_targets(word: str, kind: str) -> None:
    assert pairs(["b", word])[0][1].kind == kind


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to copy"),
        (["a"], "no target named"),
        (["a", "x", "b"], "do not pair up"),
        (["missing", "x"], "missing: No such file"),
        (["", "x"], "source's name is empty"),
        (["a", ""], "target's name is empty"),
        (["dir", "x"], "dir: Is a directory"),
        (["a", "dir"], "dir: Is a directory"),
        (["a", "."], "Is a directory"),
        (["a", "new/"], "Is a directory"),
        (["a", "nowhere/x"], "nowhere/x: No such file"),
        (["null:", "x"], "null: can't be a source"),
        (["http://user:secret@host/d", "x"], r"user:\*\*\*@host/d’ is neither"),
        (["a", "ssh://host/d"], "neither a file nor an NBD URI"),
        (["NBD://host", "x"], "neither a file nor an NBD URI"),
        (["nbd:unix:/s:exportname=", "x"], "not an NBD URI"),
        (["a", "a"], "‘a’ is both source and target"),
        (["a", "./a"], "‘a’ is the same as ‘./a’, and is both"),
        (["a", "link"], "both source and target"),
        (["hard", "a"], "both source and target"),
        (["a", "x", "b", "x"], "‘x’ is the target of two disks"),
        (["a", "x", "b", "dir/../x"], "‘x’ is the same as ‘dir/../x’"),
        (["a", "link2", "b", "dir/new"], "target of two disks"),
        (["a", "b", "b", "x"], "‘b’ is both"),
        (["nbd://h/e", "nbd://H/e"], "both source and target"),
        (["a", "nbd+unix:///?socket=a", "b", "nbd+unix://?socket=link"], "two disks"),
        (["-", "x", "-", "y"], "can't both be read from stdin"),
        (["sock", "x"], "is a socket"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_ends_refused(words: list[str], said: str, folder: Path) -> None:
    import socket

    (folder / "link2").symlink_to("dir/new")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("sock")
        with pytest.raises(V2VError, match=said) as refused:
            pairs(words)
    assert refused.value.hint
    assert (folder / "a").read_bytes() == b"a" * 512
    assert not (folder / "x").exists()


@pytest.mark.usefixtures("folder")
def test_sharing_that_harms_nobody() -> None:
    def command(*argv: str) -> Command:
        return Command(argv)

    assert len(pairs(["a", "x", "a", "y"])) == 2  # read twice
    assert len(pairs(["a", "null:", "b", "null:"])) == 2
    assert len(pairs(["/dev/null", "/dev/null"])) == 1
    twice = command("nbdkit", "memory", "1G")
    assert len(pairs(["a", twice, "b", twice])) == 2
    assert len(pairs(["nbd://h/e", "nbd://h/f"])) == 1


def standard(stdin: str, stdout: str, folder: Path) -> str:
    """Return the pair that ``- -`` means with the shell's redirections."""
    code = (
        "import sys; from v2v_async.cli.copy_ends import pairs\n"
        "try: (s, t), = pairs(['-', '-']); print(s.kind, s.fd, t.kind, t.fd, file=sys.stderr)\n"
        "except Exception as error: print(error, file=sys.stderr)"
    )
    python = f'PYTHONPATH={ROOT} {sys.executable} -c "$CODE"'
    made = subprocess.run(
        ["bash", "-c", f"{stdin} {python} {stdout}"],
        cwd=folder,
        env={**os.environ, "CODE": code},
        capture_output=True,
        text=True,
        check=False,
    )
    return made.stderr.strip()


def test_stdin_and_stdout(folder: Path) -> None:
    assert standard("", "<a >x", folder) == "file 0 file 1"
    assert standard("", "<a >>x", folder) == "file 0 stream 1"
    assert standard("cat a |", "| cat", folder) == "stream 0 stream 1"
    assert standard("", "<&- >x", folder) == "stdin: Bad file descriptor"
    assert standard("", "<a >&-", folder) == "stdout: Bad file descriptor"
    assert "both source and target" in standard("", "<a 1<>link", folder)


def test_stdout_that_is_a_terminal(folder: Path) -> None:
    require("script")
    python = f"PYTHONPATH={ROOT} {sys.executable} -m v2v_async copy a -"
    said = subprocess.run(
        ["script", "-qec", python, "/dev/null"],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 1
    assert "refusing to write to a terminal" in said.stdout
    assert "aaaa" not in said.stdout


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--verify", "fifo", "x"], "--verify: ‘fifo’ can't be read again"),
        (["--repair", "a", "null:"], "--repair: ‘null:’"),
        (["--checkpoint=d", "a", "fifo"], "--checkpoint: ‘fifo’"),
        (["--progress=977", "a", "x"], "--progress=977: Bad file descriptor"),
        (["--events=fd:977", "a", "x"], "Bad file descriptor"),
        (["--digest", "--digest-file=nowhere/d", "a", "x"], "--digest-file"),
        (["--machine-readable=what", "a", "x"], "--machine-readable"),
    ],
)
def test_refused_before_anything_is_touched(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["copy", *argv]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "  hint:  " in error
    assert not Path("x").exists()
