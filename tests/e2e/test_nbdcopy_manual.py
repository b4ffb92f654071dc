"""nbdcopy(1), statement by statement: the real program and ours do each thing in the same folder.

Each row is a statement of the manual page (or what nbdcopy does where the page is silent) and a
shell script. Both programs are called ‘nbdcopy’ there; the exit status, all that is printed on
stdout and every file that is left must be the same. Scripts print what else must be: how many
connections there were, whether a flush was sent.

nbdcopy leaves a server of ‘[ … ]’ running when it fails (tried with 1.24; nbdkit 1.32 aborts by
itself). There $E is --exit-with-parent for the real one and nothing for ours, which ends it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import require
from tests.integration.servers import MIB, fragmented
from v2v_async.cli import shim
from v2v_async.nbdcopy import SHIM_MARKER, find_nbdcopy


@dataclass(frozen=True)
class Row:
    """``says``: the statement. ``script`` shows it. ``needs``: an option of newer versions."""

    says: str
    script: str
    needs: str | None = None

    def __str__(self) -> str:
        return self.says.replace(" ", "-")


# Shell functions for the scripts. serve FILE COMMAND: run COMMAND with $uri of FILE served by
# nbdkit, whose requests are in ‘log’ (removed at the end). whether COMMAND: whether it succeeds.
PRELUDE = """
serve() { nbdkit -U - --filter=log file "$1" logfile=log --run "$2"; }
whether() { if "$@" >/dev/null 2>&1; then echo yes; else echo no; fi; }
connections() { grep -o 'connection=[0-9]*' log | sort -u | wc -l; }
reads() { printf '%d\\n' $(grep ' Read id' log | grep -o "$1=0x[0-9a-f]*" | cut -d= -f2); }
offsets() { reads offset; }
largest() { reads count | sort -n | tail -1; }
sparse() { [ $(stat -c %b "$1") -lt $(($(stat -c %s "$1") / 512)) ]; }
quiet() { "$@" 2>err; local status=$?; rm err; return $status; }
"""

ROWS = [
    # SYNOPSIS, EXAMPLES
    Row("copies everything from a server to a local file", "serve disk 'nbdcopy $uri local'"),
    Row("streams to stdout", "serve disk 'nbdcopy $uri - | sha256sum'"),
    Row("copies a local disk to a server", "cp disk2 out; truncate -s 9M out; "
        "serve out 'nbdcopy disk $uri'"),
    Row("copies from one server to another", "cp disk2 out; truncate -s 3M disk out; serve disk "
        "'a=$uri nbdkit -U - file out --run \"nbdcopy \\$a \\$uri\"'"),
    Row("runs qemu-nbd as a subprocess",
        "nbdcopy -- [ qemu-nbd -r -f qcow2 disk.qcow2 ] - | md5sum"),
    Row("concatenates into a qcow2", "qemu-img create -q -f qcow2 o.qcow2 8M; cat disk disk2 | "
        "nbdcopy -- - [ qemu-nbd -f qcow2 o.qcow2 ]; "
        "qemu-img convert -f qcow2 -O raw o.qcow2 o; rm o.qcow2"),
    Row("reads and throws away", "serve disk 'nbdcopy $uri null:'"),
    Row("both may be subprocesses", "nbdcopy -- [ nbdkit file disk ] [ nbdkit file disk4 ]"),
    Row("options may follow", "nbdcopy disk local --flush -S 0"),
    Row("long options may be cut short", "nbdcopy --alloc disk local"),
    Row("short options may stand together", "quiet nbdcopy -vpS0 disk local"),
    Row("options end at --", "cp disk ./-p; nbdcopy -- -p local"),
    Row("brackets without -- where no option is inside", "nbdcopy [ nbdkit null 1M ] local"),
    Row("--help exits 0", "nbdcopy --help >/dev/null"),
    Row("--help before anything else", "nbdcopy --help a b c >/dev/null"),
    Row("-V exits 0", "nbdcopy -V | head -2; nbdcopy --version | head -1"),
    Row("long options are listed", "nbdcopy --long-options | grep -v blkhash | sort"),
    Row("short options are listed", "nbdcopy --short-options | sort"),
    # OPTIONS
    Row("normally the output is sparse", "nbdcopy disk local; whether sparse local"),
    Row("--allocated makes it not sparse",
        "nbdcopy --allocated --no-extents blocks local; whether sparse local"),
    Row("--allocated to a server", "cp disk2 out; truncate -s 9M out; "
        "serve out 'nbdcopy --allocated disk $uri'"),
    Row("-C 1 opens one connection", "serve disk 'nbdcopy -C 1 $uri null:'; connections"),
    Row("--connections=2", "serve disk 'nbdcopy --connections=2 $uri local'"),
    Row("--destination-is-zero skips zeroes",
        "serve dirty 'nbdcopy --destination-is-zero disk $uri'"),
    Row("--target-is-zero is the same", "serve dirty 'nbdcopy --target-is-zero blocks $uri'"),
    Row("without it zeroes are written", "serve dirty 'nbdcopy blocks $uri'"),
    Row("--flush flushes", "cp disk2 out; truncate -s 9M out; "
        "serve out 'nbdcopy --flush disk $uri'; whether grep Flush log"),
    Row("without it nothing does", "cp disk2 out; truncate -s 9M out; "
        "serve out 'nbdcopy disk $uri'; whether grep Flush log"),
    Row("extents are asked for", "serve disk 'nbdcopy $uri local'; whether grep Extents log"),
    Row("--no-extents asks for none", "serve disk 'nbdcopy --no-extents $uri local'; "
        "whether grep Extents log"),
    Row("-p draws a bar", "nbdcopy -p disk local 2>err; tr \"\\r\" \"\\n\" <err | tail -1; rm err"),
    Row("--progress draws a bar",
        "nbdcopy --progress disk null: 2>err; whether grep 100% err; rm err"),
    Row("--progress=FD writes N/100", "nbdcopy --progress=3 disk null: 3>p; "
        "head -1 p; tail -1 p; whether grep -vE '^[0-9]+/100$' p; rm p"),
    Row("--progress=FD that is closed", "nbdcopy --progress=9 disk local"),
    Row("--request-size limits requests", "serve blocks 'nbdcopy --request-size=65536 $uri null:'; "
        "whether test $(largest) -le 65536"),
    Row("--request-size of 32 MiB", "nbdcopy --request-size=33554432 disk local"),
    Row("--request-size above it", "nbdcopy --request-size=67108864 disk local"),
    Row("--request-size below 4096", "nbdcopy --request-size=2048 disk local"),
    Row("--request-size no power of two", "nbdcopy --request-size=5000 disk local"),
    Row("--queue-size", "nbdcopy --queue-size=262144 disk local"),
    Row("--queue-size below a request", "nbdcopy --queue-size=1 disk local"),
    Row("--queue-size no number", "nbdcopy --queue-size=x disk local"),
    Row("-R N", "nbdcopy -R 1 disk local && nbdcopy --requests=64 disk again"),
    Row("-R 0", "nbdcopy -R 0 disk local"),
    Row("-C 0", "nbdcopy -C 0 disk local"),
    Row("-S N makes zero blocks sparse", "nbdcopy -S 4096 full local; whether sparse local"),
    Row("-S 0 turns it off", "nbdcopy -S 0 full local; whether sparse local"),
    Row("-S no power of two", "nbdcopy -S 1000 disk local"),
    Row("-S too small", "nbdcopy -S 256 disk local"),
    Row("--synchronous keeps the order", "serve blocks 'nbdcopy --synchronous $uri local'; "
        "offsets >o; whether sort -nc o; rm o"),
    Row("-T 0 chooses", "nbdcopy -T 0 disk local"),
    Row("-T 1", "nbdcopy --threads=1 disk local"),
    Row("-v says more", "nbdcopy -v disk local 2>err; whether test -s err; rm err"),
    Row("silent by default", "nbdcopy disk local 2>err; cat err; rm err"),
    # Streams: MULTI-CONN, THREADS
    Row("stdin may be a file", "nbdcopy - local <disk"),
    Row("stdout may be a file", "nbdcopy disk - >local"),
    Row("stdin to stdout", "cat disk | nbdcopy - - | md5sum"),
    Row("a stream into a server", "cp disk2 out; truncate -s 9M out; "
        "serve out 'cat disk | nbdcopy - $uri'"),
    Row("a stream into null", "cat disk | nbdcopy - null:"),
    Row("an empty stream", "nbdcopy - null: </dev/null"),
    Row("a pipe as target", "mkfifo f; md5sum <f & nbdcopy disk f; wait; rm f"),
    Row("a pipe as source", "mkfifo f; cat disk >f & nbdcopy f null:; s=$?; wait; rm f; exit $s"),
    Row("a device as target", "nbdcopy disk /dev/null"),
    # What becomes of targets
    Row("a longer file becomes as long",
        "cp disk2 local; truncate -s 9M local; nbdcopy disk local"),
    Row("a shorter file becomes as long", "truncate -s 1k local; nbdcopy disk local"),
    Row("an empty disk", "truncate -s 0 e; nbdcopy e local"),
    Row("a disk of one byte", "printf x >e; nbdcopy e local"),
    Row("an empty server", "nbdcopy -- [ nbdkit null 0 ] local"),
    Row("a larger server keeps its rest", "cp disk2 out; truncate -s 9M out; "
        "nbdcopy -- disk [ nbdkit file out ]"),
    Row("a file named as null: but not it", "nbdcopy disk ./null:"),
    Row("a file with a colon", "nbdcopy disk foo:bar"),
    Row("a signal ends it and its server", "mkfifo l; exec 3<>l; nbdcopy -- "
        "[ nbdkit $E --filter=log --filter=delay pattern 1G rdelay=1 logfile=$PWD/l ] null: & "
        "grep -m1 -q Read <&3; kill -TERM $!; wait $!"),
    # Newer
    Row("--blkhash", "nbdcopy --blkhash disk null:", "--blkhash"),
    Row("--blkhash=md5/4k", "nbdcopy --blkhash=md5/4k disk local", "--blkhash"),
    Row("--blkhash-file", "nbdcopy --blkhash --blkhash-file=h disk null:", "--blkhash-file"),
    Row("--blkhash of nothing known", "nbdcopy --blkhash=crc disk local", "--blkhash"),
    # Failures
    Row("no argument", "nbdcopy"),
    Row("one argument", "nbdcopy disk"),
    Row("three arguments", "nbdcopy disk local x"),
    Row("unknown option", "nbdcopy --bogus disk local"),
    Row("unknown letter", "nbdcopy -q disk local"),
    Row("ambiguous option", "nbdcopy --ver disk local"),
    Row("an argument too many", "nbdcopy --flush=1 disk local"),
    Row("a bracket that is not closed", "nbdcopy disk [ nbdkit null 1M"),
    Row("nothing between brackets", "nbdcopy [ ] local"),
    Row("source missing", "nbdcopy nothing null:"),
    Row("target's folder missing", "nbdcopy disk no/where"),
    Row("source is a folder", "nbdcopy . null:"),
    Row("target is a folder", "nbdcopy disk ."),
    Row("null: as source", "nbdcopy null: local"),
    Row("no server there", "nbdcopy 'nbd+unix:///?socket=nowhere' null:"),
    Row("no server there as target", "nbdcopy disk 'nbd+unix:///?socket=nowhere'"),
    Row("not an NBD URI", "nbdcopy http://localhost/x null:"),
    Row("an old NBD URI", "nbdcopy nbd:unix:x null:"),
    Row("the command is missing", "nbdcopy -- [ ./nothing ] null:"),
    Row("the command fails", "nbdcopy -- [ nbdkit nothing ] null:"),
    Row("--progress=x", "nbdcopy --progress=x disk local"),
    Row("reading fails",
        "nbdcopy -- [ nbdkit $E --filter=error pattern 1M error-pread-rate=100% ] null:"),
    Row("writing fails", "nbdcopy -- blocks "
        "[ nbdkit $E --filter=error memory 9M error-pwrite-rate=100% error-zero-rate=100% ]"),
    Row("the server is too small", "nbdcopy -- disk [ nbdkit $E memory 1M ]"),
    Row("the server is too small for a stream", "cat disk | nbdcopy -- - [ nbdkit $E memory 1M ]"),
    Row("the target is full", "nbdcopy disk /dev/full"),
    Row("stdout is full", "nbdcopy disk - >/dev/full"),
    Row("stdin is closed", "nbdcopy - null: <&-"),
    Row("the source can only be written", "nbdcopy -- disk [ nbdkit $E -r memory 9M ]"),
]  # fmt: skip

# Where we differ on purpose: what, a script, its exit status with nbdcopy 1.14 and with ours.
DIFFERENT = [
    ("a file onto itself is refused", "nbdcopy disk disk", 0, 1),
    ("the same by a link", "ln -s disk link; nbdcopy disk link", 0, 1),
    ("a stream into a file works", "cat disk | nbdcopy - local", 1, 0),
    (
        "--allocated takes room for holes too",
        "nbdcopy --allocated blocks local; sparse local",
        0,
        1,
    ),
    ("a number with a tail is refused", "nbdcopy -C 4x disk local", 0, 1),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders to put first in the PATH: with the real nbdcopy, with ours."""
    require("nbdcopy", "nbdkit", "qemu-nbd")
    real = tmp_path_factory.mktemp("real")
    (real / "nbdcopy").symlink_to(find_nbdcopy())
    ours = tmp_path_factory.mktemp("ours")
    shim.make(ours)
    return real, ours


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The disks that the scripts use, made once and copied for each."""
    folder = tmp_path_factory.mktemp("disks")
    fragmented(folder / "disk", 5 * MIB + 513)
    fragmented(folder / "disk2", 2 * MIB, seed=2)
    (folder / "disk4").write_bytes(b"\xff" * (6 * MIB))
    (folder / "dirty").write_bytes(b"\xff" * (8 * MIB))
    # Holes and data of whole blocks, so that both programs must find the same zeroes.
    with (folder / "blocks").open("wb") as blocks:
        blocks.truncate(8 * MIB)
        for n in range(0, 8, 2):
            blocks.seek(n * MIB)
            blocks.write(os.urandom(MIB // 2).replace(b"\0", b"\1"))
    # Allocated zeroes.
    (folder / "full").write_bytes(b"x" * MIB + bytes(MIB) + b"x")
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "disk2", "disk.qcow2"],
        cwd=folder,
        check=True,
    )
    return folder


@dataclass(frozen=True)
class Outcome:
    """All that a script did."""

    status: int
    stdout: bytes
    files: dict[str, tuple[int, str]]


def run(script: str, program: Path, disks: Path, folder: Path) -> tuple[Outcome, str]:
    """Run ``script`` on fresh disks in ``folder``; return what came of it, and its stderr."""
    subprocess.run(["cp", "-a", "--sparse=always", disks, folder], check=True)
    is_ours = (program / SHIM_MARKER).exists()
    done = subprocess.run(
        ["timeout", "-k5", "60", "bash", "-c", f"{PRELUDE}\n{script}"],
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{program}:{os.environ['PATH']}",
            "LC_ALL": "C.UTF-8",
            "E": "" if is_ours else "--exit-with-parent",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    (folder / "log").unlink(missing_ok=True)
    files = _digests(folder)
    stderr = done.stderr.decode(errors="replace")
    shutil.rmtree(folder)
    return Outcome(done.returncode, done.stdout, files), stderr


def _digests(folder: Path) -> dict[str, tuple[int, str]]:
    contents = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    return {n: (len(c), hashlib.sha256(c).hexdigest()) for n, c in contents.items()}


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_same(row: Row, folders: tuple[Path, Path], disks: Path, short_tmp: Path) -> None:
    real, ours = folders
    if row.needs is not None and row.needs not in _known(real):
        pytest.skip(f"the installed nbdcopy has no {row.needs}")
    expected, _ = run(row.script, real, disks, short_tmp / "d")
    found, said = run(row.script, ours, disks, short_tmp / "d")
    if expected.status == 0:
        assert found == expected, said
    else:  # what has been made by then is worth nothing; sources are
        assert (found.status, found.stdout) == (expected.status, expected.stdout), said
        assert _digests(disks).items() <= found.files.items(), said
        is_signal = found.status > 128  # it says nothing
        assert is_signal or re.search("^nbdcopy: ", said, re.MULTILINE), said
        assert "internal error" not in said


@pytest.mark.parametrize(
    ("script", "theirs", "wanted"), [row[1:] for row in DIFFERENT], ids=[r[0] for r in DIFFERENT]
)
def test_better(
    script: str,
    theirs: int,
    wanted: int,
    folders: tuple[Path, Path],
    disks: Path,
    short_tmp: Path,
) -> None:
    real, ours = folders
    before = hashlib.sha256((disks / "disk").read_bytes()).hexdigest()
    assert run(script, real, disks, short_tmp / "d")[0].status in (theirs, wanted)
    found, said = run(script, ours, disks, short_tmp / "d")
    assert found.status == wanted, said
    assert found.files["disk"][1] == before
    if wanted == 0:
        assert found.files["local"][1] == before


def test_the_table_is_of_two_programs(folders: tuple[Path, Path]) -> None:
    """The test of the tests: each folder has the nbdcopy that it should."""
    versions = [
        subprocess.run([f / "nbdcopy", "-V"], capture_output=True, text=True, check=True).stdout
        for f in folders
    ]
    assert "v2v-async" not in versions[0]
    assert "v2v-async" in versions[1]


def test_a_reader_of_stdout_that_goes_away(folders: tuple[Path, Path], disks: Path) -> None:
    for folder in folders:
        done = subprocess.run(
            ["bash", "-c", f"'{folder}/nbdcopy' disk - | head -c 1; exit ${{PIPESTATUS[0]}}"],
            cwd=disks,
            capture_output=True,
            check=False,
            timeout=60,
        )
        assert done.returncode != 0
        assert len(done.stdout) == 1


def _known(folder: Path) -> str:
    return subprocess.run(
        [folder / "nbdcopy", "--long-options"], capture_output=True, text=True, check=True
    ).stdout
