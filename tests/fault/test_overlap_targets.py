"""Every target that is set up before the conversion: whole, or gone when that fails."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.fault.test_guest_faults import Place, quiet
from tests.fault.test_guest_faults import place as place
from tests.fault.test_targets_matrix import TYPES, Target, every, options
from tests.fault.test_targets_matrix import target as target
from tests.fault.test_targets_openstack import MODES, WHOLE, made, run_options
from tests.fault.test_targets_ovirt_upload import run_options as engine_options
from tests.integration.test_output_libvirt import daemon as daemon
from tests.integration.test_output_libvirt import host as host
from tests.integration.test_output_ovirt import export as export
from tests.ovirt_upload import engine as engine
from tests.ovirt_upload import imageio as imageio
from tests.services.engine import Engine
from tests.services.openstack import TestCloud
from tests.services.openstack_fixture import MARKS as NEEDS_OPENSTACK
from tests.services.openstack_fixture import cloud as cloud
from tests.services.openstack_fixture import session_cloud as session_cloud
from v2v_async.errors import V2VError
from v2v_async.events import Event, Reporter
from v2v_async.guest import convert_guest
from v2v_async.options import CopyOptions, GuestOptions, OverlapOptions

pytestmark = pytest.mark.anyio


def early(given: GuestOptions, *, verify: bool = True) -> GuestOptions:
    """Copied while it is converted, and compared at the end."""
    return replace(given, overlap=OverlapOptions("on"), copy=CopyOptions(verify=verify))


async def convert(given: GuestOptions, place: Place) -> None:
    """Convert a guest that is changed in many places."""
    events: list[Event] = []
    await convert_guest(given, Reporter(events.append, "t"), tmpdir=place.tmp)
    steps = [event.step for event in events if event.type == "started" and event.disk is None]
    assert steps[:5] == [None, "input", "output", "convert", "copy"]
    ends = [each.bytes for each in events if each.type == "finished" and each.step == "copy"]
    assert all(end.landed == end.total for end in ends if end is not None)
    place.assert_source_unchanged()
    assert list(place.tmp.iterdir()) == []


@pytest.fixture(autouse=True)
def _stirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("V2V_REPLAY_STIRS", "30")


@every(*TYPES)
async def test_a_target(place: Place, target: Target) -> None:
    is_kept = target.output.mode != "null"
    await convert(early(options(place, target), verify=is_kept), place)
    assert (target.look() != target.before) == is_kept


@every(*TYPES)
async def test_a_target_of_a_conversion_that_fails(
    place: Place, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("V2V_REPLAY_FAILS", "1")
    with pytest.raises(V2VError, match="could not detect"):
        await convert_guest(early(options(place, target)), quiet(), tmpdir=place.tmp)
    target.assert_nothing_left(place)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fails", [False, True])
class TestOpenStack:
    pytestmark = NEEDS_OPENSTACK

    async def test_a_cloud(
        self,
        place: Place,
        cloud: TestCloud,
        mode: str,
        fails: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        given = early(run_options(place, cloud, mode))
        if fails:
            monkeypatch.setenv("V2V_REPLAY_FAILS", "1")
            with pytest.raises(V2VError, match="could not detect"):
                await convert_guest(given, quiet(), tmpdir=place.tmp)
        else:
            await convert(given, place)
        assert made(cloud, mode) == ([] if fails else WHOLE[mode])


@pytest.mark.parametrize("fails", [False, True])
async def test_an_engine(
    place: Place, engine: Engine, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    given = early(engine_options(place, engine, monkeypatch))
    before = engine.shape()
    if fails:
        monkeypatch.setenv("V2V_REPLAY_FAILS", "1")
        with pytest.raises(V2VError, match="could not detect"):
            await convert_guest(given, quiet(), tmpdir=place.tmp)
        assert engine.shape() == before
    else:
        await convert(given, place)
        assert engine.shape() != before
