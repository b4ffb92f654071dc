"""What kind of OVA a file or folder is."""

from __future__ import annotations

import stat
from pathlib import Path

from v2v_async.errors import SourceError
from v2v_async.input.ova.archive import Archive, Folder, TarArchive
from v2v_async.input.ova.packed import COMPRESSIONS, PackedTar, ZipArchive
from v2v_async.input.ova.tar_headers import looks_like_tar


def open_ova(path: Path) -> tuple[Archive, str | None]:
    """Return the OVA, and the name of its OVF where ``path`` is that.

    Raises:
        SourceError: it is nothing of the kind.
    """
    try:
        if path.is_dir():
            return Folder(path), None
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise SourceError(f"‘{path}’ is neither a file nor a folder")
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise SourceError(
            f"the OVA ‘{path}’ can't be read: {error.strerror}",
            hint="check the name" if isinstance(error, FileNotFoundError) else "check its mode",
        ) from error
    for magic, compression in COMPRESSIONS:
        if head.startswith(magic):
            return PackedTar(path, compression), None
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return ZipArchive(path), None
    if looks_like_tar(head):
        return TarArchive(path), None
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        return Folder(path.absolute().parent), path.name
    raise SourceError(
        f"‘{path}’ is not an OVA",
        hint="an OVA is a tar file (perhaps compressed by gzip, bzip2, xz or zstd), a zip file, a "
        "folder, or the .ovf file in one",
    )
