"""What a batch is asked to do: the document a person writes.

Names are those of virt-v2v(1) written out. Everything that is said of a guest may be said once for
all in ``[defaults]``; tables are merged key by key, and the guest's own word wins.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from v2v_async.units import parse_duration, parse_rate, parse_size

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]


def _read(parse: Any) -> BeforeValidator:
    """Let a number be itself and a text be read."""
    return BeforeValidator(lambda value: parse(value) if isinstance(value, str) else value)


def _text_only(value: Any) -> Any:
    """Refuse a number for a time: YAML reads 22:00 without quotes as 1320."""
    if isinstance(value, int | float):
        raise ValueError('write the time in quotes: "22:00"')
    return value


def _or_text(number: str, pattern: str, **bound: int) -> dict[str, Any]:
    """Return what the JSON Schema says of a number that may be written with its unit."""
    return {"type": [number, "string"], "pattern": f"^{pattern}$", **bound}


Size = Annotated[
    int,
    _read(parse_size),
    Field(
        ge=0,
        json_schema_extra=_or_text(
            "integer", r"\s*\d+(\.\d+)?\s*[BKMGTPbkmgtp]?([iI][bB])?\s*", minimum=0
        ),
    ),
]
"""Bytes: ``512M``, ``1.5G`` (powers of 1024), or a number."""

Rate = Annotated[
    int,
    _read(parse_rate),
    Field(
        gt=0,
        json_schema_extra=_or_text(
            "integer",
            r"\s*\d+(\.\d+)?([KMGTPkmgtp]?| ?([KMGTPkmgtp]i?)?(bits?|b|bytes?|B)(/s|ps))\s*",
            exclusiveMinimum=0,
        ),
    ),
]
"""Bytes a second: ``50MB/s``, ``400Mbit/s``; ``400M`` is bits, as in virt-v2v."""

Duration = Annotated[
    float,
    _read(parse_duration),
    Field(
        ge=0,
        json_schema_extra=_or_text(
            "number", r" *(?=\d)(\d+ *d *)?(\d+ *h *)?(\d+ *m *)?(\d+(\.\d+)? *s *)?", minimum=0
        ),
    ),
]
"""Seconds: ``30s``, ``10m``, ``2h``, or a number."""

Count = Annotated[int, Field(ge=1)]

Clock = Annotated[
    time,
    BeforeValidator(_text_only),
    # Not "format": "time", which wants a time zone.
    WithJsonSchema({"type": "string", "pattern": r"^([01]\d|2[0-3]):[0-5]\d(:[0-5]\d)?$"}),
]
"""A time of the day: ``22:00:00`` in TOML, ``"22:00"`` in YAML."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class InputPlan(_Part):
    """Where a guest comes from."""

    type: str = Field(default="libvirt", description="-i: disk, libvirt, libvirtxml, ova or vmx")
    source: str | list[str] = Field(
        default=[],
        description="what is to be converted: a name or a file; of type disk all its disks",
        examples=["web1", ["/vms/web1-system.img", "/vms/web1-data.qcow2"]],
    )
    connection: str | None = Field(
        default=None,
        description="-ic: a libvirt URI",
        examples=["vpx://root@vcenter.example.com/Datacenter/esx1.example.com?no_verify=1"],
    )
    transport: str | None = Field(default=None, description="-it: ssh or vddk", examples=["vddk"])
    format: str | None = Field(
        default=None,
        description="-if: format of the disks (default: found out)",
        examples=["raw", "qcow2"],
    )
    options: dict[str, str | bool] = Field(
        default={},
        description="-io; true for an option without value",
        examples=[{"vddk-libdir": "/opt/vmware-vix-disklib-distrib"}],
    )
    password_file: str | None = Field(
        default=None,
        description="-ip: a file whose only line is the password",
        examples=["/root/vcenter.password"],
    )


class OutputPlan(_Part):
    """Where it goes."""

    type: str = Field(
        default="libvirt",
        description="-o: libvirt, local, qemu, json, kubevirt, openstack, glance, rhv, "
        "rhv-upload, vdsm or null",
    )
    name: str | None = Field(
        default=None,
        description="-on: the guest's name on the target (default: as on the source)",
        examples=["web1-new"],
    )
    storage: str | None = Field(
        default=None,
        description="-os: directory, pool or storage domain",
        examples=["/var/lib/libvirt/images"],
    )
    connection: str | None = Field(
        default=None, description="-oc: where the target is managed", examples=["qemu:///system"]
    )
    format: str | None = Field(
        default=None,
        description="-of: raw or qcow2 (default: as the target likes it)",
        examples=["qcow2", "raw"],
    )
    allocation: Literal["sparse", "preallocated"] | None = Field(
        default=None, description="-oa (default: sparse)", examples=["sparse", "preallocated"]
    )
    options: dict[str, str | bool] = Field(
        default={},
        description="-oo; true for an option without value",
        examples=[{"compressed": True}],
    )
    password_file: str | None = Field(
        default=None,
        description="-op: a file whose only line is the password",
        examples=["/root/ovirt.password"],
    )


class NetworkPlan(_Part):
    """Which network its NICs are on."""

    networks: list[str] = Field(
        default=[],
        description="-n: IN:OUT, or OUT for all others",
        examples=[["VM Network:lan", "default"]],
    )
    bridges: list[str] = Field(
        default=[], description="-b: the same for bridges", examples=[["xenbr0:br0"]]
    )
    macs: list[str] = Field(
        default=[],
        description="--mac: MAC:network|bridge|ip:OUT",
        examples=[["52:54:00:01:02:03:network:dmz"]],
    )


class ConvertPlan(_Part):
    """How it is converted."""

    root: str | None = Field(
        default=None,
        description="--root: which of several operating systems: first, single or a device",
        examples=["first", "single", "/dev/sda2"],
    )
    keys: list[str] = Field(
        default=[],
        description="--key: ID:file:FILE or ID:clevis, for encrypted disks; no passphrases here",
        examples=[["all:file:/root/luks.key"]],
    )


class CopyPlan(_Part):
    """How its disks are copied."""

    verify: bool = Field(default=False, description="--verify: read both sides again")
    retries: int | None = Field(
        default=None,
        ge=0,
        description="--retries of one request (default: 5)",
        examples=[5],
    )


class GuestDefaults(_Part):
    """What may be said of a guest, or of all."""

    input: InputPlan = InputPlan()
    output: OutputPlan = OutputPlan()
    network: NetworkPlan = NetworkPlan()
    convert: ConvertPlan = ConvertPlan()
    copy_: CopyPlan = Field(default=CopyPlan(), alias="copy")
    options: list[str] = Field(
        default=[],
        description="more options of virt-v2v, word by word",
        examples=[["--bandwidth", "400M"]],
    )
    priority: int = Field(default=0, description="higher goes first")
    group: str | None = Field(
        default=None, description="name of a group in [limits.groups]", examples=["web"]
    )
    datastore: str | None = Field(
        default=None, description="name in [limits.datastores]", examples=["san1"]
    )
    memory: Size = Field(
        default=2 << 30,
        description="memory of its conversion, with the appliance's",
        examples=["2G"],
    )
    scratch: Size = Field(
        default=1 << 30, description="space that its overlays may take", examples=["1G"]
    )


class GuestPlan(GuestDefaults):
    """One guest after defaults and patterns; ``name`` is its label in this batch."""

    name: str = Field(min_length=1)

    def words(self) -> list[str]:
        """Return virt-v2v's command line for it, without the program; ``""`` is no value."""
        return list(_words(self))


class GroupLimits(_Part):
    """Limits of a group of guests, a source host, a datastore or a target."""

    connections: Count | None = Field(
        default=None, description="connections for copies at once", examples=[8]
    )
    conversions: Count | None = Field(default=None, description="conversions at once", examples=[1])
    disks: Count | None = Field(default=None, description="disks copied at once", examples=[4])
    bandwidth: Rate | None = Field(
        default=None, description="all its copies together", examples=["400Mbit/s"]
    )


class Limits(_Part):
    """What all guests together may take. What is not given is chosen by the machine's size."""

    conversions: Count | None = Field(
        default=None,
        description="appliances at once (default: three for two processors, if there is memory)",
        examples=[2],
    )
    disks: Count = Field(default=8, description="disks copied at once")
    connections: Count = Field(default=64, description="connections to sources together")
    memory: Size | None = Field(
        default=None,
        description="for conversions together (default: all but 2G)",
        examples=["12G"],
    )
    scratch: Size | None = Field(
        default=None,
        description="for overlays together (default: 90% of what is free in $TMPDIR)",
        examples=["200G"],
    )
    bytes_in_flight: Size = Field(
        default=512 << 20, description="data of copies in memory", examples=["512M"]
    )
    bandwidth: Rate | None = Field(
        default=None, description="of all copies together", examples=["100MB/s", "800Mbit/s"]
    )
    hosts: dict[str, GroupLimits] = Field(
        default={}, description="by host of the source, as in its URI"
    )
    datastores: dict[str, GroupLimits] = Field(
        default={}, description="by the datastore that guests name"
    )
    targets: dict[str, GroupLimits] = Field(
        default={},
        description="by where guests go: the output's storage, else its connection, else its type",
    )
    groups: dict[str, GroupLimits] = Field(default={}, description="by the group that guests name")


class Window(_Part):
    """A part of the week in which other limits hold, in local time; it may pass midnight."""

    days: list[Day] = Field(
        default=["mon", "tue", "wed", "thu", "fri", "sat", "sun"], description="on which it begins"
    )
    begin: Clock = Field(description="when it opens", examples=["08:00:00"])
    end: Clock = Field(
        description="when it closes; before ‘begin’: on the next day", examples=["18:00:00"]
    )
    bandwidth: Rate | None = Field(
        default=None, description="in place of the limit's or the group's", examples=["20MB/s"]
    )
    conversions: int | None = Field(
        default=None, ge=0, description="at once; 0: none begins", examples=[1]
    )
    disks: int | None = Field(
        default=None, ge=0, description="copied at once; 0: no copy begins", examples=[2]
    )
    group: str | None = Field(default=None, description="only for this group", examples=["web"])


class Retries(_Part):
    """How often a guest is tried again, and when."""

    attempts: Count = Field(default=3, description="in all, for one guest")
    delay: Duration = Field(
        default=30.0,
        description="before the second attempt; doubles each time",
        examples=["30s"],
    )
    longest_delay: Duration = Field(
        default=900.0, description="no pause is longer", examples=["15m"]
    )
    budget: int = Field(default=50, ge=0, description="retries of the whole batch")


class Batch(_Part):
    """What a plan says of all its guests together."""

    version: Literal[1] = Field(default=1, description="of this format")
    name: str = Field(default="batch", description="of the run, where --name gives none")
    limits: Limits = Limits()
    windows: list[Window] = Field(
        default=[], description="parts of the week in which other limits hold; the last one wins"
    )
    retries: Retries = Retries()


class Plan(Batch):
    """A whole batch, patterns resolved."""

    guests: list[GuestPlan]


def _words(guest: GuestPlan) -> Iterator[str]:
    single: tuple[tuple[str, str | None], ...] = (
        ("-i", guest.input.type),
        ("-ic", guest.input.connection),
        ("-it", guest.input.transport),
        ("-if", guest.input.format),
        ("-ip", guest.input.password_file),
        ("-o", guest.output.type),
        ("-on", guest.output.name),
        ("-os", guest.output.storage),
        ("-oc", guest.output.connection),
        ("-of", guest.output.format),
        ("-oa", guest.output.allocation),
        ("-op", guest.output.password_file),
        ("--root", guest.convert.root),
    )
    for option, value in single:
        if value:  # "" takes a default back
            yield from (option, value)
    for option, pairs in (("-io", guest.input.options), ("-oo", guest.output.options)):
        for name, setting in pairs.items():
            if setting is not False:
                yield from (option, name if setting is True else f"{name}={setting}")
    for option, values in (
        ("-n", guest.network.networks),
        ("-b", guest.network.bridges),
        ("--mac", guest.network.macs),
        ("--key", guest.convert.keys),
    ):
        for each in values:
            yield from (option, each)
    if guest.copy_.verify:
        yield "--verify"
    if guest.copy_.retries is not None:
        yield from ("--retries", str(guest.copy_.retries))
    yield from guest.options
    sources = guest.input.source
    yield "--"
    yield from [sources] if isinstance(sources, str) else sources
