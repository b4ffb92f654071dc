"""What a person asked for, after parsing and before anything is touched.

One class for each step; each is frozen and knows nothing of the command line it came from. Names
follow virt-v2v(1).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from v2v_async.secret import Secret

# libvirt's drivers for VMware: vpx is vCenter, the others are single hosts.
_VMWARE = ("esx", "gsx", "vpx")

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
    password: Secret | None = None
    transport: str | None = None

    @property
    def kind(self) -> str:
        """Which input it is: ``-i libvirt`` is several, by -ic and -it, as in virt-v2v."""
        if self.mode == "local":
            return "disk"
        if self.mode != "libvirt" or self.connection is None:
            return self.mode
        address = urlsplit(self.connection)
        if address.scheme in _VMWARE and address.hostname:
            return "vddk" if self.transport == "vddk" else "vcenter"
        return "xen-ssh" if address.scheme == "xen+ssh" and address.hostname else "libvirt"


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
class InPlaceOptions:
    """One guest, converted on its own disks.

    ``report``: the file that gets virt-v2v-inspector's document (``-O``), ``-`` is standard output.
    ``direct``: without an overlay, as virt-v2v-in-place does.
    """

    input: InputOptions
    convert: ConvertOptions
    report: str | None = None
    direct: bool = False


@dataclass(frozen=True, slots=True)
class InspectOptions:
    """One guest, looked into. ``root`` and ``keys`` are those of :class:`ConvertOptions`."""

    input: InputOptions
    root: str = "single"
    keys: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """``-o -oa -oc -of -on -oo -op -os`` (``format`` is None where the source's is wanted)."""

    mode: str = "libvirt"
    allocation: Literal["sparse", "preallocated"] = "sparse"
    connection: str | None = None
    format: str | None = None
    name: str | None = None
    options: tuple[tuple[str, str | None], ...] = ()
    password: Secret | None = None
    storage: str | None = None


Copier = Literal["native", "nbdcopy", "qemu-img"]


@dataclass(frozen=True, slots=True)
class CopyOptions:
    """How disks are copied; nbdcopy(1)'s options and ours. Sizes are bytes.

    ``None`` everywhere means that the engine chooses, and goes on choosing while it runs.

    Over all disks: ``parallel`` is disks at once (None: all), ``max_connections`` connections to
    the sources together (as many to the targets), ``threads`` polling threads, ``bandwidth`` bytes
    a second and ``bandwidth_file`` a file that tells them and may change while the copy runs.

    For each disk: ``connections``, and for each of those ``requests`` in flight; ``request_size``
    is the most one request moves and ``queue_size`` the most that is in flight on a connection.

    ``sparse`` is the size of the blocks in which zeroes are looked for in data (0: not at all).
    ``allocated``: zeroes take room on the target. ``target_is_zero``: the person says that it reads
    as zeroes. ``extents``: ask the source where its data is. ``flush``: success means flushed.
    ``synchronous``: one request at a time, in the order of the disk.

    ``retries``: times that a lost connection or a failing request is tried again before its disk
    fails. ``keep_going``: other disks finish when one has failed.

    ``checkpoint``: a directory that remembers what has been flushed. ``verify``: read both sides
    again and compare; ``repair``: copy again what differs. ``digest``: ``ALGORITHM[/SIZE]``
    of a digest of each disk (``copy/digest.py``).
    """

    parallel: int | None = None
    max_connections: int | None = None
    threads: int | None = None
    bandwidth: int | None = None
    bandwidth_file: Path | None = None
    connections: int | None = None
    requests: int | None = None
    request_size: int | None = None
    queue_size: int | None = None
    sparse: int | None = None
    allocated: bool = False
    target_is_zero: bool = False
    extents: bool = True
    flush: bool = True
    synchronous: bool = False
    retries: int = 5
    keep_going: bool = False
    checkpoint: Path | None = None
    verify: bool = False
    repair: bool = False
    digest: str | None = None
    copier: Copier = "native"


Overlap = Literal["auto", "on", "off"]


@dataclass(frozen=True, slots=True)
class OverlapOptions:
    """Copying while the guest is converted (``v2v_async/overlap.py``).

    The early copy waits for the end of the conversion once more than ``waste`` bytes, or
    ``waste_percent`` of what the disks hold, have been copied in vain.
    """

    mode: Overlap = "auto"
    waste: int | None = None
    waste_percent: float = 20.0


@dataclass(frozen=True, slots=True)
class GuestOptions:
    """One guest, all six steps."""

    input: InputOptions
    convert: ConvertOptions
    output: OutputOptions
    copy: CopyOptions = field(default_factory=CopyOptions)
    overlap: OverlapOptions = field(default_factory=OverlapOptions)
