"""Copies a disk with nbdcopy or ‘qemu-img convert’, telling the events that the engine tells.

::

    options and ends ── can't be done ──> UsageError, before anything is touched
      └ plan ─ which program, its version and command line ──> planned
          └ run ─ both its outputs are read: a line is how far it is ──> progress
              │                               or the program's words ──> the error
              └ exit status 0 ─ the odd end and the flush of qemu-img ──> finished

What the program calls done is taken for landed, except for its 100%: that is told when it has
ended well. nbdcopy counts when it has asked for a range; qemu-img counts what holds data.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable

import anyio
from anyio.abc import ByteReceiveStream

from v2v_async import process
from v2v_async.copy.endpoint import Endpoint
from v2v_async.copy.external_command import (
    Command,
    length_of_file,
    nbdcopy_command,
    path_of,
    qemu_img_command,
    size_of,
)
from v2v_async.errors import CopyError, SizeMismatchError, UsageError, V2VError
from v2v_async.events import Bytes, Reporter
from v2v_async.options import CopyOptions
from v2v_async.redact import redact

_DEFAULTS = CopyOptions()
# Options that only the native copier has a way to do, and those that qemu-img has none for either.
_ONLY_NATIVE = ("checkpoint", "verify", "repair", "digest", "bandwidth_file")
_NOT_QEMU_IMG = ("request_size", "queue_size", "threads")
_TAIL_LINES = 12
_QUOTED_LINES = 3
# A line that never ends is cut here; the programs' own are shorter than their paths are.
_LONGEST_LINE = 64 * 1024
_WHOLE = 10_000  # hundredths of a per cent
_OFFSET = re.compile(r"at (?:offset|byte) (\d+)")


def unsupported(options: CopyOptions) -> list[str]:
    """Return the options asked for that ``options.copier`` has no way to do (``--verify``).

    ``parallel``, ``max_connections`` and ``keep_going`` are about several disks: whoever calls for
    each of them sees to those. Neither program tries anything again, so 0 retries are granted.
    """
    if options.copier == "native":
        return []
    fields = list(_ONLY_NATIVE)
    if options.copier == "nbdcopy":
        fields.append("bandwidth")
    else:
        fields += _NOT_QEMU_IMG
    found = [name for name in fields if getattr(options, name) != getattr(_DEFAULTS, name)]
    if options.retries not in (0, _DEFAULTS.retries):
        found.append("retries")
    if options.copier == "qemu-img" and (options.connections or 1) > 1:
        found.append("connections")
    names = ["--" + name.replace("_", "-") for name in found]
    if options.copier == "qemu-img" and not options.extents:
        names.append("--no-extents")
    return names


async def copy_disk_external(
    index: int,
    source: Endpoint,
    target: Endpoint,
    options: CopyOptions,
    reporter: Reporter,
    *,
    is_known_zero: bool,
    size: int | None = None,
) -> Bytes:
    """Copy one disk with ``options.copier``; return what has landed, by class.

    ``reporter`` is bound to the disk. ``size`` is the source's in bytes; when it is None an NBD
    source is asked first, over a connection of its own. ``bandwidth`` is this disk's share.

    Cancelled, the program and what it has started are ended before this returns.

    Raises:
        UsageError: the copier can't do what was asked for; nothing was touched.
        DependencyError: it is not installed.
        CopyError: it failed, with its own last words.
        SourceError, TargetError: a file can't be opened.
        ConnectError: an export can't be reached.
    """
    try:
        _check(source, target, options)
        if size is None:
            size = await size_of(source)
        ends = (source, target, options)
        if options.copier == "nbdcopy":
            command = await nbdcopy_command(*ends, is_known_zero=is_known_zero)
        else:
            command = await qemu_img_command(*ends, size or 0, is_known_zero=is_known_zero)
    except V2VError as error:
        error.locate(disk=index)
        raise
    copied, words = 0, deque[str](maxlen=_TAIL_LINES)

    def landed() -> Bytes:
        # What is not done may all be data: neither program tells.
        return Bytes(total=size or 0, data=size or 0, copied=copied)

    def progress(hundredths: int) -> None:
        nonlocal copied
        if size is None:
            reporter.emit("progress", bytes=landed(), details={"percent": hundredths / 100})
            return
        now = size * hundredths // _WHOLE
        # All of it is there when the program says so by its exit status, and not before.
        if copied < now < size:
            copied = now
            reporter.emit("progress", bytes=landed())

    reporter.emit("planned", bytes=landed(), details=command.details(size))
    started = anyio.current_time()
    reporter.emit("started", bytes=landed())
    try:
        status = await _run(command, progress, words)
        if status != 0:
            raise _failure(command.name, status, words)
        if command.ending is not None:
            await command.ending.finish()
    except V2VError as error:
        error.locate(disk=index)
        said = {"last_words": list(words)}
        where = {"hint": error.hint, "offset": error.offset}
        reporter.emit("failed", error.message, bytes=landed(), details=said, **where)
        raise
    except anyio.get_cancelled_exc_class():
        reporter.emit("cancelled", bytes=landed())
        raise
    if size is None:
        size = length_of_file(target)
    copied = size or 0
    reporter.emit("progress", bytes=landed())
    reporter.emit("finished", bytes=landed(), duration_s=anyio.current_time() - started)
    return landed()


def _check(source: Endpoint, target: Endpoint, options: CopyOptions) -> None:
    names = unsupported(options)
    if names:
        raise UsageError(
            f"{options.copier} has no way to do {' and '.join(names)}",
            hint="leave it out, or use --copier native",
        )
    if source.kind == "null":
        raise UsageError("‘null:’ can be the destination of a copy only")
    if options.copier == "qemu-img":
        for end in (source, target):
            if end.kind not in ("nbd", "file"):
                raise UsageError(
                    f"qemu-img can't copy from or to ‘{end}’: it takes NBD exports, files and "
                    "block devices",
                    hint="use --copier native or --copier nbdcopy",
                )
    if source.kind == target.kind == "file":
        one, two = path_of(source), path_of(target)
        if one.exists() and two.exists() and one.samefile(two):
            raise UsageError(f"‘{source}’ and ‘{target}’ are the same file")


async def _run(command: Command, progress: Callable[[int], None], words: deque[str]) -> int:
    """Run it to its end and return its exit status; what it says is added to ``words``."""

    def take(line: str) -> None:
        hundredths = command.progress(line)
        if hundredths is not None:
            progress(min(hundredths, _WHOLE))
        elif line.strip():
            words.append(redact(line.strip()))

    child = await process.start(
        command.argv,
        stdin=command.stdin,
        stdout=command.stdout,
        environment={"LC_ALL": "C.UTF-8"},
        with_children=command.has_servers,
    )
    outputs = [stream for stream in (child.stdout, child.stderr) if stream is not None]
    try:
        async with anyio.create_task_group() as readers:
            for stream in outputs:
                readers.start_soon(_read_lines, stream, take)
            await child.wait()
            # A server that it has left behind would hold the pipes open.
            await process.end(child)
    finally:
        await process.end(child)
        with anyio.CancelScope(shield=True):
            for stream in outputs:
                await stream.aclose()
    assert child.returncode is not None
    return process.unguarded(child.returncode) if command.has_servers else child.returncode


async def _read_lines(stream: ByteReceiveStream, take: Callable[[str], None]) -> None:
    """Give each line to ``take``; qemu-img ends those of its progress with a carriage return."""
    rest = b""
    async for chunk in stream:
        *lines, rest = re.split(rb"[\r\n]", rest + chunk)
        rest = rest[-_LONGEST_LINE:]
        for line in lines:
            take(line.decode(errors="replace"))
    take(rest.decode(errors="replace"))


def _failure(name: str, status: int, words: deque[str]) -> CopyError:
    said = "; ".join(list(words)[-_QUOTED_LINES:])
    message = f"{name} failed ({process.describe_status(status)})"
    if said:
        message += f": {said}"
    if "smaller than" in said:
        return SizeMismatchError(message, hint="make the target at least as large as the source")
    found = _OFFSET.search(said)
    return CopyError(message, offset=int(found[1]) if found else None)
