"""The failure bundle: all that helps is in it, nothing secret is, and it is small."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import stat
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from v2v_async.batch.plan.model import GuestPlan
from v2v_async.batch.record import folder
from v2v_async.batch.record.journal import Failure, GuestRecord
from v2v_async.batch.report import bundle_versions
from v2v_async.batch.report.bundle import MOST_BYTES, write_bundle
from v2v_async.batch.report.bundle_logs import last_lines, read_log
from v2v_async.batch.report.redaction import Redaction
from v2v_async.batch.report.secrets_of import secrets_of
from v2v_async.errors import V2VError
from v2v_async.events import Bytes, Reporter
from v2v_async.redact import redact

VERSIONS = {"v2v-async": "0.1.0", "nbdkit": "1.32.5", "kernel": "6.1"}


@pytest.fixture(autouse=True)
def _versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("v2v_async.batch.report.bundle.versions", lambda: VERSIONS)


def record(**changes: Any) -> GuestRecord:
    fields = {
        "name": "db",
        "phase": "failed",
        "is_paused": False,
        "attempts": 2,
        "failures": 2,
        "not_before": 0.0,
        "began": 1000.0,
        "ended": 2000.0,
        "failure": Failure("it failed", "mend it", "copy", 2, 1 << 20, None),
        "disks": (Bytes(total=8192), Bytes(total=4096, copied=4096)),
    }
    return GuestRecord(**{**fields, **changes})


def guest(**changes: Any) -> GuestPlan:
    return GuestPlan.model_validate(
        {"name": "db", "input": {"type": "disk", "source": ["a.img"]}, **changes}
    )


def unpacked(path: Path) -> dict[str, str]:
    with tarfile.open(path) as archive:
        return {
            member.name.partition("/")[2]: opened.read().decode()
            for member in archive
            if (opened := archive.extractfile(member)) is not None
        }


def logs(run: Path, name: str = "db", attempt: int = 2) -> Path:
    made = folder.guest_folder(run, name) / f"attempt-{attempt}"
    made.mkdir(parents=True, exist_ok=True)
    return made


def events(run: Path) -> Reporter:
    def emit(event: Any) -> None:
        with (run / "events.jsonl").open("a") as file:
            file.write(event.to_json() + "\n")

    return Reporter(emit, "r")


def test_what_is_in_it(tmp_path: Path) -> None:
    (logs(tmp_path) / "convert.log").write_text("one\ntwo\n")
    copying = logs(tmp_path) / "copy-2.log"
    copying.write_text("three\n")
    (logs(tmp_path, attempt=1) / "input.log").write_text("of the first attempt\n")
    mine = events(tmp_path).for_guest("db")
    mine.for_step("copy").for_disk(2).emit("progress", bytes=Bytes(total=1))
    for number in range(250):
        mine.message(f"text {number}")
        events(tmp_path).for_guest("other").message("of another guest")
    failure = Failure("it failed", "mend it", "copy", 2, 1 << 20, str(copying), is_permanent=True)
    path = write_bundle(tmp_path / "b.tar.gz", tmp_path, guest(), record(failure=failure))
    found = unpacked(path)
    assert list(found) == [
        *("summary.txt", "failure.json", "plan.json", "argv.txt", "versions.json"),
        *("events.jsonl", "log/copy-2.log", "log/convert.log"),
    ]
    summary = found["summary.txt"]
    for expected in (
        f"Guest ‘db’ of run ‘{tmp_path.name}’: failed",
        "where: step copy, disk 2, offset 1048576",
        "cause: it failed",
        "hint:  mend it",
        f"log:   {copying}",
        "again: no use",
        "tried: 2 times",
        "disk 2: 4096 of 4096 bytes",
        "log/convert.log: whole",
    ):
        assert expected in summary, expected
    told = json.loads(found["failure.json"])
    assert told["failure"]["offset"] == 1 << 20
    assert told["disks"][1]["copied"] == 4096
    assert json.loads(found["plan.json"])["input"]["source"] == ["a.img"]
    assert found["argv.txt"] == "virt-v2v-async -i disk -o libvirt -- a.img\n"
    assert json.loads(found["versions.json"]) == VERSIONS
    lines = [json.loads(line) for line in found["events.jsonl"].splitlines()]
    assert [each["text"] for each in lines] == [f"text {number}" for number in range(50, 250)]
    assert found["log/convert.log"] == "one\ntwo\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with tarfile.open(path) as archive:
        assert {member.mode for member in archive} == {0o600}
        assert {member.name.partition("/")[0] for member in archive} == {"db-failure"}


def test_it_is_the_same_again(tmp_path: Path) -> None:
    (logs(tmp_path) / "convert.log").write_text("one\n")
    first = write_bundle(tmp_path / "a", tmp_path, guest(), record()).read_bytes()
    os.utime(logs(tmp_path) / "convert.log", (1, 1))
    again = write_bundle(tmp_path / "b", tmp_path, guest(), record()).read_bytes()
    assert first == again
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "b", "guests"]


# Secrets, in each place.

PASSWORDS = {
    "of-source": "hunter2",
    "of-target": "o\"ddly<qu'oted&",
    "luks": "correct horse battery",
    "in-uri": "p@ss/word",
    "in-option": "s3cr3t-c00kie",
    "in-words": "rootpw99",
    "in-selector": "selected77",
    "environment": "env-token-55",
}


def written(secret: str) -> Iterator[str]:
    """Yield what a log may have of it."""
    yield secret
    yield quote(secret, safe="")
    yield json.dumps(secret)
    yield shlex.quote(secret)
    yield secret.replace("&", "&amp;").replace("<", "&lt;")


@pytest.fixture
def secretive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GuestPlan:
    for name in ("of-source", "of-target", "luks"):
        (tmp_path / name).write_text(PASSWORDS[name] + "\n")
    monkeypatch.setenv("OS_PASSWORD", PASSWORDS["environment"])
    return guest(
        input={
            "type": "libvirt",
            "source": "db",
            "connection": f"vpx://root:{quote(PASSWORDS['in-uri'], safe='')}@vc/DC/esx",
            "password_file": str(tmp_path / "of-source"),
            "options": {"vddk-cookie": PASSWORDS["in-option"]},
        },
        output={"password_file": str(tmp_path / "of-target")},
        convert={"keys": [f"all:file:{tmp_path / 'luks'}"]},
        options=[
            *("--root-password", f"password:{PASSWORDS['in-words']}"),
            *("--key", f"/dev/sda1:key:{PASSWORDS['in-selector']}"),
        ],
    )


def test_no_secret_of_the_plan_is_in_it(tmp_path: Path, secretive: GuestPlan) -> None:
    every = "\n".join(form for secret in PASSWORDS.values() for form in written(secret))
    run = tmp_path / "run"
    run.mkdir()
    (logs(run) / "convert.log").write_text(f"begin\n{every}\nend\n")
    argv = shlex.join(["nbdkit", "curl", *PASSWORDS.values()])
    (logs(run) / "input.log").write_text(f"$ {argv}\nbegin\n{every}\nend\n")
    events(run).for_guest("db").emit("failed", every, hint=every, details={"x": [every], every: 1})
    failure = Failure(every, every, "copy", log=str(logs(run) / "convert.log"))
    path = write_bundle(tmp_path / "b.tar.gz", run, secretive, record(failure=failure))
    found = unpacked(path)
    assert {"log/convert.log", "log/input.log"} <= found.keys()
    for name, text in found.items():
        for kind, secret in PASSWORDS.items():
            for form in written(secret):
                assert form not in text, f"{kind} in {name}"
    for name in ("summary.txt", "failure.json", "plan.json", "argv.txt", "events.jsonl"):
        assert "***" in found[name], name
    assert found["log/convert.log"].startswith("begin\n***\n")
    assert found["log/convert.log"].endswith("\nend\n")
    plan = json.loads(found["plan.json"])
    assert plan["input"]["password_file"] == str(tmp_path / "of-source")
    assert plan["input"]["options"] == {"vddk-cookie": "***"}
    assert plan["input"]["connection"] == "vpx://root:***@vc/DC/esx"
    assert "\nnbdkit curl" in found["argv.txt"]


def test_half_a_command_is_left_out(tmp_path: Path) -> None:
    """A secret of which only the beginning is there is not masked."""
    (logs(tmp_path) / "in1.log").write_text(f"$ nbdkit {'x' * (64 << 10)} hunter2\n")
    (logs(tmp_path) / "out1.log").write_text("$ nbdkit null hun")
    (logs(tmp_path) / "out2.log").write_text("$ nbdkit null size=1M\n")
    argv = unpacked(write_bundle(tmp_path / "b.tar.gz", tmp_path, guest(), record()))["argv.txt"]
    assert argv.splitlines()[1:] == ["nbdkit null size=1M"]


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Basic aHVudGVyMg==hunter2",
        "> X-Auth-Token: hunter2",
        "< Set-Cookie: vmware_soap_session=hunter2; Path=/",
        "curl: header 'Proxy-Authorization: Bearer hunter2'",
        "X-Vmware-Cgi-Ticket: hunter2",
        "vmware-api-session-id: hunter2",
        'the answer was {"password": "hunter2", "a": 1}',
        'the answer was {"auth": {"api_key": "hunter2"}}',
        "{'passphrase': 'hunter2'}",
        '"token": "hunter2 with spaces"',
        "os-application-credential-secret=hunter2",
        "password = hunter2",
        "Password:hunter2",
        "<password>hunter2</password>",
        '<ns:secret usage="x">hunter2</ns:secret>',
        "<graphics type='vnc' passwd='hunter2'/>",
        "--password hunter2",
        "--admin-password 'hunter2 x'",
        "nbds://u:hunter2@host/",
        "nbds://u:hun@ter@hunter2@host/",
        "1http://u:hunter2@host/",
        "/dev/sda1:key:hunter2",
        "eyJhbGciOiJIUzI1.eyJodW50ZXIyIjoxfQ.hunter2",
        "-----BEGIN RSA PRIVATE KEY-----\nhunter2\n-----END RSA PRIVATE KEY-----",
        "-----BEGIN OPENSSH PRIVATE KEY-----\nhunter2\nand the end is cut off",
        "MIIhunter2\nMIIhunter2\n-----END PRIVATE KEY-----",
    ],
)
def test_what_looks_like_a_secret_is_masked(text: str) -> None:
    shown = Redaction().text(f"before:\n{text}\nafter")
    assert "hunter2" not in shown
    assert shown.startswith("before:\n")
    assert "***" in shown


@pytest.mark.parametrize(
    "text",
    [
        "password_file: /root/pw",
        "--password-file /root/pw",
        "-ip /root/vcenter.password",
        "nbd://host:10809/disk, read 4096 bytes at offset 8192: Input/output error",
        "virt-v2v-in-place: error: inspection could not detect the source guest",
        "nbdkit: debug: key=value cow: filter",
        "https://host/path?query=1",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert Redaction().text(text) == text


def test_a_short_secret_is_masked_only_as_a_word() -> None:
    redaction = Redaction(["ab", ""])
    assert redaction.text("ab tab ab=1 /ab/ abc") == "*** tab ***=1 /***/ abc"


def test_a_secret_that_is_part_of_another() -> None:
    assert Redaction(["word", "password9"]).text("password9 word") == "*** ***"


def test_keys_and_values_of_json() -> None:
    value = {"a": {"token": "x", "password_file": "/f", "n": 3}, "hunter2": [None, "hunter2"]}
    assert Redaction(["hunter2"]).value(value) == {
        "a": {"token": "***", "password_file": "/f", "n": 3},
        "***": [None, "***"],
    }


def test_secrets_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"x" * 100_000)
    plan = guest(
        input={
            "source": ["nbd://[::1", "nbd://u:pw%20x@h/", "\0"],
            "password_file": str(tmp_path / "absent"),
        },
        output={"password_file": str(tmp_path / "large")},
        convert={"keys": ["a:clevis", "b:file:x\0y", "c:key:later"]},
        options=["--password", "root:file:/x", "--token=abc1", "--key"],
    )
    assert secrets_of(plan) == {"pw%20x", "pw x", "later", "abc1"}


def test_long_lines_take_no_time() -> None:
    begin = time.perf_counter()
    for text in ("a" * 200_000, "a." * 100_000, "-" * 200_000, "x-" * 100_000, "<a" * 100_000):
        Redaction(["hunter2"]).text(text)
    redact("a" * 200_000)
    redact("password " * 50_000)
    assert time.perf_counter() - begin < 10  # quadratic, it takes minutes


# Small, and honest about what is left out.


def test_it_is_small_however_long_the_logs_are(tmp_path: Path) -> None:
    noise = random.Random(7)
    for name in ("input", "convert", "copy-1", "copy-2", "output"):
        with (logs(tmp_path) / f"{name}.log").open("w") as file:
            for number in range(20_000):
                file.write(f"{name} {number} {noise.randbytes(40).hex()}\n")
    mine = events(tmp_path).for_guest("db")
    for _ in range(200):
        mine.message(noise.randbytes(3000).hex())
    path = write_bundle(tmp_path / "b.tar.gz", tmp_path, guest(), record())
    assert MOST_BYTES / 4 < path.stat().st_size <= MOST_BYTES
    found = unpacked(path)
    for name in ("input", "copy-2"):
        lines = found[f"log/{name}.log"].splitlines()
        assert lines[-1].startswith(f"{name} 19999 ")
        size = (logs(tmp_path) / f"{name}.log").stat().st_size
        assert (
            f"log/{name}.log: the last {len(lines)} lines of {size} bytes" in found["summary.txt"]
        )
    assert len(found["events.jsonl"].splitlines()) > 3
    assert all(json.loads(line)["guest"] == "db" for line in found["events.jsonl"].splitlines())


def test_a_log_that_is_cut_loses_whole_lines_at_its_begin_and_ends_of_long_ones(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.log"
    path.write_text("password=hunter2" * 100_000 + "\nsecond\n" + "x" * 10_000 + "hunter2\nlast\n")
    log = read_log(path, Redaction(["hunter2"]))
    assert not log.is_whole
    assert log.lines[0] == "second"
    assert log.lines[1].startswith("xxx")
    assert log.lines[1].endswith("x … (the rest of the line is left out)")
    assert last_lines(log, 5)[0] == "last\n"
    assert last_lines(log, 4) == ("", f"the last 0 lines of {path.stat().st_size} bytes")


def test_a_secret_where_a_line_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    secret = "correct-horse-battery"
    for length in range(4070, 4100):
        path.write_text("x" * length + secret + "\n")
        [line] = read_log(path, Redaction([secret])).lines
        assert "corr" not in line


def test_logs_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "private").write_text("not a log\n")
    (logs(tmp_path) / "link.log").symlink_to(tmp_path / "private")
    (logs(tmp_path) / "folder.log").mkdir()
    os.mkfifo(logs(tmp_path) / "pipe.log")
    (logs(tmp_path) / "binary.log").write_bytes(b"\xff\x00\x1b[31m\n")
    failure = Failure("x", log=str(tmp_path / "absent"))
    found = unpacked(write_bundle(tmp_path / "b", tmp_path, guest(), record(failure=failure)))
    assert [name for name in found if name.startswith("log/")] == ["log/binary.log"]
    assert "log/binary.log: whole" in found["summary.txt"]


def test_a_guest_of_any_name_and_a_run_without_anything(tmp_path: Path) -> None:
    for name in ("../../etc/passwd", "a b\n", "…", "web/1", "x" * 300):
        made = write_bundle(
            tmp_path / "new" / "b.tar.gz",
            tmp_path / "run",
            guest(name=name),
            record(name=name, failure=None, disks=(), attempts=0, ended=None),
        )
        with tarfile.open(made) as archive:
            assert all(
                re.fullmatch(r"[A-Za-z0-9._-]{1,80}/[a-z.]+", member.name) for member in archive
            )
        assert "tried: 0 times" in unpacked(made)["summary.txt"]


def test_where_it_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(V2VError, match="can't be written: File exists"):
        write_bundle(tmp_path / "file" / "b", tmp_path, guest(), record())


def test_versions_of_what_is_here() -> None:
    found = bundle_versions.versions()
    assert found["v2v-async"]
    assert found["libnbd"]
    assert found["nbdkit"]
    assert found["qemu-nbd"]
    assert found["python"]
    assert found["kernel"] == os.uname().release
    assert json.loads(json.dumps(found)) == found
