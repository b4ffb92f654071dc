"""``-o local`` (``-o disk``): disk images and a libvirt XML in a directory.

::

    DIR/NAME-sda  DIR/NAME-sdb …  DIR/NAME.xml       as virt-v2v names them
                  └─> /dev/VG/LV                     or links to block devices that are written
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

_WITHOUT_UEFI = "the XML leaves the choice to libvirt, which needs OVMF (x86-64) or AAVMF (aarch64)"


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
            disk.index: TargetDisk(str(path), self.disks.format, is_block=path.is_block_device())
            for disk, path in zip(target.source.disks, paths, strict=True)
        }
        uefi = uefi_for(target, reporter, without=_WITHOUT_UEFI)
        xml = domain_xml(target, disks, uefi)
        return [Document(self.document_path(target.name), xml)]
