"""The storage pool that ``-os`` names: by name, UUID or directory; or what to do without one."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from v2v_async.errors import TargetError
from v2v_async.output.libvirt_calls import FoundPool, TargetConnection
from v2v_async.redact import redact

DEFAULT_POOL = "default"
"""As virt-v2v's."""

# Their volumes are files of a directory.
_KINDS = ("dir", "fs", "netfs")


async def find_pool(connection: TargetConnection, uri: str | None, storage: str) -> FoundPool:
    """Return the pool; it is active, and has an absolute ``path``. ``uri`` is for hints.

    Raises:
        TargetError: there is none, or disks can't be files in it.
    """
    pools = await connection.pools()
    pool = next((each for each in pools if each.name == storage), None)
    pool = pool or next((each for each in pools if each.uuid == storage.lower()), None)
    directory = Path(storage)
    if pool is None and directory.is_dir():
        # Of several with the same directory, one that is active.
        same = [each for each in pools if _is_at(each, directory)]
        pool = next(iter(sorted(same, key=lambda each: not each.is_active)), None)
    if pool is None:
        raise _no_pool(connection.shown, uri, storage, pools)
    if pool.kind not in _KINDS:
        raise TargetError(
            f"the storage pool ‘{pool.name}’ is of the type ‘{pool.kind}’: -o libvirt needs one "
            "whose volumes are files in a directory (dir, fs, netfs)",
            hint=f"name another with -os: {virsh(uri, 'pool-list', '--type', ','.join(_KINDS))}",
        )
    if not pool.is_active:
        raise TargetError(
            f"the storage pool ‘{pool.name}’ is not active",
            hint=f"start it: {virsh(uri, 'pool-start', pool.name)}",
        )
    if not pool.path or not os.path.isabs(pool.path):
        raise TargetError(
            f"the storage pool ‘{pool.name}’ does not say where its directory is",
            hint=f"look at {virsh(uri, 'pool-dumpxml', pool.name)}, or name another with -os",
        )
    return pool


def virsh(uri: str | None, *words: str) -> str:
    """Return a command for a person to run."""
    connect = ["-c", redact(uri)] if uri else []
    return shlex.join(["virsh", *connect, *words])


def _is_at(pool: FoundPool, directory: Path) -> bool:
    if pool.kind not in _KINDS or not pool.path:
        return False
    try:
        return directory.samefile(pool.path)
    except OSError:
        return False


def _no_pool(host: str, uri: str | None, storage: str, pools: Sequence[FoundPool]) -> TargetError:
    create = ("pool-create-as", "--type", "dir")
    if Path(storage).is_dir():
        path = Path(storage).absolute()
        command = virsh(uri, *create, "--name", path.name or "root", "--target", str(path))
        return TargetError(
            f"‘{storage}’ is no storage pool of {host}, nor the directory of one",
            hint=f"make a pool of it: {command}; or write just files: -o local",
        )
    default = " (the default)" if storage == DEFAULT_POOL else ""
    names = ", ".join(f"‘{pool.name}’" for pool in sorted(pools, key=lambda each: each.name))
    command = virsh(uri, *create, "--name", DEFAULT_POOL, "--target", "DIR")
    return TargetError(
        f"{host} has no storage pool ‘{storage}’{default}",
        hint=f"it has {names}: give one with -os" if names else f"it has none; make one: {command}",
    )
