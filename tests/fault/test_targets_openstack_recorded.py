"""-o openstack against what virt-v2v 2.2 asked of Cinder and Nova: tests/recorded/openstack.

A difference is a mistake here unless it is listed, with its row of docs/targets-openstack.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.fault.test_guest_faults import Place, quiet
from tests.fault.test_guest_faults import place as place
from tests.integration.servers import MIB, fragmented
from tests.openstack_recorded import OPTIONS, TYPE, asked, guest_xml, recorded, volumes
from tests.services.front import Fault
from tests.services.openstack import TestCloud
from tests.services.openstack_fixture import MARKS
from tests.services.openstack_fixture import cloud as cloud
from tests.services.openstack_fixture import session_cloud as session_cloud
from v2v_async import __version__
from v2v_async.errors import TargetError
from v2v_async.guest import convert_guest
from v2v_async.options import GuestOptions, InputOptions
from v2v_async.secret import Secret

pytestmark = MARKS

_DATE = r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d"
_UUID = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
# Row of the table; what it is of, theirs, ours: regular expressions.
ALLOWED = [
    ("volumes: `virt_v2v_version`", r".*\.virt_v2v_version", r"2\.2\.0",
     re.escape(f"v2v-async {__version__}")),
    ("volumes: `virt_v2v_conversion_date`", r".*\.virt_v2v_conversion_date", _DATE, _DATE),
    ("volumes: descriptions", r".*\.description", r"rec disk ./2 converted by virt-v2v",
     r"rec disk ./2 converted by v2v-async"),
    ("volumes: descriptions", r"POST /volumes .*\.description",
     "virt-v2v temporary volume for rec", "temporary volume of v2v-async for rec"),
    ("volumes: a mark", r"POST /volumes .*\.metadata\.v2v_async_id", "None", _UUID),
]  # fmt: skip


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Return everything in a JSON value by its path; null is the same as absent."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from leaves(each, f"{name}.{key}")
    elif value is not None:
        yield name, str(value)


def label(call: list[Any]) -> str:
    """Name what a call does: the volume too, and whichever verb sets the properties."""
    method, path, body = call
    if path == "/volumes":
        path += f" {body['volume']['name']}"
    elif path.endswith("/metadata"):
        method = "SET"
    elif path.endswith(("/action", "/os-volume_attachments")):
        [what] = body
        path += f" {body[what].get('volumeId', what)}"
    return f"{method} {path}"


def changes(calls: list[list[Any]]) -> list[list[Any]]:
    return [call for call in calls if call[0] != "GET"]


def contents(calls: list[list[Any]], made: list[dict[str, Any]]) -> dict[str, str]:
    """Return all that was sent and all that has become of it."""
    found: dict[str, str] = {}
    for call in changes(calls):
        assert label(call) not in found, "it was asked twice"
        found[label(call)] = "asked"
        found |= leaves(call[2], label(call))
    for volume in made:
        found |= leaves(volume, volume["name"])
    return found


def is_detaching(call: list[Any]) -> bool:
    return call[0] == "DELETE" and "os-volume_attachments" in call[1]


def rows() -> list[str]:
    """Return the first column of the document's table of differences."""
    text = (ROOT / "docs" / "targets-openstack.md").read_text()
    return [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines()]


def run_options(place: Place, cloud: TestCloud) -> GuestOptions:
    """The recorded run; the disks' content is what the replayed conversion needs."""
    disks = [fragmented(place.tmp.parent / "system", 24 * MIB)]
    disks.append(fragmented(place.tmp.parent / "data", 8 * MIB))
    options = place.options(
        mode="openstack",
        storage=TYPE,
        password=Secret(cloud.password),
        options=tuple({**OPTIONS, "dev-disk-by-id": str(cloud.devices)}.items()),
    )
    xml = guest_xml(place.tmp.parent, *disks)
    return replace(options, input=InputOptions("libvirtxml", (str(xml),)))


async def test_the_same_calls_and_volumes(place: Place, cloud: TestCloud) -> None:
    await convert_guest(run_options(place, cloud), quiet(), tmpdir=place.tmp)
    reference, calls = recorded(), asked(cloud)
    theirs = contents(reference["calls"], reference["volumes"])
    ours = contents(calls, volumes(cloud))
    unused = {row for row, *_ in ALLOWED}
    for name in theirs.keys() | ours.keys():
        given = str(theirs.get(name)), str(ours.get(name))
        if given[0] == given[1] and not name.endswith("_date"):
            continue
        matching = [
            row
            for row, *patterns in ALLOWED
            if all(re.fullmatch(p, text) for p, text in zip(patterns, (name, *given), strict=True))
        ]
        assert matching, f"{name}: {given[0]!r} of virt-v2v, {given[1]!r} of ours"
        unused -= set(matching)
    assert not unused, "no difference any more"
    assert {row for row, *_ in ALLOWED} <= set(rows())


async def test_the_same_order(place: Place, cloud: TestCloud) -> None:
    """But for one thing: volumes are complete, or gone, when nothing holds them any more."""
    await convert_guest(run_options(place, cloud), quiet(), tmpdir=place.tmp)
    theirs, ours = changes(recorded()["calls"]), changes(asked(cloud))
    in_between = [[label(each) for each in of if not is_detaching(each)] for of in (theirs, ours)]
    assert in_between[0] == in_between[1]
    assert all(is_detaching(each) for each in theirs[-2:])
    first = next(index for index, each in enumerate(ours) if "action" in each[1])
    assert all(is_detaching(each) for each in ours[first - 2 : first])
    assert "volumes: when they are detached" in rows()


async def test_the_same_after_a_refusal(place: Place, cloud: TestCloud) -> None:
    """The second volume is not attached; virt-v2v does not look before it deletes."""
    attach = "/v2.1/servers/[^/]+/os-volume_attachments"
    cloud.add_fault(Fault("compute", "POST", attach, status=403, skip=1))
    with pytest.raises(TargetError):
        await convert_guest(run_options(place, cloud), quiet(), tmpdir=place.tmp)
    theirs, calls = recorded()["failed"], asked(cloud)
    attached = [index for index, each in enumerate(calls) if each[0] == "POST"][-1]
    ours = calls[attached + 1 :]
    never_attached = "DELETE /servers/SERVER/os-volume_attachments/VOLUME2"
    wanted = {label(call) for call in changes(theirs)} - {never_attached}
    assert {label(call) for call in changes(ours)} == wanted
    # Each is deleted when it can be, and seen to be gone.
    of_volumes = [call for call in cloud.calls() if re.fullmatch(".*/volumes/[^/]+", call[2])]
    assert [status for _, method, _, status, _ in of_volumes if method == "DELETE"] == [202, 202]
    assert [status for _, _, _, status, _ in of_volumes].count(404) == 2
    assert cloud.volumes() == []
    assert "volumes on failure" in rows()
