"""What a warm migration asks libvirt for: backup jobs and checkpoints.

Source: libvirt-domain(3) virDomainBackupBegin, libvirt-domain-checkpoint; formatbackup.html and
formatcheckpoint.html of libvirt.org.
"""

from __future__ import annotations

import time

from v2v_async.libvirt_connection import LibvirtConnection, libvirt_module
from v2v_async.warm.changed import MarkLostError

_END_POLL_S = 0.02


class BackupConnection(LibvirtConnection):
    """A connection that can read the disks of guests that run. Guests are named."""

    async def begin_backup(self, guest: str, backup: str, checkpoint: str | None) -> None:
        """Begin a backup job by these XML documents; the checkpoint is made at the same moment.

        Raises:
            MarkLostError: the checkpoint that it is to start from is gone or has missed something.
            SourceError: it can't begin.
        """

        def call() -> None:
            libvirt = libvirt_module()
            lost = (libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT, libvirt.VIR_ERR_CHECKPOINT_INCONSISTENT)
            try:
                self._look_up(guest).backupBegin(backup, checkpoint, 0)
            except libvirt.libvirtError as error:
                if error.get_error_code() in lost:
                    raise MarkLostError(str(error.get_error_message())) from None
                raise

        await self._ask(
            call,
            f"the guest ‘{guest}’ can't be read while it runs",
            hint="its disks must be files, its libvirt 7.2 or newer, and qemu must be able to make "
            "a socket where --socket-dir says",
        )

    async def backup(self, guest: str) -> str | None:
        """Return the XML of the guest's backup job; None where there is none.

        Raises:
            SourceError: libvirt fails.
        """
        return await self._ask(
            lambda: self._backup(guest), f"the backup job of the guest ‘{guest}’ can't be looked at"
        )

    async def end_backup(self, guest: str) -> None:
        """End the guest's backup job and wait until it is gone; it may have ended already.

        Raises:
            SourceError: it can't be ended.
        """

        def call() -> None:
            libvirt = libvirt_module()
            try:
                self._look_up(guest).abortJob()
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID:
                    raise
            # libvirt answers before qemu has ended it, and nothing tells when it has.
            while self._backup(guest) is not None:
                time.sleep(_END_POLL_S)

        await self._ask(
            call,
            f"the backup job of the guest ‘{guest}’ can't be ended",
            hint=f"try: virsh domjobabort {guest}",
        )

    def _backup(self, guest: str) -> str | None:
        libvirt = libvirt_module()
        domain = self._look_up(guest)
        if not domain.isActive():
            return None
        try:
            return str(domain.backupGetXMLDesc(0))
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_BACKUP:
                return None
            raise

    async def checkpoints(self, guest: str) -> list[str]:
        """Return the names of the guest's checkpoints.

        Raises:
            SourceError: libvirt fails.
        """

        def call() -> list[str]:
            return [str(each.getName()) for each in self._look_up(guest).listAllCheckpoints(0)]

        return await self._ask(call, f"the checkpoints of the guest ‘{guest}’ can't be listed")

    async def delete_checkpoint(self, guest: str, checkpoint: str, *, is_needed: bool) -> None:
        """Delete a checkpoint; its bitmaps stay in the images where the guest is off.

        ``is_needed``: another checkpoint gets what this one knows. Else only libvirt's record of it
        goes where its bitmap has been lost.

        Raises:
            SourceError: it can't be deleted.
        """

        def call() -> None:
            libvirt = libvirt_module()
            domain = self._look_up(guest)
            found = domain.checkpointLookupByName(checkpoint, 0)
            if domain.isActive():
                try:
                    found.delete(0)
                    return
                except libvirt.libvirtError:
                    if is_needed:
                        raise
            found.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)

        await self._ask(
            call,
            f"the checkpoint ‘{checkpoint}’ of the guest ‘{guest}’ can't be deleted",
            hint=f"try: virsh checkpoint-delete {guest} {checkpoint}",
        )

    async def shut_down(self, guest: str) -> None:
        """Ask the guest to shut down; it may take its time, or not listen.

        Raises:
            SourceError: it can't be asked.
        """
        await self._ask(
            lambda: self._look_up(guest).shutdown(), f"the guest ‘{guest}’ can't be shut down"
        )
