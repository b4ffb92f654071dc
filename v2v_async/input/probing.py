"""Looking at a disk that only an nbdkit plugin reads: it is served for a moment and asked."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from v2v_async import nbdkit, qemu_img
from v2v_async.errors import ServerStartError, SourceError, V2VError
from v2v_async.input.checking import FORMATS, CheckedDisk
from v2v_async.input.image import NEVER, DiskSource, PluginImage
from v2v_async.input.overlay import source_command
from v2v_async.redact import redact
from v2v_async.server import running_servers
from v2v_async.v2vdir import V2VDir


async def check_plugin(image: PluginImage, format_: str, *, hint: str | None = None) -> CheckedDisk:
    """Look at a disk that a plugin reads; ``hint`` says what to do where it can't be read.

    Nothing is tried again: whoever waits for an answer wants to know of a wrong name now.

    Raises:
        SourceError: it can't be used.
        DependencyError: the plugin or a filter is not installed.
    """
    shown = redact(image.shown)
    features = await nbdkit.probe()
    features.require(plugin=image.plugin, filters=image.filters)
    image_once = replace(image, retry=NEVER)
    v2vdir = V2VDir.create()
    try:
        async with running_servers(v2vdir) as servers:
            command = source_command(features, image_once, v2vdir.path / "probe")
            server = await servers.start("probe", command, log=v2vdir.log("input"))
            assert server.info is not None
            size = server.info.size
            if format_ != "raw":
                size = await _virtual_size(v2vdir.path / "probe", format_, shown)
    except ServerStartError as error:
        raise SourceError(
            f"the disk ‘{shown}’ can't be read: {_reason(error)}", hint=hint
        ) from error
    finally:
        shutil.rmtree(v2vdir.path, ignore_errors=True)
    if size == 0:
        raise SourceError(f"the disk ‘{shown}’ is empty (0 bytes)")
    return CheckedDisk(DiskSource(image, format_, size), shown)


async def _virtual_size(socket: Path, format_: str, shown: str) -> int:
    if format_ not in FORMATS:
        raise SourceError(
            f"the disk ‘{shown}’ has the format {format_}, which is not supported",
            hint=f"supported are: {', '.join(FORMATS)}",
        )
    served = {"driver": format_, "file": {"driver": "nbd", "path": str(socket)}}
    try:
        info = await qemu_img.info("json:" + json.dumps(served))
    except V2VError as error:
        reason = error.message.rpartition(": ")[2]
        raise SourceError(f"the disk ‘{shown}’ can't be read as {format_}: {reason}") from error
    return info.virtual_size


def _reason(error: ServerStartError) -> str:
    """Return the plugin's own words where it has any: ``nbdkit: curl[1]: error: WORDS``."""
    for line in reversed(error.stderr_tail.splitlines()):
        if " error: " in line:
            return line.partition(" error: ")[2]
    return error.message
