"""The plot: how many times as fast ours is, a group of bars for each scenario, as SVG."""

from __future__ import annotations

import math
from dataclasses import dataclass
from xml.sax.saxutils import escape

from v2v_async.bench.report import Report
from v2v_async.bench.suite import OURS

_LABEL_WIDTH, _PLOT_WIDTH, _VALUE_WIDTH = 150, 460, 90
_TOP, _BOTTOM = 56, 40
_FIGURE_WIDTH = 32
_BAR, _BAR_GAP, _GROUP_GAP = 14, 3, 16

_MOST = 8.0
"""A longer bar is cut, and marked so: one outlier must not flatten the others."""

# Colours that are told apart by people with any colour vision, on white and on black.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")

_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2328; }
.title { font-weight: bold; font-size: 14px; }
.grid { stroke: #d0d7de; } .even { stroke: #57606a; stroke-width: 1.5; }
.promise { stroke: #d1242f; stroke-width: 2.5; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .grid { stroke: #30363d; } .even { stroke: #9198a1; }
  .promise { stroke: #ff7b72; }
}
"""


@dataclass(frozen=True, slots=True)
class Group:
    """The bars of one scenario: (contestant, how many times ours is as fast), and the promise."""

    name: str
    bars: tuple[tuple[str, float], ...]
    promise: float | None


def groups(report: Report) -> list[Group]:
    """Return what is plotted: scenarios whose speed is promised or compared."""
    found = []
    for scenario in report.scenarios:
        bars = []
        for contestant in scenario.contestants:
            if contestant.name == OURS:
                continue
            ratio = scenario.ratio(lambda run: run.wall_s, contestant.name)
            if ratio is not None:
                bars.append((contestant.name, ratio))
        is_other = scenario.promise.speed is None and scenario.promise != type(scenario.promise)()
        if bars and not is_other:
            found.append(Group(scenario.name, tuple(bars), scenario.promise.speed))
    return found


def svg(report: Report) -> str:
    """Return the plot as an SVG document."""
    made = groups(report)
    names = list(dict.fromkeys(name for group in made for name, _ in group.bars))
    colours = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(names)}
    longest = max((max([*(r for _, r in g.bars), g.promise or 1.0]) for g in made), default=1.0)
    scale = _Scale(min(_MOST, max(2.0, math.ceil(longest * 2) / 2)))
    width = _LABEL_WIDTH + _PLOT_WIDTH + _VALUE_WIDTH
    bars: list[str] = []
    y = _TOP
    for group in made:
        bars += _group(group, y, colours, scale)
        y += _height(group) + _GROUP_GAP
    title = "How many times as fast as the others v2v-async copies (longer is better)"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y + _BOTTOM}" '
            f'width="{width}" height="{y + _BOTTOM}" role="img" aria-labelledby="title about">',
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="about">{escape(_describe(made))}</desc>',
            f"<style>{_STYLE}</style>",
            f'<text class="title" x="8" y="20">{escape(title)}</text>',
            *_legend(colours),
            *_grid(scale, y),
            *bars,
            "</svg>",
            "",
        ]
    )


class _Scale:
    def __init__(self, most: float) -> None:
        self.most = most

    def x(self, value: float) -> float:
        return round(_LABEL_WIDTH + min(value, self.most) / self.most * _PLOT_WIDTH, 1)


def _height(group: Group) -> int:
    return len(group.bars) * (_BAR + _BAR_GAP) - _BAR_GAP


def _group(group: Group, y: int, colours: dict[str, str], scale: _Scale) -> list[str]:
    middle = y + _height(group) / 2 + 4
    lines = [
        f'<text x="{_LABEL_WIDTH - 8}" y="{middle}" text-anchor="end">{escape(group.name)}</text>'
    ]
    top = y
    for name, ratio in group.bars:
        width = round(scale.x(ratio) - _LABEL_WIDTH, 1)
        lines.append(
            f'<rect x="{_LABEL_WIDTH}" y="{top}" width="{width}" height="{_BAR}" '
            f'fill="{colours[name]}"><title>{escape(name)}: {ratio:.2f}</title></rect>'
        )
        arrow = " →" if ratio > scale.most else ""
        x = _label_x(scale.x(ratio) + 5, scale.x(group.promise) if group.promise else 0)
        lines.append(f'<text x="{x}" y="{top + 11}">{ratio:.2f}{arrow}</text>')
        top += _BAR + _BAR_GAP
    if group.promise is not None:
        x = scale.x(group.promise)
        lines.append(
            f'<line class="promise" x1="{x}" x2="{x}" y1="{y - 4}" y2="{y + _height(group) + 4}">'
            f"<title>promised: {group.promise:g}</title></line>"
        )
    return lines


def _label_x(x: float, mark: float) -> float:
    """Return where a figure begins: behind the promise's mark where it would lie on it."""
    return mark + 5 if x - 3 < mark < x + _FIGURE_WIDTH else x


def _grid(scale: _Scale, bottom: int) -> list[str]:
    step = 0.5 if scale.most <= 3 else 1.0
    lines = []
    for number in range(int(scale.most / step) + 1):
        value = number * step
        x, kind = scale.x(value), "even" if value == 1 else "grid"
        lines.append(f'<line class="{kind}" x1="{x}" x2="{x}" y1="{_TOP - 8}" y2="{bottom}"/>')
        lines.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{value:g}</text>')
    return lines


def _legend(colours: dict[str, str]) -> list[str]:
    lines, x = [], 8
    for name, colour in colours.items():
        lines.append(f'<rect x="{x}" y="30" width="12" height="12" fill="{colour}"/>')
        lines.append(f'<text x="{x + 17}" y="40">{escape(name)}</text>')
        x += 40 + 7 * len(name)
    lines.append(f'<line class="promise" x1="{x + 6}" x2="{x + 6}" y1="29" y2="43"/>')
    lines.append(f'<text x="{x + 17}" y="40">promised against nbdcopy</text>')
    return lines


def _describe(made: list[Group]) -> str:
    """Say the same in words, for who can't see it."""
    return "; ".join(
        f"{group.name}: " + ", ".join(f"{ratio:.2f} times {name}" for name, ratio in group.bars)
        for group in made
    )
