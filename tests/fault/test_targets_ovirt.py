"""-o rhv and -o vdsm, all steps with a replayed conversion: stopped in each, nothing is left."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from tests.fault.test_guest_faults import STEPS, Place, kill_server, when
from tests.fault.test_guest_faults import place as place
from tests.integration.test_output_ovirt import OUTPUTS, shape, tree
from tests.integration.test_output_ovirt import export as export
from v2v_async.errors import ServerError
from v2v_async.events import Event, Reporter
from v2v_async.guest import convert_guest
from v2v_async.options import GuestOptions
from v2v_async.output.contract import Output

pytestmark = pytest.mark.anyio


def run_options(
    place: Place, export: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> GuestOptions:
    """The guest of ``place``, whose disks are not those of the integration tests, to ``mode``."""
    made: list[Output] = [OUTPUTS[mode](export, format="qcow2")]
    monkeypatch.setattr("v2v_async.guest.parse_output", lambda options: made[0])
    return place.options(mode=mode)


@pytest.mark.parametrize("mode", ["rhv", "vdsm"])
async def test_a_whole_run(
    place: Place, export: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    options = run_options(place, export, mode, monkeypatch)
    before = tree(export)
    await convert_guest(options, Reporter(events.append, "t"), tmpdir=place.tmp)
    made = shape([row.rpartition("/")[2] for row in tree(export) if row not in before])
    assert sum(row.endswith(".meta") for row in made) == 2
    assert sum(row.endswith(".ovf") for row in made) == 1
    assert not any("partial" in row for row in made)
    place.assert_nothing_left()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("mode", ["rhv", "vdsm"])
async def test_cancelled_in_each_step(
    place: Place, export: Path, mode: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = run_options(place, export, mode, monkeypatch)
    before = tree(export)
    with anyio.CancelScope() as scope:
        reporter, _ = when(step, scope.cancel)
        await convert_guest(options, reporter, tmpdir=place.tmp)
    assert scope.cancel_called
    place.assert_nothing_left()
    if step == "cleanup":  # the guest was whole before that
        assert len(tree(export)) > len(before)
        return
    assert tree(export) == before


@pytest.mark.parametrize("mode", ["rhv", "vdsm"])
async def test_a_server_killed_in_the_copy(
    place: Place, export: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = run_options(place, export, mode, monkeypatch)
    before = tree(export)
    reporter, _ = when("copy", lambda: kill_server(place, "out2"))
    with pytest.raises(ServerError, match="out2"):
        await convert_guest(options, reporter, tmpdir=place.tmp)
    assert tree(export) == before
    place.assert_nothing_left()
