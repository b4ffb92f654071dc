"""Overlays: what keeps the source from being written.

::

    virt-v2v-in-place ── writes ──> overlay ── reads ──> source disk

Behind one small interface:

``cow``    nbdkit's cow filter. Nothing to prepare; the overlay is an unlinked file that goes with
           its server. For raw disks. ``kept``: :func:`settle` saves what was written to it.
``qcow2``  a qcow2 file in the v2v directory, served by qemu-nbd. It outlives its server, and its
           ``qemu:allocation-depth`` tells what conversion changed. For every format. What only an
           nbdkit plugin can read is served to it by an nbdkit of its own, ``inINDEX.base``.

An overlay that was settled is served again, with what the conversion made of it, when a later
process sets up the same source in the same v2v directory (``input/kept.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal, Protocol, get_args

from v2v_async import nbdkit, qemu_img, qemu_nbd
from v2v_async.connection import connected
from v2v_async.errors import ServerStartError, SourceError, UsageError, V2VError
from v2v_async.input import kept
from v2v_async.input.checking import raise_problems
from v2v_async.input.image import (
    NEVER,
    RETRY,
    DiskSource,
    FileImage,
    Image,
    NbdImage,
    PluginImage,
    backing_name,
)
from v2v_async.input.kept import discard as discard
from v2v_async.input.kept import is_kept as is_kept
from v2v_async.input.kept import settle as settle
from v2v_async.options import InputOptions
from v2v_async.process import ServerCommand
from v2v_async.redact import redact
from v2v_async.server import Server, Servers
from v2v_async.v2vdir import V2VDir

OverlayKind = Literal["cow", "kept", "qcow2"]

OVERLAY_HELP = (
    "cow, kept or qcow2: what keeps the source from being written (default: cow for raw disks and "
    "NBD, qcow2 for other formats); kept: as cow, but a later run can go on from the conversion"
)
"""What ``-io ?`` says of ``overlay``."""

REMOTE_COW_BLOCK_SIZE = 4096
"""A write that does not fill a block of the overlay reads the rest of it from the source first:
cheap from a local file (64 KiB, the default), a round trip for each from a remote one."""
# Of nbdkit: the oldest that was seen to have both options of its cow filter.
_COW_OPTIONS = (1, 32, 0)


class Overlay(Protocol):
    """Makes an overlay and serves it."""

    async def start(
        self, source: DiskSource, index: int, v2vdir: V2VDir, servers: Servers
    ) -> Server:
        """Start the server that exports an overlay on ``source`` as ``inINDEX``."""
        ...


class CowOverlay:
    """nbdkit's cow filter. ``is_kept``: its requests are noted, so that it can be settled."""

    def __init__(self, *, is_kept: bool = False) -> None:
        self.is_kept = is_kept

    async def start(
        self, source: DiskSource, index: int, v2vdir: V2VDir, servers: Servers
    ) -> Server:
        """See :class:`Overlay`."""
        record = kept.settled(v2vdir, index, "cow", source) if self.is_kept else None
        if record is None:
            kept.discard(v2vdir, index)
        is_noted = self.is_kept and record is None
        features = await nbdkit.probe()
        command = source_command(
            features,
            source.image,
            v2vdir.source_socket(index),
            scratch=v2vdir.path,
            keep_while=v2vdir.converting_mark,
            noted_in=kept.log_path(v2vdir, index) if is_noted else None,
        )
        server = await servers.start(f"in{index}", command, log=v2vdir.log("input", index))
        assert server.info is not None
        if record is not None:
            kept.check_size(v2vdir, index, record, server.info.size)
            await kept.restore(v2vdir, index, record)
        elif self.is_kept:
            kept.begin(v2vdir, index, "cow", source, server.info.size)
        return server


class Qcow2Overlay:
    """A qcow2 file over the source."""

    async def start(
        self, source: DiskSource, index: int, v2vdir: V2VDir, servers: Servers
    ) -> Server:
        """See :class:`Overlay`."""
        log = v2vdir.log("input", index)
        record = kept.settled(v2vdir, index, "qcow2", source)
        if record is None:
            kept.discard(v2vdir, index)
        base: Path | None = None
        if isinstance(source.image, PluginImage):
            base = v2vdir.path / f"in{index}.base"
            features = await nbdkit.probe()
            command = source_command(
                features,
                source.image,
                base,
                scratch=v2vdir.path,
                keep_while=v2vdir.converting_mark,
                is_read_only=True,
            )
            await servers.start(f"in{index}.base", command, log=log)
        overlay = kept.qcow2_path(v2vdir, index)
        backing = (backing_name(source, base), source.format)
        if record is None:
            await qemu_img.create_qcow2(overlay, source.size or None, backing=backing)
        else:
            await _check_qcow2(overlay, backing, v2vdir)
        command = qemu_nbd.serve_overlay(overlay, v2vdir.source_socket(index))
        server = await servers.start(f"in{index}", command, log=log)
        assert server.info is not None
        if record is not None:
            kept.check_size(v2vdir, index, record, server.info.size)
        else:
            kept.begin(v2vdir, index, "qcow2", source, server.info.size)
        return server


async def _check_qcow2(overlay: Path, backing: tuple[str, str], v2vdir: V2VDir) -> None:
    """See that an overlay lies over what it would be made over, and is whole.

    Raises:
        SourceError
    """
    try:
        found = await qemu_img.info(overlay, format_="qcow2")
        if (found.backing_name, found.backing_format) != backing:
            raise SourceError(
                f"‘{overlay}’ lies over ‘{found.backing_name}’ ({found.backing_format}), and not "
                f"over ‘{backing[0]}’ ({backing[1]})",
                hint=f"convert it again: remove ‘{v2vdir.path}’",
            )
        await qemu_img.repair(overlay)
    except qemu_img.ImageError as error:
        raise SourceError(
            f"what the conversion wrote can't be used: {error.message}",
            hint=f"convert it again: remove ‘{v2vdir.path}’",
        ) from error


def source_command(
    features: nbdkit.Features,
    image: Image,
    socket: Path,
    *,
    scratch: Path | None = None,
    keep_while: Path | None = None,
    noted_in: Path | None = None,
    is_read_only: bool = False,
) -> ServerCommand:
    """Return the nbdkit that serves a raw disk: under a cow filter in ``scratch``, or read-only.

    While the file ``keep_while`` is there, the overlay keeps what is read from a remote disk:
    conversion reads the same blocks again and again. At 20 ms a request it took 69 s so, and 231 s
    otherwise. ``is_read_only``: only that is what it is for. (nbdkit's cache filter reads one block
    at a time, however many clients there are.)

    ``noted_in``: a file that will tell each request.

    The file plugin opens read-write only where a connection may write, and behind the cow filter
    none may (nbdkit-cow-filter(1)). The overlay is an unlinked file in ``$TMPDIR``.
    """
    filters: tuple[str, ...] = ()
    retry = NEVER
    if isinstance(image, FileImage):
        plugin, filters = "file", ("offset",) if image.is_part else ()
        parameters = [f"file={image.path.absolute()}"]
        if image.is_part:
            parameters += [f"offset={image.offset}", f"range={image.length}"]
    elif isinstance(image, NbdImage):
        # The plugin keeps a connection that was lost, and answers EINVAL from then on; the filter
        # opens another.
        plugin, retry = "nbd", RETRY
        parameters = nbdkit.uri_parameters(image.uri)
    else:
        plugin, filters, retry = image.plugin, image.filters, image.retry
        parameters = list(image.parameters)
    there = [name for name in retry if features.has_filter(name)]
    filters = (*filters, *there)
    parameters += [word for name in there for word in retry[name]]
    environment = dict(image.environment) if isinstance(image, PluginImage) else {}
    if scratch is not None:
        filters = ("cow", *filters)
        environment["TMPDIR"] = str(scratch)
        if not isinstance(image, FileImage) and features.version >= _COW_OPTIONS:
            parameters.append(f"cow-block-size={REMOTE_COW_BLOCK_SIZE}")
            if keep_while is not None:
                parameters.append(f"cow-on-read={keep_while}")
    if noted_in is not None:
        filters = ("log", *filters)
        parameters.append(f"logfile={noted_in}")
    return nbdkit.serve(
        features,
        socket,
        plugin,
        parameters,
        filters=filters,
        read_only=scratch is None or is_read_only,
        environment=environment,
    )


async def _serve_plain(source: DiskSource, index: int, v2vdir: V2VDir, servers: Servers) -> None:
    """Serve a disk as it is, read-only, as ``plainINDEX``: nothing is faster."""
    socket = v2vdir.plain_socket(index)
    if source.format == "raw":
        command = source_command(await nbdkit.probe(), source.image, socket)
    else:
        is_served = isinstance(source.image, PluginImage)
        base = v2vdir.path / f"in{index}.base" if is_served else None
        command = qemu_nbd.serve_read_only(backing_name(source, base), source.format, socket)
    log = v2vdir.log("input", index)
    if not source.is_remote:
        await servers.start(f"plain{index}", command, log=log)
        return
    # Both at once, as they will be: a server that takes one client would let the copy wait for the
    # whole conversion.
    async with connected(str(v2vdir.source_socket(index))):
        try:
            await servers.start(f"plain{index}", command, log=log)
        except ServerStartError as error:
            error.hint = (
                f"‘{source.image.shown}’ is read twice, by the conversion and by the copy: does "
                "its server take one client only? Then leave --overlap out"
            )
            raise


def choose(wanted: OverlayKind | None, source: DiskSource) -> Overlay:
    """Return the overlay for a disk: the wanted kind, or the nearest that can serve it.

    What ``qcow2`` has that a raw disk's cow has not is that it is kept, and so it is then.

    Raises:
        UsageError: the wanted kind can't serve it.
    """
    is_raw = source.format == "raw"
    if wanted == "cow" and not is_raw:
        raise UsageError(
            f"‘-io overlay=cow’ can't serve ‘{source.image.shown}’, which is {source.format}",
            hint="leave the option out, or use overlay=qcow2",
        )
    if not is_raw or (wanted == "qcow2" and _is_qemus(source.image)):
        return Qcow2Overlay()
    return CowOverlay(is_kept=wanted in ("kept", "qcow2"))


def _is_qemus(image: Image) -> bool:
    """Whether qemu itself does well at reading a raw disk.

    Of what is remote it reads extents one by one, and the rest on a single connection: at 20 ms a
    request, copying 256 MiB with a hole in each took ten times as long as behind a cow filter. And
    to qemu every disk consists of whole sectors.
    """
    if not isinstance(image, FileImage):
        return False
    size = image.length
    with suppress(OSError):
        if size is None and image.path.is_file():
            size = image.path.stat().st_size
    return (size or 0) % qemu_img.SECTOR == 0


def overlay_option(
    what: str, known: Mapping[str, str], options: InputOptions
) -> OverlayKind | None:
    """Return ``-io overlay=…``; ``what`` is the input, ``known`` the ``-io`` options it takes.

    Raises:
        UsageError: an option is not known, or this one has no such value.
    """
    wanted: OverlayKind | None = None
    for key, value in options.options:
        shown = redact(key if value is None else f"{key}={value}")
        if key not in known:
            raise UsageError(
                f"{what} takes no -io {redact(key)}", hint=f"it takes {', '.join(known)}"
            )
        if key == "overlay":
            found = next((kind for kind in get_args(OverlayKind) if kind == value), None)
            if found is None:
                raise UsageError(
                    f"{what}: ‘-io {shown}’ is not known",
                    hint="write overlay=cow, overlay=kept or overlay=qcow2",
                )
            wanted = found
    return wanted


async def serve_overlays(
    disks: list[DiskSource], wanted: OverlayKind | None, v2vdir: V2VDir, servers: Servers
) -> list[int]:
    """Serve an overlay on each disk, ``in1`` first; return their sizes in bytes.

    Where the v2v directory says that they are copied early, these tell what is changed in them, and
    the disks are served as they are too, ``plain1`` first.

    Raises:
        V2VError: all that is wrong with any of them.
    """
    is_overlapped = v2vdir.state.is_overlapped
    if is_overlapped and wanted is None:
        wanted = "kept"
    sizes: list[int] = []
    problems: list[tuple[int, V2VError]] = []
    for index, disk in enumerate(disks, 1):
        try:
            server = await choose(wanted, disk).start(disk, index, v2vdir, servers)
            if is_overlapped:
                await _serve_plain(disk, index, v2vdir, servers)
        except V2VError as error:
            problems.append((index, error))
            continue
        assert server.info is not None
        sizes.append(server.info.size)
    raise_problems(problems)
    return sizes
