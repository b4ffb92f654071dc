"""units, redact, errors, and the documents of the v2v directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from v2v_async.errors import RequestError, UsageError, V2VError
from v2v_async.events import Event, Reporter
from v2v_async.redact import redact, redact_argv
from v2v_async.units import format_duration, format_size, parse_size
from v2v_async.v2vdir import OutputFile, V2VDir, record_of


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("512", 512), ("64K", 65536), ("1.5G", 3 << 29), ("2GiB", 2 << 30), ("1t", 1 << 40)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "1Q", "1.2.3", "0x10"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (512 << 20, "512 MiB"), (1 << 40, "1.0 TiB")],
)
def test_sizes_are_written(size: int, text: str) -> None:
    assert format_size(size) == text


def test_durations_are_written() -> None:
    assert [format_duration(s) for s in (7, 725, 3723)] == ["0:07", "12:05", "1:02:03"]


@pytest.mark.parametrize(
    "text",
    [
        "nbd://user:hunter2@host/x",
        "nbdkit curl password=hunter2 url=x",
        "--key /dev/sda1:key:hunter2",
        "nbds://u:hunter2@h:10809/disk?tls-certificates=/etc/pki",
        "cookie=hunter2",
        "--root-password password:hunter2",
        "--password root:password:hunter2",
    ],
)
def test_no_secret_is_shown(text: str) -> None:
    assert "hunter2" not in redact(text)
    assert "***" in redact(text)
    assert "hunter2" not in " ".join(redact_argv(text.split(" ")))


def test_what_is_no_secret_stays() -> None:
    assert redact("nbd://host:10809/disk and file=/a/b") == "nbd://host:10809/disk and file=/a/b"


def test_an_error_says_where() -> None:
    error = RequestError("read", offset=4096, length=512, reason="Input/output error (EIO)")
    error.locate(guest="db1", step="copy", disk=2)
    error.locate(guest="other", step="convert")
    assert str(error) == (
        "guest db1, step copy, disk 2, offset 4096: "
        "read of 512 bytes failed: Input/output error (EIO)"
    )


def test_a_reporter_redacts_and_says_where() -> None:
    events: list[Event] = []
    also: list[Event] = []
    reporter = Reporter(events.append, "r1", clock=lambda: 1.5).for_guest("g").for_step("input")
    reporter.tee(also.append).for_disk(2).warning("can't reach nbd://u:hunter2@h")
    assert also == events
    assert events[0].to_json() == (
        '{"version":1,"time":1.5,"run":"r1","type":"warning","guest":"g","step":"input",'
        '"disk":2,"text":"can\'t reach nbd://u:***@h"}'
    )


def test_the_v2v_directory_is_private_and_goes(tmp_path: Path) -> None:
    v2vdir = V2VDir.create(tmp_path)
    assert v2vdir.path.stat().st_mode & 0o777 == 0o700
    assert v2vdir.state.owner is not None
    assert v2vdir.state.owner.pid == os.getpid()
    v2vdir.add_output(OutputFile(temporary="/a", final="/b"))
    v2vdir.add_process(record_of(os.getpid(), "me", socket="/x/in1"))
    assert v2vdir.state.processes[0].is_alive
    v2vdir.forget_process(os.getpid())
    assert v2vdir.state.processes == []
    assert v2vdir.state.outputs[0].final == "/b"
    v2vdir.log("copy", 2).write_text("x")
    v2vdir.keep_only_logs()
    assert [p.name for p in v2vdir.path.iterdir()] == ["log"]
    v2vdir.remove()
    assert not v2vdir.path.exists()


def test_a_pid_that_was_reused_is_not_ours() -> None:
    record = record_of(os.getpid(), "me")
    assert record.is_alive
    assert not record.model_copy(update={"started": record.started + 1}).is_alive


def test_a_name_too_long_for_sockets_is_refused(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 90)
    long.mkdir()
    with pytest.raises(UsageError, match="too long for Unix sockets"):
        V2VDir.create(long)
    assert list(long.iterdir()) == []


def test_a_temporary_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no temporary directory") as caught:
        V2VDir.create(tmp_path / "absent")
    assert caught.value.exit_status == 2


def test_a_broken_document_is_named(tmp_path: Path) -> None:
    v2vdir = V2VDir(tmp_path)
    with pytest.raises(V2VError, match="is not there"):
        v2vdir.read_source()
    v2vdir.metadata_in.write_text('{"version": 1}')
    with pytest.raises(V2VError, match="metadata.in"):
        v2vdir.read_source()
