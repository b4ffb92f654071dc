"""libvirt's domain XML, as far as a conversion needs it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from v2v_async.model import Controller, SourceGuest


@dataclass(frozen=True, slots=True)
class DomainDisk:
    """A disk of a domain, as its XML names it: in the order in which virt-v2v counts them.

    ``location``: of ``file`` and ``block`` a path (for VMware ``[datastore] folder/name.vmdk``), of
    ``volume`` the volume's name in ``pool``, of ``network`` a URI (nbd, nbd+unix, http, https).
    ``format`` is the driver's type, None where the XML does not tell. ``checksum``: (method, hex).
    """

    kind: Literal["file", "block", "volume", "network"]
    location: str
    format: str | None = None
    pool: str | None = None
    controller: Controller | None = None
    checksum: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Domain:
    """A domain: ``guest`` is everything but its disks (``guest.disks`` is empty).

    ``vmware_datacenter`` and ``vmware_moref`` are what libvirt's esx driver adds.
    """

    guest: SourceGuest
    disks: list[DomainDisk] = field(default_factory=list)
    vmware_datacenter: str | None = None
    vmware_moref: str | None = None
    warnings: list[str] = field(default_factory=list)


def parse_domain(xml: bytes, what: str) -> Domain:
    """Read libvirt domain XML; ``what`` names it in messages.

    Entities, DTDs and the network are off, and the size of what it may become is bounded.

    Raises:
        SourceError: it is no domain XML, or a guest can't be made of it.
    """
    raise NotImplementedError
