"""What somebody who helps with a failed guest needs to see: one small file to attach.

::

    GUEST-failure/
    ├ summary.txt     what failed, for a person, and what is in here
    ├ failure.json    the same for programs
    ├ plan.json       what the plan says of the guest
    ├ argv.txt        its command line, and those of the programs that wrote the logs
    ├ versions.json   of the programs, the kernel, the distribution
    ├ events.jsonl    the guest's last events
    └ log/…           the last lines of each log of the attempt

Secrets are masked in all of it. The same failure gives the same bytes.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shlex
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from v2v_async.batch.plan.model import GuestPlan
from v2v_async.batch.record import folder
from v2v_async.batch.record.event_file import NAME as EVENTS
from v2v_async.batch.record.history import last_events
from v2v_async.batch.record.journal import GuestRecord
from v2v_async.batch.report.bundle_logs import Log, command_in, last_lines, logs_of, read_log
from v2v_async.batch.report.bundle_versions import versions
from v2v_async.batch.report.redaction import Redaction
from v2v_async.batch.report.secrets_of import secrets_of
from v2v_async.errors import V2VError

MOST_BYTES = 256 << 10
"""Mail, chat and trackers take as much."""

_EVENTS = 200
_EVENT_BYTES = 16 << 20  # of the file's end: in the events of 500 guests those of one are rare
_LONGEST_TEXT = 4096
_LINES_BYTES, _LEAST_LINES_BYTES = 256 << 10, 512
"""Of one log or the events, uncompressed; halved until the bundle is small enough, at last 0."""


def write_bundle(path: Path, run: Path, guest: GuestPlan, record: GuestRecord) -> Path:
    """Write the bundle of a guest that failed to ``path`` (mode 0600), and return that. Blocks.

    ``run`` is the run's folder.

    Raises:
        V2VError: it can't be written.
    """
    case = _case(run, guest, record)
    limit = _LINES_BYTES
    while len(content := _packed(case, limit)) > MOST_BYTES and limit:
        limit = limit // 2 if limit > _LEAST_LINES_BYTES else 0
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise V2VError(f"the failure bundle ‘{path}’ can't be written: {error.strerror}") from error
    return path


@dataclass(frozen=True, slots=True)
class _Case:
    """What is packed, secrets masked; of ``events`` and ``logs`` (by name) only the last lines."""

    redaction: Redaction
    name: str
    run: str
    guest: GuestPlan
    record: GuestRecord
    members: Mapping[str, str]
    events: Sequence[str]
    logs: Mapping[str, Log]


def _case(run: Path, guest: GuestPlan, record: GuestRecord) -> _Case:
    redaction = Redaction(secrets_of(guest))
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", redaction.text(guest.name)).strip("._")[:60]
    failing = None if record.failure is None else record.failure.log
    logs = logs_of(folder.guest_folder(run, guest.name), failing)
    events = last_events(run / EVENTS, guest.name, _EVENTS, most_bytes=_EVENT_BYTES)
    members = {
        "failure.json": _json(_failure(guest, record, run), redaction),
        "plan.json": _json(guest.model_dump(mode="json", by_alias=True), redaction),
        "argv.txt": _argv(guest, logs, redaction),
        "versions.json": _json(versions(), redaction),
    }
    return _Case(
        redaction,
        name or "guest",
        run.name,
        guest,
        record,
        members,
        [_json(each, redaction, indent=None).rstrip("\n") for each in events],
        {redaction.text(each): read_log(path, redaction) for each, path in logs.items()},
    )


def _packed(case: _Case, limit: int) -> bytes:
    """Return the archive, with at most ``limit`` bytes of each log, and of the events."""
    ends = {name: last_lines(log, limit) for name, log in case.logs.items()}
    ended, _ = last_lines(Log(tuple(case.events), 0, is_whole=True), limit)
    summary = _summary(case, {name: told for name, (_, told) in ends.items()})
    members = {"summary.txt": summary, **case.members, "events.jsonl": ended}
    members |= {f"log/{name}": text for name, (text, _) in ends.items()}
    packed = io.BytesIO()
    # No time and no name in the header, nor whose files they were: the same again is the same.
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name, text in members.items():
            content = text.encode(errors="replace")
            info = tarfile.TarInfo(f"{case.name}-failure/{name}")
            info.size = len(content)
            info.mode = 0o600
            info.mtime = int(case.record.ended or 0)
            archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def _failure(guest: GuestPlan, record: GuestRecord, run: Path) -> dict[str, Any]:
    return {
        "version": 1,
        "run": run.name,
        "guest": guest.name,
        "phase": record.phase,
        "attempts": record.attempts,
        "began": record.began,
        "ended": record.ended,
        "failure": None if record.failure is None else asdict(record.failure),
        "disks": [asdict(disk) for disk in record.disks],
    }


def _json(value: Any, redaction: Redaction, *, indent: int | None = 2) -> str:
    # Masked before it is cut, which might be in the middle of a secret.
    shown = _shortened(redaction.value(value))
    return json.dumps(shown, ensure_ascii=False, indent=indent, default=str) + "\n"


def _shortened(value: Any) -> Any:
    """Return a value of JSON with its longest texts cut: of one message the beginning tells."""
    if isinstance(value, str) and len(value) > _LONGEST_TEXT:
        return f"{value[:_LONGEST_TEXT]} … ({len(value) - _LONGEST_TEXT} characters left out)"
    if isinstance(value, list | tuple):
        return [_shortened(each) for each in value]
    if isinstance(value, dict):
        return {name: _shortened(each) for name, each in value.items()}
    return value


def _argv(guest: GuestPlan, logs: Mapping[str, Path], redaction: Redaction) -> str:
    """Return the command that converts this guest alone, and those that wrote the logs."""
    # Each word for itself first: quoting may hide what it begins with.
    alone = shlex.join(redaction.text(word) for word in ["virt-v2v-async", *guest.words()])
    ran = [command_in(path) for path in logs.values()]
    return "".join(f"{redaction.text(line)}\n" for line in [alone, *filter(None, ran)])


def _summary(case: _Case, logs: Mapping[str, str]) -> str:
    """Return what a person reads first; ``logs`` says how much of each is there."""
    record = case.record
    lines = [f"Guest ‘{case.guest.name}’ of run ‘{case.run}’: {record.phase}", ""]
    failure = record.failure
    if failure is not None:
        place = {"step": failure.step, "disk": failure.disk, "offset": failure.offset}
        where = ", ".join(f"{name} {each}" for name, each in place.items() if each is not None)
        told = {
            "where": where or None,
            "cause": _shortened(case.redaction.text(failure.message)),
            "hint": failure.hint,
            "log": failure.log,
            "again": "no use: it would fail in the same way" if failure.is_permanent else None,
        }
        lines += [f"{name + ':':<7}{each}" for name, each in told.items() if each]
    lines += [f"tried: {record.attempts} time{'' if record.attempts == 1 else 's'}", ""]
    for number, disk in enumerate(record.disks, 1):
        lines.append(f"disk {number}: {disk.landed} of {disk.total} bytes were on the target")
    lines += [
        *([""] if record.disks else []),
        "failure.json   the same for programs",
        "plan.json      what the plan says of this guest",
        "argv.txt       the command that converts it alone, and those that wrote the logs",
        "versions.json  of the programs, the kernel and the distribution",
        f"events.jsonl   its last {_EVENTS} events but for progress",
        *(f"log/{name}: {told_of}" for name, told_of in logs.items()),
        "",
        "Passwords, keys and tokens are masked (***). Names, addresses and paths are not: look",
        "through it before it leaves your house.",
    ]
    return case.redaction.text("\n".join(lines) + "\n")
