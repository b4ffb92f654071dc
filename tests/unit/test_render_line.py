"""Lines of styled pieces: how wide they are, where they are cut, and their colours."""

from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from v2v_async.render.line import Line, bar, cut, fit, painter, wide, wrap


@pytest.mark.parametrize("cells", [0, 1, 2, 5, 40])
@pytest.mark.parametrize("value", ["", "abc", "日本語テスト", "e\u0301a" * 9, "\x1b[31mred"])
def test_fit_and_cut(value: str, cells: int) -> None:
    assert cell_len(fit(value, cells)) == cells
    assert wide(cut([(fit(value, 9), ""), ("more", "")], cells)) <= cells
    for part in wrap(value, cells):
        assert cell_len(part) <= max(cells, 2)


@settings(max_examples=100, deadline=None)
@given(value=st.text(max_size=60), cells=st.integers(2, 20))
def test_wrap_loses_nothing(value: str, cells: int) -> None:
    from v2v_async.render.text import clean

    parts = wrap(value, cells)
    assert "".join("".join(parts).split()) == "".join(clean(value).split())


@pytest.mark.parametrize("fraction", [-1, 0, 0.001, 0.5, 0.999, 1, 2])
def test_a_bar_is_as_wide_as_it_is(fraction: float) -> None:
    for cells in range(20):
        assert wide(bar(fraction, cells)) == cells
    if fraction < 1:
        assert "─" in bar(fraction, 5)[-1][0] or "╸" in bar(fraction, 5)[0][0]


def test_colours_are_those_of_the_terminal() -> None:
    file = io.StringIO()
    line: Line = [("a", "bold red"), ("b", "")]
    coloured = Console(file=file, force_terminal=True, color_system="standard", no_color=False)
    assert painter(coloured)(line) == "\x1b[1;31ma\x1b[0mb"
    plain = Console(file=file, force_terminal=True, color_system="standard", no_color=True)
    assert painter(plain)(line) == "\x1b[1ma\x1b[0mb"
    none = Console(file=file, force_terminal=True, color_system=None)
    assert painter(none)(line) == "ab"
