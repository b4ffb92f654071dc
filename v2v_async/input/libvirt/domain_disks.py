"""The disks and drives of a libvirt domain: which there are, where each is, on which bus."""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote

from lxml import etree

from v2v_async.errors import SourceError
from v2v_async.input.xml_source import elements, number, text
from v2v_async.model import Controller, SourceRemovable

ChecksumFail = Literal["error", "warn", "print"]
CHECKSUM_METHODS = {"md5": 32, "sha256": 64, "sha512": 128}
"""The methods of ``<checksum>``, and how many hexadecimal digits each has."""

_CONTROLLERS: dict[str, Controller] = {
    "ide": "ide",
    "sata": "sata",
    "scsi": "scsi",
    "virtio": "virtio-blk",
    "nvme": "nvme",
}
_CHECKSUM_FAIL: dict[str, ChecksumFail] = {
    "print": "print",
    "warn": "warn",
    "warning": "warn",
    "err": "error",
    "error": "error",
}
_NBD_PORT = 10809
_WEB_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+(%[A-Za-z0-9._-]+)?")
_PREFIXES = ("hd", "sd", "vd", "xvd", "fd")


@dataclass(frozen=True, slots=True)
class DomainDisk:
    """A disk of a domain, as its XML names it: in the order in which virt-v2v counts them.

    ``location``: of ``file`` and ``block`` a path (for VMware ``[datastore] folder/name.vmdk``), of
    ``volume`` the volume's name in ``pool``, of ``network`` a URI (nbd, nbd+unix, http, https).
    ``format`` is the driver's type, None where the XML does not tell. ``checksum``: (method, hex),
    and ``checksum_fail`` what happens where the disk has another one (``print``: it is only told).
    ``verify``: whether the certificate of an https server is checked. ``device``: its name in the
    guest's definition (``vda``).
    """

    kind: Literal["file", "block", "volume", "network"]
    location: str
    format: str | None = None
    pool: str | None = None
    controller: Controller | None = None
    checksum: tuple[str, str] | None = None
    checksum_fail: ChecksumFail = "error"
    verify: bool = True
    device: str | None = None


def read_disks(domain: etree._Element, what: str, warnings: list[str]) -> list[DomainDisk]:
    """Return the disks that can be converted; what is left out is told in ``warnings``.

    A disk without ``device`` is one: that is libvirt's default. (virt-v2v does not see it.)

    Raises:
        SourceError: a disk that is there makes no sense.
    """
    has_virtio_scsi = _has_virtio_scsi(domain)
    disks: list[DomainDisk] = []
    for node in elements(domain, "devices/disk[not(@device) or @device='disk']"):
        where = f"{what}: disk {len(disks) + 1}"
        disk = _disk(node, where, warnings, _controller(node, has_virtio_scsi))
        if disk is not None:
            disks.append(disk)
    passed = elements(domain, "devices/disk[@device='lun']")
    if passed:
        warnings.append(
            f"{what}: {len(passed)} SCSI device(s) passed through to the guest (<disk "
            "device='lun'>) are left out"
        )
    return disks


def _disk(
    node: etree._Element, where: str, warnings: list[str], controller: Controller | None
) -> DomainDisk | None:
    kind = text(node, "@type")
    image_format = text(node, "driver/@type")
    if image_format == "aio":  # Xen's word for a raw file
        image_format = "raw"
    checksum, checksum_fail = _checksum(node, where, warnings)
    pool: str | None = None
    verify = True
    match kind:
        case "file" | "block":
            location = text(node, "source/@file" if kind == "file" else "source/@dev")
        case "volume":
            location = text(node, "source/@volume")
            pool = text(node, "source/@pool")
            location = location if pool else None
        case "network":
            verify = text(node, "source/ssl/@verify") != "no"
            location = _uri(node, where, warnings)
            if location is None:
                return None
        case _:
            type_ = "no type" if kind is None else f"type ‘{kind}’"
            warnings.append(f"{where}: a disk of {type_} is left out: nothing here can read it")
            return None
    if location is None:
        warnings.append(f"{where}: a disk of type ‘{kind}’ without a source is left out")
        return None
    if elements(node, "source/slices"):
        raise SourceError(
            f"{where}: it is a slice of a larger image (<slices>), which is not read here",
            hint="copy it out first: qemu-img convert --image-opts driver=raw,offset=…,size=…",
        )
    if not location or "\n" in location:
        raise SourceError(
            f"{where}: the name of its source is {'empty' if not location else 'not one line'}"
        )
    return DomainDisk(
        kind=kind,
        location=location,
        format=image_format,
        pool=pool,
        controller=controller,
        checksum=checksum,
        checksum_fail=checksum_fail,
        verify=verify,
        device=text(node, "target/@dev"),
    )


def _checksum(
    node: etree._Element, where: str, warnings: list[str]
) -> tuple[tuple[str, str] | None, ChecksumFail]:
    """Return a disk's ``<checksum>`` as virt-v2v 2.8 and newer understand it (2.2 passes it by)."""
    if not elements(node, "checksum"):
        return None, "error"
    expected = (text(node, "checksum/text()") or "").strip().lower()
    method = text(node, "checksum/@method")
    fail = text(node, "checksum/@fail")
    if fail in (None, "ignore"):
        return None, "error"
    if method is None or fail not in _CHECKSUM_FAIL:
        problem = "no method" if method is None else f"the unknown fail='{fail}'"
        warnings.append(f"{where}: its <checksum> has {problem} and is not checked")
        return None, "error"
    assert fail is not None
    if method not in CHECKSUM_METHODS:
        raise SourceError(
            f"{where}: its <checksum> has the unknown method ‘{method}’",
            hint=f"the methods are: {', '.join(CHECKSUM_METHODS)}",
        )
    action = _CHECKSUM_FAIL[fail]
    if action == "print":
        return (method, ""), action
    if not re.fullmatch(f"[0-9a-f]{{{CHECKSUM_METHODS[method]}}}", expected):
        raise SourceError(
            f"{where}: its <checksum> is no {method}, which has {CHECKSUM_METHODS[method]} "
            "hexadecimal digits"
        )
    return (method, expected), action


def _uri(node: etree._Element, where: str, warnings: list[str]) -> str | None:
    """Return the URI of a disk of type network; None where nothing here reads it."""
    protocol = text(node, "source/@protocol")
    if protocol not in ("nbd", "http", "https"):
        told = "no protocol" if protocol is None else f"the protocol ‘{protocol}’"
        warnings.append(
            f"{where}: a network disk with {told} is left out: only nbd, http and https are read"
        )
        return None
    if elements(node, "source/auth") or elements(node, "source/cookies"):
        warnings.append(f"{where}: the <auth> and <cookies> of its source are not used")
    name = text(node, "source/@name") or ""
    if protocol == "nbd" and text(node, "source/host/@transport") == "unix":
        socket = text(node, "source/host/@socket")
        if not socket:
            raise SourceError(f"{where}: its Unix socket has no name")
        return f"nbd+unix:///{quote(name, safe='/')}?socket={quote(socket, safe='/')}"
    host = text(node, "source/host/@name")
    if not host:
        warnings.append(f"{where}: a network disk without a host is left out")
        return None
    if not _HOST.fullmatch(host):
        raise SourceError(f"{where}: ‘{host}’ is not the name of a host")
    if ":" in host:
        host = f"[{host}]"
    port = number(node, "source/host/@port", f"{where}: its port", least=1, most=65535)
    if protocol == "nbd":
        scheme = "nbds" if text(node, "source/@tls") == "yes" else "nbd"
        address = host if port in (None, _NBD_PORT) else f"{host}:{port}"
        return f"{scheme}://{address}/{quote(name, safe='/')}"
    address = host if port in (None, _WEB_PORTS[protocol]) else f"{host}:{port}"
    path = quote(name, safe="/:;=@+,!$&'()*~")
    query = text(node, "source/@query")
    return f"{protocol}://{address}/{path.removeprefix('/')}" + (
        f"?{quote(query, safe='/:;=@+,!$&()*~?%')}" if query else ""
    )


def _has_virtio_scsi(domain: etree._Element) -> bool:
    return bool(elements(domain, "devices/controller[@model='virtio-scsi']"))


def _controller(node: etree._Element, has_virtio_scsi: bool) -> Controller | None:
    bus = text(node, "target/@bus")
    if bus == "scsi" and has_virtio_scsi:
        return "virtio-scsi"
    return _CONTROLLERS.get(bus) if bus is not None else None


def read_removables(
    domain: etree._Element, what: str, warnings: list[str]
) -> list[SourceRemovable]:
    """Return the CD-ROM and floppy drives; media in them are not converted."""
    has_virtio_scsi = _has_virtio_scsi(domain)
    return [
        SourceRemovable(
            type="cdrom" if text(node, "@device") == "cdrom" else "floppy",
            controller=_controller(node, has_virtio_scsi),
            slot=_slot(text(node, "target/@dev"), what, warnings),
        )
        for node in elements(domain, "devices/disk[@device='cdrom' or @device='floppy']")
    ]


def _slot(device: str | None, what: str, warnings: list[str]) -> int | None:
    """Return which drive a device name means: hda is 0, sdb 1, sr2 (as virt-p2v writes) 2."""
    if device is None:
        return None
    # No more than eight, so that the number stays one that means something.
    if numbered := re.fullmatch(r"sr([0-9]{1,8})", device):
        return int(numbered[1])
    for prefix in _PREFIXES:
        letters = device.removeprefix(prefix)
        if letters != device and re.fullmatch("[a-z]{1,8}", letters):
            slot = 0
            for letter in letters:
                slot = slot * 26 + string.ascii_lowercase.index(letter) + 1
            return slot - 1
    warnings.append(f"{what}: the slot of a drive is unknown: its device name is ‘{device}’")
    return None
