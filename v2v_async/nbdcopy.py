"""nbdcopy: where the real one is, what this one can do, and its command line.

A folder that ``v2v-async shim`` made has our own ``nbdcopy`` and comes first in the PATH of those
who want that; it is marked, and never what is meant here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from v2v_async import process
from v2v_async.errors import DependencyError, UsageError
from v2v_async.options import CopyOptions

SHIM_MARKER = ".v2v-async-shim"
"""A file in each folder whose ``nbdcopy`` is ours."""

HINT = "install it: apt-get install libnbd-bin, or dnf install libnbd"
_OUR_SCRIPTS = ("v2v-async", "virt-v2v-async")
_TIMEOUT_S = 30.0
_PROGRESS = re.compile(r"(\d{1,3})/100")


@dataclass(frozen=True, slots=True)
class NbdCopy:
    """An installed nbdcopy. ``known`` are its options, as ``--long-options`` lists them."""

    path: Path
    version: str
    known: frozenset[str]


def find_nbdcopy(search_path: str | None = None) -> Path:
    """Return the first nbdcopy in ``search_path`` (default: PATH) that is not our own.

    Raises:
        DependencyError: there is none.
    """
    if search_path is None:
        search_path = os.environ.get("PATH", os.defpath)
    has_ours = False
    for folder in search_path.split(os.pathsep):
        program = Path(folder or ".") / "nbdcopy"
        if not (program.is_file() and os.access(program, os.X_OK)):
            continue
        if not _is_ours(program):
            return program.absolute()
        has_ours = True
    but = " (the one that is there is v2v-async itself)" if has_ours else ""
    raise DependencyError(f"nbdcopy is not installed or not in the PATH{but}", hint=HINT)


def _is_ours(program: Path) -> bool:
    resolved = program.resolve()
    return (
        resolved.name in _OUR_SCRIPTS
        or (program.parent / SHIM_MARKER).exists()
        or (resolved.parent / SHIM_MARKER).exists()
    )


async def probe(program: Path | None = None) -> NbdCopy:
    """Ask nbdcopy what it is.

    Raises:
        DependencyError: there is none, or it does not answer.
    """
    path = program or find_nbdcopy()
    said = []
    for question in ("--version", "--long-options"):
        try:
            completed = await process.run([str(path), question], timeout_s=_TIMEOUT_S)
        except TimeoutError:
            raise DependencyError(
                f"‘{path} {question}’ did not answer within {_TIMEOUT_S:.0f} s", hint=HINT
            ) from None
        if completed.status != 0:
            why = completed.stderr.strip() or process.describe_status(completed.status)
            raise DependencyError(f"‘{path} {question}’ failed: {why}", hint=HINT)
        said.append(completed.stdout.split())
    version, known = said
    return NbdCopy(path, version[1] if len(version) > 1 else "?", frozenset(known))


def command(
    found: NbdCopy,
    options: CopyOptions,
    source: Sequence[str],
    target: Sequence[str],
    *,
    is_known_zero: bool,
    progress_fd: int,
) -> list[str]:
    """Return the command line that copies ``source`` to ``target`` (their words on it).

    ``is_known_zero``: we know that the target reads as zeroes; a program that can't use that copies
    all the same.

    Raises:
        UsageError: this version has not an option that was asked for.
    """
    wanted: list[tuple[str, object]] = [
        ("--connections", options.connections),
        ("--requests", options.requests),
        ("--request-size", options.request_size),
        ("--queue-size", options.queue_size),
        ("--sparse", options.sparse),
        ("--threads", options.threads),
        ("--allocated", options.allocated),
        ("--destination-is-zero", options.target_is_zero),
        ("--no-extents", not options.extents),
        ("--flush", options.flush),
        ("--synchronous", options.synchronous),
        ("--progress", progress_fd),
    ]
    words = [
        name if value is True else f"{name}={value}"
        for name, value in wanted
        if value is not None and value is not False
    ]
    unknown = [
        name for name in (word.partition("=")[0] for word in words) if name not in found.known
    ]
    if unknown:
        raise UsageError(
            f"nbdcopy {found.version} (‘{found.path}’) has no {' and no '.join(unknown)}",
            hint="leave the option out, install a newer nbdcopy, or use --copier native",
        )
    # nbdcopy leaves out what is zero there already even where it should take room.
    is_useful = is_known_zero and not options.allocated and not options.target_is_zero
    if is_useful and "--destination-is-zero" in found.known:
        words.append("--destination-is-zero")
    return [str(found.path), *words, "--", *source, *target]


def uri(address: str) -> str:
    """Return the NBD URI for a Unix socket's absolute path; a URI is returned as it is."""
    return f"nbd+unix:///?socket={quote(address)}" if address.startswith("/") else address


def progress(line: str) -> int | None:
    """Return how far it is, in hundredths of a per cent; None where ``line`` is something else."""
    match = _PROGRESS.fullmatch(line)
    return None if match is None else int(match[1]) * 100
