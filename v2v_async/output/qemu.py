"""``-o qemu``: disk images and a shell script that boots the guest with qemu.

::

    DIR/NAME-sda  DIR/NAME-sdb …  DIR/NAME.sh     as virt-v2v names them
    DIR/NAME-XXXXXXXX.vars                        of UEFI guests: the script makes it, once
    DIR/NAME.log                                  what the guest says, with -oo qemu-boot
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from v2v_async import process
from v2v_async.errors import DependencyError, V2VError
from v2v_async.events import Reporter
from v2v_async.model import SourceGuest, TargetGuest
from v2v_async.options import OutputOptions
from v2v_async.output.directory import DirectoryOutput
from v2v_async.output.domain_xml import TargetDisk
from v2v_async.output.file_disks import COMPRESSED_HELP, Document, FileDisks, parse_bool
from v2v_async.output.qemu_script import qemu_script
from v2v_async.output.uefi import uefi_for
from v2v_async.v2vdir import V2VDir

QEMU_BOOT_HELP = "start the guest in the background when it is converted"
"""What ``-oo ?`` says of ``qemu-boot``."""
_WITHOUT_UEFI = (
    "before the script is run, install OVMF (x86-64) or AAVMF (aarch64) and name its two files in "
    "QEMU_UEFI_CODE and QEMU_UEFI_VARS"
)


class QemuOutput(DirectoryOutput):
    """Files in a directory, and a script to boot them."""

    name = "qemu"
    option_help = {"compressed": COMPRESSED_HELP, "qemu-boot": QEMU_BOOT_HELP}
    suffix = ".sh"

    def __init__(self, disks: FileDisks, *, is_booted: bool = False) -> None:
        super().__init__(disks)
        self.is_booted = is_booted

    @classmethod
    def parse(cls, options: OutputOptions) -> Self:
        """Check -os, -of, -oa, -oo, -on and refuse -op."""
        made = super().parse(options)
        for option, value in options.options:
            if option == "qemu-boot":
                made.is_booted = parse_bool(option, value)
        return made

    async def check(self, reporter: Reporter) -> None:
        """Check the directory; where the guest will be booted, that qemu is there."""
        await super().check(reporter)
        program = "qemu-system-x86_64"
        if self.is_booted and shutil.which(program) is None:
            raise DependencyError(
                f"{program} is not installed, and -oo qemu-boot needs it",
                hint="apt-get install qemu-system-x86, or leave out -oo qemu-boot",
            )

    async def check_source(self, source: SourceGuest, name: str, reporter: Reporter) -> None:
        """As for any directory; and say what qemu's command line can't carry over."""
        await super().check_source(source, name, reporter)
        if source.tpm is not None:
            reporter.warning(
                "the guest has a TPM, and the script gives it none: what it sealed there is lost"
            )

    def documents(
        self, target: TargetGuest, paths: Sequence[Path], reporter: Reporter
    ) -> list[Document]:
        """Return the script."""
        disks = {
            disk.index: TargetDisk(str(path), self.disks.format)
            for disk, path in zip(target.source.disks, paths, strict=True)
        }
        # With a name that no earlier guest had: its variables name devices of another machine.
        variables = self.document_path(target.name).with_name(
            f"{target.name}-{secrets.token_hex(4)}.vars"
        )
        script = qemu_script(
            target, disks, uefi_for(target, reporter, without=_WITHOUT_UEFI), variables
        )
        return [Document(self.document_path(target.name), script, is_executable=True)]

    async def finalize(self, v2vdir: V2VDir, target: TargetGuest, reporter: Reporter) -> None:
        """Write the script, publish everything; start the guest where that was asked for."""
        await super().finalize(v2vdir, target, reporter)
        if self.is_booted:
            self._boot(target.name, reporter)

    def _boot(self, name: str, reporter: Reporter) -> None:
        """Start the script in a session of its own. The guest is whole whether it starts or not."""
        script = self.document_path(name)
        log = script.with_suffix(".log")
        try:
            # Appended to: what is there may be a file of the person's.
            with log.open("ab") as output:
                guest = process.start_detached([str(script)], output=output)
        except (OSError, V2VError) as error:
            reporter.warning(f"the guest was made, but ‘{script}’ can't be started: {error}")
            return
        reporter.message(f"the guest is booting as process {guest.pid}; its console is in ‘{log}’")
