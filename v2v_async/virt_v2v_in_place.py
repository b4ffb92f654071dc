"""virt-v2v-in-place: what this one can do, its command line, and what it says while it works.

With ``--machine-readable=stream:stdout`` it prints its messages as JSON lines between those for
people; its debugging output (``-v``) goes to standard error. ``-v`` is always asked for: it is the
only place where any version so far (2.2 to 2.10) tells the guestcaps.

Source: virt-v2v-in-place(1); guestfs(3), "ADVANCED MACHINE READABLE OUTPUT".
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import anyio

from v2v_async import process
from v2v_async.errors import DependencyError, UsageError
from v2v_async.options import ConvertOptions

PROGRAM = "virt-v2v-in-place"

# Debian has it in the PATH; others keep programs that a person should not meet in libexec.
_DIRECTORIES = ("/usr/bin", "/usr/libexec", "/usr/local/bin", "/usr/local/libexec")

MINIMUM_VERSION = (2, 2, 0)
"""The oldest one that this was tried with; 2.0 had it as ``virt-v2v --in-place``."""

MessageKind = Literal["message", "info", "warning", "error"]

_CSI = re.compile(r"\x1b\[[0-9;]*m")
_ERROR_LINE = re.compile(rf"(?:{PROGRAM}|virt-v2v): error: (?P<text>.*)")
_HUMAN_PHASE = re.compile(r"\[ *\d+\.\d\] (?P<text>.*)")
_SOCKET_DIRECTORY = re.compile(r"socket,path=(?P<path>/[^,\s]*/libguestfs\w{6,})/guestfsd\.sock")


@dataclass(frozen=True, slots=True)
class Features:
    """What the installed program says of itself. ``options`` are its long options."""

    path: str
    version: tuple[int, int, int]
    options: frozenset[str]
    words: frozenset[str]

    @property
    def has_output_xml(self) -> bool:
        """Whether ``-O FILE`` writes what inspection found (2.8 and newer)."""
        return "output-xml-option" in self.words

    @property
    def can_customize(self) -> bool:
        """Whether it takes virt-customize's options (2.6 and newer)."""
        return "customize-ops" in self.words or "--run-command" in self.options


@dataclass(frozen=True, slots=True)
class Message:
    """One thing that it said. A ``message`` opens a phase of its work."""

    kind: MessageKind
    text: str


async def probe(program: str | None = None) -> Features:
    """Ask the installed program what it is.

    Raises:
        DependencyError: there is none, it is too old, or it does not answer.
    """
    path = _find(program)
    answers: dict[str, str] = {}

    async def ask(option: str) -> None:
        completed = await process.run([path, option], timeout_s=60)
        if completed.status != 0:
            last = completed.stderr.strip().splitlines()[-1:]
            raise DependencyError(
                ": ".join(
                    [
                        f"‘{PROGRAM} {option}’ failed "
                        f"({process.describe_status(completed.status)})",
                        *last,
                    ]
                ),
                hint="‘v2v-async doctor’ says what is missing",
            )
        answers[option] = completed.stdout

    try:
        async with anyio.create_task_group() as group:
            for option in ("--version", "--long-options", "--machine-readable"):
                group.start_soon(ask, option)
    except BaseExceptionGroup as errors:
        ours = errors.subgroup(DependencyError)
        if ours is not None:
            raise ours.exceptions[0] from None
        raise
    features = parse_features(
        path, answers["--version"], answers["--long-options"], answers["--machine-readable"]
    )
    if features.version < MINIMUM_VERSION:
        wanted = ".".join(map(str, MINIMUM_VERSION))
        raise DependencyError(
            f"{PROGRAM} {'.'.join(map(str, features.version))} is too old",
            hint=f"install virt-v2v {wanted} or newer",
        )
    return features


def parse_features(path: str, version: str, options: str, words: str) -> Features:
    """Read the answers to ``--version``, ``--long-options`` and ``--machine-readable``."""
    match = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    major, minor, micro = (int(part or 0) for part in match.groups()) if match else (0, 0, 0)
    return Features(
        path, (major, minor, micro), frozenset(options.split()), frozenset(words.split())
    )


def command(
    features: Features,
    guest_xml: Path,
    options: ConvertOptions,
    *,
    keys: Sequence[str],
    customize: Sequence[str],
    output_xml: Path | None,
) -> list[str]:
    """Return the command that converts the disks of ``guest_xml`` where they are.

    ``keys`` and ``customize`` are those of ``options`` with each secret moved into a file; the
    others must not be in an argv. Networks and bridges are mapped by us, static addresses by it.

    Raises:
        UsageError: an option needs a newer version.
    """
    argv = [features.path, "-v", "--machine-readable=stream:stdout"]
    if options.trace:
        argv.append("-x")
    # "ask", its default, reads a terminal that is not its own here. "single" says that there are
    # several systems, and then the person chooses one.
    root = options.root if options.root not in (None, "ask") else "single"
    assert root is not None
    argv += ["--root", root]
    for mapping in options.network.macs:
        if mapping.kind == "ip":
            argv += ["--mac", f"{mapping.mac}:ip:{mapping.out}"]
    for key in keys:
        argv += ["--key", key]
    if options.keys_from_stdin:
        argv.append("--keys-from-stdin")
    if options.echo_keys:
        argv.append("--echo-keys")
    argv += _checked_customize(features, customize)
    if output_xml is not None and features.has_output_xml:
        argv += ["-O", str(output_xml)]
    return [*argv, "-i", "libvirtxml", str(guest_xml)]


def environment(scratch: Path, given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for a run whose temporary files stay in ``scratch``.

    The cache must not move with TMPDIR: the appliance in it would be built anew for every guest.
    """
    inherited = {**os.environ, **given}
    cache = inherited.get("LIBGUESTFS_CACHEDIR") or inherited.get("TMPDIR") or "/var/tmp"
    return {
        **given,
        "TMPDIR": str(scratch),
        "LIBGUESTFS_TMPDIR": str(scratch),
        "VIRT_V2V_TMPDIR": str(scratch),
        "LIBGUESTFS_CACHEDIR": cache,
        # What it prints is read: no translations.
        "LC_ALL": "C.UTF-8",
    }


def parse_message(line: str) -> Message | None:
    """Read a line of standard output; None when it is not a message for a program."""
    if not line.startswith("{"):
        return None
    try:
        said = json.loads(line)
    except ValueError:
        return None
    if not isinstance(said, dict) or not isinstance(said.get("message"), str):
        return None
    kind = said.get("type")
    if kind not in ("message", "info", "warning", "error"):
        return None
    return Message(kind, _CSI.sub("", said["message"]).strip())


def parse_error(line: str) -> str | None:
    """Return the error of a line on standard error: bad options come before any JSON does."""
    match = _ERROR_LINE.match(_CSI.sub("", line))
    return match["text"].strip() if match else None


def parse_phase(line: str) -> str | None:
    """Return the text of ``[  12.3] Converting … to run on KVM``."""
    match = _HUMAN_PHASE.fullmatch(_CSI.sub("", line).rstrip())
    return match["text"].strip() if match else None


def parse_socket_directory(line: str) -> str | None:
    """Return the directory of libguestfs's sockets, from the line that starts qemu.

    It is under /tmp (or XDG_RUNTIME_DIR) whatever TMPDIR says, and stays when libguestfs is killed.
    """
    match = _SOCKET_DIRECTORY.search(line)
    return match["path"] if match else None


def _find(program: str | None) -> str:
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), *_DIRECTORIES])
    path = shutil.which(program or PROGRAM, path=search)
    if path is None:
        raise DependencyError(
            f"{program or PROGRAM} is not installed or not in the PATH",
            hint="install it: apt-get install virt-v2v, or dnf install virt-v2v",
        )
    return path


def _checked_customize(features: Features, customize: Sequence[str]) -> list[str]:
    for word in customize:
        name = word.partition("=")[0]
        if not name.startswith("--") or name in features.options:
            continue
        version = ".".join(map(str, features.version))
        raise UsageError(
            f"{PROGRAM} {version} has no option {name}",
            hint=None if features.can_customize else "customising needs virt-v2v 2.6 or newer",
        )
    return list(customize)
