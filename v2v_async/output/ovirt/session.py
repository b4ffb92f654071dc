"""A session with the engine for async callers, and what its storage and clusters are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
from lxml import etree

from v2v_async.errors import TargetError
from v2v_async.ovirt_engine import Engine, EngineLogin, number, text
from v2v_async.unwaited import run_unwaited

HOST_ID = Path("/etc/vdsm/vdsm.id")
"""There on oVirt's own hosts: what the engine knows this machine by."""

_BLOCK = ("iscsi", "fcp")
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.1, 2.0
# A session that is not ended ends by itself.
_LOGOUT_S = 5.0
_THREAD = "ovirt"


class Session:
    """An engine, asked in threads.

    What changes something is waited for even when cancelled, so that nobody has to guess whether
    it was done; ``gives_up``: that too is left alone when time is over.
    """

    def __init__(self, engine: Engine, *, gives_up: bool = False) -> None:
        self._engine = engine
        self._gives_up = gives_up
        self.login = engine.login

    async def get(self, path: str, **query: str) -> etree._Element:
        """Return what is at ``path``; raises as :meth:`Engine.get`."""
        call = partial(self._engine.get, path, query)
        return await run_unwaited(call, _THREAD)

    async def find(self, path: str) -> etree._Element | None:
        """Return what is at ``path``, None where there is nothing."""
        call = partial(self._engine.find, path)
        return await run_unwaited(call, _THREAD)

    async def post(
        self, path: str, body: etree._Element, query: Mapping[str, str] | None = None
    ) -> etree._Element:
        """Have something made or done; raises as :meth:`Engine.post`."""
        call = partial(self._engine.post, path, body, query)
        with anyio.CancelScope(shield=not self._gives_up):
            result = await run_unwaited(call, _THREAD)
        return result  # noqa: RET504 - mypy takes a scope for something that may swallow errors

    async def delete(self, path: str, **query: str) -> bool:
        """Have something removed; return whether it was there."""
        call = partial(self._engine.delete, path, query)
        with anyio.CancelScope(shield=not self._gives_up):
            result = await run_unwaited(call, _THREAD)
        return result  # noqa: RET504 - mypy takes a scope for something that may swallow errors


@asynccontextmanager
async def connected(login: EngineLogin, *, gives_up: bool = False) -> AsyncIterator[Session]:
    """Have a session with an engine; it is logged out at the end."""
    engine = Engine(login)
    try:
        yield Session(engine, gives_up=gives_up)
    finally:
        with anyio.move_on_after(_LOGOUT_S, shield=True):
            await run_unwaited(engine.close, _THREAD)


async def waiting(timeout_s: float) -> AsyncIterator[None]:
    """Yield now and then, until ``timeout_s`` is over: often at first, every 2 s in the end."""
    end = anyio.current_time() + timeout_s
    pause_s = _FIRST_PAUSE_S
    while True:
        yield
        left = end - anyio.current_time()
        if left <= 0:
            return
        await anyio.sleep(min(pause_s, left))
        pause_s = min(pause_s * 1.5, _LAST_PAUSE_S)


@dataclass(frozen=True, slots=True)
class Site:
    """Where the guest goes. ``free`` is bytes, None where the engine does not tell.

    ``host`` is this machine, where it is one of oVirt's hosts and can write to the domain.
    ``version`` is the engine's.
    """

    domain: str
    is_block: bool
    free: int | None
    cluster: str
    cluster_name: str
    architecture: str
    version: tuple[int, int]
    host: str | None = None


async def find_site(session: Session, storage: str, cluster: str, *, look_for_host: bool) -> Site:
    """Look up the storage domain and the cluster, and that they belong together.

    ``storage`` has no characters that the engine's search gives a meaning to.

    Raises:
        TargetError: one is not there, or can't be used.
    """
    root = await session.get("")
    centers = await session.get("datacenters", search=f"storage.name={storage}")
    center = centers.find("data_center")
    if center is None:
        raise await _no_center(session, storage)
    center_id, center_name = center.get("id", ""), text(center, "name")
    domains = await session.get(f"datacenters/{center_id}/storagedomains")
    domain = _named(domains, "storage_domain", storage)
    if domain is None:
        raise await _no_center(session, storage)
    _check_domain(domain, storage)
    clusters = await session.get(f"datacenters/{center_id}/clusters")
    found = _named(clusters, "cluster", cluster)
    if found is None:
        names = ", ".join(text(each, "name") for each in clusters.iterfind("cluster"))
        raise TargetError(
            f"the data center ‘{center_name}’, which has the storage domain ‘{storage}’, has no "
            f"cluster ‘{cluster}’",
            hint=f"give one with -oo rhv-cluster=NAME; it has: {names or 'none'}",
        )
    architecture = text(found, "cpu/architecture", "undefined")
    if architecture == "undefined":
        raise TargetError(
            f"the cluster ‘{cluster}’ has no processor architecture yet",
            hint="add a host to it first, or give another one: -oo rhv-cluster=NAME",
        )
    version = "product_info/version"
    return Site(
        domain=domain.get("id", ""),
        is_block=text(domain, "storage/type") in _BLOCK,
        free=number(domain, "available"),
        cluster=found.get("id", ""),
        cluster_name=cluster,
        architecture=architecture,
        version=(number(root, f"{version}/major") or 0, number(root, f"{version}/minor") or 0),
        host=await _find_host(session, center_name) if look_for_host else None,
    )


async def _no_center(session: Session, storage: str) -> TargetError:
    """Return the error for a domain that no data center has."""
    found = await session.get("storagedomains", search=f"name={storage}")
    if _named(found, "storage_domain", storage) is not None:
        return TargetError(
            f"the storage domain ‘{storage}’ is not attached to a data center",
            hint="attach it in the engine: Storage, Domains, Data Center",
        )
    everything = await session.get("storagedomains")
    names = ", ".join(
        text(each, "name")
        for each in everything.iterfind("storage_domain")
        if text(each, "type") == "data"
    )
    return TargetError(
        f"the engine ‘{session.login.address}’ has no storage domain ‘{storage}’",
        hint=f"give one with -os NAME; it has: {names or 'none for data'}",
    )


def _check_domain(domain: etree._Element, storage: str) -> None:
    kind = text(domain, "type", "data")
    if kind != "data":
        raise TargetError(
            f"the storage domain ‘{storage}’ is of the type {kind}, not for data",
            hint="give a data domain with -os; export domains are written with -o rhv",
        )
    status = text(domain, "status", "active")
    if status != "active":
        raise TargetError(
            f"the storage domain ‘{storage}’ is not active but in the state ‘{status}’",
            hint="activate it in the engine: Storage, Domains, Data Center",
        )


async def _find_host(session: Session, center: str) -> str | None:
    """Return the id of this machine, where it is a host of the data center that is up."""
    try:
        identity = HOST_ID.read_text().strip()
    except OSError:
        return None
    # What is not plain would be read as more of the search.
    if not identity or not identity.replace("-", "").replace("_", "").isalnum():
        return None
    hosts = await session.get(
        "hosts", search=f'hw_id={identity} and datacenter="{center}" and status=Up'
    )
    host = hosts.find("host")
    return None if host is None else host.get("id")


def _named(found: etree._Element, tag: str, name: str) -> etree._Element | None:
    return next((each for each in found.iterfind(tag) if text(each, "name") == name), None)
