"""Heat maps as one SVG file: text as text, the cells of each panel as a small PNG inside it. Values go from 0 to 1."""

import base64
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Of 0, 1/4 ... 1: matplotlib's viridis, which keeps its order in grey and for the colour-blind."""
FONT, CHARACTER = 11, 6.2
"""Size of the text, and about how wide a character is, in pixels."""
GAP, MARGIN, PAGE = 18, 16, 1100
"""Between panels, around everything, and the width at which panels go on in the next row."""


@dataclass(frozen=True)
class Panel:
    """One heat map."""

    title: str
    values: Sequence[Sequence[float]]
    """Rows from top to bottom."""
    row_labels: Sequence[str]
    """One a row; "" leaves it out."""
    column_labels: Sequence[str]
    cell: tuple[int, int]
    """Width and height of a cell in pixels."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the cells, in pixels."""
        return len(self.column_labels) * self.cell[0], len(self.row_labels) * self.cell[1]

    @property
    def left(self) -> float:
        """Width that the labels of the rows take."""
        return CHARACTER * max(map(len, self.row_labels)) + 6


def draw(panels: Sequence[Panel], *, title: str, rows: str, columns: str) -> str:
    """An SVG with all panels and a scale.

    Args:
        rows: what the rows of each panel are, in words.
        columns: likewise.
    """
    top = MARGIN + 4 * FONT + GAP
    body, x, y, row_height, right = [], float(MARGIN), float(top), 0.0, 0.0
    for panel in panels:
        width = max(panel.left + panel.size[0], CHARACTER * len(panel.title)) + GAP
        height = 3 * FONT + panel.size[1] + GAP
        if x > MARGIN and x + width > PAGE:
            x, y, row_height = MARGIN, y + row_height, 0.0
        body += _panel(panel, x, y)
        x, row_height = x + width, max(row_height, height)
        right = max(right, x)
    heading = f"{rows}; {columns}"
    right = max(right, MARGIN + CHARACTER * max(len(title), len(heading) + 24))
    scale = _image([[step / 63 for step in range(64)]], (2, FONT), MARGIN + 12, MARGIN + 2 * FONT + 6)
    head = [
        _text(title, MARGIN, MARGIN + FONT, bold=True),
        _text("0", MARGIN, MARGIN + 3 * FONT + 4),
        scale,
        _text("1", MARGIN + 144, MARGIN + 3 * FONT + 4),
        _text(heading, MARGIN + 164, MARGIN + 3 * FONT + 4),
    ]
    width, height = round(right + MARGIN), round(y + row_height + MARGIN)
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="{FONT}"><rect width="100%" height="100%" fill="white"/>'
    )
    return "\n".join([opening, *head, *body, "</svg>"]) + "\n"


def ends_labelled(count: int) -> list[str]:
    """Labels of 1 to `count`: the first and the last number."""
    return [str(number) if number in (1, count) else "" for number in range(1, count + 1)]


def _panel(panel: Panel, x: float, y: float) -> list[str]:
    left, top = x + panel.left, y + 2 * FONT + 4
    parts = [_text(panel.title, x, y + FONT, bold=True), _image(panel.values, panel.cell, left, top)]
    for index, label in enumerate(panel.row_labels):
        if label:
            middle = top + (index + 0.5) * panel.cell[1] + FONT * 0.35
            parts.append(_text(label, left - 4, middle, anchor="end"))
    for index, label in enumerate(panel.column_labels):
        if label:
            parts.append(_text(label, left + (index + 0.5) * panel.cell[0], top - 3, anchor="middle"))
    return parts


def _text(text: str, x: float, y: float, *, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'


def _image(values: Sequence[Sequence[float]], cell: tuple[int, int], x: float, y: float) -> str:
    encoded = base64.b64encode(png(values, cell)).decode()
    size = f'width="{len(values[0]) * cell[0]}" height="{len(values) * cell[1]}"'
    return f'<image x="{x:.1f}" y="{y:.1f}" {size} href="data:image/png;base64,{encoded}"/>'


def png(values: Sequence[Sequence[float]], cell: tuple[int, int]) -> bytes:
    """A PNG with `cell` pixels, width and height, for each value: sharp edges at any size that a viewer shows."""
    width, height = len(values[0]) * cell[0], len(values) * cell[1]
    lines = b""
    for row in values:
        # Each line of pixels begins with the number of its filter: none.
        lines += (b"\0" + b"".join(bytes(colour(value)) * cell[0] for value in row)) * cell[1]
    eight_bit_rgb = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", eight_bit_rgb), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in parts)


def colour(value: float) -> tuple[int, int, int]:
    """Red, green and blue of a value from 0 to 1."""
    place = min(max(value, 0.0), 1.0) * (len(COLOURS) - 1)
    index = min(int(place), len(COLOURS) - 2)
    low, high = COLOURS[index], COLOURS[index + 1]
    red, green, blue = (round(a + (b - a) * (place - index)) for a, b in zip(low, high, strict=True))
    return red, green, blue


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
