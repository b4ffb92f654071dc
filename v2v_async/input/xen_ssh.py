"""``-i libvirt -ic xen+ssh://HOST``: a guest of a Xen host, its libvirt XML and disks over ssh.

``virsh`` runs on the host, where it fits the host's libvirt however old: nothing of libvirt is
needed here. The disks are files of the host, read by nbdkit's ssh plugin.
"""

from __future__ import annotations

import shlex
from functools import partial
from typing import ClassVar, Self

from v2v_async import process, ssh
from v2v_async.errors import SourceError, UsageError
from v2v_async.events import Reporter
from v2v_async.input.checking import (
    CheckedDisk,
    check_each,
    image_format,
    with_disks,
    with_sizes,
)
from v2v_async.input.contract import Input
from v2v_async.input.libvirt.domain_xml import Domain, DomainDisk, parse_domain
from v2v_async.input.overlay import OVERLAY_HELP, OverlayKind, choose, overlay_option
from v2v_async.input.ssh_files import (
    check_image,
    opened,
    remote_source,
    serve_remote,
)
from v2v_async.input.xml_source import MAX_SIZE
from v2v_async.model import SourceGuest
from v2v_async.options import InputOptions
from v2v_async.server import Servers
from v2v_async.ssh import LoginError, SshHost
from v2v_async.v2vdir import V2VDir

_OFF = ("shut off", "crashed", "no state")
"""What ``virsh domstate`` says of a guest whose disks nobody writes."""
_RAW_DRIVERS = (None, "raw", "aio")  # Xen: tap:aio: is a raw file


class XenSshInput(Input):
    """A guest of a Xen host."""

    name: ClassVar[str] = "xen-ssh"
    option_help: ClassVar[dict[str, str]] = {"overlay": OVERLAY_HELP, **ssh.OPTIONS}

    def __init__(
        self,
        guest: str,
        host: SshHost,
        driver: str,
        format_: str | None,
        overlay: OverlayKind | None,
    ) -> None:
        self._name = guest
        self._host = host
        self._driver = driver
        self._format = format_
        self._overlay: OverlayKind | None = overlay
        self._domain: Domain | None = None
        self._checked: list[CheckedDisk] = []

    @classmethod
    def parse(cls, options: InputOptions) -> Self:
        """See :class:`Input`."""
        if len(options.arguments) != 1 or not options.arguments[0]:
            raise UsageError(
                "-ic xen+ssh://: one guest is to be named", hint="name it, or give its UUID"
            )
        if any(ord(character) < 32 for character in options.arguments[0]):
            raise UsageError("-ic xen+ssh://: the guest's name has control characters")
        if options.transport not in (None, "ssh"):
            raise UsageError(
                f"‘-it {options.transport}’ has no meaning with ‘-ic xen+ssh://’",
                hint="leave it out",
            )
        overlay = overlay_option("-ic xen+ssh://", cls.option_help, options)
        format_ = image_format(options)
        # no_tty asks libvirt for what is always so here.
        host, user, port, path = ssh.parse_address(
            options.connection or "", "-ic", scheme="xen+ssh", others=("no_tty",)
        )
        found = SshHost(
            host, user, port, secret=options.password, **ssh.parse_options(options.options)
        )
        return cls(options.arguments[0], found, f"xen://{path or '/'}", format_, overlay)

    async def check(self, reporter: Reporter) -> None:
        """See :class:`Input`."""
        ssh.check_files(self._host)
        what = f"the XML of the guest ‘{self._name}’ of ‘{self._host.shown}’"
        self._domain = parse_domain(await self._xml(), what)
        for warning in self._domain.warnings:
            reporter.warning(warning)
        if not self._domain.disks:
            raise SourceError(f"the guest ‘{self._name}’ of ‘{self._host.shown}’ has no disk")
        looks = [partial(self._look_at, disk) for disk in self._domain.disks]
        self._checked = await check_each(looks, fatal=(LoginError,))

    async def _xml(self) -> bytes:
        """Return the guest's XML.

        Raises:
            SourceError: there is no such guest, it is running, or virsh is not there.
        """
        doing = f"the guest ‘{self._name}’ can't be asked for"
        # In one login; && and env are of every shell that somebody may have there.
        words: list[str] = []
        for subcommand in ("domstate", "dumpxml"):
            words += [*(["&&"] if words else []), "env", "LC_ALL=C", "virsh", "--quiet"]
            words += ["--connect", shlex.quote(self._driver)]
            words += [subcommand, "--domain", shlex.quote(self._name)]
        completed = await ssh.run(self._host, words, most=MAX_SIZE, doing=doing)
        if completed.status != 0:
            raise self._virsh_failed(completed)
        state, _, xml = completed.stdout.lstrip().partition("\n")
        if state.strip() not in _OFF:
            raise SourceError(
                f"the guest ‘{self._name}’ of ‘{self._host.shown}’ is not shut off, but "
                f"‘{state.strip()[:40]}’",
                hint="shut it down first, so that its disks do not change while they are read: "
                f"virsh --connect {self._driver} shutdown {shlex.quote(self._name)} (on the host)",
            )
        return xml.strip().encode()

    def _virsh_failed(self, completed: process.Completed) -> SourceError:
        said = completed.stderr.strip()
        where = f"‘{self._host.shown}’"
        if completed.status == 127 or "command not found" in said:
            return SourceError(
                f"there is no virsh on {where}",
                hint="install libvirt's client there; or take the guest's XML and its disks, and "
                "use -i libvirtxml",
            )
        if "failed to get domain" in said or "Domain not found" in said:
            return SourceError(
                f"there is no guest ‘{self._name}’ on {where}",
                hint=f"the guests are: virsh --connect {self._driver} list --all (on the host)",
            )
        last = said.splitlines()[-1:] or [process.describe_status(completed.status)]
        return SourceError(
            f"virsh on {where} failed: {last[0].removeprefix('error: ')[:400]}",
            hint=f"‘virsh --connect {self._driver} list --all’ must work on the host",
        )

    async def _look_at(self, disk: DomainDisk) -> CheckedDisk:
        if disk.kind not in ("file", "block"):
            raise SourceError(
                f"the disk ‘{disk.location}’ is a {disk.kind} disk, which can't be read over ssh",
                hint="make a file of it on the host, or use -i libvirtxml where it can be reached",
            )
        format_ = self._format or disk.format
        if format_ in _RAW_DRIVERS:
            format_ = "raw"
        assert format_ is not None
        async with opened(self._host, disk.location) as file:
            if disk.kind == "block" and file.size == 0:
                raise SourceError(
                    f"the disk ‘{file.shown}’ is a block device: sftp does not tell its size, so "
                    "it can't be read over ssh",
                    hint="serve it on the host (qemu-nbd --read-only --format=raw --shared=0 "
                    f"--persistent {shlex.quote(disk.location)}) and name nbd://HOST in the XML, "
                    "with -i libvirtxml; or copy it to a file",
                )
            size = await check_image(file, format_)
        source = remote_source(self._host, disk.location, format_, size)
        choose(self._overlay, source)
        return CheckedDisk(source, self._host.uri(disk.location))

    async def describe(self) -> SourceGuest:
        """See :class:`Input`."""
        assert self._domain is not None, "check comes first"
        controllers = [disk.controller for disk in self._domain.disks]
        return with_disks(self._domain.guest, self._checked, controllers)

    async def setup(self, v2vdir: V2VDir, servers: Servers, reporter: Reporter) -> SourceGuest:
        """See :class:`Input`."""
        source = await self.describe()
        sizes = await serve_remote(
            self._host, [c.source for c in self._checked], self._overlay, v2vdir, servers
        )
        return with_sizes(source, sizes)
