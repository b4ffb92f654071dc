"""What both forms of ``-o rhv`` files have in common: the guest's checks and its documents."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from v2v_async.errors import UsageError
from v2v_async.events import Reporter
from v2v_async.model import SourceGuest, TargetGuest
from v2v_async.output.file_disks import Document
from v2v_async.output.ovirt.meta import check_size, volume_meta
from v2v_async.output.ovirt.ovf import Flavour, Volume, losses, ovf

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def is_uuid(text: str) -> bool:
    """Return whether ``text`` is a UUID as oVirt writes it."""
    try:
        return str(uuid.UUID(text)) == text.lower()
    except ValueError:
        return False


def check_name(name: str) -> None:
    """Refuse a name that no guest of oVirt can have.

    It is no part of a path, and what the engine does not like in it can be changed when the guest
    is imported.

    Raises:
        UsageError: it is empty or has control characters.
    """
    if not name.strip() or _CONTROL.search(name):
        what = "it has a control character" if name.strip() else "it is empty"
        raise UsageError(
            f"{name!r} can't be the name of the new guest: {what}", hint="give one: -on NAME"
        )


def check_guest(source: SourceGuest, name: str) -> None:
    """Refuse a guest that oVirt can't have.

    Raises:
        UsageError, TargetError
    """
    check_name(name)
    for disk in source.disks:
        check_size(disk.index, disk.size)


def guest_documents(
    target: TargetGuest,
    volumes: Sequence[Volume],
    finals: Sequence[Path],
    ovf_path: Path,
    *,
    flavour: Flavour,
    vm: str,
    domain: str,
    reporter: Reporter,
) -> list[Document]:
    """Return a ``.meta`` for each of ``volumes``, at ``finals``, and the OVF: the same time in all.

    ``vm`` and ``domain`` are the UUIDs of the new guest and of the storage domain.
    """
    now = int(time.time())
    created = time.strftime("%Y/%m/%d %H:%M:%S", time.gmtime(now))
    for text in losses(target):
        reporter.warning(text)
    documents = [
        Document(
            final.with_name(f"{final.name}.meta"),
            volume_meta(
                domain=domain,
                image=volume.image,
                size=volume.size,
                format_=volume.format,
                is_preallocated=volume.is_preallocated,
                time=now,
            ),
        )
        for volume, final in zip(volumes, finals, strict=True)
    ]
    content = ovf(target, volumes, flavour=flavour, vm=vm, domain=domain, created=created)
    return [*documents, Document(ovf_path, content)]


def silent(reporter: Reporter) -> Reporter:
    """Return a reporter for what has been said before."""
    return Reporter(lambda event: None, reporter.run)
