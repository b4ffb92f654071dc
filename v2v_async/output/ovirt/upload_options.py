"""What ``-o rhv-upload`` is told: the engine, the storage domain, and its ``-oo`` options."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from v2v_async.errors import UsageError
from v2v_async.options import OutputOptions
from v2v_async.output.file_disks import parse_bool
from v2v_async.output.ovirt.engine_guest import check_name
from v2v_async.output.ovirt.guest import is_uuid
from v2v_async.ovirt_engine import EngineLogin

# As long as it was the only one; since 4.5.1 engines make admin@ovirt@internalsso, too.
_USER = "admin@internal"
_CLUSTER = "Default"
# What the engine allows, and what means nothing to its search.
_DOMAIN = re.compile(r"[-a-zA-Z0-9_]+")

OPTION_HELP = {
    "rhv-cafile": "the engine's certificate authority (ca.pem), to check certificates against",
    "rhv-cluster": "the cluster that the guest is made in (default: Default)",
    "rhv-direct": "false: the same as -oo rhv-proxy (default: true)",
    "rhv-disk-uuid": "UUID of a new disk; once for each disk (default: random)",
    "rhv-proxy": "send the disks through the engine, where the hosts can't be reached",
    "rhv-verifypeer": "check the certificates of the engine and its hosts (default: false)",
}
"""By the names that every virt-v2v takes."""

ALIASES = {f"ovirt{name[3:]}": name for name in OPTION_HELP}
"""The names that newer virt-v2v has, and those they stand for."""


@dataclass(frozen=True, slots=True)
class UploadOptions:
    """Everything, checked; nothing has been touched."""

    login: EngineLogin
    storage: str
    cluster: str = _CLUSTER
    use_proxy: bool = False
    disk_ids: tuple[str, ...] = ()
    format: Literal["raw", "qcow2"] = "raw"
    is_preallocated: bool = False


def parse(options: OutputOptions) -> UploadOptions:
    """Check what was given.

    Raises:
        UsageError: an option is missing, unknown or wrong.
    """
    values = _values(options.options)
    if options.name is not None:
        check_name(options.name)
    if not options.storage:
        raise UsageError("-o rhv-upload needs a storage domain", hint="add -os NAME")
    if not _DOMAIN.fullmatch(options.storage):
        raise UsageError(
            f"-os ‘{options.storage}’ can't be the name of a storage domain",
            hint="it has only letters, digits, - and _",
        )
    format_: Literal["raw", "qcow2"]
    match options.format:
        case None | "raw":
            format_ = "raw"
        case "qcow2":
            format_ = "qcow2"
        case other:
            raise UsageError(f"-of {other}: -o rhv-upload writes raw or qcow2")
    is_preallocated = options.allocation == "preallocated"
    if is_preallocated and format_ == "qcow2":
        raise UsageError(
            "-oa preallocated and -of qcow2 exclude each other",
            hint="leave one out: oVirt preallocates raw disks",
        )
    use_proxy = not _last_bool(values, "rhv-direct", default=True)
    return UploadOptions(
        login=_login(options, values),
        storage=options.storage,
        cluster=_single(values, "rhv-cluster") or _CLUSTER,
        use_proxy=_last_bool(values, "rhv-proxy", default=use_proxy),
        disk_ids=_disk_ids(values["rhv-disk-uuid"]),
        format=format_,
        is_preallocated=is_preallocated,
    )


def _values(options: tuple[tuple[str, str | None], ...]) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {name: [] for name in OPTION_HELP}
    for option, value in options:
        name = ALIASES.get(option, option)
        if name not in values:
            raise UsageError(
                f"-o rhv-upload has no option ‘-oo {option}’", hint=f"it has: {', '.join(values)}"
            )
        if not value and name in ("rhv-cafile", "rhv-cluster", "rhv-disk-uuid"):
            raise UsageError(f"-oo {option}: nothing given", hint=f"write -oo {option}=…")
        values[name].append(value or "")
    if values["rhv-proxy"] and values["rhv-direct"]:
        raise UsageError("-oo rhv-proxy and -oo rhv-direct say the same thing", hint="keep one")
    return values


def _login(options: OutputOptions, values: dict[str, list[str]]) -> EngineLogin:
    if not options.connection:
        raise UsageError(
            "-o rhv-upload needs the engine's address",
            hint="add -oc https://ENGINE/ovirt-engine/api",
        )
    try:
        parts = urlsplit(options.connection)
        port = parts.port or 443
    except ValueError as error:
        raise UsageError(f"-oc is not a URL: {error}") from error
    # Not quoted whole: it may hold a password.
    if parts.scheme != "https" or not parts.hostname:
        raise UsageError(
            f"-oc: ‘{parts.scheme}://{parts.hostname or ''}…’ is not an engine's address",
            hint="write https://ENGINE/ovirt-engine/api",
        )
    path = parts.path.rstrip("/")
    if not path.endswith("/api") or parts.query or parts.fragment:
        raise UsageError(
            f"-oc: the path ‘{parts.path}’ is not that of an engine's API",
            hint=f"write https://{parts.hostname}/ovirt-engine/api",
        )
    # “user@profile” is what a user is called, and a second @ is no mistake; so a password would
    # not be seen as one either.
    user, colon, _ = parts.netloc.rpartition("@")[0].partition(":")
    if colon:
        raise UsageError(
            "-oc has a password in it, which everybody can see in the list of processes",
            hint="write it into a file (mode 0600): -op FILE",
        )
    if options.password is None:
        raise UsageError(
            "-o rhv-upload needs the password of the engine's user",
            hint="write it into a file (mode 0600): -op FILE",
        )
    user = unquote(user) or _USER
    if not user.isprintable():
        raise UsageError("-oc: the name of the user has a control character")
    verify = _last_bool(values, "rhv-verifypeer", default=False)
    ca_file = _single(values, "rhv-cafile")
    if ca_file is not None:
        # nbdkit reads it too, and works in /.
        path_ = Path(ca_file).absolute()
        if not path_.is_file():
            raise UsageError(f"-oo rhv-cafile: there is no file ‘{ca_file}’")
        ca_file = str(path_)
    return EngineLogin(
        parts.hostname, port, path, user, options.password, verify=verify, ca_file=ca_file
    )


def _disk_ids(given: list[str]) -> tuple[str, ...]:
    for number, value in enumerate(given):
        if not is_uuid(value) or value.strip("0-") == "":
            raise UsageError(
                f"-oo rhv-disk-uuid={value} is not a UUID",
                hint="write it as 12345678-1234-1234-1234-123456789abc",
            )
        if value.lower() in (other.lower() for other in given[:number]):
            raise UsageError(
                f"-oo rhv-disk-uuid={value} is given twice", hint="each disk has its own"
            )
    # The engine writes them in small letters.
    return tuple(str(uuid.UUID(value)) for value in given)


def _single(values: dict[str, list[str]], name: str) -> str | None:
    if len(values[name]) > 1:
        raise UsageError(f"-oo {name} is given twice", hint="keep one")
    return values[name][0] if values[name] else None


def _last_bool(values: dict[str, list[str]], name: str, *, default: bool) -> bool:
    return parse_bool(name, values[name][-1]) if values[name] else default
