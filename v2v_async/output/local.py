"""``-o local`` (``-o disk``): disk images and a libvirt XML in a directory.

::

    DIR/NAME-sda  DIR/NAME-sdb …  DIR/NAME.xml       as virt-v2v names them
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from v2v_async.events import Reporter
from v2v_async.model import TargetGuest
from v2v_async.output.directory import DirectoryOutput
from v2v_async.output.domain_xml import TargetDisk, domain_xml
from v2v_async.output.file_disks import COMPRESSED_HELP, Document
from v2v_async.output.uefi import uefi_for


class LocalOutput(DirectoryOutput):
    """Files in a directory."""

    name = "local"
    option_help = {"compressed": COMPRESSED_HELP}
    suffix = ".xml"

    def documents(
        self, target: TargetGuest, paths: Sequence[Path], reporter: Reporter
    ) -> list[Document]:
        """Return the XML."""
        disks = {
            disk.index: TargetDisk(str(path), self.disks.format)
            for disk, path in zip(target.source.disks, paths, strict=True)
        }
        xml = domain_xml(target, disks, uefi_for(target, reporter))
        return [Document(self.document_path(target.name), xml)]
