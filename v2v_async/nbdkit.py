"""nbdkit: what this one can do, and the command lines that serve a disk."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import unquote

from v2v_async import process
from v2v_async.errors import DependencyError
from v2v_async.process import ServerCommand

_TLS_PARAMETERS = {"tls-certificates": "tls-certificates", "tls-psk-file": "tls-psk"}
"""Of an NBD URI, and what nbdkit's nbd plugin calls them."""


@dataclass(frozen=True, slots=True)
class Features:
    """What ``nbdkit --dump-config`` says. ``version`` is (major, minor, micro)."""

    path: str
    version: tuple[int, int, int]
    plugin_directory: Path
    filter_directory: Path

    def has_plugin(self, name: str) -> bool:
        """Whether a plugin is installed (a shared object or a script)."""
        stem = self.plugin_directory / f"nbdkit-{name}-plugin"
        return stem.with_suffix(".so").exists() or stem.exists()

    def has_filter(self, name: str) -> bool:
        """Whether a filter is installed."""
        return (self.filter_directory / f"nbdkit-{name}-filter.so").exists()

    def require(self, *, plugin: str, filters: Sequence[str] = ()) -> None:
        """Check that a plugin and filters are installed.

        Raises:
            DependencyError: one is missing.
        """
        missing = [] if self.has_plugin(plugin) else [f"the plugin ‘{plugin}’"]
        missing += [f"the filter ‘{name}’" for name in filters if not self.has_filter(name)]
        if missing:
            raise DependencyError(
                f"nbdkit has not {' and '.join(missing)}",
                hint="‘v2v-async doctor’ says which package has it",
            )


async def probe(program: str = "nbdkit") -> Features:
    """Ask nbdkit what it is.

    Raises:
        DependencyError: there is none, or it does not answer.
    """
    path = shutil.which(program)
    if path is None:
        raise DependencyError(
            "nbdkit is not installed or not in the PATH",
            hint="install it: apt-get install nbdkit, or dnf install nbdkit",
        )
    completed = await process.run([path, "--dump-config"], timeout_s=30)
    if completed.status != 0:
        raise DependencyError(f"‘nbdkit --dump-config’ failed: {completed.stderr.strip()}")
    return parse_config(path, completed.stdout)


@cache
def parse_config(path: str, config: str) -> Features:
    """Read the output of ``nbdkit --dump-config``."""
    values = dict(line.split("=", 1) for line in config.splitlines() if "=" in line)
    digits = (values.get("version", "0").split(".") + ["0", "0"])[:3]
    major, minor, micro = (int("".join(c for c in d if c.isdigit()) or "0") for d in digits)
    return Features(
        path,
        (major, minor, micro),
        Path(values.get("plugindir", "/usr/lib/nbdkit/plugins")),
        Path(values.get("filterdir", "/usr/lib/nbdkit/filters")),
    )


def serve(
    features: Features,
    socket: Path,
    plugin: str,
    parameters: Sequence[str],
    *,
    filters: Sequence[str] = (),
    read_only: bool = False,
    environment: Mapping[str, str] | None = None,
) -> ServerCommand:
    """Return the command that serves ``plugin`` on ``socket``, in the foreground.

    ``filters`` are ordered from the client to the plugin.

    Raises:
        DependencyError: the plugin or a filter is not installed.
    """
    features.require(plugin=plugin, filters=filters)
    argv = [features.path, "--foreground", "--newstyle", "--unix", str(socket)]
    if read_only:
        argv.append("--readonly")
    argv += [f"--filter={name}" for name in filters]
    argv += [plugin, *parameters]
    return ServerCommand("nbdkit", tuple(argv), socket, environment or {})


def uri_parameters(uri: str) -> list[str]:
    """Return the nbd plugin's parameters for an NBD URI.

    The plugin lets no URI name local files, so the TLS parameters are moved out of it.
    Source: nbdkit-nbd-plugin(1); the URI's own are in the NBD URI specification.
    """
    scheme, separator, rest = uri.partition("://")
    address, _, query = rest.partition("?")
    kept, moved = [], []
    for word in query.split("&") if query else []:
        name, _, value = word.partition("=")
        if name in _TLS_PARAMETERS:
            moved.append(f"{_TLS_PARAMETERS[name]}={unquote(value)}")
        else:
            kept.append(word)
    address += f"?{'&'.join(kept)}" if kept else ""
    return [f"uri={scheme}{separator}{address}", *moved]


def serve_target_file(features: Features, path: Path, socket: Path) -> ServerCommand:
    """Serve a raw target file or block device, writable."""
    return serve(features, socket, "file", [f"file={path.absolute()}"])


def serve_null(features: Features, size: int, socket: Path) -> ServerCommand:
    """Serve ``size`` bytes that read as zeroes and forget what is written."""
    return serve(features, socket, "null", [f"size={size}"])
