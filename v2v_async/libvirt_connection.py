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

from v2v_async.errors import DependencyError, SourceError
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

    def __init__(self, raw: Any, shown: str) -> None:
        self._raw = raw
        self._shown = shown

    async def domain(self, name: str) -> FoundDomain:
        """Return the domain of this name or UUID.

        Raises:
            SourceError: there is none, or libvirt fails.
        """
        return await _call(lambda: self._domain(name), f"the guest ‘{name}’ can't be read")

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
            f"{self._shown} has no guest ‘{name}’",
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
        return await _call(lambda: self._volume(pool, name), what, hint=hint)

    def _volume(self, pool: str, name: str) -> FoundVolume:
        volume = self._raw.storagePoolLookupByName(pool).storageVolLookupByName(name)
        number = volume.info()[0]
        kind = _VOLUME_KINDS[number] if number < len(_VOLUME_KINDS) else str(number)
        return FoundVolume(str(volume.path()), kind, str(volume.XMLDesc(0)).encode())


@asynccontextmanager
async def connected(
    uri: str | None, password: Secret | None = None
) -> AsyncIterator[LibvirtConnection]:
    """Have a connection for the duration of a block; ``uri`` None: libvirt's own choice.

    Raises:
        DependencyError: the bindings are not installed.
        SourceError: no connection can be made.
    """
    shown = redact(uri) if uri else "libvirt's default connection"
    raw = await _call(
        lambda: _open(uri, password),
        f"{shown} can't be connected to",
        hint="is libvirtd running, and the URI (-ic) right? Try ‘virsh -c URI list --all’",
        timeout_s=CONNECT_TIMEOUT_S,
    )
    try:
        yield LibvirtConnection(raw, shown)
    finally:
        with anyio.move_on_after(_CLOSE_TIMEOUT_S, shield=True):
            await _in_thread(lambda: _close(raw))


async def fetch(uri: str | None, guest: str, password: Secret | None = None) -> bytes:
    """Return the XML of a guest that is off, secrets in it included.

    Raises:
        DependencyError: the bindings are not installed.
        SourceError: libvirt can't be reached or does not know the guest, or it is running.
    """
    async with connected(uri, password) as connection:
        found = await connection.domain(guest)
    refuse_active(found, uri)
    return found.xml


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


def _open(uri: str | None, password: Secret | None) -> Any:
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
            raise SourceError(
                f"{redact(uri or 'libvirt')} wants a password",
                hint="add -ip FILE: the password is the file's only line",
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
    call: Callable[[], _T], what: str, *, hint: str | None = None, timeout_s: float = CALL_TIMEOUT_S
) -> _T:
    """Run ``call`` in a thread; ``what`` (can't be done) begins the message of what it raises."""
    libvirt = _libvirt()
    try:
        with anyio.fail_after(timeout_s):
            return await _in_thread(call)
    except libvirt.libvirtError as error:
        reason = redact(" ".join((error.get_error_message() or str(error)).split()))
        # Its traceback holds domains and volumes, and those the connection, and that its socket.
        raise SourceError(f"{what}: {reason}", hint=hint) from error.with_traceback(None)
    except TimeoutError as error:
        raise SourceError(f"{what}: no answer within {timeout_s:.0f} s", hint=hint) from error
