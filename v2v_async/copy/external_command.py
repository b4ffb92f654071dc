"""What another program is given to copy a disk: its command line, its pipes, and what it leaves."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any, Protocol

import anyio.to_thread

from v2v_async import nbdcopy, process, qemu_img
from v2v_async.connection import connected, export_info
from v2v_async.copy.endpoint import Endpoint
from v2v_async.copy.file import FileEnd
from v2v_async.errors import CopyError, SourceError, TargetError, V2VError
from v2v_async.options import CopyOptions


@dataclass(frozen=True, slots=True)
class Command:
    """What is run. ``progress`` reads a line of its output: hundredths of a per cent, or None.

    ``stdin`` and ``stdout`` are descriptors. ``has_servers``: it starts servers of its own.
    """

    name: str
    version: str
    argv: tuple[str, ...]
    progress: Callable[[str], int | None]
    stdin: int = DEVNULL
    stdout: int = PIPE
    has_servers: bool = False
    ending: Ending | None = None

    def details(self, size: int | None) -> dict[str, object]:
        """Return what the events tell of it, without secrets."""
        line = process.command_line(self.argv)
        return {"size": size, "copier": self.name, "version": self.version, "command": line}


async def nbdcopy_command(
    source: Endpoint, target: Endpoint, options: CopyOptions, *, is_known_zero: bool
) -> Command:
    """Return how nbdcopy copies ``source`` to ``target``.

    Raises:
        UsageError: the installed version has not an option that was asked for.
        DependencyError: it is not installed.
    """
    found = await nbdcopy.probe()
    reads_stdin = source.kind == "stream" and _is_handed_over(source)
    writes_stdout = target.kind == "stream" and _is_handed_over(target)
    argv = nbdcopy.command(
        found,
        options,
        _nbdcopy_words(source),
        _nbdcopy_words(target),
        is_known_zero=is_known_zero,
        # Its errors are lines of another form, so both can share a pipe where they must.
        progress_fd=2 if writes_stdout else 1,
    )
    return Command(
        "nbdcopy",
        found.version,
        tuple(argv),
        nbdcopy.progress,
        stdin=(source.fd or 0) if reads_stdin else DEVNULL,
        stdout=(1 if target.fd is None else target.fd) if writes_stdout else PIPE,
        has_servers="command" in (source.kind, target.kind),
    )


def _is_handed_over(stream: Endpoint) -> bool:
    """Return whether it becomes the program's own input or output; others have a path."""
    return stream.fd is not None or stream.address in ("", "-")


def _nbdcopy_words(end: Endpoint) -> list[str]:
    if end.kind == "nbd":
        return [nbdcopy.uri(end.address)]
    if end.kind == "command":
        return ["[", *end.argv, "]"]
    if end.kind == "null":
        return ["null:"]
    if end.kind == "stream" and _is_handed_over(end):
        return ["-"]
    return [str(path_of(end).absolute())]


async def qemu_img_command(
    source: Endpoint, target: Endpoint, options: CopyOptions, size: int, *, is_known_zero: bool
) -> Command:
    """Return how qemu-img copies ``source``, of ``size`` bytes; make the target where it is a file.

    Raises:
        UsageError: the installed version has not an option that was asked for, or can't reach an
            end; nothing was touched.
        DependencyError: it is not installed.
        TargetError: the file can't be made.
    """
    program, version = await qemu_img.version()
    rest = size % qemu_img.SECTOR
    # Where the target has room for the last sector to be whole, qemu fills it up with zeroes.
    has_tail = rest > 0 and await _lacks_room(target, size - rest + qemu_img.SECTOR)
    limit = size - rest if has_tail else None

    def argv(is_zero: bool) -> list[str]:
        ends = (_image(source, limit), _image(target, None))
        return qemu_img.convert_command(program, version, options, *ends, is_known_zero=is_zero)

    words = argv(is_known_zero)
    if target.kind == "file" and _make_empty(target, size):
        words = argv(True)
    tail = (size - rest, rest) if has_tail else None
    return Command(
        "qemu-img",
        ".".join(map(str, version)),
        tuple(words),
        qemu_img.progress,
        ending=Ending(source, target, tail, options.flush) if tail or options.flush else None,
    )


def _image(end: Endpoint, size: int | None) -> str:
    if end.kind == "nbd":
        return qemu_img.nbd_image(end.address, size=size)
    return qemu_img.file_image(path_of(end), size=size)


async def _lacks_room(target: Endpoint, length: int) -> bool:
    if target.kind == "nbd":
        return (await export_info(target.address)).size < length
    return not path_of(target).is_block_device()  # a file is made as long as the source


def _make_empty(target: Endpoint, size: int) -> bool:
    """Make the target file, ``size`` bytes long; return whether it now reads as zeroes."""
    path = path_of(target)
    if path.is_block_device():
        return False
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.ftruncate(fd, 0)
            os.ftruncate(fd, size)
        finally:
            os.close(fd)
    except OSError as error:
        raise TargetError(f"can't write ‘{target}’: {error.strerror}") from error
    return True


@dataclass(frozen=True, slots=True)
class Ending:
    """What qemu-img leaves to be done: the end of a disk of odd size, and a flush that can fail.

    It exits with 0 where the server refused its flush (tried with 7.2). ``tail`` is (offset,
    length), less than a sector.
    """

    source: Endpoint
    target: Endpoint
    tail: tuple[int, int] | None
    flush: bool

    async def finish(self) -> None:
        """Do it.

        Raises:
            CopyError: it could not be done.
        """
        offset = None
        try:
            content = b""
            if self.tail is not None:
                offset, length = self.tail
                async with _opened(self.source, os.O_RDONLY) as (source, _):
                    content = await _in_thread(source.read_now, length, offset)
            async with _opened(self.target, os.O_RDWR) as (target, can_flush):
                if content:
                    await _in_thread(target.write_now, memoryview(content), offset)
                if self.flush and can_flush:
                    offset = None
                    await _in_thread(target.flush_now)
        except (V2VError, OSError, TimeoutError) as error:
            reason = error.message if isinstance(error, V2VError) else str(error) or "no answer"
            what = "flush" if offset is None else "copy the last bytes to"
            raise CopyError(
                f"qemu-img is done, but we can't {what} ‘{self.target}’: {reason}", offset=offset
            ) from error


class _Opened(Protocol):
    """What the end of a copy needs of a side."""

    def read_now(self, length: int, offset: int) -> bytearray: ...

    def write_now(self, view: memoryview, offset: int) -> None: ...

    def flush_now(self) -> None: ...


@asynccontextmanager
async def _opened(end: Endpoint, flags: int) -> AsyncIterator[tuple[_Opened, bool]]:
    """Have a side open; also tells whether it can flush."""
    if end.kind == "nbd":
        async with connected(end.address, contexts=[]) as connection:
            yield connection.handle, connection.info.can_flush
        return
    file = FileEnd(os.open(path_of(end), flags | os.O_CLOEXEC), str(end))
    try:
        yield file, True
    finally:
        file.close()


async def _in_thread(call: Callable[..., Any], *arguments: Any) -> Any:
    # A server that hangs must not hold a cancelled run.
    return await anyio.to_thread.run_sync(call, *arguments, abandon_on_cancel=True)


def path_of(file: Endpoint) -> Path:
    """Return the path of a file, by which programs that we start find it too."""
    # Open already: our own descriptor, by a name that is good as long as we live.
    return Path(file.address) if file.fd is None else Path(f"/proc/{os.getpid()}/fd/{file.fd}")


async def size_of(source: Endpoint) -> int | None:
    """Return the size in bytes, None where only the copy will tell.

    Raises:
        SourceError: the file can't be read.
        ConnectError: the export can't be reached.
    """
    if source.kind == "nbd":
        return (await export_info(source.address)).size
    if source.kind == "file":
        try:
            with path_of(source).open("rb") as file:
                return file.seek(0, os.SEEK_END)
        except OSError as error:
            raise SourceError(f"can't read ‘{source}’: {error.strerror}") from error
    return None


def length_of_file(target: Endpoint) -> int | None:
    """Return how long the target is after the copy, where it is a regular file."""
    path = path_of(target) if target.kind == "file" else None
    return path.stat().st_size if path is not None and path.is_file() else None
