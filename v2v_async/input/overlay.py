"""Overlays: what keeps the source from being written.

::

    virt-v2v-in-place ── writes ──> overlay ── reads ──> source disk

Two kinds, behind one small interface:

``cow``    nbdkit's cow filter. Nothing to prepare; the overlay is an unlinked file that goes with
           its server. For raw disks.
``qcow2``  a qcow2 file in the v2v directory, served by qemu-nbd. It outlives its server, and its
           ``qemu:allocation-depth`` tells what conversion changed. For every format. What only an
           nbdkit plugin can read is served to it by an nbdkit of its own, ``inINDEX.base``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

from v2v_async import nbdkit, qemu_img, qemu_nbd
from v2v_async.errors import UsageError, V2VError
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
from v2v_async.options import InputOptions
from v2v_async.process import ServerCommand
from v2v_async.redact import redact
from v2v_async.server import Server, Servers
from v2v_async.v2vdir import V2VDir

OverlayKind = Literal["cow", "qcow2"]

OVERLAY_HELP = (
    "cow or qcow2: what keeps the source from being written (default: cow for raw disks and NBD, "
    "qcow2 for other formats)"
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
    """nbdkit's cow filter."""

    async def start(
        self, source: DiskSource, index: int, v2vdir: V2VDir, servers: Servers
    ) -> Server:
        """See :class:`Overlay`."""
        features = await nbdkit.probe()
        command = source_command(
            features,
            source.image,
            v2vdir.source_socket(index),
            scratch=v2vdir.path,
            keep_while=v2vdir.converting_mark,
        )
        return await servers.start(f"in{index}", command, log=v2vdir.log("input", index))


class Qcow2Overlay:
    """A qcow2 file over the source."""

    async def start(
        self, source: DiskSource, index: int, v2vdir: V2VDir, servers: Servers
    ) -> Server:
        """See :class:`Overlay`."""
        log = v2vdir.log("input", index)
        base: Path | None = None
        size = source.size
        if isinstance(source.image, PluginImage):
            base = v2vdir.path / f"in{index}.base"
            features = await nbdkit.probe()
            command = source_command(features, source.image, base)
            await servers.start(f"in{index}.base", command, log=log)
        overlay = v2vdir.path / f"overlay-{index}.qcow2"
        await qemu_img.create_qcow2(
            overlay, size or None, backing=(backing_name(source, base), source.format)
        )
        command = qemu_nbd.serve_overlay(overlay, v2vdir.source_socket(index))
        return await servers.start(f"in{index}", command, log=log)


def source_command(
    features: nbdkit.Features,
    image: Image,
    socket: Path,
    *,
    scratch: Path | None = None,
    keep_while: Path | None = None,
) -> ServerCommand:
    """Return the nbdkit that serves a raw disk: under a cow filter in ``scratch``, or read-only.

    While the file ``keep_while`` is there, the overlay keeps what is read from a remote disk:
    conversion reads the same blocks again and again. At 20 ms a request it took 69 s so, and 231 s
    otherwise.

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
        if isinstance(image, PluginImage) and features.version >= _COW_OPTIONS:
            parameters.append(f"cow-block-size={REMOTE_COW_BLOCK_SIZE}")
            if keep_while is not None:
                parameters.append(f"cow-on-read={keep_while}")
    return nbdkit.serve(
        features,
        socket,
        plugin,
        parameters,
        filters=filters,
        read_only=scratch is None,
        environment=environment,
    )


def choose(wanted: OverlayKind | None, source: DiskSource) -> Overlay:
    """Return the overlay for a disk: the wanted kind, else the plain one that can serve it.

    Raises:
        UsageError: the wanted kind can't serve it.
    """
    is_raw = source.format == "raw"
    if wanted == "cow" and not is_raw:
        raise UsageError(
            f"‘-io overlay=cow’ can't serve ‘{source.image.shown}’, which is {source.format}",
            hint="leave the option out, or use overlay=qcow2",
        )
    image = source.image
    if wanted == "qcow2" and is_raw and isinstance(image, FileImage) and (image.length or 0) % 512:
        raise UsageError(
            f"‘-io overlay=qcow2’ can't serve ‘{source.image.shown}’: qemu reads parts of a file "
            "only in multiples of 512 bytes",
            hint="leave the option out, or use overlay=cow",
        )
    is_tls = isinstance(source.image, NbdImage) and source.image.uri.startswith("nbds")
    if wanted == "qcow2" and is_tls:
        raise UsageError(
            "‘-io overlay=qcow2’ can't be used with TLS (nbds://)", hint="use overlay=cow"
        )
    return CowOverlay() if is_raw and wanted != "qcow2" else Qcow2Overlay()


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
            if value not in ("cow", "qcow2"):
                raise UsageError(
                    f"{what}: ‘-io {shown}’ is not known",
                    hint="write overlay=cow or overlay=qcow2",
                )
            wanted = "cow" if value == "cow" else "qcow2"
    return wanted


async def serve_overlays(
    disks: list[DiskSource], wanted: OverlayKind | None, v2vdir: V2VDir, servers: Servers
) -> list[int]:
    """Serve an overlay on each disk, ``in1`` first; return their sizes in bytes.

    Raises:
        V2VError: all that is wrong with any of them.
    """
    sizes: list[int] = []
    problems: list[tuple[int, V2VError]] = []
    for index, disk in enumerate(disks, 1):
        try:
            server = await choose(wanted, disk).start(disk, index, v2vdir, servers)
        except V2VError as error:
            problems.append((index, error))
            continue
        assert server.info is not None
        sizes.append(server.info.size)
    raise_problems(problems)
    return sizes
