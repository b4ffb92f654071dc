"""The part of a terminal that is drawn again and again, below what scrolls up."""

from __future__ import annotations

import io

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small_terminal import Resizable, SmallTerminal
from v2v_async.render.line import Line
from v2v_async.render.live_part import LivePart

FRAMES = st.lists(
    st.tuples(
        st.lists(st.sampled_from(["", "x", "long line", "another"]), max_size=6),
        st.lists(st.sampled_from(["said", "and said"]), max_size=3),
    ),
    max_size=12,
)


@settings(max_examples=200, deadline=None)
@given(frames=FRAMES)
def test_the_live_part_is_below_all_that_was_said(
    frames: list[tuple[list[str], list[str]]],
) -> None:
    console = Resizable(40, 10)
    current: list[str] = []
    live = LivePart(
        console, lambda width, height: [[(line, "")] for line in current], refreshes=4,
        is_animated=False,
    )  # fmt: skip
    expected: list[str] = []
    with live:
        for frame, said in frames:
            current = frame
            live.say([[(line, "")] for line in said])
            live.draw()
            expected += said
            wanted = [*expected, *frame]
            while wanted and not wanted[-1]:
                wanted.pop()
            assert console.read().shown == wanted
        live.say([[("last words", "")]])
    assert console.read().shown == [*expected, "last words"]


def test_what_has_not_changed_is_not_sent() -> None:
    console = Resizable()
    lines: list[Line] = [[("same", "")], [("1", "")], [("same too", "")]]
    live = LivePart(console, lambda width, height: lines, refreshes=4, is_animated=False)
    live.draw()
    console.read()
    lines = [[("same", "")], [("2", "")], [("same too", "")]]
    live.draw()
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "\r\x1b[3A\n2\x1b[K\n\n"


def test_a_terminal_that_becomes_narrow_has_broken_lines_removed() -> None:
    console = Resizable(80, 24)
    live = LivePart(
        console, lambda width, height: [[("x" * width, "")]] * 3, refreshes=4, is_animated=False
    )
    live.say([[("said", "")]])
    live.draw()
    console.read()
    # As tmux and others do it: each line of 79 is two rows of 40 now.
    narrow = SmallTerminal(40, 24)
    narrow.rows[:7] = ["said", *(["x" * 40, "x" * 39] * 3)]
    narrow.row = 7
    console.terminal = narrow
    console.width = 40
    live.draw()
    assert console.read().shown == ["said", *["x" * 39] * 3]
