"""A guest of an engine: its name, made from an OVF, and taken back."""

from __future__ import annotations

import uuid

from lxml import etree

from v2v_async.errors import TargetError, UsageError
from v2v_async.output.ovirt.session import Session, Site, waiting
from v2v_async.ovirt_engine import EngineError, text

IMPORT_TIMEOUT_S = 300.0
"""For the engine to make the guest; nothing is copied then."""

# The engine's own bounds: its search would read more into other characters, too.
_MOST_CHARACTERS = 255
_BESIDES = "0123456789-_.+"


def check_name(name: str) -> None:
    """Refuse a name that the engine would refuse at the very end.

    Raises:
        UsageError: it says why.
    """
    if name and all(each.isalpha() or each in _BESIDES for each in name):
        if len(name) <= _MOST_CHARACTERS:
            return
        problem = f"it has {len(name)} characters, and {_MOST_CHARACTERS} are allowed"
    else:
        problem = "oVirt allows letters, digits and the characters - _ . + there"
    suggestion = compliant_name(name)
    raise UsageError(
        f"{name[:80]!r} can't be the name of the new guest: {problem}",
        hint=f"give another one: -on {suggestion}",
    )


def compliant_name(name: str) -> str:
    """Return a name that oVirt allows, as near to ``name`` as it can be."""
    kept = "".join(each if each.isalpha() or each in _BESIDES else "-" for each in name)
    return kept.strip("-.")[:64] or "guest"


async def find_guest(session: Session, name: str) -> str | None:
    """Return the id of the guest of this name, which ``check_name`` has passed."""
    found = await session.get("vms", search=f"name={name}")
    for guest in found.iterfind("vm"):
        if text(guest, "name") == name:
            return guest.get("id")
    return None


async def make_guest(session: Session, site: Site, vm: str, ovf: bytes) -> None:
    """Make the guest of an OVF, whose disks are there; ``vm`` is its id in there.

    Raises:
        EngineError: the engine refuses; it was not made.
        TargetError: it may have been made in part.
    """
    root = etree.Element("vm")
    etree.SubElement(root, "cluster", id=site.cluster)
    initialization = etree.SubElement(root, "initialization")
    configuration = etree.SubElement(initialization, "configuration")
    etree.SubElement(configuration, "type").text = "ova"
    # The declaration of its own encoding has no place within another document.
    document = etree.fromstring(ovf)
    etree.SubElement(configuration, "data").text = etree.tostring(document, encoding="unicode")
    correlation = str(uuid.uuid4())
    await session.post("vms", root, {"correlation_id": correlation})
    status = "unknown"
    async for _ in waiting(IMPORT_TIMEOUT_S):
        jobs = await session.get("jobs", search=f"correlation_id={correlation}")
        states = {text(job, "status"): text(job, "description") for job in jobs.iterfind("job")}
        for failed in ("failed", "aborted"):
            if failed in states:
                raise _not_made(f"‘{states[failed]}’ {failed}")
        if "started" in states:
            status = "being made"
            continue
        found = await session.find(f"vms/{vm}")
        if found is None:
            # Jobs are listed a moment after they were begun.
            status = "not there"
            continue
        status = text(found, "status", "down")
        if status != "image_locked":
            return
    raise _not_made(f"it is still {status}")


def _not_made(why: str) -> TargetError:
    return TargetError(
        f"the engine could not make the guest: {why}",
        hint="Events in the engine's Administration Portal tell why",
    )


async def remove_guest(session: Session, vm: str, timeout_s: float) -> None:
    """Remove a guest but not its disks; return when it is gone.

    Raises:
        TargetError: it can't be removed.
    """
    problem = "the engine has not removed it in time"
    async for _ in waiting(timeout_s):
        if await session.find(f"vms/{vm}") is None:
            return
        try:
            await session.delete(f"vms/{vm}", detach_only="true")
        except EngineError as error:
            problem = error.message
    raise TargetError(f"the guest {vm} can't be removed: {problem}")
