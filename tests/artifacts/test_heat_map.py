"""Heat maps: the pixels, read back by hand, and what stands around them."""

import base64
import struct
import zlib
from xml.etree import ElementTree

import pytest

from ftkit.artifacts.heat_map import COLOURS, MARGIN, PAGE, Panel, colour, draw, ends_labelled, png

SVG = "{http://www.w3.org/2000/svg}"


def pixels(content: bytes) -> list[list[tuple[int, ...]]]:
    """The rows of an RGB image without filters, as the PNG specification lays them out; checks every chunk's sum."""
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, place = {}, 8
    while place < len(content):
        (length,) = struct.unpack_from(">I", content, place)
        kind, data = content[place + 4 : place + 8], content[place + 8 : place + 8 + length]
        assert struct.unpack_from(">I", content, place + 8 + length) == (zlib.crc32(kind + data),)
        chunks[kind] = data
        place += 12 + length
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *form = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert form == [8, 2, 0, 0, 0]
    raw, stride = zlib.decompress(chunks[b"IDAT"]), 1 + 3 * width
    assert len(raw) == height * stride
    lines = [raw[row * stride : (row + 1) * stride] for row in range(height)]
    assert all(line[0] == 0 for line in lines)
    return [[tuple(line[1 + 3 * x : 4 + 3 * x]) for x in range(width)] for line in lines]


def panel(title: str = "q_proj", rows: int = 2, columns: int = 3, cell: tuple[int, int] = (5, 4)) -> Panel:
    values = [[(row * columns + column) / (rows * columns) for column in range(columns)] for row in range(rows)]
    return Panel(title, values, ends_labelled(rows), ends_labelled(columns), cell)


def test_every_value_is_a_cell_of_its_colour() -> None:
    rows = pixels(png([[0.0, 0.5], [1.0, 0.25]], (3, 2)))
    assert [len(row) for row in rows] == [6] * 4
    assert rows[0] == rows[1] == [COLOURS[0]] * 3 + [COLOURS[2]] * 3
    assert rows[2] == rows[3] == [COLOURS[4]] * 3 + [COLOURS[1]] * 3


def test_colours_lie_between_their_neighbours_and_values_outside_take_the_ends() -> None:
    assert colour(0.125) == tuple(round((a + b) / 2) for a, b in zip(COLOURS[0], COLOURS[1], strict=True))
    assert (colour(-0.5), colour(1.5)) == (COLOURS[0], COLOURS[-1])


def test_brightness_grows_with_the_value() -> None:
    """So that the picture can be read in grey."""
    brightness = [0.2126 * red + 0.7152 * green + 0.0722 * blue for red, green, blue in map(colour, _steps(50))]
    assert brightness == sorted(brightness)


def _steps(count: int) -> list[float]:
    return [step / count for step in range(count + 1)]


def test_a_picture_holds_the_cells_of_every_panel_and_a_scale() -> None:
    first, second = panel("layers.0 <q>"), panel("layers.1 & k", rows=4, columns=4)
    root = ElementTree.fromstring(draw([first, second], title="a < b & c", rows="rows: i", columns="columns: j"))
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"a < b & c", "rows: i; columns: j", "layers.0 <q>", "layers.1 & k"} <= set(texts)
    scale, *images = [
        pixels(base64.b64decode(image.attrib["href"].removeprefix("data:image/png;base64,")))
        for image in root.iter(f"{SVG}image")
    ]
    assert (scale[0][0], scale[0][-1]) == (COLOURS[0], COLOURS[-1])
    for own, image in zip((first, second), images, strict=True):
        middles = [row[own.cell[0] // 2 :: own.cell[0]] for row in image[own.cell[1] // 2 :: own.cell[1]]]
        assert middles == [[colour(value) for value in row] for row in own.values]


def test_panels_stay_on_the_page_and_apart() -> None:
    root = ElementTree.fromstring(draw([panel(columns=60)] * 7, title="t", rows="i", columns="j"))
    boxes = [
        tuple(float(image.attrib[side]) for side in ("x", "y", "width", "height"))
        for image in list(root.iter(f"{SVG}image"))[1:]
    ]
    assert len({y for _, y, _, _ in boxes}) == 3
    assert all(x >= MARGIN and x + width <= PAGE for x, _, width, _ in boxes)
    for index, (x, y, width, height) in enumerate(boxes):
        for other_x, other_y, *_ in boxes[index + 1 :]:
            assert other_x >= x + width or other_y >= y + height
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    assert all(x + w <= width and y + h <= height for x, y, w, h in boxes)


@pytest.mark.parametrize(("count", "labels"), [(1, ["1"]), (2, ["1", "2"]), (4, ["1", "", "", "4"])])
def test_the_ends_are_labelled(count: int, labels: list[str]) -> None:
    assert ends_labelled(count) == labels
