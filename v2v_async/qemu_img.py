"""qemu-img: make an image, say what one is, and copy one to another."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

from v2v_async import process
from v2v_async.errors import DependencyError, UsageError, V2VError
from v2v_async.needs import Version, parse_version
from v2v_async.options import CopyOptions

HINT = "install it: apt-get install qemu-utils, or dnf install qemu-img"
SECTOR = 512
"""qemu counts disks in these: of one that is no multiple, it takes the last to be whole."""

_INFO_TIMEOUT_S = 60.0
_NBD_PORT = 10809
# The releases that brought them; qemu-img(1) of each.
_SINCE = {"--target-is-zero": (5, 0), "-r": (6, 0)}
_PROGRESS = re.compile(r"\((\d{1,3})\.(\d\d)/100%\)")


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What ``qemu-img info`` says. Sizes are bytes; ``allocated`` is what it takes of the disk.

    ``content_files``: where its content lies, as far as the format tells: VMDK extents (of which
    the image itself may be one), a qcow2's external data file. ``backing_name`` and
    ``backing_format`` are as the image itself has them.
    """

    format: str
    virtual_size: int
    allocated: int | None
    backing_file: str | None
    is_encrypted: bool
    content_files: tuple[str, ...] = ()
    backing_name: str | None = None
    backing_format: str | None = None


class ImageError(V2VError):
    """qemu-img failed on ``path``; the caller knows whether that is a source or a target."""

    def __init__(self, message: str, *, path: str, **where: object) -> None:
        super().__init__(message, **where)  # type: ignore[arg-type]
        self.path = path


async def info(
    path: str | Path, *, format_: str | None = None, is_shared: bool = True
) -> ImageInfo:
    """Return what ``path`` (a file, a device, or what else qemu can open) is.

    Without ``format_`` the content decides: only for images whose content can be trusted, since
    what says that it is qcow2 may name any backing file. The backing file is not opened.
    ``is_shared``: an image that is in use elsewhere may be looked at.

    Raises:
        ImageError: it can't be opened or understood.
        DependencyError: qemu-img is not installed.
    """
    argv = ["qemu-img", "info", "--output=json"]
    if is_shared:
        argv.append("--force-share")
    if format_ is not None:
        argv += ["-f", format_]
    completed = await _run([*argv, "--", _literal(path)], path, timeout_s=_INFO_TIMEOUT_S)
    try:
        return parse_info(json.loads(completed.stdout))
    except (ValueError, KeyError, TypeError) as error:
        raise ImageError(
            f"‘qemu-img info’ of ‘{path}’ said something that is not understood: {error!r}",
            path=str(path),
        ) from error


def parse_info(said: Mapping[str, Any]) -> ImageInfo:
    """Read the JSON of ``qemu-img info``.

    Raises:
        KeyError, TypeError, ValueError: something that is always there is missing.
    """
    allocated = said.get("actual-size")
    specific = said.get("format-specific", {}).get("data", {})
    content = [extent.get("filename") for extent in specific.get("extents", [])]
    content.append(specific.get("data-file"))
    return ImageInfo(
        format=str(said["format"]),
        virtual_size=int(said["virtual-size"]),
        allocated=None if allocated is None else int(allocated),
        backing_file=said.get("full-backing-filename") or said.get("backing-filename"),
        is_encrypted=bool(said.get("encrypted", False)),
        content_files=tuple(str(name) for name in content if name),
        backing_name=said.get("backing-filename"),
        backing_format=said.get("backing-filename-format"),
    )


async def create_qcow2(
    path: Path,
    size: int | None,
    *,
    preallocation: Literal["off", "metadata", "falloc", "full"] = "off",
    backing: tuple[str, str] | None = None,
    compat: Literal["0.10", "1.1"] = "1.1",
) -> None:
    """Make a qcow2 image of ``size`` bytes (None: as its backing file) at ``path``, a new file.

    ``preallocation`` is qemu-img's: ``falloc`` reserves every cluster without writing it, ``full``
    writes zeroes. ``backing`` is (file, format). ``compat``: qemu before 1.1 reads only 0.10.

    Raises:
        ImageError: it can't be made; what there is of it stays, for whoever noted it.
        DependencyError: qemu-img is not installed.
    """
    # lazy_refcounts off and compat 1.1 are the defaults of every qemu that this can meet.
    argv = ["qemu-img", "create", "-q", "-f", "qcow2"]
    if compat != "1.1":
        argv += ["-o", f"compat={compat}"]
    if preallocation != "off":
        argv += ["-o", f"preallocation={preallocation}"]
    if backing is not None:
        argv += ["-b", backing[0], "-F", backing[1]]
    await _run(
        [*argv, "--", _literal(path), *([] if size is None else [str(size)])], path, timeout_s=None
    )


async def repair(path: Path) -> None:
    """Make a qcow2 image whole whose server was killed: clusters that nothing refers to are freed.

    What was flushed is in it, whatever else was on its way (qcow2 orders its writes so).

    Raises:
        ImageError: it is damaged beyond that.
        DependencyError: qemu-img is not installed.
    """
    argv = ["qemu-img", "check", "-q", "-f", "qcow2", "-r", "leaks", "--", _literal(path)]
    await _run(argv, path, timeout_s=None)


async def bitmaps(path: Path) -> dict[str, bool]:
    """Return the persistent bitmaps of a qcow2 image that nobody has open, and which are whole.

    One whose qemu was killed is not: nobody knows what it has missed.

    Raises:
        ImageError: it can't be opened.
        DependencyError: qemu-img is not installed.
    """
    argv = ["qemu-img", "info", "--output=json", "-f", "qcow2", "--", _literal(path)]
    completed = await _run(argv, path, timeout_s=_INFO_TIMEOUT_S)
    specific = json.loads(completed.stdout).get("format-specific", {}).get("data", {})
    told = specific.get("bitmaps", [])
    return {str(each["name"]): "in-use" not in each.get("flags", []) for each in told}


async def remove_bitmap(path: Path, bitmap: str) -> None:
    """Remove a persistent bitmap from a qcow2 image that nobody has open.

    Raises:
        ImageError: it can't be.
        DependencyError: qemu-img is not installed.
    """
    argv = ["qemu-img", "bitmap", "--remove", "-f", "qcow2", "--", _literal(path), bitmap]
    await _run(argv, path, timeout_s=_INFO_TIMEOUT_S)


def is_locked(error: ImageError) -> bool:
    """Whether an image could not be opened since another process has it open."""
    # The last of two lines; the first says which lock.
    return "Is another process using the image" in error.message


async def version() -> tuple[str, Version]:
    """Return the program's path and version.

    Raises:
        DependencyError: there is none, or it does not answer.
    """
    path = shutil.which("qemu-img")
    if path is None:
        raise DependencyError("qemu-img is not installed or not in the PATH", hint=HINT)
    try:
        completed = await process.run([path, "--version"], timeout_s=_INFO_TIMEOUT_S)
    except TimeoutError:
        raise DependencyError(f"‘{path} --version’ does not answer", hint=HINT) from None
    if completed.status != 0:
        raise DependencyError(f"‘{path} --version’ failed: {completed.stderr.strip()}", hint=HINT)
    return path, parse_version(completed.stdout)


def convert_command(
    program: str,
    found: Version,
    options: CopyOptions,
    source: str,
    target: str,
    *,
    is_known_zero: bool,
) -> list[str]:
    """Return the command line that copies raw ``source`` over raw ``target``, which exists.

    Both are image options, as :func:`nbd_image` and :func:`file_image` make them.
    ``is_known_zero``: we know that the target reads as zeroes; a program that can't use that copies
    all the same.

    Raises:
        UsageError: this version has not an option that was asked for.
    """
    words = ["-n", "-p", "--image-opts", "--target-image-opts"]
    # Its default for convert, ‘unsafe’, leaves the flush out.
    words += ["-t", "writeback" if options.flush else "unsafe"]
    if options.synchronous:
        words += ["-m", "1"]
    else:
        words += ["-W", *(["-m", str(options.requests)] if options.requests else [])]
    if options.allocated:
        words += ["-S", "0"]
    elif options.sparse is not None:
        words += ["-S", str(options.sparse)]
    if options.bandwidth is not None:
        words += ["-r", str(options.bandwidth)]
    if options.target_is_zero:
        words.append("--target-is-zero")
    for word in words:
        if found < _SINCE.get(word, ()):
            raise UsageError(
                f"qemu-img {'.'.join(map(str, found))} (‘{program}’) has no {word} for convert",
                hint="leave the option out, install a newer qemu-img, or use --copier native",
            )
    is_useful = is_known_zero and not options.allocated and not options.target_is_zero
    if is_useful and found >= _SINCE["--target-is-zero"]:
        words.append("--target-is-zero")
    return [program, "convert", *words, source, target]


def nbd_image(address: str, *, size: int | None = None) -> str:
    """Return the image options for the raw content of an NBD export (a socket path or a URI).

    ``size`` is how many bytes of it there are to qemu, a multiple of 512 (default: all).

    Raises:
        UsageError: qemu can't reach it this way.
    """
    if address.startswith("/"):
        return _raw(size, driver="nbd", **{"server.type": "unix", "server.path": address})
    try:
        parts = urlsplit(address)
        host, port = parts.hostname or "localhost", parts.port or _NBD_PORT
        # A plus is a plus in an NBD URI, as elsewhere outside web forms.
        asked = parse_qs(parts.query.replace("+", "%2B"), keep_blank_values=True)
    except ValueError as error:
        raise UsageError(f"‘{address}’ is not an NBD URI: {error}") from None
    if parts.scheme == "nbd+unix" and set(asked) == {"socket"}:
        server = {"server.type": "unix", "server.path": asked["socket"][0]}
    elif parts.scheme == "nbd" and not asked:
        server = {"server.type": "inet", "server.host": unquote(host), "server.port": str(port)}
    else:
        raise UsageError(
            f"qemu-img can't copy from or to ‘{address}’",
            hint="it takes nbd://HOST:PORT/NAME and nbd+unix:///NAME?socket=PATH, without TLS; "
            "use --copier native or nbdcopy for others",
        )
    return _raw(size, driver="nbd", **server, export=unquote(parts.path.removeprefix("/")))


def file_image(path: Path, *, size: int | None = None) -> str:
    """Return the image options for the raw content of a file or block device (see above)."""
    driver = "host_device" if path.is_block_device() else "file"
    return _raw(size, driver=driver, filename=str(path.absolute()))


def _raw(size: int | None, **behind: str) -> str:
    # In qemu's option syntax a comma in a value is doubled.
    words = [f"file.{name}={value.replace(',', ',,')}" for name, value in behind.items()]
    return ",".join(["driver=raw", *([] if size is None else [f"size={size}"]), *words])


def progress(line: str) -> int | None:
    """Return how far it is, in hundredths of a per cent; None where ``line`` is something else."""
    match = _PROGRESS.fullmatch(line.strip())
    return None if match is None else int(match[1]) * 100 + int(match[2])


async def _run(argv: list[str], path: str | Path, *, timeout_s: float | None) -> process.Completed:
    try:
        completed = await process.run(argv, environment={"LC_ALL": "C.UTF-8"}, timeout_s=timeout_s)
    except TimeoutError as error:
        raise ImageError(
            f"‘qemu-img {argv[1]}’ of ‘{path}’ did not answer within {timeout_s} s",
            path=str(path),
        ) from error
    if completed.status != 0:
        last = completed.stderr.strip().splitlines()[-1:] or [
            process.describe_status(completed.status)
        ]
        reason = last[0].removeprefix("qemu-img: ")
        raise ImageError(f"‘qemu-img {argv[1]}’ of ‘{path}’ failed: {reason}", path=str(path))
    return completed


def _literal(path: str | Path) -> str:
    """Keep qemu from taking the name of a local file for a protocol (``a:b``) or options."""
    if isinstance(path, Path):
        return f"{'host_device' if path.is_block_device() else 'file'}:{path.absolute()}"
    return path
