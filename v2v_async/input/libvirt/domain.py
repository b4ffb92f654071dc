"""What ``-i libvirt`` and ``-i libvirtxml`` share: a domain, and disks as its XML names them.

::

    open ──> Domain ──┬─ file, block ──────────────> looked at where they are
                      ├─ volume ──> libvirt's pool ─> the same
                      └─ network ──┬─ nbd ─────────> asked
                                   └─ http, https ─> nbdkit's curl plugin, asked for a moment
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import ClassVar

from v2v_async.errors import SourceError, UsageError
from v2v_async.events import Reporter
from v2v_async.input.checking import (
    FORMAT_ALIASES,
    FORMATS,
    CheckedDisk,
    check_each,
    check_file,
    check_uri,
    image_format,
    with_disks,
    with_sizes,
)
from v2v_async.input.contract import Input
from v2v_async.input.image import RETRY, PluginImage
from v2v_async.input.libvirt.checksum import Checksum, verify_checksums
from v2v_async.input.libvirt.domain_xml import Domain, DomainDisk
from v2v_async.input.overlay import (
    OVERLAY_HELP,
    OverlayKind,
    choose,
    is_kept,
    overlay_option,
    serve_overlays,
)
from v2v_async.input.probing import check_plugin
from v2v_async.input.xml_source import parse_xml, text
from v2v_async.libvirt_connection import FoundVolume
from v2v_async.model import SourceGuest
from v2v_async.options import InputOptions
from v2v_async.redact import redact
from v2v_async.server import Servers
from v2v_async.v2vdir import V2VDir

HTTP_TIMEOUT_S = 300
"""For one request. Proxies stall for minutes; what takes longer is lost, and the retry filter
begins anew. curl's own default is never."""

VolumeLookup = Callable[[str, str], Awaitable[FoundVolume]]
"""Takes a pool's name and a volume's."""


class DomainInput(Input):
    """A guest that libvirt's XML describes."""

    option_help: ClassVar[dict[str, str]] = {"overlay": OVERLAY_HELP}

    def __init__(self, options: InputOptions) -> None:
        self._argument = options.arguments[0]
        self._connection = options.connection
        self._password = options.password
        self._format: str | None = None
        self._overlay: OverlayKind | None = None
        self._domain: Domain | None = None
        self._checked: list[CheckedDisk] = []

    def _read_options(self, options: InputOptions) -> None:
        """Check what both take.

        Raises:
            UsageError: an option is unknown or wrong.
        """
        if options.transport is not None:
            raise UsageError(
                f"‘-it {options.transport}’ has no meaning with ‘-i {options.mode}’",
                hint="it belongs to -i vmx, and to -i libvirt with -ic vpx:// or esx://",
            )
        self._overlay = overlay_option(f"-i {self.name}", self.option_help, options)
        self._format = image_format(options)

    @abstractmethod
    def _opened(
        self, reporter: Reporter
    ) -> AbstractAsyncContextManager[tuple[Domain, VolumeLookup]]:
        """Have the domain, and a way to find its volumes, for the duration of a block.

        Raises:
            SourceError: there is no such domain, or it can't be converted.
        """

    def _path(self, location: str) -> Path:
        """Return the file that the XML means by ``location``."""
        return Path(location)

    def _hint(self, path: Path) -> str | None:
        """Return what to do where a file can't be used, if this input knows better than others."""
        return None

    async def check(self, reporter: Reporter) -> None:
        """See :class:`Input`."""
        async with self._opened(reporter) as (domain, volume):
            for warning in [*domain.warnings, *_visible_queries(domain)]:
                reporter.warning(warning)
            self._domain = domain
            self._checked = await check_each(
                [partial(self._look, disk, volume) for disk in domain.disks]
            )

    async def _look(self, disk: DomainDisk, volume: VolumeLookup) -> CheckedDisk:
        format_ = self._format or FORMAT_ALIASES.get(disk.format or "", disk.format)
        match disk.kind:
            case "file" | "block":
                checked = await self._look_at_file(disk.location, format_)
            case "volume":
                checked = await self._look_at_volume(disk, volume)
            case "network":
                checked = await _look_at_network(disk, format_)
        choose(self._overlay, checked.source)
        return checked

    async def _look_at_file(self, location: str, format_: str | None) -> CheckedDisk:
        path = self._path(location)
        try:
            return await check_file(path, format_)
        except SourceError as error:
            error.hint = self._hint(path) or error.hint
            raise

    async def _look_at_volume(self, disk: DomainDisk, volume: VolumeLookup) -> CheckedDisk:
        assert disk.pool is not None
        found = await volume(disk.pool, disk.location)
        what = f"the volume ‘{disk.location}’ of the storage pool ‘{disk.pool}’"
        if found.kind not in ("file", "block"):
            raise SourceError(
                f"{what} is of the kind {found.kind}, which can't be read",
                hint="copy it to a pool of files first: virsh vol-clone, or qemu-img convert",
            )
        format_ = text(parse_xml(found.xml, what, "volume"), "target/format/@type")
        if format_ is not None:
            format_ = FORMAT_ALIASES.get(format_, format_)
        # libvirt's pools of block devices say ‘unknown’, or the kind of a partition.
        if format_ not in FORMATS:
            format_ = None
        return await self._look_at_file(found.path, self._format or format_)

    async def describe(self) -> SourceGuest:
        """See :class:`Input`."""
        assert self._domain is not None, "after check"
        controllers = [disk.controller for disk in self._domain.disks]
        return with_disks(self._domain.guest, self._checked, controllers)

    async def setup(self, v2vdir: V2VDir, servers: Servers, reporter: Reporter) -> SourceGuest:
        """See :class:`Input`."""
        source = await self.describe()
        assert self._domain is not None
        converted = [i for i in range(1, len(self._checked) + 1) if is_kept(v2vdir, i)]
        sizes = await serve_overlays(
            [disk.source for disk in self._checked], self._overlay, v2vdir, servers
        )
        checksums = [
            Checksum(index, disk.checksum[0], disk.checksum[1], disk.checksum_fail)
            for index, disk in enumerate(self._domain.disks, 1)
            if disk.checksum is not None and index not in converted
        ]
        await verify_checksums(checksums, v2vdir, reporter)
        return with_sizes(source, sizes)


def _visible_queries(domain: Domain) -> list[str]:
    """Return a warning for each URL that may hold a token: nbdkit takes URLs only in its argv."""
    return [
        f"disk {index}: the query of its URL can be seen in the list of processes while it is read"
        for index, disk in enumerate(domain.disks, 1)
        if disk.kind == "network" and "?" in disk.location and disk.location.startswith("http")
    ]


async def _look_at_network(disk: DomainDisk, format_: str | None) -> CheckedDisk:
    if not disk.location.startswith("http"):
        if format_ not in (None, "raw"):
            raise SourceError(
                f"the NBD export ‘{redact(disk.location)}’ is said to be {format_}; only raw ones "
                "are read",
                hint="serve the image with qemu-nbd, which reads its format",
            )
        return await check_uri(disk.location)
    return await check_plugin(
        curl_image(disk.location, verify=disk.verify),
        # Nothing says whether a header in it was written by the guest, so that it is not looked at.
        format_ or "raw",
        hint="try it: curl -I URL; the server must know Range requests",
    )


def curl_image(url: str, *, verify: bool = True) -> PluginImage:
    """Return a disk behind an HTTP or HTTPS server.

    ``verify``: its certificate is checked.
    """
    parameters = [f"url={url}", f"timeout={HTTP_TIMEOUT_S}", "protocols=http,https"]
    if not verify:
        parameters.append("sslverify=false")
    return PluginImage("curl", tuple(parameters), url, retry=RETRY)
