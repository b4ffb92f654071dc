"""What a guest is called that has no name but its file's."""

from __future__ import annotations

from collections.abc import Sequence

DISK_SUFFIXES = (".img", ".qcow2", ".raw", ".vmdk", "-sda")


def name_after(file_name: str, suffixes: Sequence[str]) -> str:
    """Return the guest's name from a file's, as virt-v2v makes it: without one of the suffixes."""
    for suffix in suffixes:
        if file_name.endswith(suffix):
            file_name = file_name.removesuffix(suffix)
            break
    return file_name or "guest"
