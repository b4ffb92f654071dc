"""``-i libvirt [-ic URI]``: a guest of libvirt's, by name or UUID, that is shut down."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import ClassVar, Self

from v2v_async.errors import UsageError
from v2v_async.events import Reporter
from v2v_async.input.libvirt.domain import DomainInput, VolumeLookup
from v2v_async.input.libvirt.domain_xml import Domain, parse_domain
from v2v_async.libvirt_connection import connected, is_remote, refuse_active
from v2v_async.options import InputOptions
from v2v_async.redact import redact


class LibvirtInput(DomainInput):
    """A guest that libvirt knows and whose disks are on this machine."""

    name: ClassVar[str] = "libvirt"
    accepts_running = False
    """For those who know how to read the disks of a guest that runs."""

    @classmethod
    def parse(cls, options: InputOptions) -> Self:
        """See :class:`Input`."""
        if len(options.arguments) != 1:
            raise UsageError(
                f"-i libvirt takes one guest, not {len(options.arguments)}",
                hint="name it, or give its UUID; ‘virsh list --all’ lists them",
            )
        made = cls(options)
        made._read_options(options)
        return made

    @asynccontextmanager
    async def _opened(self, reporter: Reporter) -> AsyncIterator[tuple[Domain, VolumeLookup]]:
        if is_remote(self._connection):
            reporter.warning(
                f"‘-ic {redact(self._connection or '')}’ is another machine: the disks’ paths are "
                "looked for on this one, which works where both share their storage"
            )
        async with connected(self._connection, self._password) as connection:
            found = await connection.domain(self._argument)
            if not self.accepts_running:
                refuse_active(found, self._connection)
            if found.has_saved_state:
                reporter.warning(
                    f"‘{found.name}’ has been saved while it ran (virsh managedsave): its disks "
                    "are as after a power cut; what was in memory is not converted"
                )
            yield parse_domain(found.xml, f"the guest ‘{found.name}’"), connection.volume
