"""Stacked areas over the phases of something, side by side with one scale, as one SVG file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

COLOURS = ("#4c72b0", "#8fb0d9", "#c44e52", "#8172b3", "#e0b050")
"""Of the kinds, from the bottom of the stack to the top."""
FONT, GAP, MARGIN, HEIGHT = 11, 26, 16, 260
"""Size of the text, between panels, around everything, and the height of a panel, in pixels."""
WIDTHS = (110, 110, 40)
"""Of the phases of a panel, in pixels: a column each."""


@dataclass(frozen=True)
class Panel:
    """One stack of areas."""

    title: str
    phases: Sequence[tuple[str, Sequence[Sequence[float]]]]
    """(name, values by kind at every instant of the phase); a phase is as wide as its place in WIDTHS says."""


def draw(panels: Sequence[Panel], kinds: Sequence[str], *, title: str, unit: str, step: float) -> str:
    """An SVG with all panels, a legend, and a line every `step` units."""
    top, left = MARGIN + 4 * FONT + GAP, MARGIN + 40
    highest = max(sum(values) for panel in panels for _, instants in panel.phases for values in instants)
    scale = HEIGHT / highest
    parts = [_text(title, MARGIN, MARGIN + FONT, bold=True), *_legend(kinds)]
    width = left + len(panels) * (sum(WIDTHS) + GAP)
    for number in range(int(highest / step) + 1):
        y = top + HEIGHT - number * step * scale
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{width - GAP}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(_text(f"{number * step:g}", left - 5, y + FONT * 0.35, anchor="end"))
    parts.append(_text(unit, MARGIN, top - FONT))
    for index, panel in enumerate(panels):
        parts += _panel(panel, left + index * (sum(WIDTHS) + GAP), top, scale, len(kinds))
    height = top + HEIGHT + 3 * FONT + MARGIN
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="{FONT}"><rect width="100%" height="100%" fill="white"/>'
    )
    return "\n".join([opening, *parts, "</svg>"]) + "\n"


def columns(instants: Sequence[Sequence[float]], count: int) -> list[Sequence[float]]:
    """`count` of the instants in order: of those that share a column the one with the largest sum; no peak is lost."""
    chosen = []
    for column in range(count):
        begin = column * len(instants) // count
        end = max(begin + 1, (column + 1) * len(instants) // count)
        chosen.append(max(instants[begin:end], key=sum))
    return chosen


def _panel(panel: Panel, x: float, top: float, scale: float, kinds: int) -> list[str]:
    drawn: list[Sequence[float]] = []
    parts = [_text(panel.title, x, top - FONT, bold=True)]
    for (name, instants), width in zip(panel.phases, WIDTHS, strict=True):
        middle = x + len(drawn) + width / 2
        parts.append(_text(name if width > 60 else "step", middle, top + HEIGHT + FONT + 4, anchor="middle"))
        drawn += columns(instants, width)
    for kind in range(kinds):
        lower = [top + HEIGHT - scale * sum(values[:kind]) for values in drawn]
        upper = [top + HEIGHT - scale * sum(values[: kind + 1]) for values in drawn]
        if any(abs(a - b) > 0.05 for a, b in zip(lower, upper, strict=True)):
            path = "M" + "L".join([*_steps(upper, x), *reversed(_steps(lower, x))]) + "Z"
            parts.append(f'<path d="{path}" fill="{COLOURS[kind]}"/>')
    place = x
    for width in (0, *WIDTHS):
        place += width
        parts.append(
            f'<line x1="{place}" y1="{top}" x2="{place}" y2="{top + HEIGHT}" stroke="#555" stroke-width="0.5"/>'
        )
    return parts


def _steps(heights: Sequence[float], x: float) -> list[str]:
    """Corners of a line that is level over each column; those between equal neighbours are left out."""
    corners: list[str] = []
    for column, height in enumerate(heights):
        if column == 0 or height != heights[column - 1]:
            corners.append(f"{x + column:g} {height:.1f}")
        if column + 1 == len(heights) or height != heights[column + 1]:
            corners.append(f"{x + column + 1:g} {height:.1f}")
    return corners


def _legend(kinds: Sequence[str]) -> list[str]:
    parts, x, y = [], float(MARGIN), MARGIN + 2 * FONT + 4
    for kind, colour in zip(kinds, COLOURS, strict=False):
        parts.append(f'<rect x="{x:.0f}" y="{y}" width="{FONT}" height="{FONT}" fill="{colour}"/>')
        parts.append(_text(kind, x + FONT + 4, y + FONT - 1.5))
        x += FONT + 20 + 6.2 * len(kind)
    return parts


def _text(text: str, x: float, y: float, *, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'


def series_panel(title: str, phases: Mapping[str, range], series: Mapping[str, Sequence[int]], unit: float) -> Panel:
    """A panel of series by kind, each divided by `unit`."""
    return Panel(
        title,
        [
            (name, [[values[event] / unit for values in series.values()] for event in events])
            for name, events in phases.items()
        ],
    )
