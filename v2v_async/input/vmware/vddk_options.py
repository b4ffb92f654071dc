"""``-io vddk-*``: what each means, and what nbdkit's vddk plugin is told."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from v2v_async.errors import SourceError, UsageError
from v2v_async.input.vmware.uri import VmwareUri

OPTION_HELP = {
    "vddk-libdir": "the folder of VMware's library: the one that has lib64 in it",
    "vddk-thumbprint": "SHA-1 of the server's certificate, AA:BB:… (default: asked of the server)",
    "vddk-compression": "none, zlib, fastlz or skipz: how the server packs what it sends",
    "vddk-config": "VDDK's configuration file",
    "vddk-cookie": "the cookie of a session with the server, instead of a login",
    "vddk-file": "read this [DATASTORE] NAME.vmdk instead; once for each disk, in their order",
    "vddk-nfchostport": "the port of the host's NFC service (default: 902)",
    "vddk-noextents": "true: do not ask where the data is, which some servers take long to tell",
    "vddk-port": "the server's port (default: that of -ic, or 443)",
    "vddk-snapshot": "the managed object reference of a snapshot to read",
    "vddk-transports": "how to read, the first that works: MODE:MODE:…",
}

# What goes to the plugin as it is.
_PASSED = ("compression", "config", "cookie", "libdir", "nfchostport", "snapshot", "transports")
_COMPRESSIONS = ("none", "zlib", "fastlz", "skipz")
_PORTS = ("vddk-nfchostport", "vddk-port")
_THUMBPRINT = re.compile(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){19}")
_TRANSPORTS = re.compile(r"[A-Za-z0-9]+(:[A-Za-z0-9]+)*")


@dataclass(frozen=True, slots=True)
class VddkOptions:
    """Checked ``-io vddk-*`` options; ``port`` of the server, None: VDDK's own default."""

    libdir: str | None = None
    thumbprint: str | None = None
    port: int | None = None
    files: tuple[str, ...] = ()
    extents: bool = True
    passed: dict[str, str] = field(default_factory=dict, repr=False)  # may hold a cookie

    def file(self, index: int, location: str) -> str:
        """Return what the disk ``index`` (from 0) is read from; libvirt says ``location``."""
        return self.files[index] if self.files else location

    def check_files(self, disks: int) -> None:
        """Check that ``vddk-file`` was given for each disk, or not at all.

        Raises:
            SourceError: it was not.
        """
        if self.files and len(self.files) != disks:
            raise SourceError(
                f"‘-io vddk-file’ was given {len(self.files)} times for {disks} disks",
                hint="give it once for each disk, in the order of ‘virsh dumpxml’",
            )

    def parameters(
        self,
        uri: VmwareUri,
        *,
        file: str,
        moref: str,
        thumbprint: str,
        password_file: Path | None = None,
    ) -> tuple[str, ...]:
        """Return the plugin's parameters for one disk.

        Source: nbdkit-vddk-plugin(1).
        """
        given = {
            "file": file,
            "server": uri.host,
            "user": uri.user,
            "vm": f"moref={moref}",
            "thumbprint": thumbprint,
            **self.passed,
        }
        port = self.port if self.port is not None else uri.port
        if password_file is not None:
            given["password"] = f"+{password_file}"
        if port is not None:
            given["port"] = str(port)
        return tuple(f"{name}={value}" for name, value in given.items())


def parse_vddk_options(options: Sequence[tuple[str, str]]) -> VddkOptions:
    """Read the options of ``-it vddk``, whose names are known.

    Raises:
        UsageError: a value is wrong, or an option was given twice.
    """
    values: dict[str, str] = {}
    files: list[str] = []
    for name, value in options:
        if name == "vddk-file":
            files.append(value)
        elif name in values:
            raise UsageError(f"‘-io {name}’ was given twice", hint="leave one of them out")
        else:
            values[name] = value
        if "\n" in value:
            raise UsageError(f"‘-io {name}’ is not one line")
    for name in _PORTS:
        if name in values and not (
            values[name].isascii() and values[name].isdecimal() and 0 < int(values[name]) < 65536
        ):
            raise UsageError(f"‘-io {name}={values[name]}’ is not a port", hint="write 1 to 65535")
    thumbprint = values.get("vddk-thumbprint")
    if thumbprint is not None and _THUMBPRINT.fullmatch(thumbprint) is None:
        raise UsageError(
            f"‘-io vddk-thumbprint={thumbprint}’ is not the SHA-1 of a certificate",
            hint="it has 20 pairs of digits, AA:BB:…; without the option the server is asked",
        )
    transports = values.get("vddk-transports")
    if transports is not None and _TRANSPORTS.fullmatch(transports) is None:
        raise UsageError(
            f"‘-io vddk-transports={transports}’ is not MODE:MODE:…",
            hint="the modes are nbdssl, nbd, san, hotadd, file",
        )
    compression = values.get("vddk-compression", "none")
    if compression not in _COMPRESSIONS:
        raise UsageError(
            f"‘-io vddk-compression={compression}’", hint=f"write {', '.join(_COMPRESSIONS)}"
        )
    noextents = values.get("vddk-noextents", "false")
    if noextents not in ("true", "false"):
        raise UsageError(f"‘-io vddk-noextents={noextents}’", hint="write true or false")
    return VddkOptions(
        libdir=values.get("vddk-libdir"),
        thumbprint=None if thumbprint is None else thumbprint.upper(),
        port=int(values["vddk-port"]) if "vddk-port" in values else None,
        files=tuple(files),
        extents=noextents == "false",
        passed={name: values[f"vddk-{name}"] for name in _PASSED if f"vddk-{name}" in values},
    )
