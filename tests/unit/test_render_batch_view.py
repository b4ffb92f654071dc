"""The live part of a batch: at every size of terminal, and of 500 guests."""

from __future__ import annotations

import re
import time

import pytest

from tests.batch_screens import GIB, SIZES, busy, pausing, text
from tests.unit.test_render_batch_state import Batch
from v2v_async.render.batch_rows import Columns, waiting_line
from v2v_async.render.batch_state import GuestView
from v2v_async.render.batch_view import BatchView
from v2v_async.render.line import Line, wide


def test_a_small_batch_in_words() -> None:
    batch = Batch().begin("web", "db", "mail", "dns", "old", disks=(4 * GIB, 2 * GIB))
    batch.convert("web", 60)
    batch.convert("old", 30)
    batch.emit("old", "failed", "the server has gone", details={"step": "copy", "disk": 2})
    batch.start("db")
    batch.run.for_guest("db").for_step("convert").emit("started")
    batch.disk("web", "started", 1, total=8 * GIB, data=4 * GIB)
    batch.run.for_guest("web").for_disk(2).emit("waiting", details={"for": "hosts.esx1.disks"})
    for second in range(1, 11):
        batch.now += 1
        copied = second * (GIB // 10)
        batch.disk("web", "progress", 1, total=8 * GIB, data=4 * GIB, copied=copied)
    batch.emit("mail", "waiting", details={"for": "conversions", "until": None})
    batch.emit("dns", "retrying", "no luck", details={"attempt": 1, "at": batch.now + 30})
    batch.run.emit(
        "limits",
        details={
            "taken": {"conversions": 1, "memory": 2 * GIB, "disks": 1, "targets.far.disks": 0},
            "capacities": {
                "conversions": 1, "memory": 8 * GIB, "disks": 1 << 30, "targets.far.disks": 3,
            },
        },
    )  # fmt: skip
    view = BatchView(batch.state)
    assert text(view.lines(batch.now, 79, 24)) == [
        "nightly        1:40 ╸────────────────   4%  1.0 of 24.0 GiB  102 MiB/s     3:50",
        "2 waiting  1 converting  1 copying  1 failed  of 5",
        "conversions 1/1  memory 2.0/8.0 GiB  disks 1",
        "web                 copying 0:10       16%   1.0 of 6.0 GiB  102 MiB/s     0:50",
        "  disk 1            ━━━━─────────────  24%   1.0 of 4.0 GiB  102 MiB/s     0:30",
        "  disk 2            waits for hosts.esx1.disks",
        "db                  convert 0:10",
        "old                 ✗ copy, disk 2: the server has gone",
        "mail                waits for conversions",
        "dns                 tries again in 0:30: no luck",
        "waiting: 1 for conversions, 1 to try again (next in 0:30)",
        "disks waiting: 1 for hosts.esx1.disks",
    ]
    assert text(view.lines(batch.now, 40, 10)) == [
        "nightly  1:40 ╸────────────────────   4%",
        "2 waiting  1 converting  … and 3 more",
        "conversions 1/1  … and 2 more",
        "web           copying 0:10           16%",
        "  disk 1      ━━━━━────────────────  24%",
        "  disk 2      waits for hosts.esx1.disks",
        "db            convert 0:10",
        "old           ✗ copy, disk 2: the serve…",
        "… and 2 more",
        "waiting: 1 for conversions, … and 2 more",
    ]


def test_what_is_paused_says_so_everywhere() -> None:
    batch = pausing()
    view = BatchView(batch.state)
    shown = text(view.lines(batch.now, 79, 24))
    assert shown[1:] == [
        "3 waiting (1 paused)  1 converting (1 paused)  1 converted (1 paused)",
        "1 copying (1 paused)  of 6",
        "web                 copying 0:07, then paused   11%   0.7 of 6.0 GiB  102 MiB/s",
        "  disk 1            ━━╸──────────────  17%   0.7 of 4.0 GiB  102 MiB/s     0:33",
        "  disk 2            paused",
        "old                 convert 0:07, then paused",
        "db                  paused",
        "  disk 1            paused",
        "  disk 2            paused",
        "mail                paused",
        "dns                 waits for its turn",
        "new                 waits for its turn",
        "waiting: 2 for their turn, 1 paused  disks waiting: 3 paused",
    ]
    for folded in ("d", "d"):
        view.press(folded)
        assert "then paused" in "\n".join(text(view.lines(batch.now, 79, 24)))
    narrow = text(view.lines(batch.now, 40, 24))
    assert "web           copying 0:07, then paused" in narrow
    batch.disk("web", "finished", 1, total=8 * GIB, data=4 * GIB, copied=4 * GIB)
    held = text(view.lines(batch.now, 79, 24))
    assert any(re.fullmatch("web +paused +66% +4.0 of 6.0 GiB", line) for line in held)
    batch.run.for_guest("web").for_step("finalize").emit("started")
    ending = "\n".join(text(view.lines(batch.now, 79, 24)))
    assert re.search("^web +finalize 0:00$", ending, re.MULTILINE)  # it is not held up any more


def test_counts_add_up_to_all_guests() -> None:
    for batch, guests in ((pausing(), 6), (Batch().begin("a", "b"), 2)):
        lines = " ".join(text(BatchView(batch.state).lines(batch.now, 79, 24))[1:3])
        counted, _, _ = lines.partition("  of ")
        assert sum(map(int, re.findall(r"(?<![(\d])\d+", counted))) == guests


def test_a_limit_that_a_window_closes_says_so() -> None:
    batch = Batch().begin("a")
    for taken, said in ((0, "closed by a window"), (2, "closed by a window (2 running)")):
        batch.run.emit(
            "limits",
            details={
                "taken": {"conversions": taken, "memory": 0},
                "capacities": {"conversions": 0, "disks": 4, "memory": 0},
            },
        )
        shown = text(BatchView(batch.state).lines(batch.now, 79, 24))
        assert f"conversions {said}  disks 0/4  memory 0/0 B" in shown


def test_counts_and_waits_fit_eighty_columns() -> None:
    names = [f"g{number:03}" for number in range(400)]
    batch = Batch().begin(*names)
    reasons = ["conversions", "hosts.esx1.connections", "targets.openstack.disks", "scratch"]
    for number, name in enumerate(names):
        if number % 40 < 10:
            batch.convert(name, 1)
            waits = {"for": reasons[1 + number % 3], "until": None}
            batch.run.for_guest(name).for_disk(1).emit("waiting", details=waits)
        else:
            waits = {"for": reasons[number % 4], "until": None}
            batch.emit(name, "waiting", details=waits)
        if number % 40 == 7:
            batch.emit(name, "failed", "no luck")
        elif number % 40 == 8:
            batch.emit(name, "cancelled")
        elif number % 40 == 9:
            batch.emit(name, "finished")
        elif number % 3 == 0:
            batch.emit(name, "paused")
        elif number % 17 == 0:
            details = {"attempt": 1, "at": batch.now + 30}
            batch.emit(name, "retrying", "no luck", details=details)
    lines = text(BatchView(batch.state).lines(batch.now, 80, 20))
    assert lines[1:3] == [
        "300 waiting (100 paused)  70 converted (24 paused)  10 done  10 failed",
        "10 cancelled  of 400",
    ]
    assert [line for line in lines[-2:] if "…" in line] == lines[-2:]
    assert lines[-2].startswith("waiting: ")
    assert lines[-2].endswith(" more")
    assert lines[-1].startswith("disks waiting: ")
    assert all(len(line) <= 80 for line in lines)
    # With nothing of disks, both lines are for the guests: nothing is cut.
    batch.state.disk_waits.clear()
    batch.state.reasons["scratch"] += batch.state.reasons.pop("targets.openstack.disks")
    lines = text(BatchView(batch.state).lines(batch.now, 80, 20))
    assert lines[-2:] == [
        "waiting: 100 for scratch, 45 for hosts.esx1.connections, 42 for conversions,",
        "  15 to try again (next in 0:00), 100 paused",
    ]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_no_line_is_too_many_or_too_long(width: int, height: int) -> None:
    state, now = busy()
    view = BatchView(state, has_keys=True)
    for keys in ("", "jjj", "d", "d", "G", "f", "G", "?"):
        for key in keys:
            view.press(key)
        lines = view.lines(now, width, height)
        assert 0 < len(lines) <= height
        assert all(wide(line) <= width for line in lines), text(lines)


def test_all_that_matters_fits_eighty_columns() -> None:
    state, now = busy(guests=500, seconds=900)
    shown = text(BatchView(state).lines(now, 79, 20))
    assert shown[0].startswith("nightly")
    assert re.search(r"\d+ waiting  2 converting .*\d+ copying .*of 500", shown[1])
    assert "conversions 2/2" in shown[2]
    assert len(shown) == 20
    running = list(state.running)
    named = [line.split()[0] for line in shown if line.startswith("guest-")]
    # All that are active come first, then what failed, and the rest is counted.
    assert set(named[: len(running)]) == set(running)
    assert re.fullmatch(r"… and \d+ more", shown[-2])
    assert re.fullmatch(r"waiting: \d+ for conversions.*", shown[-1])


def test_what_failed_is_seen_however_many_run() -> None:
    batch = Batch().begin(*(f"g{number:02}" for number in range(60)))
    for number in range(60):
        batch.start(f"g{number:02}")
    for number in (3, 4):
        batch.emit(f"g{number:02}", "failed", "no luck")
    shown = text(BatchView(batch.state).lines(batch.now, 79, 20))
    assert sum("✗ no luck" in line for line in shown) == 2
    view = BatchView(batch.state)
    seen = set()
    for _ in range(10):
        seen |= {line[:3] for line in text(view.lines(batch.now, 79, 20))}
        view.press("pgdn")
    assert {f"g{number:02}" for number in range(60)} <= seen


def test_disks_are_shown_where_there_is_room() -> None:
    state, now = busy(guests=8, seconds=100, failing=0)
    assert len(state.running) > 2
    few, many = (text(BatchView(state).lines(now, 79, rows)) for rows in (9, 40))
    assert not any("disk 1" in line for line in few)
    copying = sum(guest.phase == "copying" for guest in state.running.values())
    assert sum("disk 1" in line for line in many) == copying
    view = BatchView(state)
    view.press("d")  # all
    assert sum("disk 1" in line for line in text(view.lines(now, 79, 60))) == len(state.running)
    view.press("d")  # none
    assert not any("disk 1" in line for line in text(view.lines(now, 79, 60)))


def test_keys_move_through_all_guests() -> None:
    state, now = busy(guests=500)
    view = BatchView(state, has_keys=True)
    seen: list[str] = []
    for _ in range(100):
        page = text(view.lines(now, 79, 20))
        for line in page:
            if line.startswith("guest-") and line.split()[0] not in seen:
                seen.append(line.split()[0])
        view.press("pgdn")
    assert set(seen) == {*state.running, *state.waiting, *state.failed}
    end = text(view.lines(now, 79, 20))
    assert "more" not in end[-2]
    view.press("k")
    above = text(view.lines(now, 79, 20))
    assert "… and 1 more" in above[-2]
    view.press("g")
    assert "above" not in text(view.lines(now, 79, 20))[-2]
    view.press("k")  # there is nothing above: the next one moves
    first = text(view.lines(now, 79, 20))
    view.press("j")
    assert text(view.lines(now, 79, 20)) != first
    view.press("G")
    assert text(view.lines(now, 79, 20)) == end
    assert not view.press("x")


def test_a_list_that_shrinks_does_not_lose_its_reader() -> None:
    batch = Batch().begin(*(f"g{number:03}" for number in range(100)))
    view = BatchView(batch.state, has_keys=True)
    view.press("G")
    assert "g099" in "\n".join(text(view.lines(batch.now, 79, 12)))
    for number in range(10, 100):
        batch.emit(f"g{number:03}", "cancelled")
    assert "g009" in "\n".join(text(view.lines(batch.now, 79, 12)))


def test_only_failures_with_all_that_is_known() -> None:
    batch = Batch().begin("a", "b", "c")
    reason = "the copy of 256 KiB at 3 GiB ended with an error of the server: " + "word " * 20
    batch.start("b", 3)
    batch.emit("b", "failed", reason, hint="look at the host", log="/v/log",
               details={"step": "copy", "disk": 1, "bundle": "/v/b.tar"})  # fmt: skip
    view = BatchView(batch.state, has_keys=True)
    short = "\n".join(text(view.lines(batch.now, 79, 20)))
    assert "✗ copy, disk 1: the copy of 256 KiB" in short
    assert "look at the host" not in short
    view.press("f")
    full = text(view.lines(batch.now, 79, 20))
    told = " ".join(line.strip() for line in full)
    assert "✗ b  copy, disk 1  attempt 3" in told
    assert reason.strip() in told
    assert "hint: look at the host log: /v/log bundle: /v/b.tar" in told
    view.press("f")
    assert "\n".join(text(view.lines(batch.now, 79, 20))) == short
    view.press("?")
    assert any("PgDn" in line for line in text(view.lines(batch.now, 79, 20)))
    view.press("escape")
    assert "\n".join(text(view.lines(batch.now, 79, 20))) == short


def test_only_what_is_seen_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    state, now = busy(guests=500)
    made: list[str] = []

    def counting(guest: GuestView, now: float, columns: Columns) -> Line:
        made.append(guest.name)
        return waiting_line(guest, now, columns)

    monkeypatch.setattr("v2v_async.render.batch_view.waiting_line", counting)
    view = BatchView(state)
    view.press("G")
    view.lines(now, 79, 20)
    assert 0 < len(made) <= 20


def test_many_guests_cost_little_beside_all_of_them_drawn() -> None:
    state, now = busy(guests=500)
    view = BatchView(state)

    def cost_s(height: int) -> float:
        """Return the least processor time of this thread: other work can only add to it."""
        costs = []
        for _ in range(7):
            began = time.thread_time()
            for _ in range(5):
                view.lines(now, 79, height)
            costs.append(time.thread_time() - began)
        return min(costs)

    seen, all_drawn = cost_s(20), cost_s(10_000)
    # Measured: 0.22 (0.15 to 0.29 on a busy machine); 0.96 when what is not seen is made too.
    assert seen < all_drawn / 2
