"""The logs of a failed attempt, and their last lines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from v2v_async.batch.report.redaction import Redaction

_READ_BYTES = 512 << 10
"""Of one log: more than is ever kept of it, so that masking sees what it needs."""
_MOST_LOGS = 64
_LONGEST_LINE = 4096
_LONGEST_COMMAND = 64 << 10
"""A server's has some hundred bytes; what is longer is no command, but a log without lines."""
_ATTEMPT = re.compile(r"attempt-(\d+)")


@dataclass(frozen=True, slots=True)
class Log:
    """The end of a log: ``is_whole`` if it is all of it; ``size`` is the file's, in bytes."""

    lines: tuple[str, ...]
    size: int
    is_whole: bool
    problem: str | None = None


def logs_of(folder: Path, failing: str | None) -> dict[str, Path]:
    """Return the logs of a guest's last attempt by name, the one of the failure first.

    ``folder`` holds those of each attempt.
    """
    found: dict[str, Path] = {}
    seen: set[Path] = set()
    for name, path in _candidates(folder, failing):
        real = path.resolve()
        if real not in seen and len(found) < _MOST_LOGS:
            seen.add(real)
            found.setdefault(name, path)
    return found


def read_log(path: Path, redaction: Redaction) -> Log:
    """Return the last lines of a log, secrets masked; lines that are too long lose their end."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _READ_BYTES))
            content = file.read(_READ_BYTES)
    except OSError as error:
        return Log((), 0, is_whole=False, problem=error.strerror)
    # What begins in the middle of a line may begin in the middle of a secret.
    if size > _READ_BYTES:
        content = content.partition(b"\n")[2]
    # Twice the length until secrets are masked: one may stand where a line is cut.
    raw = [line[: 2 * _LONGEST_LINE] for line in content.decode(errors="replace").splitlines()]
    lines = tuple(_cut(line) for line in redaction.text("\n".join(raw)).splitlines())
    return Log(lines, size, is_whole=size <= _READ_BYTES)


def command_in(path: Path) -> str | None:
    """Return the command line whose log this is, as its first line has it after ``$``; not masked.

    None: it has none, or can't be read.
    """
    try:
        with path.open("rb") as file:
            line = file.readline(_LONGEST_COMMAND)
    except OSError:
        return None
    # Half a line may end in the middle of a secret, which nothing would mask.
    if not line.startswith(b"$ ") or not line.endswith(b"\n"):
        return None
    return line[2:].decode(errors="replace").rstrip("\n")


def last_lines(log: Log, limit: int) -> tuple[str, str]:
    """Return at most ``limit`` bytes of a log's end, and in words how much of it that is."""
    if log.problem is not None:
        return "", f"can't be read: {log.problem}"
    kept: list[str] = []
    for line in reversed(log.lines):
        limit -= len(line.encode(errors="replace")) + 1
        if limit < 0:
            break
        kept.append(line)
    text = "".join(f"{line}\n" for line in reversed(kept))
    if log.is_whole and len(kept) == len(log.lines):
        return text, "whole"
    count = "the last line" if len(kept) == 1 else f"the last {len(kept)} lines"
    return text, f"{count} of {log.size} bytes"


def _cut(line: str) -> str:
    if len(line) <= _LONGEST_LINE:
        return line
    return f"{line[:_LONGEST_LINE]} … (the rest of the line is left out)"


def _candidates(folder: Path, failing: str | None) -> Iterator[tuple[str, Path]]:
    first = "" if failing is None else Path(failing).name
    if failing is not None and _is_file(Path(failing)):
        yield first, Path(failing)
    attempts = [each for each in _listed(folder) if _ATTEMPT.fullmatch(each.name)]
    if not attempts:
        return
    last = max(attempts, key=lambda each: int(each.name.partition("-")[2]))
    for path in sorted(_listed(last), key=lambda each: (each.name != first, each.name)):
        if _is_file(path):
            yield path.name, path


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _is_file(path: Path) -> bool:
    """Whether it is a file itself: what a link leads to need not be a log."""
    return path.is_file() and not path.is_symlink()
