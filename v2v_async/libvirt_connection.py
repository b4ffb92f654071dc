"""libvirt, asked from asyncio. The only module that imports ``libvirt``, and only when it is used.

Every call runs in a thread: the bindings wait for the daemon, which may be far away. A call that is
cancelled is left behind. Its thread is a daemon: anyio's would hold up the end of the program until
libvirt gives up, which it does after minutes or, where nobody answers, never.
"""

from __future__ import annotations

import asyncio
import shlex
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar, cast
from urllib.parse import urlsplit

import anyio
from lxml import etree

from v2v_async.errors import DependencyError, SourceError, TargetError
from v2v_async.redact import redact
from v2v_async.secret import Secret

CONNECT_TIMEOUT_S = 60.0
"""A login over ssh to a slow machine takes seconds; what takes longer waits for an answer that
nobody will give, such as a question about a host key."""
CALL_TIMEOUT_S = 60.0
"""A running daemon answers in milliseconds; a storage pool may have to wake up its storage."""

_CLOSE_TIMEOUT_S = 5.0
# virStorageVolType, in its order.
_VOLUME_KINDS = ("file", "block", "dir", "network", "netdir", "ploop")
_SHOWN_NAMES = 10

_T = TypeVar("_T")
Activity = Literal["off", "running", "paused", "shutting down", "suspended"]


@dataclass(frozen=True, slots=True)
class Side:
    """Which end of a conversion a connection is for: its errors, and its options in hints."""

    error: type[SourceError] | type[TargetError]
    uri_option: str
    password_option: str


SOURCE = Side(SourceError, "-ic", "-ip")
TARGET = Side(TargetError, "-oc", "-op")


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


@dataclass(frozen=True, slots=True)
class FoundDomain:
    """A domain. ``xml`` is its description, whole; ``has_saved_state``: of a managed save."""

    name: str
    xml: bytes
    activity: Activity
    has_saved_state: bool


@dataclass(frozen=True, slots=True)
class FoundVolume:
    """A storage volume. ``kind`` is libvirt's: file, block, dir …; ``xml`` is its description."""

    path: str
    kind: str
    xml: bytes


@cache
def _libvirt() -> Any:
    """Import the bindings, and keep libvirt from printing errors: they are raised as well.

    Raises:
        DependencyError: they are not installed.
    """
    try:
        import libvirt
    except ImportError as error:
        raise DependencyError(
            "libvirt's Python bindings are not installed",
            hint="install them: apt-get install python3-libvirt, or dnf install python3-libvirt",
        ) from error
    libvirt.registerErrorHandler(lambda context, error: None, None)
    return libvirt


def is_remote(uri: str | None) -> bool:
    """Whether ``uri`` names a daemon of another machine, whose files are not here."""
    address = urlsplit(uri or "")
    return bool(address.hostname) and not address.scheme.startswith("test")


class LibvirtConnection:
    """An open connection; made by :func:`connected`."""

    def __init__(self, raw: Any, shown: str, side: Side = SOURCE) -> None:
        self._raw = raw
        self._side = side
        self.shown = shown
        """The URI as a person may see it."""
        self._lock = threading.Lock()
        self._calls = 0
        self._is_closing = False

    async def _ask(self, call: Callable[[], _T], what: str, *, hint: str | None = None) -> _T:
        return await _call(lambda: self._run(call), what, hint=hint, error=self._side.error)

    def _run(self, call: Callable[[], _T]) -> _T:
        """Call, in a thread; the last call of a connection that was given up closes it."""
        with self._lock:
            if self._is_closing:
                raise RuntimeError("nobody waits for this call any more")
            self._calls += 1
        try:
            return call()
        finally:
            self._end_call()

    def _end_call(self) -> None:
        with self._lock:
            self._calls -= 1
            is_last = self._is_closing and self._calls == 0
        if is_last:
            _close(self._raw)

    def close(self) -> None:
        """Close it, or leave that to a call that still runs: libvirt would use what is freed."""
        with self._lock:
            self._is_closing = True
            is_idle = self._calls == 0
        if is_idle:
            _close(self._raw)

    async def domain(self, name: str) -> FoundDomain:
        """Return the domain of this name or UUID.

        Raises:
            SourceError: there is none, or libvirt fails.
        """
        return await self._ask(lambda: self._domain(name), f"the guest ‘{name}’ can't be read")

    def _domain(self, name: str) -> FoundDomain:
        libvirt = _libvirt()
        domain = self._look_up(name)
        activities: dict[int, Activity] = {
            libvirt.VIR_DOMAIN_RUNNING: "running",
            libvirt.VIR_DOMAIN_BLOCKED: "running",
            libvirt.VIR_DOMAIN_PAUSED: "paused",
            libvirt.VIR_DOMAIN_SHUTDOWN: "shutting down",
            libvirt.VIR_DOMAIN_PMSUSPENDED: "suspended",
        }
        has_saved_state = False
        with suppress(libvirt.libvirtError):  # not every driver knows of it
            has_saved_state = bool(domain.hasManagedSaveImage(0))
        return FoundDomain(
            name=str(domain.name()),
            # With what is secret in it: only so can be told whether the display has a password.
            xml=str(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_SECURE)).encode(),
            activity=activities.get(domain.state()[0], "off"),
            has_saved_state=has_saved_state,
        )

    def _look_up(self, name: str) -> Any:
        libvirt = _libvirt()
        # One that has the name goes before one that has it as UUID.
        for look_up in (self._raw.lookupByName, self._raw.lookupByUUIDString):
            try:
                return look_up(name)
            except libvirt.libvirtError as error:
                if error.get_error_code() not in (
                    libvirt.VIR_ERR_NO_DOMAIN,
                    libvirt.VIR_ERR_INVALID_ARG,  # not a UUID
                ):
                    raise
        names = sorted(str(domain.name()) for domain in self._raw.listAllDomains(0))
        more = len(names) - _SHOWN_NAMES
        told = ", ".join(f"‘{each}’" for each in names[:_SHOWN_NAMES])
        raise SourceError(
            f"{self.shown} has no guest ‘{name}’",
            hint=f"it has {told}{f' and {more} more' if more > 0 else ''}"
            if names
            else "it has no guests at all: is that the right connection (-ic)?",
        )

    async def volume(self, pool: str, name: str) -> FoundVolume:
        """Return a volume of a storage pool.

        Raises:
            SourceError: there is no such pool or volume, the pool is not active, or libvirt fails.
        """
        what = f"the volume ‘{name}’ of the storage pool ‘{pool}’ can't be found"
        hint = f"virsh pool-list --all, virsh vol-list {shlex.quote(pool)} list what there is"
        return await self._ask(lambda: self._volume(pool, name), what, hint=hint)

    def _volume(self, pool: str, name: str) -> FoundVolume:
        volume = self._raw.storagePoolLookupByName(pool).storageVolLookupByName(name)
        number = volume.info()[0]
        kind = _VOLUME_KINDS[number] if number < len(_VOLUME_KINDS) else str(number)
        return FoundVolume(str(volume.path()), kind, str(volume.XMLDesc(0)).encode())

    async def has_domain(self, name: str) -> bool:
        """Whether a domain of this name is there, active or not."""
        libvirt = _libvirt()

        def look_up() -> bool:
            return self._found(lambda: self._raw.lookupByName(name), libvirt.VIR_ERR_NO_DOMAIN)

        return await self._ask(look_up, f"{self.shown} does not say whether ‘{name}’ is there")

    async def pools(self) -> list[FoundPool]:
        """Return all storage pools, active or not."""

        def read() -> list[FoundPool]:
            found = []
            for pool in self._raw.listAllStoragePools(0):
                # One that was removed meanwhile is none.
                with suppress(_libvirt().libvirtError):
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
                lambda: pool.storageVolLookupByName(name), _libvirt().VIR_ERR_NO_STORAGE_VOL
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
            except _libvirt().libvirtError as error:
                if error.get_error_code() in (
                    _libvirt().VIR_ERR_INVALID_ARG,
                    _libvirt().VIR_ERR_CONFIG_UNSUPPORTED,
                ):
                    return None
                raise

        return await self._ask(read, f"{self.shown} does not tell what {arch} guests can have")

    async def network_is_active(self, name: str) -> bool | None:
        """Whether a network is active; None where there is no such network."""
        libvirt = _libvirt()

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
        )

    async def undefine(self, uuid: str) -> bool:
        """Remove a domain that is off, and its firmware's variables; False where there is none."""
        libvirt = _libvirt()

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
        except _libvirt().libvirtError as error:
            if error.get_error_code() == absent:
                return False
            raise
        return True


def _found_pool(pool: Any) -> FoundPool:
    root = etree.fromstring(str(pool.XMLDesc(0)).encode(), etree.XMLParser(resolve_entities=False))
    return FoundPool(
        name=str(pool.name()),
        uuid=str(pool.UUIDString()),
        kind=root.get("type", ""),
        path=root.findtext("target/path"),
        is_active=bool(pool.isActive()),
    )


@asynccontextmanager
async def connected(
    uri: str | None, password: Secret | None = None, side: Side = SOURCE
) -> AsyncIterator[LibvirtConnection]:
    """Have a connection for the duration of a block; ``uri`` None: libvirt's own choice.

    ``side`` says which error is raised, here and by the connection's methods.

    Raises:
        DependencyError: the bindings are not installed.
        SourceError, TargetError: no connection can be made.
    """
    shown = redact(uri) if uri else "libvirt's default connection"
    raw = await _call(
        lambda: _open(uri, password, side),
        f"{shown} can't be connected to",
        hint=f"is libvirtd running, and the URI ({side.uri_option}) right? "
        "Try ‘virsh -c URI list --all’",
        timeout_s=CONNECT_TIMEOUT_S,
        error=side.error,
    )
    connection = LibvirtConnection(raw, shown, side)
    try:
        yield connection
    finally:
        with anyio.move_on_after(_CLOSE_TIMEOUT_S, shield=True):
            await _in_thread(connection.close)


def refuse_active(found: FoundDomain, uri: str | None) -> None:
    """Raise SourceError, which says what to do, unless the domain is off."""
    if found.activity == "off":
        return
    virsh = f"virsh -c {shlex.quote(redact(uri))}" if uri else "virsh"
    name = shlex.quote(found.name)
    shutdown = f"{virsh} shutdown {name}"
    hints = {
        "running": f"shut it down first: {shutdown}",
        "paused": f"let it go on, and shut it down: {virsh} resume {name} && {shutdown}",
        "suspended": f"wake it up, and shut it down: {virsh} dompmwakeup {name} && {shutdown}",
        "shutting down": f"wait until it is off: {virsh} domstate {name}",
    }
    raise SourceError(
        f"the guest ‘{found.name}’ is {found.activity}: it must be off, since the disks of a guest "
        "that runs change while they are read",
        hint=hints[found.activity],
    )


def _open(uri: str | None, password: Secret | None, side: Side) -> Any:
    libvirt = _libvirt()
    asked_password: list[bool] = []
    user = urlsplit(uri or "").username

    def answer(credentials: list[list[Any]], opaque: object) -> int:
        for credential in credentials:
            if credential[0] in (libvirt.VIR_CRED_PASSPHRASE, libvirt.VIR_CRED_NOECHOPROMPT):
                asked_password.append(True)
                if password is None:
                    return -1
                credential[4] = password.reveal()
            else:
                credential[4] = user or credential[3] or ""
        return 0

    kinds = [
        libvirt.VIR_CRED_AUTHNAME,
        libvirt.VIR_CRED_ECHOPROMPT,
        libvirt.VIR_CRED_PASSPHRASE,
        libvirt.VIR_CRED_NOECHOPROMPT,
    ]
    try:
        return libvirt.openAuth(uri, [kinds, answer, None], 0)
    except libvirt.libvirtError as error:
        if asked_password and password is None:
            raise side.error(
                f"{redact(uri or 'libvirt')} wants a password",
                hint=f"add {side.password_option} FILE: the password is the file's only line",
            ) from error.with_traceback(None)
        raise


def _close(raw: Any) -> None:
    with suppress(_libvirt().libvirtError):
        raw.close()


async def _in_thread(call: Callable[[], _T]) -> _T:
    """Return what ``call`` does, in a thread that nobody waits for when this is cancelled."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[_T] = loop.create_future()

    def tell(value: _T | None, error: BaseException | None) -> None:
        if result.done():  # cancelled
            return
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(cast(_T, value))

    def run() -> None:
        value: _T | None = None
        problem: BaseException | None = None
        try:
            value = call()
        except BaseException as error:
            problem = error
        with suppress(RuntimeError):  # the loop may have been closed meanwhile
            loop.call_soon_threadsafe(tell, value, problem)

    threading.Thread(target=run, name="libvirt", daemon=True).start()
    return await result


async def _call(
    call: Callable[[], _T],
    what: str,
    *,
    hint: str | None = None,
    timeout_s: float = CALL_TIMEOUT_S,
    error: type[SourceError] | type[TargetError] = SourceError,
) -> _T:
    """Run ``call`` in a thread; ``what`` (can't be done) begins the message of what it raises."""
    libvirt = _libvirt()
    try:
        with anyio.fail_after(timeout_s):
            return await _in_thread(call)
    except libvirt.libvirtError as problem:
        reason = redact(" ".join((problem.get_error_message() or str(problem)).split()))
        # Its traceback holds domains and volumes, and those the connection, and that its socket.
        raise error(f"{what}: {reason}", hint=hint) from problem.with_traceback(None)
    except TimeoutError as problem:
        raise error(f"{what}: no answer within {timeout_s:.0f} s", hint=hint) from problem
