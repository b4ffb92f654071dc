"""Looking at source disks before the slow part; every problem is told, not only the first."""

from __future__ import annotations

import stat
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from v2v_async import qemu_img
from v2v_async.connection import export_info
from v2v_async.errors import NbdError, SourceError, UsageError, V2VError
from v2v_async.input.image import DiskSource, FileImage, NbdImage
from v2v_async.model import Controller, SourceDisk, SourceGuest
from v2v_async.options import InputOptions
from v2v_async.redact import redact

FORMATS = ("raw", "qcow2", "vmdk", "vpc", "vhdx", "vdi", "qed", "parallels", "luks")
FORMAT_ALIASES = {"vhd": "vpc"}

# Chains are short; this only ends one that goes round.
_LONGEST_CHAIN = 200


def image_format(options: InputOptions) -> str | None:
    """Return what ``-if`` says as qemu names it; None where it was not given.

    Raises:
        UsageError: nothing here reads such images.
    """
    if options.format is None:
        return None
    found = FORMAT_ALIASES.get(options.format, options.format)
    if found not in FORMATS:
        raise UsageError(
            f"unknown format ‘-if {options.format}’",
            hint=f"the formats are: {', '.join([*FORMATS, *FORMAT_ALIASES])}",
        )
    return found


@dataclass(frozen=True, slots=True)
class CheckedDisk:
    """A disk that was looked at. ``files``: the local files its content is read from."""

    source: DiskSource
    shown: str
    allocated: int | None = None
    files: tuple[str, ...] = ()

    def described(self, index: int, controller: Controller | None = None) -> SourceDisk:
        """Return it as ``metadata.in`` has it; ``index`` is 1-based."""
        return SourceDisk(
            index=index,
            source=self.shown,
            format=self.source.format,
            size=self.source.size,
            allocated=self.allocated,
            files=list(self.files),
            controller=controller,
        )


def with_disks(
    guest: SourceGuest, checked: Sequence[CheckedDisk], controllers: Sequence[Controller | None]
) -> SourceGuest:
    """Return the guest with its disks; ``controllers``: what each of them is on."""
    pairs = enumerate(zip(checked, controllers, strict=True), 1)
    disks = [disk.described(index, controller) for index, (disk, controller) in pairs]
    return guest.model_copy(update={"disks": disks})


def with_sizes(guest: SourceGuest, sizes: Sequence[int]) -> SourceGuest:
    """Return the guest with the sizes (bytes) that the servers of its disks told."""
    disks = [
        disk.model_copy(update={"size": size})
        for disk, size in zip(guest.disks, sizes, strict=True)
    ]
    return guest.model_copy(update={"disks": disks})


async def check_each(
    checks: Sequence[Callable[[], Awaitable[CheckedDisk]]],
    *,
    fatal: tuple[type[V2VError], ...] = (),
) -> list[CheckedDisk]:
    """Look at every disk; a ``fatal`` error, which all the others would meet as well, ends it.

    Raises:
        V2VError: the only problem, with the number of its disk.
        SourceError: all problems, where there are several.
    """
    checked: list[CheckedDisk] = []
    problems: list[tuple[int, V2VError]] = []
    for index, check in enumerate(checks, 1):
        try:
            checked.append(await check())
        except fatal:
            raise
        except V2VError as error:
            problems.append((index, error))
    raise_problems(problems)
    return checked


def raise_problems(problems: Sequence[tuple[int, V2VError]]) -> None:
    """Raise what is wrong with disks (counted from 1): the only error, or one made of all."""
    if not problems:
        return
    for index, problem in problems:
        problem.locate(disk=index)
    if len(problems) == 1:
        raise problems[0][1]
    told = "; ".join(f"disk {index}: {problem.message}" for index, problem in problems)
    hints = dict.fromkeys(problem.hint for _, problem in problems if problem.hint)
    raise SourceError(
        f"{len(problems)} disks can't be used: {told}", hint="; ".join(hints) if hints else None
    )


async def check_file(path: Path, format_: str | None) -> CheckedDisk:
    """Look at a file or block device; ``format_`` None: qemu-img finds it out.

    Raises:
        SourceError: it can't be used; the message names it.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise SourceError(
            f"‘{path}’: the name is not UTF-8, and qemu takes no other",
            hint="rename the file, or make a link with another name",
        ) from error
    try:
        status = path.stat()
        mode = status.st_mode
        if stat.S_ISDIR(mode):
            raise SourceError(f"‘{path}’ is a directory, not a disk image")
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise SourceError(f"‘{path}’ is neither a file nor a block device")
        with path.open("rb"):
            pass
    except OSError as error:
        raise SourceError(
            f"the disk ‘{path}’ can't be read: {error.strerror}",
            hint="check the name" if isinstance(error, FileNotFoundError) else "check its mode",
        ) from error
    if stat.S_ISREG(mode) and status.st_size == 0:
        raise SourceError(f"the disk ‘{path}’ is empty (0 bytes)")
    try:
        info = await qemu_img.info(path, format_=format_)
    except V2VError as error:
        raise SourceError(
            f"the disk ‘{path}’ can't be read{f' as {format_}' if format_ else ''}: "
            f"{error.message}",
            hint="give its format with -if" if format_ is None else "check -if",
        ) from error
    if info.virtual_size == 0:
        raise SourceError(f"the disk ‘{path}’ is empty (0 bytes)")
    if info.format not in FORMATS:
        raise SourceError(
            f"the disk ‘{path}’ has the format {info.format}, which is not supported",
            hint=f"supported are: {', '.join(FORMATS)}",
        )
    absolute = path.absolute()
    backing, beneath = await _backing_files(info)
    allocated = info.allocated
    if allocated is not None:
        allocated = min(allocated + beneath, info.virtual_size) if backing else allocated
    return CheckedDisk(
        DiskSource(FileImage(absolute), info.format, info.virtual_size),
        redact(str(path)),
        allocated,
        (str(absolute), *backing),
    )


async def _backing_files(info: qemu_img.ImageInfo) -> tuple[tuple[str, ...], int]:
    """Return the chain under an image, as far as it is made of files that can be looked at.

    And how many bytes these take.
    """
    found: list[str] = []
    allocated = 0
    while info.backing_file is not None and len(found) < _LONGEST_CHAIN:
        found.append(info.backing_file)
        try:
            info = await qemu_img.info(Path(info.backing_file))
        except V2VError:
            break  # the server will say it better when it opens the image
        allocated += info.allocated or 0
    return tuple(found), allocated


async def check_uri(uri: str) -> CheckedDisk:
    """Look at an NBD export.

    Raises:
        SourceError: it can't be used; the message names it.
    """
    shown = redact(uri)
    try:
        info = await export_info(uri)
    except NbdError as error:
        raise SourceError(
            error.message, hint="is the server running, and the URI right?"
        ) from error
    except TimeoutError as error:
        raise SourceError(f"‘{shown}’ does not answer") from error
    if info.size == 0:
        raise SourceError(f"the export ‘{shown}’ is empty (0 bytes)")
    return CheckedDisk(DiskSource(NbdImage(uri), "raw", info.size), shown)
