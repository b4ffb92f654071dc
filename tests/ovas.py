"""OVAs for tests: descriptions in the dialects of VMware and VirtualBox, packed every way."""

from __future__ import annotations

import gzip
import hashlib
import io
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

ENVELOPE = """<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1"
 xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"
 xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
 xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData"
 xmlns:vmw="http://www.vmware.com/schema/ovf"
 xmlns:vbox="http://www.virtualbox.org/ovf/machine">
"""
VMDK_FORMAT = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"
IDE, SCSI, SATA = 5, 6, 20
Content = bytes | Path


def item(type_: int | str, instance: int, **fields: object) -> str:
    """One item of hardware; ``CoresPerSocket`` is VMware's."""
    told = {"InstanceID": instance, "ResourceType": type_, **fields}
    elements = [
        f"<{'vmw' if name == 'CoresPerSocket' else 'rasd'}:{name}>{value}"
        f"</{'vmw' if name == 'CoresPerSocket' else 'rasd'}:{name}>"
        for name, value in sorted(told.items())
    ]
    return f"<Item>{''.join(elements)}</Item>\n"


def cpu(count: int = 2, **fields: object) -> str:
    return item(3, 1, VirtualQuantity=count, **fields)


def memory(amount: int = 1024, units: str | None = "byte * 2^20") -> str:
    told = {"AllocationUnits": units} if units is not None else {}
    return item(4, 2, VirtualQuantity=amount, **told)


def controller(type_: int = SCSI, instance: int = 3, subtype: str = "lsilogic") -> str:
    return item(type_, instance, ResourceSubType=subtype, Address=0)


def disk(number: int = 1, *, parent: int | None = 3, address: int | None = None) -> str:
    fields: dict[str, object] = {"HostResource": f"ovf:/disk/vmdisk{number}"}
    if parent is not None:
        fields["Parent"] = parent
    fields["AddressOnParent"] = number - 1 if address is None else address
    return item(17, 10 + number, **fields)


def nic(instance: int, **fields: object) -> str:
    return item(10, instance, **fields)


def ovf(
    *hrefs: str,
    items: str | None = None,
    name: str | None = "web",
    compression: str | None = None,
    capacity: int | None = 16,
    file_attributes: str = "",
    disk_attributes: str = "",
    config: str = "",
    system: str = "",
    sections: str = "",
    says_format: str = VMDK_FORMAT,
) -> bytes:
    """A description with a disk for each of ``hrefs``; ``items`` is the hardware (default: some).

    ``config`` goes behind the hardware, ``system`` into the virtual system, ``sections`` before it.
    """
    hrefs = hrefs or ("disk1.vmdk",)
    if items is None:
        items = cpu() + memory() + controller()
        items += "".join(disk(number) for number in range(1, len(hrefs) + 1))
        items += nic(30, Connection="VM Network", ResourceSubType="E1000")
    packed = f' ovf:compression="{compression}"' if compression else ""
    files = "".join(
        f'<File ovf:href="{href}" ovf:id="file{number}"{packed} {file_attributes}/>'
        for number, href in enumerate(hrefs, 1)
    )
    size = (
        f'ovf:capacity="{capacity}" ovf:capacityAllocationUnits="byte * 2^20"' if capacity else ""
    )
    disks = "".join(
        f'<Disk {size} ovf:diskId="vmdisk{number}" ovf:fileRef="file{number}" '
        f'ovf:format="{says_format}" {disk_attributes}/>'
        for number in range(1, len(hrefs) + 1)
    )
    named = f"<Name>{name}</Name>" if name is not None else ""
    return (
        f"{ENVELOPE}<References>{files}</References><DiskSection><Info/>{disks}</DiskSection>"
        f'{sections}<VirtualSystem ovf:id="the-id"><Info/>{named}'
        f"<VirtualHardwareSection><Info/>{items}{config}</VirtualHardwareSection>{system}"
        "</VirtualSystem></Envelope>"
    ).encode()


def manifest(files: Mapping[str, Content], algorithm: str = "SHA256") -> bytes:
    """The manifest of some files, as VMware writes it."""
    lines = [
        f"{algorithm}({name})= {hashlib.new(algorithm.lower(), read(content)).hexdigest()}\n"
        for name, content in files.items()
    ]
    return "".join(lines).encode()


def read(content: Content) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def pack(path: Path, files: Mapping[str, Content], kind: str = "tar") -> Path:
    """Make an OVA of ``kind``: tar, ustar, gnu, pax, gzip, bzip2, xz, zstd, zip, stored, folder."""
    if kind == "folder":
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(read(content))
    elif kind in ("zip", "stored"):
        method = zipfile.ZIP_STORED if kind == "stored" else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, content in files.items():
                archive.writestr(name, read(content))
    elif kind == "zstd":
        pack(path.with_suffix(".plain"), files)
        subprocess.run(
            ["zstd", "-q", "--rm", "-o", str(path), str(path.with_suffix(".plain"))], check=True
        )
    else:
        mode = {"gzip": "w:gz", "bzip2": "w:bz2", "xz": "w:xz"}.get(kind, "w")
        form = {"ustar": tarfile.USTAR_FORMAT, "pax": tarfile.PAX_FORMAT}.get(
            kind, tarfile.GNU_FORMAT
        )
        with tarfile.open(path, mode, format=form) as archive:  # type: ignore[call-overload]
            for name, content in files.items():
                add(archive, name, content)
    return path


def add(archive: tarfile.TarFile, name: str, content: Content = b"", **fields: object) -> None:
    """Add a file; ``fields`` are those of its header (``type``, ``linkname``)."""
    info = tarfile.TarInfo(name)
    told = read(content)
    info.size = len(told)
    for field, value in fields.items():
        setattr(info, field, value)
    archive.addfile(info, io.BytesIO(told))


def gzipped(content: Content) -> bytes:
    return gzip.compress(read(content), 1, mtime=0)


def convert(raw: Path, target: Path, image_format: str, subformat: str | None = None) -> Path:
    """Convert a raw disk; ``subformat`` is VMDK's."""
    options = ["-o", f"subformat={subformat}"] if subformat else []
    if image_format == "vpc":
        options = ["-o", f"force_size=on,subformat={subformat or 'dynamic'}"]
    if image_format == "raw":
        shutil.copy(raw, target)
        return target
    convert = ["qemu-img", "convert", "-f", "raw", "-O", image_format, *options]
    subprocess.run([*convert, str(raw), str(target)], check=True)
    return target
