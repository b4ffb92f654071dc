"""What a person asked for, after parsing and before anything is touched.

One class for each step; each is frozen and knows nothing of the command line it came from. Names
follow virt-v2v(1).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Mapping = tuple[str | None, str]
"""``in:out`` of -n and -b; ``None`` for the default mapping (``-n OUT``)."""


@dataclass(frozen=True, slots=True)
class MacMapping:
    """``--mac MAC:network|bridge|ip:OUT``."""

    mac: str
    kind: Literal["network", "bridge", "ip"]
    out: str


@dataclass(frozen=True, slots=True)
class InputOptions:
    """``-i -ic -if -io -ip -it`` and the guest's arguments."""

    mode: str = "libvirt"
    arguments: tuple[str, ...] = ()
    connection: str | None = None
    format: str | None = None
    options: tuple[tuple[str, str | None], ...] = ()
    password_file: Path | None = None
    transport: str | None = None
    bandwidth: str | None = None
    bandwidth_file: Path | None = None


@dataclass(frozen=True, slots=True)
class NetworkOptions:
    """``-n``, ``-b`` and ``--mac``, in the order given."""

    networks: tuple[Mapping, ...] = ()
    bridges: tuple[Mapping, ...] = ()
    macs: tuple[MacMapping, ...] = ()


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """What is handed on to virt-v2v-in-place.

    ``keys`` are ``--key`` selectors, kept out of every argv shown to a person.
    ``customize`` are the customisation options word for word (virt-v2v-in-place 2.6 and newer).
    """

    root: str | None = None
    keys: tuple[str, ...] = field(default=(), repr=False)
    keys_from_stdin: bool = False
    echo_keys: bool = False
    customize: tuple[str, ...] = field(default=(), repr=False)
    network: NetworkOptions = field(default_factory=NetworkOptions)
    verbose: bool = False
    trace: bool = False


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """``-o -oa -oc -of -on -oo -op -os`` (``format`` is None where the source's is wanted)."""

    mode: str = "libvirt"
    allocation: Literal["sparse", "preallocated"] = "sparse"
    connection: str | None = None
    format: str | None = None
    name: str | None = None
    options: tuple[tuple[str, str | None], ...] = ()
    password_file: Path | None = None
    storage: str | None = None


@dataclass(frozen=True, slots=True)
class CopyOptions:
    """How the copy step runs. ``parallel``: disks at once (None: all of them)."""

    parallel: int | None = None


@dataclass(frozen=True, slots=True)
class GuestOptions:
    """One guest, all six steps."""

    input: InputOptions
    convert: ConvertOptions
    output: OutputOptions
    copy: CopyOptions = field(default_factory=CopyOptions)
