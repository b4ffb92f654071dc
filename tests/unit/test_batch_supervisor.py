"""The supervisor of a run: what it may change, and when."""

from __future__ import annotations

from pathlib import Path

import pytest

from v2v_async.batch.plan.model import Plan
from v2v_async.batch.record import folder
from v2v_async.batch.record.journal import Failure, open_journal
from v2v_async.batch.supervisor import Run, supervise
from v2v_async.errors import UsageError
from v2v_async.events import Event, Reporter

pytestmark = pytest.mark.anyio


async def test_a_run_that_another_has_is_not_changed(tmp_path: Path) -> None:
    plan = Plan.model_validate({"guests": [{"name": "web"}]})
    path = folder.create(tmp_path, "r", plan)
    with open_journal(path / folder.JOURNAL) as journal:
        journal.fail("web", Failure("no route"))
    events: list[Event] = []
    with folder.locked(path), pytest.raises(UsageError, match="r"):
        await supervise(
            Run(path, plan, {}),
            Reporter(events.append, "r"),
            first=lambda journal: journal.take_up(["web"]),
        )
    with open_journal(path / folder.JOURNAL, read_only=True) as journal:
        assert [each.phase for each in journal.guests()] == ["failed"]
    assert events == []
