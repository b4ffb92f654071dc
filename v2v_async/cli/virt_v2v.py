"""virt-v2v's command line, turned into options: no file is touched here.

::

    argv ── read() ──> Words ── input_options() convert_options() output_options() copy_options()
                         └───── edge_options()            each checks what it reads, nothing else

A helper reads only the part of its own step, so that a script can hand every helper the same
``"$@"``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from v2v_async.cli import modes, table, values
from v2v_async.cli.getopt import Given, Option, parse
from v2v_async.cli.values import Target
from v2v_async.errors import NotBuiltError, UsageError
from v2v_async.options import (
    ConvertOptions,
    CopyOptions,
    GuestOptions,
    InputOptions,
    MacMapping,
    Mapping,
    NetworkOptions,
    OutputOptions,
    OverlapOptions,
)
from v2v_async.redact import redact
from v2v_async.secret import Secret

_CUSTOMIZE = frozenset(option.name for option in table.CUSTOMIZE)
_IGNORED = ("--no-trim", "--vmtype")
_TRANSPORTS = ("ssh", "vddk")
_ALLOCATIONS = ("sparse", "preallocated")
_FORMATS = ("raw", "qcow2")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class EdgeOptions:
    """What the edge itself needs: where to show things, and how much.

    ``keeps_stdout``: something else is written there, and no screen.
    """

    quiet: bool = False
    verbose: bool = False
    trace: bool = False
    colours: bool = False
    machine_readable: Target | None = None
    events: Target | None = None
    print_source: bool = False
    keeps_stdout: bool = False


@dataclass(slots=True)
class Words:
    """A command line taken apart: options by the name that messages use, then the rest."""

    options: dict[str, list[str]] = field(default_factory=dict, repr=False)  # holds keys
    words: list[str] = field(default_factory=list)
    customize: list[str] = field(default_factory=list, repr=False)  # holds passwords
    warnings: list[str] = field(default_factory=list)
    machine_readable: Target | None = None
    wants_help: bool = False
    wants_version: bool = False

    def has(self, name: str) -> bool:
        """Whether option ``name`` was given."""
        return name in self.options

    def last(self, name: str) -> str | None:
        """Return the last argument of option ``name``."""
        given = self.options.get(name)
        return given[-1] if given else None

    def pairs(self, name: str) -> tuple[tuple[str, str | None], ...]:
        """Return -io or -oo as pairs."""
        return tuple(values.option_pair(text) for text in self.options.get(name, []))


def read(argv: Sequence[str], extra: Sequence[Option] = ()) -> Words:
    """Take ``argv`` apart and check each option by itself.

    Stops at --help and --version, so what follows them does not matter.

    Raises:
        UsageError: and the caller may have to know whether --machine-readable came first; it is
            kept in the error's ``machine_readable`` attribute.
    """
    made = Words()
    try:
        for item in parse((*table.OPTIONS, *extra), argv):
            if not isinstance(item, Given):
                made.words.append(item.text)
                continue
            _take(made, item.option.name, item.value)
            if made.wants_help or made.wants_version:
                break
    except UsageError as error:
        error.machine_readable = made.machine_readable  # type: ignore[attr-defined]
        raise
    return made


def _take(made: Words, name: str, value: str | None) -> None:
    if name in _CUSTOMIZE:
        made.customize += [name] if value is None else [name, value]
        return
    if name == "--machine-readable":
        made.machine_readable = values.machine_readable_target(value)
    elif name == "--help":
        made.wants_help = True
    elif name in ("-V", "--version"):
        made.wants_version = True
    elif name in _IGNORED:
        made.warnings.append(f"{name} does nothing any more; leave it out")
    elif name == "--in-place":
        raise UsageError(
            "--in-place is a program of its own", hint="use virt-v2v-in-place(1) for that"
        )
    elif value is not None and (check := _CHECKS.get(name)) is not None:
        check(value)
    name, value = _modern(name, value)
    made.options.setdefault(name, []).append(value if value is not None else "")


def _modern(name: str, value: str | None) -> tuple[str, str | None]:
    """Return the option that an old spelling stands for."""
    if name == "--password-file":
        return "-ip", value
    if name.startswith("--vddk-"):
        return "-io", f"{name[2:]}={value}"
    if name.startswith("--vdsm-"):
        return "-oo", f"{name[2:]}={value}"
    if name in ("--compressed", "--qemu-boot"):
        return "-oo", name[2:]
    return name, value


def _one_of(option: str, known: Sequence[str]) -> Callable[[str], object]:
    def check(text: str) -> None:
        if text not in known:
            raise UsageError(f"{option}: unknown ‘{text}’", hint=f"write {' or '.join(known)}")

    return check


_CHECKS: dict[str, Callable[[str], object]] = {
    "-i": modes.input_mode,
    "-o": modes.output_mode,
    "-it": _one_of("-it", _TRANSPORTS),
    "-oa": _one_of("-oa", _ALLOCATIONS),
    "-of": _one_of("-of", _FORMATS),
    "--block-driver": _one_of("--block-driver", ("virtio-blk", "virtio-scsi")),
    "--key": values.key,
    "--root": values.root,
    "--parallel": partial(values.count, "--parallel"),
    "--max-connections": partial(values.count, "--max-connections"),
    "--retries": lambda text: values.count("--retries", text, 0),
    "--bandwidth": values.rate,
    "--bandwidth-file": values.rate_file,
    "--copier": values.copier,
    "--overlap": values.overlap,
    "--overlap-waste": values.waste,
    "--events": values.events_target,
}


def listed_options(words: Words) -> str | None:
    """Return the answer to ``-io ?`` or ``-oo ?``, or None where neither was asked."""
    if "?" in words.options.get("-io", []):
        kind = modes.INPUT_KINDS[_source(words).kind]
        return modes.list_options("-io", kind.name, kind.options)
    if "?" in words.options.get("-oo", []):
        mode = modes.output_mode(words.last("-o") or "libvirt")
        return modes.list_options("-oo", f"-o {mode.name}", mode.options)
    return None


def refuse_not_built(words: Words, options: Sequence[Option] = table.SHOWN) -> None:
    """Raise NotBuiltError for one of ``options`` that no step reads yet."""
    for option in options:
        if option.not_built and words.has(option.name):
            raise NotBuiltError(option.name)


def _source(words: Words) -> InputOptions:
    """Return what the input step reads, unchecked but for the mode."""
    return InputOptions(
        mode=modes.input_mode(words.last("-i") or "libvirt"),
        arguments=tuple(words.words),
        connection=words.last("-ic"),
        format=words.last("-if"),
        options=words.pairs("-io"),
        transport=words.last("-it"),
    )


def input_options(words: Words, wanted: str | None = None) -> InputOptions:
    """Return what the input step reads; a password is read from its file, or from the terminal.

    Raises:
        UsageError: also where the source is not of the kind ``wanted``.
    """
    options = _source(words)
    kind = modes.INPUT_KINDS[options.kind]
    if wanted is not None and wanted != options.kind:
        raise UsageError(
            f"this helper is for {modes.INPUT_KINDS[wanted].name}, not {kind.name}",
            hint=f"run helper-v2v-input-{options.kind}",
        )
    modes.check_options("-io", kind.name, kind.options, options.options)
    if options.transport is not None and "-it" not in kind.uses:
        raise UsageError(
            f"‘-it {options.transport}’ has no meaning with ‘{kind.name}’",
            hint="leave it out; -it ssh goes with -i vmx, -it vddk with -ic vpx:// or esx://",
        )
    if not words.words:
        raise UsageError(f"{kind.name}: no {kind.noun} was named", hint=f"name {kind.argument}")
    if "" in words.words:
        raise UsageError(
            f"{kind.name}: a {kind.noun}'s name is empty",
            hint="is a shell variable unset?",
        )
    if kind.most is not None and len(words.words) > kind.most:
        raise UsageError(
            f"{kind.name} takes one guest: ‘{redact(words.words[1])}’ is too much",
            hint=f"name only {kind.argument}",
        )
    text = words.last("-ip")
    if text is not None and "-ip" in kind.uses:
        password: Secret | None = Secret.read(Path(text), "-ip")
    else:
        password = _ask_password(kind, options) if kind.needs_password else None
    return replace(options, password=password)


def _ask_password(kind: modes.InputKind, options: InputOptions) -> Secret:
    """Ask the person at the terminal.

    Raises:
        UsageError: there is none.
    """
    if not (sys.stdin and sys.stdin.isatty()):
        raise UsageError(
            f"{kind.name} needs a password, and there is no terminal to ask for it",
            hint="add -ip FILE: the password is the file's only line",
        )
    from getpass import getpass

    whose = redact(urlsplit(options.connection or "").netloc) or kind.name
    try:
        value = getpass(f"Password for {whose}: ")
    except EOFError:
        value = ""
    if not value:
        raise UsageError(f"{kind.name} needs a password, and none was typed")
    return Secret(value)


def network_options(words: Words) -> NetworkOptions:
    """Return -n, -b and --mac in the order given."""
    networks: tuple[Mapping, ...] = ()
    bridges: tuple[Mapping, ...] = ()
    macs: tuple[MacMapping, ...] = ()
    for text in words.options.get("-n", []):
        networks += (values.mapping("-n", text, networks),)
    for text in words.options.get("-b", []):
        bridges += (values.mapping("-b", text, bridges),)
    for text in words.options.get("--mac", []):
        macs += (values.mac(text, macs),)
    return NetworkOptions(networks, bridges, macs)


def convert_options(words: Words) -> ConvertOptions:
    """Return what the convert step reads."""
    return ConvertOptions(
        root=words.last("--root"),
        keys=tuple(words.options.get("--key", [])),
        keys_from_stdin=words.has("--keys-from-stdin"),
        echo_keys=words.has("--echo-keys"),
        customize=tuple(words.customize),
        network=network_options(words),
        verbose=words.has("-v"),
        trace=words.has("-x"),
    )


def output_options(words: Words) -> OutputOptions:
    """Return what the output steps read.

    Raises:
        UsageError
    """
    mode = modes.output_mode(words.last("-o") or "libvirt")
    for option in sorted(mode.refused):
        if words.has(option):
            raise UsageError(f"-o {mode.name} takes no {option}", hint=f"leave {option} out")
    pairs = words.pairs("-oo")
    password = words.last("-op")
    modes.check_options("-oo", f"-o {mode.name}", mode.options, pairs)
    if mode.name == "local" and not words.last("-os"):
        raise UsageError("-o local: no directory was named", hint="add -os DIR")
    if words.has("-on") and not words.last("-on"):
        raise UsageError("-on: the name is empty", hint="write -on NAME")
    if any(name == "compressed" for name, _ in pairs) and words.last("-of") == "raw":
        raise UsageError("-oo compressed needs -of qcow2", hint="raw disks can't be compressed")
    return OutputOptions(
        mode=mode.name,
        allocation="preallocated" if words.last("-oa") == "preallocated" else "sparse",
        connection=words.last("-oc"),
        format=words.last("-of"),
        name=words.last("-on"),
        options=pairs,
        password=None if password is None else Secret.read(Path(password), "-op"),
        storage=words.last("-os"),
    )


def copy_options(words: Words) -> CopyOptions:
    """Return what the copy step reads. A disk that fails makes the others useless: they stop."""

    def given(name: str, read: Callable[[str], T], default: T) -> T:
        text = words.last(name)
        return default if text is None else read(text)

    def count(name: str, default: int | None = None, least: int = 1) -> int | None:
        return given(name, partial(values.count, name, least=least), default)

    return CopyOptions(
        parallel=count("--parallel"),
        max_connections=count("--max-connections"),
        retries=count("--retries", CopyOptions().retries, least=0) or 0,
        bandwidth=given("--bandwidth", values.rate, None),
        bandwidth_file=given("--bandwidth-file", values.rate_file, None),
        verify=words.has("--verify"),
        copier=given("--copier", values.copier, "native"),
    )


def overlap_options(words: Words) -> OverlapOptions:
    """Return whether to copy while the guest is converted."""
    mode, waste = words.last("--overlap"), words.last("--overlap-waste")
    options = OverlapOptions() if waste is None else values.waste(waste)
    return options if mode is None else replace(options, mode=values.overlap(mode))


def guest_options(words: Words) -> GuestOptions:
    """Return everything for one guest. With --print-source the output is not looked at."""
    convert = convert_options(words)  # its mistakes are usage errors: before what is not built
    copy = copy_options(words)
    refuse_not_built(words)
    source = input_options(words)
    output = OutputOptions() if words.has("--print-source") else output_options(words)
    return GuestOptions(source, convert, output, copy, overlap_options(words))


def edge_options(words: Words) -> EdgeOptions:
    """Return what the edge needs."""
    events = words.last("--events")
    return EdgeOptions(
        quiet=words.has("-q"),
        verbose=words.has("-v"),
        trace=words.has("-x"),
        colours=words.has("--colours"),
        machine_readable=words.machine_readable,
        events=None if events is None else values.events_target(events),
        print_source=words.has("--print-source"),
        keeps_stdout=words.has("--print-source"),
    )
