"""What ``-ic vpx://`` and ``esx://`` have in common, however the disks are read.

libvirt's esx driver asks the server what the guest is; the subclasses read its disks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from types import MappingProxyType
from typing import ClassVar, Self

from v2v_async.errors import SourceError, UsageError
from v2v_async.events import Reporter
from v2v_async.input.checking import CheckedDisk, check_each, with_disks, with_sizes
from v2v_async.input.contract import Input
from v2v_async.input.image import RETRY, Retry
from v2v_async.input.libvirt.domain_xml import Domain, parse_domain
from v2v_async.input.overlay import OverlayKind, choose, overlay_option
from v2v_async.input.vmware.uri import VmwareUri, parse_uri
from v2v_async.libvirt_connection import connected, refuse_active
from v2v_async.model import SourceGuest
from v2v_async.options import InputOptions
from v2v_async.secret import Secret
from v2v_async.server import Servers
from v2v_async.v2vdir import V2VDir

SERVER_RETRY: Retry = MappingProxyType(
    {**RETRY, "retry-request": ("retry-request-retries=4", "retry-request-delay=5")}
)
"""The filter nearest to the plugin tries each request, and the opening of a disk, again for 20 s: a
new connection is given up at once otherwise, and within 30 s here. The other one begins again after
that: together a server may be away for three minutes."""

# What libvirt's esx driver and libcurl say, and what to do then.
_HINTS = (
    (
        "incorrect user name or password",
        "check USER@ in -ic (a backslash is %5c, an @ is %40) and the file of -ip",
    ),
    (
        "certificate",
        "add the certificate of its authority to this machine's, use the name that the "
        "certificate is for, or add ?no_verify=1 to -ic to trust any",
    ),
    (
        "specified in",
        "the path in -ic is /DATACENTER/HOST or /DATACENTER/CLUSTER/HOST, with the folders that "
        "they are in",
    ),
    ("connect", "is the server up, and the way to it open (port 443)?"),
)


def _hint(message: str) -> str | None:
    """Return what to do about an error of libvirt's."""
    reason = message.partition("connected to: ")[2].lower()
    return next((hint for said, hint in _HINTS if said in reason), None)


class VmwareInput(Input):
    """One guest of a vCenter or ESXi server."""

    kind: ClassVar[str]
    """It, as messages name it."""
    retry: ClassVar[Retry] = SERVER_RETRY
    """What its disks are read with."""
    accepts_running = False
    """Whether the guest may run: a snapshot of it is read, or none of its disks yet."""

    def __init__(
        self,
        uri: VmwareUri,
        guest: str,
        password: Secret,
        options: Sequence[tuple[str, str]],
        overlay: OverlayKind | None,
    ) -> None:
        self._uri = uri
        self._guest = guest
        self._password = password
        self._options = [(name, value) for name, value in options if name != "overlay"]
        self._overlay = overlay
        self._domain: Domain | None = None
        self._checked: list[CheckedDisk] = []

    @classmethod
    def parse(cls, options: InputOptions) -> Self:
        """See :class:`Input`."""
        if len(options.arguments) != 1:
            raise UsageError(
                f"{cls.kind} takes the name of one guest, not {len(options.arguments)}",
                hint="name it as ‘virsh -c URI list --all’ does",
            )
        if options.connection is None:
            raise UsageError(f"{cls.kind}: no server was named", hint="add -ic vpx://USER@SERVER/…")
        if options.password is None:
            raise UsageError(
                f"{cls.kind} needs a password",
                hint="add -ip FILE: the password is the file's only line",
            )
        overlay = overlay_option(cls.kind, cls.option_help, options)
        given = []
        for name, value in options.options:
            if not value:
                raise UsageError(f"‘-io {name}’ needs a value", hint=f"write {name}=…")
            given.append((name, value))
        uri, guest = parse_uri(options.connection), options.arguments[0]
        return cls(uri, guest, options.password, given, overlay)

    async def check(self, reporter: Reporter) -> None:
        """See :class:`Input`."""
        self._domain = await self._ask_libvirt(reporter)
        checks = await self._checks(self._domain, reporter)
        self._checked = await check_each(checks)
        for disk in self._checked:
            choose(self._overlay, disk.source)

    async def describe(self) -> SourceGuest:
        """See :class:`Input`."""
        assert self._domain is not None, "check comes first"
        controllers = [disk.controller for disk in self._domain.disks]
        return with_disks(self._domain.guest, self._checked, controllers)

    async def setup(self, v2vdir: V2VDir, servers: Servers, reporter: Reporter) -> SourceGuest:
        """See :class:`Input`."""
        source = await self.describe()
        sizes = await self._serve(v2vdir, servers)
        return with_sizes(source, sizes)

    async def _ask_libvirt(self, reporter: Reporter) -> Domain:
        try:
            async with connected(self._uri.text, self._password) as connection:
                found = await connection.domain(self._guest)
        except SourceError as error:
            error.hint = _hint(error.message) or error.hint
            raise
        if not self.accepts_running:
            refuse_active(found, self._uri.text)
        domain = parse_domain(found.xml, f"the guest ‘{found.name}’")
        for warning in domain.warnings:
            reporter.warning(warning)
        return domain

    @abstractmethod
    async def _checks(
        self, domain: Domain, reporter: Reporter
    ) -> Sequence[Callable[[], Awaitable[CheckedDisk]]]:
        """Return what looks at each disk, after looking at what they have in common."""

    @abstractmethod
    async def _serve(self, v2vdir: V2VDir, servers: Servers) -> list[int]:
        """Serve an overlay on each disk; return their sizes in bytes."""
