"""``-i libvirtxml``: a guest that a file with libvirt domain XML describes.

Relative paths in it are taken from the current directory, as virt-v2v does it. libvirt itself is
only asked where a disk is a volume of a storage pool.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import ClassVar, Self

from v2v_async.errors import SourceError, UsageError
from v2v_async.events import Reporter
from v2v_async.input.libvirt.domain import DomainInput, VolumeLookup
from v2v_async.input.libvirt.domain_xml import Domain, parse_domain
from v2v_async.input.xml_source import MAX_SIZE
from v2v_async.libvirt_connection import FoundVolume, LibvirtConnection, connected
from v2v_async.options import InputOptions
from v2v_async.redact import redact


class LibvirtXmlInput(DomainInput):
    """The guest of one XML file."""

    name: ClassVar[str] = "libvirtxml"

    @classmethod
    def parse(cls, options: InputOptions) -> Self:
        """See :class:`Input`."""
        if len(options.arguments) != 1:
            raise UsageError(
                f"-i libvirtxml takes one XML file, not {len(options.arguments)}",
                hint="‘virsh dumpxml GUEST > FILE’ writes one",
            )
        made = cls(options)
        made._read_options(options)
        return made

    @asynccontextmanager
    async def _opened(self, reporter: Reporter) -> AsyncIterator[tuple[Domain, VolumeLookup]]:
        domain = parse_domain(_read(Path(self._argument)), f"‘{redact(self._argument)}’")
        async with AsyncExitStack() as stack:
            connection: LibvirtConnection | None = None

            async def volume(pool: str, name: str) -> FoundVolume:
                nonlocal connection
                if connection is None:
                    connection = await stack.enter_async_context(
                        connected(self._connection, self._password)
                    )
                return await connection.volume(pool, name)

            yield domain, volume

    def _hint(self, path: Path) -> str | None:
        beside = Path(self._argument).parent / path
        if path.is_absolute() or path.exists() or not beside.exists():
            return None
        return (
            "relative paths are taken from the current directory, not from the XML's: "
            f"cd {Path(self._argument).parent} first, or write the whole path"
        )


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            # One byte more, so that a larger file shows.
            return file.read(MAX_SIZE + 1)
    except OSError as error:
        raise SourceError(
            f"‘{redact(str(path))}’ can't be read: {error.strerror}",
            hint="name a file with libvirt domain XML; for a guest of libvirt’s use -i libvirt",
        ) from error
