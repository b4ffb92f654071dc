"""The recorded ``-o openstack`` of virt-v2v 2.2, and calls of Cinder and Nova in its form."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.services.nova import APPLIANCE
from tests.services.openstack import TestCloud

RECORDED = ROOT / "tests" / "recorded" / "openstack"
OPTIONS = {"server-id": "appliance", "guest-id": "42 & more"}
"""-oo options of the recorded run, besides dev-disk-by-id; and its volume type:"""
TYPE = "fast"

_VOLUME = re.compile(r"/volumes/([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")
_BASES = re.compile(r"/v3/[0-9a-f]{32}|/v2\.1(?=/)")


def guest_xml(folder: Path, system: Path, data: Path) -> Path:
    """Write the source guest of the recorded run with other files for its disks."""
    text = (RECORDED / "guest.xml").read_text()
    for name, disk in (("system.img", system), ("data1.img", data)):
        assert f"/var/tmp/g/{name}" in text
        text = text.replace(f"/var/tmp/g/{name}", str(disk))
    path = folder / "guest.xml"
    path.write_text(text)
    return path


def asked(cloud: TestCloud) -> list[list[Any]]:
    """Return method, path and body of what Cinder and Nova were asked, ids replaced by names.

    Volumes are VOLUME1, VOLUME2 as they come up, which is the order of the disks. A question that
    was repeated at once (is it ready?) is there once.
    """
    names = {APPLIANCE: "SERVER"}
    found: list[list[Any]] = []
    for service, method, path, _, body in cloud.calls():
        if service not in ("compute", "volume") or not _BASES.match(path):
            continue
        if volume := _VOLUME.search(path):
            names.setdefault(volume[1], f"VOLUME{len(names)}")
        text = json.dumps([method, _BASES.sub("", path), body])
        for identifier, name in names.items():
            text = text.replace(identifier, name)
        call = json.loads(text)
        if method != "GET" or found[-1:] != [call]:
            found.append(call)
    return found


def volumes(cloud: TestCloud) -> list[dict[str, Any]]:
    """Return what the volumes have become, without their ids."""
    return [{name: each[name] for name in each if name != "id"} for each in cloud.volumes()]


def recorded() -> dict[str, Any]:
    """Return the recorded run: ``calls``, ``volumes``; ``failed``: calls of one that failed."""
    loaded: dict[str, Any] = json.loads((RECORDED / "virt-v2v-2.2-openstack.json").read_text())
    return loaded
