"""Where on this machine the disks of a target will be, as far as that is known beforehand.

::

    -o local, json, qemu, kubevirt    DIR/NAME-sda …        named by the output itself
    -o libvirt                        the pool's directory  asked of libvirt, once for each pool
    -o vdsm                           DIR/images/UUID/UUID  named by the plan
    -o rhv                            somewhere below DIR   room is known, names are not
    -o glance                         the v2v directory, until they are uploaded
    -o null, openstack, rhv-upload    nowhere here
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from v2v_async.model import SourceDisk, SourceGuest
from v2v_async.options import OutputOptions
from v2v_async.output.contract import Output
from v2v_async.output.directory import DirectoryOutput
from v2v_async.output.file_disks import FileDisks
from v2v_async.output.libvirt import LibvirtOutput
from v2v_async.output.libvirt_calls import connected
from v2v_async.output.libvirt_pool import DEFAULT_POOL, find_pool
from v2v_async.output.ovirt import nfs
from v2v_async.output.ovirt.storage_domain import RhvOutput
from v2v_async.output.ovirt.vdsm import VdsmOutput


@dataclass(frozen=True, slots=True)
class TargetFiles:
    """Files that will be made for a guest, or written in place.

    ``names``: their final paths, documents too. ``in_place``: what is there already and is written.
    ``room``: for each disk that is made, the folder that it needs room in. ``is_passing``: they are
    there only until they have been sent elsewhere.
    """

    names: tuple[Path, ...] = ()
    in_place: tuple[Path, ...] = ()
    room: tuple[tuple[Path, SourceDisk], ...] = ()
    is_preallocated: bool = False
    is_compressed: bool = False
    is_passing: bool = False


async def pool_directory(output: Output, options: OutputOptions) -> Path | None:
    """Return the directory of the storage pool of ``-o libvirt``; None for other outputs.

    Raises:
        TargetError: libvirt does not tell it.
    """
    if not isinstance(output, LibvirtOutput):
        return None
    storage = options.storage or DEFAULT_POOL
    async with connected(options.connection, options.password) as connection:
        pool = await find_pool(connection, options.connection, storage)
    return Path(pool.path or "/")


def target_files(
    output: Output,
    options: OutputOptions,
    name: str,
    source: SourceGuest,
    *,
    tmpdir: Path,
    pool: Path | None = None,
) -> TargetFiles:
    """Return where the disks of the target guest ``name`` will be.

    ``pool`` is what :func:`pool_directory` returned, ``tmpdir`` where v2v directories are made.

    Raises:
        UsageError, TargetError: a disk can't be where it is to be.
    """
    disks = source.disks
    if isinstance(output, DirectoryOutput):
        return _in_directory(output, name, disks)
    if isinstance(output, VdsmOutput):
        files = _made(output.disks, output.finals, disks)
        return replace(files, names=(*files.names, output.ovf_path))
    if isinstance(output, RhvOutput):
        # What is mounted for a look is not there now, and its room is known only there.
        is_here = not nfs.is_export(output.storage)
        folder = output.disks.directory
        return _somewhere_in(folder, output.disks, disks) if is_here else TargetFiles()
    if isinstance(output, LibvirtOutput) and pool is not None:
        file_disks = FileDisks.parse(replace(options, storage=str(pool)), "-o libvirt")
        return _made(file_disks, file_disks.disk_paths(len(disks), name), disks)
    if output.name == "glance":
        scratch = FileDisks.parse(replace(options, storage=str(tmpdir)), "-o glance")
        return replace(_somewhere_in(tmpdir, scratch, disks), is_passing=True)
    return TargetFiles()


def _in_directory(output: DirectoryOutput, name: str, disks: Sequence[SourceDisk]) -> TargetFiles:
    new: list[Path] = []
    new_disks: list[SourceDisk] = []
    there: list[Path] = []
    for path, disk in zip(output.disk_paths(len(disks), name), disks, strict=False):
        existing = output.existing(path)
        if existing is None:
            new.append(path)
            new_disks.append(disk)
        else:
            there.append(existing)
    files = _made(output.disks, new, new_disks)
    return replace(files, names=(*files.names, output.document_path(name)), in_place=tuple(there))


def _made(file_disks: FileDisks, paths: Sequence[Path], disks: Sequence[SourceDisk]) -> TargetFiles:
    pairs = tuple((path.parent, disk) for path, disk in zip(paths, disks, strict=False))
    return TargetFiles(
        names=tuple(paths),
        room=pairs,
        is_preallocated=file_disks.is_preallocated,
        is_compressed=file_disks.is_compressed,
    )


def _somewhere_in(folder: Path, file_disks: FileDisks, disks: Sequence[SourceDisk]) -> TargetFiles:
    made = _made(file_disks, [folder / str(disk.index) for disk in disks], disks)
    return replace(made, names=())
