"""``-i vmx``: a guest of VMware by its VMX file, here or (``-it ssh``) on its host.

The disks are looked for where the VMX file names them: relative to its folder, or anywhere by an
absolute name, as ESXi writes for disks on another datastore.
"""

from __future__ import annotations

import os
import posixpath
from functools import partial
from pathlib import Path
from typing import ClassVar, Self

from v2v_async import ssh
from v2v_async.errors import SourceError, UsageError, V2VError
from v2v_async.events import Reporter
from v2v_async.input.checking import CheckedDisk, check_each, with_disks, with_sizes
from v2v_async.input.contract import Input
from v2v_async.input.overlay import (
    OVERLAY_HELP,
    OverlayKind,
    choose,
    overlay_option,
    serve_overlays,
)
from v2v_async.input.ssh_files import read_file, serve_remote
from v2v_async.input.vmx.file import MAX_SIZE, parse_vmx
from v2v_async.input.vmx.hardware import VmxDisk, VmxGuest, read_guest
from v2v_async.input.vmx.ssh_vmdk import check_remote_vmdk
from v2v_async.input.vmx.vmdk_chain import check_vmdk
from v2v_async.model import SourceGuest
from v2v_async.options import InputOptions
from v2v_async.redact import redact
from v2v_async.server import Servers
from v2v_async.ssh import LoginError, SshHost
from v2v_async.v2vdir import V2VDir


class VmxInput(Input):
    """A guest that a VMX file describes."""

    name: ClassVar[str] = "vmx"
    option_help: ClassVar[dict[str, str]] = {"overlay": OVERLAY_HELP, **ssh.OPTIONS}

    def __init__(self, path: str, host: SshHost | None, overlay: OverlayKind | None) -> None:
        self._path = path
        self._host = host
        self._overlay: OverlayKind | None = overlay
        self._guest: VmxGuest | None = None
        self._checked: list[CheckedDisk] = []

    @classmethod
    def parse(cls, options: InputOptions) -> Self:
        """See :class:`Input`."""
        if len(options.arguments) != 1 or not options.arguments[0]:
            raise UsageError(
                "-i vmx: one VMX file is to be named",
                hint="name guest.vmx, or ssh://HOST/PATH/guest.vmx with -it ssh",
            )
        argument = options.arguments[0]
        if options.transport not in (None, "ssh"):
            raise UsageError(
                f"‘-it {options.transport}’ has no meaning with ‘-i vmx’", hint="use -it ssh"
            )
        overlay = overlay_option("-i vmx", cls.option_help, options)
        files = ssh.parse_options(options.options)
        if options.transport is None:
            if argument.startswith("ssh://"):
                raise UsageError(
                    f"-i vmx: ‘{redact(argument)}’ is on another host", hint="add -it ssh"
                )
            if options.password is not None or files:
                raise UsageError(
                    "-i vmx: a password and -io ssh-… have no meaning for a local file",
                    hint="add -it ssh and name the file as ssh://HOST/PATH, or leave them out",
                )
            return cls(argument, None, overlay)
        host, user, port, path = ssh.parse_address(argument, "-i vmx", scheme="ssh")
        if not posixpath.basename(path):
            raise UsageError(
                f"-i vmx: ‘{argument}’ names no file",
                hint="name the VMX file: ssh://HOST/vmfs/volumes/DATASTORE/GUEST/GUEST.vmx",
            )
        found = SshHost(host, user, port, secret=options.password, **files)
        return cls(posixpath.normpath(path), found, overlay)

    async def check(self, reporter: Reporter) -> None:
        """See :class:`Input`."""
        if self._host is None:
            shown = self._path
            content = _read(Path(self._path))
        else:
            ssh.check_files(self._host)
            shown = self._host.uri(self._path)
            content = await read_file(self._host, self._path, most=MAX_SIZE)
        what = f"the VMX file ‘{shown}’"
        self._guest = read_guest(parse_vmx(content, what), _default_name(self._path))
        for warning in self._guest.warnings:
            reporter.warning(warning)
        if self._host is None:
            self._warn_of_locks(reporter)
            looks = [partial(self._look, disk) for disk in self._guest.disks]
            self._checked = await check_each(looks)
        else:
            there = [partial(self._look_there, self._host, disk) for disk in self._guest.disks]
            self._checked = await check_each(there, fatal=(LoginError,))

    def _warn_of_locks(self, reporter: Reporter) -> None:
        if os.path.exists(f"{self._path}.lck"):
            reporter.warning(
                f"‘{self._path}.lck’ is there: the guest may be running, and its disks change "
                "while they are read; shut it down"
            )

    async def _look(self, disk: VmxDisk) -> CheckedDisk:
        folder = Path(self._path).absolute().parent
        try:
            checked = await check_vmdk(folder / disk.file_name)
        except V2VError as error:
            if "\\" in disk.file_name:
                error.hint = "the name is one of Windows: correct it in a copy of the VMX file"
            raise
        choose(self._overlay, checked.source)
        return checked

    async def _look_there(self, host: SshHost, disk: VmxDisk) -> CheckedDisk:
        folder = posixpath.dirname(self._path)
        path = posixpath.normpath(posixpath.join(folder, disk.file_name))
        checked = await check_remote_vmdk(host, path)
        choose(self._overlay, checked.source)
        return checked

    async def describe(self) -> SourceGuest:
        """See :class:`Input`."""
        assert self._guest is not None, "check comes first"
        controllers = [disk.controller for disk in self._guest.disks]
        return with_disks(self._guest.guest, self._checked, controllers)

    async def setup(self, v2vdir: V2VDir, servers: Servers, reporter: Reporter) -> SourceGuest:
        """See :class:`Input`."""
        source = await self.describe()
        disks = [checked.source for checked in self._checked]
        if self._host is None:
            sizes = await serve_overlays(disks, self._overlay, v2vdir, servers)
        else:
            sizes = await serve_remote(self._host, disks, self._overlay, v2vdir, servers)
        return with_sizes(source, sizes)


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():
            # Of a folder, a pipe or a device nothing is read; the error tells what is missing.
            kind = "is a directory" if path.is_dir() else "is not a file"
            if path.exists():
                raise SourceError(f"‘{path}’ {kind}", hint="name the VMX file in it")
        with path.open("rb") as file:
            return file.read(MAX_SIZE + 1)
    except OSError as error:
        raise SourceError(
            f"the VMX file ‘{path}’ can't be read: {error.strerror}",
            hint="check the name" if isinstance(error, FileNotFoundError) else "check its mode",
        ) from error


def _default_name(path: str) -> str:
    name = posixpath.basename(path)
    return name.removesuffix(".vmx") or "guest"
