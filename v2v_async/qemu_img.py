"""qemu-img: make an image, and say what one is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from v2v_async import process
from v2v_async.errors import V2VError

_INFO_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What ``qemu-img info`` says. Sizes are bytes; ``allocated`` is what it takes of the disk."""

    format: str
    virtual_size: int
    allocated: int | None
    backing_file: str | None
    is_encrypted: bool


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
    return ImageInfo(
        format=str(said["format"]),
        virtual_size=int(said["virtual-size"]),
        allocated=None if allocated is None else int(allocated),
        backing_file=said.get("full-backing-filename") or said.get("backing-filename"),
        is_encrypted=bool(said.get("encrypted", False)),
    )


async def create_qcow2(
    path: Path,
    size: int,
    *,
    preallocation: Literal["off", "metadata", "falloc", "full"] = "off",
    backing: tuple[str, str] | None = None,
) -> None:
    """Make a qcow2 image of ``size`` bytes at ``path``, which must not exist.

    ``preallocation`` is qemu-img's: ``falloc`` reserves every cluster without writing it, ``full``
    writes zeroes. ``backing`` is (file, format).

    Raises:
        ImageError: it can't be made; what there is of it stays, for whoever noted it.
        DependencyError: qemu-img is not installed.
    """
    # lazy_refcounts off and compat 1.1 are the defaults of every qemu that this can meet.
    argv = ["qemu-img", "create", "-q", "-f", "qcow2"]
    if preallocation != "off":
        argv += ["-o", f"preallocation={preallocation}"]
    if backing is not None:
        argv += ["-b", backing[0], "-F", backing[1]]
    await _run([*argv, "--", _literal(path), str(size)], path, timeout_s=None)


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
        return f"file:{path.absolute()}"
    return path
