"""What ``-o libvirt`` asks of a host, and has it do.

Of each call: it raises TargetError where libvirt refuses or does not answer in time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from lxml import etree

from v2v_async.libvirt_connection import TARGET, LibvirtConnection, connected_as, libvirt_module
from v2v_async.secret import Secret

DEFINE_TIMEOUT_S = 120.0
"""Where /dev/kvm is there and of no use, the system's daemon tries it again whenever it asks qemu
what that can do: 40 to 70 s were measured on a busy machine."""


@dataclass(frozen=True, slots=True)
class FoundPool:
    """A storage pool. ``kind`` is libvirt's: dir, netfs, logical …; ``path``: its target, if any.

    Only an active pool has a certain path.
    """

    name: str
    uuid: str
    kind: str
    path: str | None
    is_active: bool


class TargetConnection(LibvirtConnection):
    """A connection to the host that takes a guest; made by :func:`connected`."""

    async def has_domain(self, name: str) -> bool:
        """Whether a domain of this name is there, active or not."""
        libvirt = libvirt_module()

        def look_up() -> bool:
            return self._found(lambda: self._raw.lookupByName(name), libvirt.VIR_ERR_NO_DOMAIN)

        return await self._ask(look_up, f"{self.shown} does not say whether ‘{name}’ is there")

    async def pools(self) -> list[FoundPool]:
        """Return all storage pools, active or not."""

        def read() -> list[FoundPool]:
            found = []
            for pool in self._raw.listAllStoragePools(0):
                # One that was removed meanwhile is none.
                with suppress(libvirt_module().libvirtError):
                    found.append(_found_pool(pool))
            return found

        return await self._ask(read, f"the storage pools of {self.shown} can't be listed")

    async def refresh_pool(self, uuid: str) -> None:
        """Have libvirt look at what is in a pool."""
        await self._ask(
            lambda: self._raw.storagePoolLookupByUUIDString(uuid).refresh(0),
            "the storage pool can't be refreshed",
        )

    async def has_volume(self, pool_uuid: str, name: str) -> bool:
        """Whether a pool, as it was last refreshed, has this volume."""

        def look_up() -> bool:
            pool = self._raw.storagePoolLookupByUUIDString(pool_uuid)
            return self._found(
                lambda: pool.storageVolLookupByName(name), libvirt_module().VIR_ERR_NO_STORAGE_VOL
            )

        return await self._ask(look_up, f"the volume ‘{name}’ can't be looked up")

    async def capabilities(self) -> bytes:
        """Return the XML of what the host can run."""
        what = f"{self.shown} does not tell what it can run"
        return await self._ask(lambda: str(self._raw.getCapabilities()).encode(), what)

    async def domain_capabilities(self, arch: str, machine: str, type_: str) -> bytes | None:
        """Return the XML of what such a domain can have; None where no such domain can be."""

        def read() -> bytes | None:
            try:
                return str(self._raw.getDomainCapabilities(None, arch, machine, type_, 0)).encode()
            except libvirt_module().libvirtError as error:
                if error.get_error_code() in (
                    libvirt_module().VIR_ERR_INVALID_ARG,
                    libvirt_module().VIR_ERR_CONFIG_UNSUPPORTED,
                ):
                    return None
                raise

        return await self._ask(read, f"{self.shown} does not tell what {arch} guests can have")

    async def network_is_active(self, name: str) -> bool | None:
        """Whether a network is active; None where there is no such network."""
        libvirt = libvirt_module()

        def look_up() -> bool | None:
            try:
                return bool(self._raw.networkLookupByName(name).isActive())
            except libvirt.libvirtError as error:
                if error.get_error_code() in (
                    libvirt.VIR_ERR_NO_NETWORK,
                    libvirt.VIR_ERR_NO_SUPPORT,
                ):
                    return None
                raise

        return await self._ask(look_up, f"the network ‘{name}’ can't be looked up")

    async def is_session(self) -> bool:
        """Whether this is a user's own daemon, which has no more rights than the user."""
        what = f"{self.shown} does not tell its URI"
        uri = await self._ask(lambda: str(self._raw.getURI()), what)
        return urlsplit(uri).path.rstrip("/").endswith("/session")

    async def define(self, xml: bytes) -> None:
        """Define a domain.

        A call that is cancelled or takes too long may still make it: look with :meth:`undefine`.
        """
        await self._ask(
            lambda: self._raw.defineXML(xml.decode()),
            f"{self.shown} does not define the new guest",
            timeout_s=DEFINE_TIMEOUT_S,
        )

    async def undefine(self, uuid: str) -> bool:
        """Remove a domain that is off, and its firmware's variables; False where there is none."""
        libvirt = libvirt_module()

        def remove() -> bool:
            try:
                domain = self._raw.lookupByUUIDString(uuid)
            except libvirt.libvirtError as error:
                if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                    return False
                raise
            domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_NVRAM)
            return True

        return await self._ask(remove, f"the guest {uuid} can't be undefined")

    @staticmethod
    def _found(look_up: Callable[[], object], absent: int) -> bool:
        try:
            look_up()
        except libvirt_module().libvirtError as error:
            if error.get_error_code() == absent:
                return False
            raise
        return True


def connected(
    uri: str | None, password: Secret | None
) -> AbstractAsyncContextManager[TargetConnection]:
    """Have a connection for the duration of a block; ``uri`` None: libvirt's own choice.

    Raises:
        DependencyError: the bindings are not installed.
        TargetError: no connection can be made.
    """
    return connected_as(TargetConnection, uri, password, TARGET)


def _found_pool(pool: Any) -> FoundPool:
    root = etree.fromstring(str(pool.XMLDesc(0)).encode(), etree.XMLParser(resolve_entities=False))
    return FoundPool(
        name=str(pool.name()),
        uuid=str(pool.UUIDString()),
        kind=root.get("type", ""),
        path=root.findtext("target/path"),
        is_active=bool(pool.isActive()),
    )
