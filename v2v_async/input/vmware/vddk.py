"""``-it vddk``: disks read by VMware's own library, through nbdkit's vddk plugin.

::

    check:  libvirt ──> domain XML ──> [datastore] paths and the guest's reference
            server's certificate ──> thumbprint;  plugin and library: are they there
            each disk is opened for a moment: login, reference, path, size
    setup:  cow ── blocksize ── cacheextents ── (retries) ── vddk       (an nbdkit for each disk)
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Self

from v2v_async import nbdkit, process, vsphere
from v2v_async.errors import DependencyError, SourceError
from v2v_async.events import Reporter
from v2v_async.input.checking import CheckedDisk
from v2v_async.input.image import DiskSource, PluginImage
from v2v_async.input.libvirt.domain_xml import Domain, DomainDisk
from v2v_async.input.overlay import OVERLAY_HELP, serve_overlays
from v2v_async.input.probing import check_plugin
from v2v_async.input.vmware.server_guest import VmwareInput
from v2v_async.input.vmware.vddk_options import OPTION_HELP, VddkOptions, parse_vddk_options
from v2v_async.options import InputOptions
from v2v_async.redact import redact
from v2v_async.secret import secret_file
from v2v_async.server import Servers
from v2v_async.unwaited import run_unwaited
from v2v_async.v2vdir import V2VDir

MAX_REQUEST = 2 << 20
"""Bytes. The host's NFC service has 48 MiB for all its clients, and fails larger requests as "out
of memory" (rhbz 1614276)."""

_LIBRARY = "lib64/libvixDiskLib.so*"
_WHERE = (
    "get VMware's Virtual Disk Development Kit, unpack it, and name its folder: "
    "-io vddk-libdir=/opt/vmware-vix-disklib-distrib"
)
_CAUSES = "check the user and its role, the password and the thumbprint"


class VddkInput(VmwareInput):
    """A guest whose disks are read by VDDK."""

    name: ClassVar[str] = "libvirt"
    kind: ClassVar[str] = "-i libvirt -it vddk"
    option_help: ClassVar[dict[str, str]] = {"overlay": OVERLAY_HELP, **OPTION_HELP}

    _vddk = VddkOptions()
    _thumbprint = ""
    _moref = ""
    told_sizes: Mapping[str, int] | None = None
    """Of the disks by their files, in bytes: then they are not opened to look at them. Those of a
    guest that runs can be opened under a snapshot only."""
    _filters: Mapping[str, tuple[str, ...]] = MappingProxyType({})

    @classmethod
    def parse(cls, options: InputOptions) -> Self:
        """See :class:`Input`."""
        made = super().parse(options)
        made._vddk = parse_vddk_options(made._options)
        return made

    async def check(self, reporter: Reporter) -> None:
        """See :class:`Input`."""
        # Before a login: what is missing on this machine needs no server to be told.
        await self._check_plugin()
        await super().check(reporter)

    async def _check_plugin(self) -> None:
        features = await nbdkit.probe()
        if not features.has_plugin("vddk"):
            raise DependencyError(
                "nbdkit has not the plugin ‘vddk’",
                hint="install it: dnf install nbdkit-vddk-plugin; Debian has no package of it, "
                "there nbdkit is built from source (the plugin is in it). " + _WHERE,
            )
        features.require(plugin="vddk", filters=("cow",))
        self._choose_filters(features)
        libdir = self._vddk.libdir
        if libdir is None:
            libdir = await _default_library(features)
            if not _has_library(Path(libdir)):
                raise DependencyError(
                    f"VMware's library is not in ‘{libdir}’, where nbdkit looks for it", hint=_WHERE
                )
        elif not Path(libdir).is_dir():
            raise SourceError(f"‘-io vddk-libdir={libdir}’ is not a directory", hint=_WHERE)
        elif not _has_library(Path(libdir)):
            above = Path(libdir).absolute().parent
            raise DependencyError(
                f"there is no {_LIBRARY} in ‘{libdir}’",
                hint=f"did you mean -io vddk-libdir={above}?" if _has_library(above) else _WHERE,
            )

    def _choose_filters(self, features: nbdkit.Features) -> None:
        wanted = {
            "blocksize": (f"maxdata={MAX_REQUEST}", "minblock=512"),
            # Asking VDDK for extents is slow, and clients ask again for what lies beside.
            "cacheextents" if self._vddk.extents else "noextents": (),
        }
        self._filters = {name: wanted[name] for name in wanted if features.has_filter(name)}

    async def _checks(
        self, domain: Domain, reporter: Reporter
    ) -> Sequence[Callable[[], Awaitable[CheckedDisk]]]:
        if domain.vmware_moref is None:
            raise SourceError(
                f"libvirt does not tell the reference of ‘{self._guest}’ (<vmware:moref>)",
                hint="libvirt 3.7 and newer tell it",
            )
        self._moref = domain.vmware_moref
        self._vddk.check_files(len(domain.disks))
        self._thumbprint = self._vddk.thumbprint or await self._ask_thumbprint(reporter)
        return [partial(self._look, disk, index) for index, disk in enumerate(domain.disks)]

    async def _ask_thumbprint(self, reporter: Reporter) -> str:
        port = self._vddk.port if self._vddk.port is not None else self._uri.port
        login = vsphere.Login(
            host=self._uri.host,
            port=port or vsphere.HTTPS_PORT,
            user=self._uri.user,
            password="",
            verify=self._uri.verify,
            ca_file=vsphere.ca_file(),
        )
        ask = partial(vsphere.thumbprint, login)
        found = await run_unwaited(ask, "vsphere")
        how = "its certificate is trusted" if login.verify else "not checked, as no_verify=1 wants"
        reporter.message(f"the thumbprint of {login.address} is {found} ({how})")
        return found

    async def _look(self, disk: DomainDisk, index: int) -> CheckedDisk:
        file = self._vddk.file(index, disk.location)
        shown = redact(file)
        if disk.kind != "file" or not file.startswith("["):
            raise SourceError(
                f"the disk ‘{shown}’ is not a file on a datastore ([DATASTORE] NAME.vmdk)"
            )
        if self.told_sizes is not None:
            size = self.told_sizes.get(file, 0)
            return CheckedDisk(DiskSource(self._image(file), "raw", size), shown)
        scratch = V2VDir.create()
        try:
            with secret_file(scratch.path, self._password, "vddk") as password_file:
                checked = await check_plugin(self._image(file, password_file), "raw", hint=_CAUSES)
        finally:
            scratch.remove()
        return CheckedDisk(replace(checked.source, image=self._image(file)), shown)

    async def _serve(self, v2vdir: V2VDir, servers: Servers) -> list[int]:
        # nbdkit has read the password when it serves: the file goes when all servers have started.
        with secret_file(v2vdir.path, self._password, "vddk") as password_file:
            return await serve_overlays(
                [_with_login(disk.source, password_file) for disk in self._checked],
                self._overlay,
                v2vdir,
                servers,
            )

    def _image(self, file: str, password_file: Path | None = None) -> PluginImage:
        parameters = self._vddk.parameters(
            self._uri,
            file=file,
            moref=self._moref,
            thumbprint=self._thumbprint,
            password_file=password_file,
        )
        return PluginImage(
            "vddk",
            (*parameters, *(word for words in self._filters.values() for word in words)),
            redact(file),
            filters=tuple(self._filters),
            retry=self.retry,
        )


def _with_login(source: DiskSource, password_file: Path) -> DiskSource:
    image = source.image
    assert isinstance(image, PluginImage)
    login = f"password=+{password_file}"
    logged_in = replace(image, parameters=(*image.parameters, login))
    return replace(source, image=logged_in)


def _has_library(folder: Path) -> bool:
    return any(folder.glob(_LIBRARY))


async def _default_library(features: nbdkit.Features) -> str:
    """Return where the plugin looks for VMware's library by itself.

    Raises:
        DependencyError: the plugin can't be loaded.
    """
    argv = [features.path, "vddk", "--dump-plugin"]
    completed = await process.run(argv, timeout_s=30)
    if completed.status != 0:
        raise DependencyError(
            f"‘nbdkit vddk --dump-plugin’ failed: {completed.stderr.strip()}", hint=_WHERE
        )
    values = dict(line.split("=", 1) for line in completed.stdout.splitlines() if "=" in line)
    return values.get("vddk_default_libdir", "/usr/lib64/vmware-vix-disklib")
