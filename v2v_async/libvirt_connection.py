"""libvirt, asked from asyncio. The only module that imports ``libvirt``, and only when it is used.

Every call runs in a thread: the bindings wait for the daemon, which may be far away. A call that is
cancelled is left behind. Its thread is a daemon: anyio's would hold up the end of the program until
libvirt gives up, which it does after minutes or, where nobody answers, never.
"""

from __future__ import annotations

import shlex
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import anyio

from v2v_async.errors import DependencyError, SourceError, TargetError
from v2v_async.redact import redact
from v2v_async.secret import Secret
from v2v_async.unwaited import run_unwaited

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
_C = TypeVar("_C", bound="LibvirtConnection")
Activity = Literal["off", "running", "paused", "shutting down", "suspended"]


class NoGuestError(SourceError):
    """libvirt has no guest of that name."""


@dataclass(frozen=True, slots=True)
class Side:
    """Which end of a conversion a connection is for: its errors, and its options in hints."""

    error: type[SourceError] | type[TargetError]
    uri_option: str
    password_option: str


SOURCE = Side(SourceError, "-ic", "-ip")
TARGET = Side(TargetError, "-oc", "-op")


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
def libvirt_module() -> Any:
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
    """An open connection; made by :func:`connected`, or by :func:`connected_as` as a subclass."""

    def __init__(self, raw: Any, shown: str, side: Side) -> None:
        self._raw = raw
        self._side = side
        self.shown = shown
        """The URI as a person may see it."""
        self._lock = threading.Lock()
        self._calls = 0
        self._is_closing = False

    async def _ask(
        self,
        call: Callable[[], _T],
        what: str,
        *,
        hint: str | None = None,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> _T:
        """Return what ``call`` does; ``what`` (can't be done) begins the message of an error."""
        error = self._side.error
        return await _call(
            lambda: self._run(call), what, hint=hint, timeout_s=timeout_s, error=error
        )

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
        libvirt = libvirt_module()
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
        libvirt = libvirt_module()
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
        raise NoGuestError(
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


def connected(
    uri: str | None, password: Secret | None = None
) -> AbstractAsyncContextManager[LibvirtConnection]:
    """Have a connection to where a source is for the duration of a block; see below."""
    return connected_as(LibvirtConnection, uri, password, SOURCE)


@asynccontextmanager
async def connected_as(
    kind: type[_C], uri: str | None, password: Secret | None, side: Side
) -> AsyncIterator[_C]:
    """Have a connection for the duration of a block; ``uri`` None: libvirt's own choice.

    ``kind`` says what can be asked. ``side`` says which error is raised, here and by the
    connection's methods.

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
    connection = kind(raw, shown, side)
    try:
        yield connection
    finally:
        with anyio.move_on_after(_CLOSE_TIMEOUT_S, shield=True):
            await run_unwaited(connection.close, "libvirt")


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
    libvirt = libvirt_module()
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
    with suppress(libvirt_module().libvirtError):
        raw.close()


async def _call(
    call: Callable[[], _T],
    what: str,
    *,
    hint: str | None = None,
    timeout_s: float = CALL_TIMEOUT_S,
    error: type[SourceError] | type[TargetError] = SourceError,
) -> _T:
    """Run ``call`` in a thread; ``what`` (can't be done) begins the message of what it raises."""
    libvirt = libvirt_module()
    try:
        with anyio.fail_after(timeout_s):
            return await run_unwaited(call, "libvirt")
    except libvirt.libvirtError as problem:
        reason = redact(" ".join((problem.get_error_message() or str(problem)).split()))
        # Its traceback holds domains and volumes, and those the connection, and that its socket.
        raise error(f"{what}: {reason}", hint=hint) from problem.with_traceback(None)
    except TimeoutError as problem:
        raise error(f"{what}: no answer within {timeout_s:.0f} s", hint=hint) from problem
