"""VMDK disks on a host behind ssh: which file has the bytes, and in which format.

::

    guest.vmdk ──┬─ a descriptor with one flat extent ──> guest-flat.vmdk, raw (ESXi)
                 ├─ a sparse image, whole in itself ────> guest.vmdk, read by qemu
                 └─ a snapshot, several extents, RDM ───> refused: qemu can't follow it there
"""

from __future__ import annotations

import posixpath

from v2v_async.errors import SourceError
from v2v_async.input.checking import CheckedDisk
from v2v_async.input.ssh_files import RemoteFile, check_image, opened, remote_source
from v2v_async.input.vmdk_descriptor import (
    DELTA_MAGICS,
    MAX_SIZE,
    SPARSE_MAGIC,
    WHERE_QEMU_LOOKS,
    Descriptor,
    Extent,
    embedded_range,
    is_descriptor,
    parse_descriptor,
    parse_embedded,
)
from v2v_async.qemu_img import SECTOR
from v2v_async.ssh import LoginError, SshHost

_HEAD = 512
_OTHER_WAYS = (
    "delete (consolidate) the snapshots, or read the guest with -it vddk, or mount the storage "
    "here and use -i vmx without -it ssh"
)


async def check_remote_vmdk(host: SshHost, path: str) -> CheckedDisk:
    """Look at a VMDK of the host.

    Raises:
        LoginError: nobody can log in.
        SourceError: it can't be used; the message names it.
    """
    shown = host.uri(path)
    try:
        async with opened(host, path) as file:
            head = await file.read(_HEAD)
            if not is_descriptor(head):
                return await _whole(host, path, file, head)
            if file.size > MAX_SIZE:
                raise SourceError("its descriptor is larger than a descriptor can be")
            descriptor = parse_descriptor(await file.read(file.size))
        extent = _only_extent(descriptor)
        flat = posixpath.join(posixpath.dirname(path), extent.file_name or "")
        async with opened(host, flat) as file:
            needed = extent.sectors * SECTOR
            if file.size < needed:
                raise SourceError(
                    f"its extent ‘{host.uri(flat)}’ has {file.size} bytes of {needed}",
                    hint="is it being copied just now?",
                )
            size = await check_image(file, "raw")
        return CheckedDisk(remote_source(host, flat, "raw", size), host.uri(flat))
    except LoginError:
        raise
    except SourceError as error:
        raise SourceError(
            error.message if shown in error.message else f"the disk ‘{shown}’: {error.message}",
            hint=error.hint,
        ) from error


async def _whole(host: SshHost, path: str, file: RemoteFile, head: bytes) -> CheckedDisk:
    """Look at what is no descriptor: an image that has all in itself can be read."""
    if any(head.startswith(magic) for magic in DELTA_MAGICS):
        raise SourceError("it is a snapshot", hint=_OTHER_WAYS)
    if not head.startswith(SPARSE_MAGIC):
        raise SourceError(
            "it is not a VMDK",
            hint="the VMX file must name the disk's descriptor, not its -flat.vmdk",
        )
    place = embedded_range(head) or (0, 0)
    contents = [await file.read(length, offset) for offset, length in (place, WHERE_QEMU_LOOKS)]
    descriptor = parse_embedded(*contents)
    if descriptor is not None and descriptor.parent is not None:
        raise SourceError("it is a snapshot", hint=_OTHER_WAYS)
    if not any(head[12:20]):
        # The header tells of no data: qemu would follow the descriptor inside, on this machine.
        raise SourceError("its header says that it is empty")
    size = await check_image(file, "vmdk")
    return CheckedDisk(remote_source(host, path, "vmdk", size), host.uri(path))


def _only_extent(descriptor: Descriptor) -> Extent:
    if descriptor.parent is not None or any("SPARSE" in e.type for e in descriptor.extents):
        if descriptor.parent is None:
            raise SourceError(
                f"its kind (‘{descriptor.create_type}’) can't be read over ssh", hint=_OTHER_WAYS
            )
        raise SourceError(
            "it is a snapshot: the guest has snapshots, which can't be read over ssh",
            hint=_OTHER_WAYS,
        )
    if len(descriptor.extents) != 1:
        raise SourceError(
            f"it has {len(descriptor.extents)} extents; one can be read over ssh",
            hint="make one of them in VMware (vmkfstools -i, or vmware-vdiskmanager -r -t 2)",
        )
    extent = descriptor.extents[0]
    if not extent.is_flat or extent.file_name is None or extent.offset != 0:
        raise SourceError(
            f"its extent is of the kind {extent.type}, which can't be read over ssh",
            hint="a mapped device (RDM) must be converted to a disk in VMware, or use -it vddk",
        )
    return extent
