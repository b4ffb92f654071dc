"""A line of a live screen: pieces of text with their styles, never wider than it may be.

rich measures characters and knows colours; its tables would cost ten times as much to lay out, and
a screen of a batch is laid out several times a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich.cells import cell_len, set_cell_size
from rich.console import COLOR_SYSTEMS, Console
from rich.text import Text

from v2v_async.render.text import clean

Line = list[tuple[str, str]]
"""Clean text and a style of rich's, ``""`` for none."""


def fit(text: str, cells: int) -> str:
    """Return ``text`` cleaned and in exactly so many cells, cut with ``…`` where it is longer."""
    text = clean(text)
    if cell_len(text) > cells:
        return set_cell_size(text, cells - 1) + "…" if cells > 0 else ""
    return text + " " * (cells - cell_len(text))


def cut(line: Line, cells: int) -> Line:
    """Return ``line`` in at most so many cells."""
    left = cells
    kept: Line = []
    for text, style in line:
        wide = cell_len(text)
        if wide > left:
            kept.append((fit(text, left), style))
            break
        kept.append((text, style))
        left -= wide
    return kept


def wide(line: Line) -> int:
    """Return how many cells ``line`` takes."""
    return sum(cell_len(text) for text, _ in line)


def wrap(text: str, cells: int) -> list[str]:
    """Return ``text`` cleaned, in lines of at most so many cells, broken at spaces if it can be."""
    cells = max(cells, 1)
    lines: list[str] = []
    current = ""
    for word in clean(text).split():
        if current and cell_len(current) + 1 + cell_len(word) <= cells:
            current += " " + word
            continue
        if current:
            lines.append(current)
        current = word
        while cell_len(current) > cells:
            head = set_cell_size(current, cells).rstrip() or current[0]
            lines.append(head)
            current = current[len(head) :]
    return [*lines, current] if current or not lines else lines


def bar(fraction: float, cells: int) -> Line:
    """Return a bar of so many cells."""
    halves = int(max(0.0, min(fraction, 1.0)) * cells * 2)
    full, half = divmod(halves, 2)
    done = "━" * full + "╸" * half
    style = "bar.finished" if fraction >= 1 else "bar.complete"
    return [(done, style), ("─" * (cells - full - half), "bright_black")]


def text_of(lines: Iterable[Line]) -> Text:
    """Return lines for rich to print, as for a picture."""
    return Text("\n").join(Text.assemble(*line) for line in lines)


def painter(console: Console) -> Callable[[Line], str]:
    """Return what turns a line into characters for the terminal of ``console``."""
    system = COLOR_SYSTEMS.get(console.color_system or "")
    known: dict[str, tuple[str, str]] = {"": ("", "")}

    def codes(style: str) -> tuple[str, str]:
        found = console.get_style(style)
        if console.no_color:
            found = found.without_color
        before, _, after = found.render("x", color_system=system).partition("x")
        return before, after

    def paint(line: Line) -> str:
        painted = []
        for text, style in line:
            if style not in known:
                known[style] = codes(style)
            before, after = known[style]
            painted.append(f"{before}{text}{after}" if text else "")
        return "".join(painted)

    return paint
