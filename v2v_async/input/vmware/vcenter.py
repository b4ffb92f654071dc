"""``-ic vpx://`` without VDDK: disks read over HTTPS from the server's ``/folder``.

::

    check:  libvirt ──> domain XML ──> [datastore] path ──> URL ──> HEAD: is it there, its size
    setup:  cow ── retry ── curl ──> URL     (an nbdkit for each disk)
                              └─ cookie-script ──> one session for all disks, kept alive
"""

from __future__ import annotations

import shlex
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import ClassVar

import anyio

from v2v_async import nbdkit, vsphere
from v2v_async.errors import SourceError
from v2v_async.events import Reporter
from v2v_async.input.checking import CheckedDisk
from v2v_async.input.image import DiskSource, PluginImage
from v2v_async.input.libvirt.domain_xml import Domain, DomainDisk
from v2v_async.input.overlay import OVERLAY_HELP, serve_overlays
from v2v_async.input.vmware.server_guest import VmwareInput
from v2v_async.input.vmware.uri import DatastorePath, parse_datastore_path
from v2v_async.server import Servers
from v2v_async.unwaited import run_unwaited
from v2v_async.v2vdir import V2VDir

RENEW_S = 15
"""How often the session is looked at. A request that meets a server without our session fails, as
does the opening of a disk, and that is tried again for 20 s only: it must be mended before."""

REQUEST_TIMEOUT_S = 300
"""For one request. vCenter is slow and may stall (rhbz 1146007), but an answer of a few MiB that
takes five minutes will not come: the connection is dead, and the retry filter makes another."""

# A server that is busy says so once or twice before the first request of a day.
_BUSY = (HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT)
_TRIES, _PAUSE_S = 3, 2.0


class VCenterInput(VmwareInput):
    """A guest whose disks are read over HTTPS."""

    name: ClassVar[str] = "libvirt"
    kind: ClassVar[str] = "-i libvirt -ic vpx://"
    option_help: ClassVar[dict[str, str]] = {"overlay": OVERLAY_HELP}

    _cookie: str | None = None

    async def _checks(
        self, domain: Domain, reporter: Reporter
    ) -> Sequence[Callable[[], Awaitable[CheckedDisk]]]:
        (await nbdkit.probe()).require(plugin="curl", filters=("cow",))
        datacenter = domain.vmware_datacenter or self._uri.datacenter
        if datacenter is None:
            raise SourceError(
                f"libvirt does not tell the datacenter of ‘{self._guest}’, and the path in -ic may "
                "name a folder or a cluster",
                hint="libvirt 1.2.20 and newer tell it (<vmware:datacenterpath>)",
            )
        # What is wrong with the server is told once, not for each disk.
        reach = partial(vsphere.thumbprint, self._login)
        await run_unwaited(reach, "vsphere")
        return [partial(self._look, disk, datacenter) for disk in domain.disks]

    @property
    def _login(self) -> vsphere.Login:
        return vsphere.Login(
            host=self._uri.host,
            port=self._uri.port or vsphere.HTTPS_PORT,
            user=self._uri.user,
            password=self._password.reveal(),
            verify=self._uri.verify,
            ca_file=vsphere.ca_file(),
        )

    async def _look(self, disk: DomainDisk, datacenter: str) -> CheckedDisk:
        path = parse_datastore_path(disk.location)
        login = self._login
        url = path.url(login.address, datacenter)
        answer = await self._head(login, url)
        if answer.status != HTTPStatus.OK:
            raise self._refused(answer, path, datacenter)
        self._cookie = answer.cookie or self._cookie
        if not answer.size:
            raise SourceError(
                f"‘{login.address}’ does not tell the size of ‘{path.content}’"
                if answer.size is None
                else f"the disk ‘{path.content}’ is empty (0 bytes)"
            )
        if not answer.has_ranges:
            raise SourceError(
                f"‘{login.address}’ gives ‘{path.content}’ only as a whole, not in parts",
                hint="use -it vddk",
            )
        return CheckedDisk(
            DiskSource(self._image(login, url, str(path)), "raw", answer.size), str(path)
        )

    async def _head(self, login: vsphere.Login, url: str) -> vsphere.Answer:
        """Ask for a disk; all disks with the session that the first one's login began."""
        for tried in range(1, _TRIES + 1):
            ask = partial(vsphere.head, login, url, self._cookie)
            answer = await run_unwaited(ask, "vsphere")
            if answer.status == HTTPStatus.UNAUTHORIZED and self._cookie is not None:
                self._cookie = None  # the session has ended
            elif answer.status in _BUSY and tried < _TRIES:
                await anyio.sleep(_PAUSE_S)
            else:
                break
        return answer

    def _refused(self, answer: vsphere.Answer, path: DatastorePath, datacenter: str) -> SourceError:
        login = self._login
        told = f"{answer.status} {answer.reason}"
        match answer.status:
            case HTTPStatus.UNAUTHORIZED:
                return SourceError(
                    f"‘{login.address}’ does not let ‘{login.user}’ in: wrong user or password",
                    hint="check USER@ in -ic (a backslash is %5c, an @ is %40) and the file of -ip",
                )
            case HTTPStatus.FORBIDDEN:
                return SourceError(
                    f"‘{login.user}’ may not read ‘{path.content}’ ({told})",
                    hint="its role needs Datastore: Browse datastore, Low level file operations",
                )
            case HTTPStatus.NOT_FOUND if path.is_snapshot:
                return SourceError(
                    f"the disk ‘{path}’ is a snapshot, which can't be read over HTTPS",
                    hint="delete the guest's snapshots (their changes are kept), or use -it vddk",
                )
            case HTTPStatus.NOT_FOUND:
                return SourceError(
                    f"‘{path.content}’ is not there, in the datacenter ‘{datacenter}’ of "
                    f"‘{login.address}’",
                    hint="is it a raw device or on vSAN or vVols? Those need -it vddk",
                )
            case HTTPStatus.SERVICE_UNAVAILABLE:
                return SourceError(
                    f"‘{login.address}’ answers {told} for ‘{path.content}’",
                    hint="try later; vCenter also says so when it is out of sessions "
                    "(maxSessionCount in vpxd.cfg)",
                )
        return SourceError(f"‘{login.address}’ answers {told} for ‘{path.content}’")

    def _image(self, login: vsphere.Login, url: str, shown: str) -> PluginImage:
        parameters = [f"url={url}", "protocols=https", f"timeout={REQUEST_TIMEOUT_S}"]
        if not login.verify:
            parameters.append("sslverify=false")
        elif login.ca_file is not None:
            parameters.append(f"cainfo={login.ca_file}")
        # As virt-v2v: what stands between us and vCenter makes it only slower (rhbz 1354507).
        return PluginImage(
            "curl",
            (*parameters, "proxy="),
            shown,
            retry=self.retry,
        )

    async def _serve(self, v2vdir: V2VDir, servers: Servers) -> list[int]:
        program = vsphere.write_login(v2vdir.path / "vcenter", self._login, self._cookie)
        return await serve_overlays(
            [_with_session(disk.source, program) for disk in self._checked],
            self._overlay,
            v2vdir,
            servers,
        )


def _with_session(source: DiskSource, program: Path) -> DiskSource:
    image = source.image
    assert isinstance(image, PluginImage)
    session = (
        f'cookie-script={shlex.quote(str(program))} "$url"',
        f"cookie-script-renew={RENEW_S}",
    )
    logged_in = replace(image, parameters=(*image.parameters, *session))
    return replace(source, image=logged_in)
