"""The records of a JSON text and the lines on which they start, which the standard library does not tell."""

import json
import math
import re
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple


class Item(NamedTuple):
    """A JSON value and the line on which it starts."""

    line: int
    value: Any
    text: str
    """The value as it is written."""


_SPACE = re.compile(r"[ \t\n\r]*")


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=lambda _: None)
decode_json = _DECODER.decode
"""The value of a JSON text. NaN and infinities, with which Python's writers stand in for a missing number, are null."""


def repeated_key(text: str, value: dict[str, Any]) -> str | None:
    """A key that an object has twice, of which the decoder kept the last; None if there is none.

    Args:
        text: the object as it is written.
        value: what was decoded from it.
    """
    # Decoding with a hook takes four times as long: only where a key's text occurs twice is it worth it.
    if all(text.count(f'"{key}"') < 2 for key in value):
        return None
    twice: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        names = [name for name, _ in pairs]
        twice.extend(name for name in names if names.count(name) > 1)

    json.JSONDecoder(object_pairs_hook=note).decode(text.strip())
    return twice[0] if twice else None


class NoListError(Exception):
    """An object that holds no list of records, or several."""


def skip_space(text: str, at: int) -> int:
    """Where the white space at `at` ends."""
    match = _SPACE.match(text, at)
    assert match is not None, "the pattern matches the empty text"
    return match.end()


def scan_json(text: str, start: int) -> Iterator[Item]:
    """The records of a whole JSON text that begins at `start`.

    Raises:
        JSONDecodeError: it is no JSON.
        NoListError: it is an object without a list of records of its own.
    """
    if text[start] == "[":
        end = yield from _scan_list(text, start)
        _expect_end(text, end)
    elif text[start] == "{":
        values, end = _scan_object(text, start)
        _expect_end(text, end)
        yield from _main_list(values)
    else:
        raise json.JSONDecodeError("expected a list or an object", text, start)


def _expect_end(text: str, at: int) -> None:
    if (end := skip_space(text, at)) != len(text):
        raise json.JSONDecodeError("text after the end of the JSON value", text, end)


def _scan_list(text: str, at: int) -> Generator[Item, None, int]:
    """The values of the list whose bracket is at `at`; returns the place after it."""
    line, counted = text.count("\n", 0, at) + 1, at
    at = skip_space(text, at + 1)
    if text.startswith("]", at):
        return at + 1
    while True:
        line, counted = line + text.count("\n", counted, at), at
        value, at = _DECODER.raw_decode(text, at)
        yield Item(line, value, text[counted:at])
        at = skip_space(text, at)
        if text.startswith("]", at):
            return at + 1
        at = skip_space(text, _expect(text, at, ","))


def _whole_list(text: str, at: int) -> tuple[list[Item], int]:
    items: list[Item] = []
    scan = _scan_list(text, at)
    while True:
        try:
            items.append(next(scan))
        except StopIteration as end:
            return items, end.value


def _scan_object(text: str, at: int) -> tuple[dict[str, Any], int]:
    """The object whose brace is at `at`, its lists as lists of `Item`, and the place after it."""
    values: dict[str, Any] = {}
    at = skip_space(text, at + 1)
    if text.startswith("}", at):
        return values, at + 1
    while True:
        key, at = _DECODER.raw_decode(text, at)
        if not isinstance(key, str):
            raise json.JSONDecodeError("expected a name in quotes", text, at)
        at = skip_space(text, _expect(text, skip_space(text, at), ":"))
        values[key], at = _whole_list(text, at) if text.startswith("[", at) else _DECODER.raw_decode(text, at)
        at = skip_space(text, at)
        if text.startswith("}", at):
            return values, at + 1
        at = skip_space(text, _expect(text, at, ","))


def _expect(text: str, at: int, character: str) -> int:
    if not text.startswith(character, at):
        raise json.JSONDecodeError(f"expected '{character}'", text, at)
    return at + 1


def _main_list(values: dict[str, Any]) -> list[Item]:
    """The records of an object that was scanned."""
    lists = {name: items for name, items in values.items() if isinstance(items, list)}
    if "Instances" in lists:
        definition = values.get("Definition")
        if isinstance(definition, list):  # newer files wrap the text in a list
            definition = "\n".join(str(item.value) for item in definition)
        return [
            Item(line, {"Definition": definition, **value} if isinstance(value, dict) else value, written)
            for line, value, written in lists["Instances"]
        ]
    of_objects = [name for name, items in lists.items() if items and all(isinstance(it.value, dict) for it in items)]
    if len(of_objects) != 1:
        found = f"several ({', '.join(of_objects)})" if of_objects else "none"
        raise NoListError(f"an object that should hold one list of records holds {found}")
    return lists[of_objects[0]]
