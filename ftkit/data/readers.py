"""Files of records, one reader a kind: every record with its place, every problem of a file at once.

json and jsonl are read here and not by a library, because users need the line of a bad row.
"""

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ftkit.errors import Problem


class Contents(NamedTuple):
    """What a file holds."""

    records: list[tuple[str, dict[str, Any]]]
    """(place, fields); the place is `file:line`, or `file: row N` (from 0) where the file has no lines."""
    problems: list[Problem]


class Item(NamedTuple):
    """A JSON value and the line on which it starts."""

    line: int
    value: Any


def read_json(path: Path, name: str) -> Contents:
    """A list of objects, an object around one list of them, or (under the wrong suffix) JSON lines.

    Of an object the only list of objects is taken; of Super-NaturalInstructions, `Instances`, each with the file's
    `Definition` as a column of its own.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Contents([], [_not_utf8(name, data, error)])
    start = _skip_space(text, 0)
    if start == len(text):
        return Contents([], [_is_empty(name)])
    if text[start] == "{" and _first_of_many_lines(text[start:]):
        return read_jsonl(path, name)
    try:
        if text[start] == "[":
            items, end = _scan_list(text, start)
        elif text[start] == "{":
            values, end = _scan_object(text, start)
            items = _main_list(values)
        else:
            raise json.JSONDecodeError("expected a list or an object", text, start)
        if (end := _skip_space(text, end)) != len(text):
            raise json.JSONDecodeError("text after the end of the JSON value", text, end)
    except _NoListError as error:
        how = "give a list of objects, or one object a line in a .jsonl file"
        return Contents([], [Problem(str(error), how, name)])
    except (ValueError, RecursionError) as error:
        return Contents([], [_malformed(name, error)])
    return _keep_objects(name, items) if items else Contents([], [_is_empty(name)])


def read_jsonl(path: Path, name: str) -> Contents:
    """One JSON object a line; blank lines are skipped."""
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    items: list[Item] = []
    problems: list[Problem] = []
    # Split on bytes: str.splitlines also breaks at U+2028, which JSON strings may hold.
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            items.append(Item(number, json.loads(line.decode("utf-8"))))
        except UnicodeDecodeError as error:
            problems.append(_not_utf8(name, line, error, line=number))
        except (ValueError, RecursionError) as error:
            problems.append(_malformed(name, error, line=number))
    if not items and not problems:
        problems.append(_is_empty(name))
    contents = _keep_objects(name, items)
    return Contents(contents.records, problems + contents.problems)


def read_csv(path: Path, name: str, *, delimiter: str = ",") -> Contents:
    """A table with a header line; every value is text."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Contents([], [_not_utf8(name, data, error)])
    # The module's own limit of 131,072 characters a value is far below what long documents need.
    csv.field_size_limit(2**31 - 1)
    # Not strict, a quote that is never closed would swallow the rest of the file in silence.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    records: list[tuple[str, dict[str, Any]]] = []
    problems: list[Problem] = []
    header: list[str] | None = None
    line = 1
    try:
        for values in reader:
            # `line_num` is the last line of a record, which may hold line breaks.
            place, line = f"{name}:{line}", reader.line_num + 1
            if not values:
                continue
            if header is None:
                header = values
                if len(set(header)) < len(header) or "" in header:
                    return Contents([], [Problem("an empty or a repeated column name", "name every column", place)])
            elif len(values) != len(header):
                problems.append(
                    Problem(f"{len(values)} values for {len(header)} columns", "quote values that hold commas", place)
                )
            else:
                records.append((place, dict(zip(header, values, strict=True))))
    except csv.Error as error:
        how = "close the quotes and double those within"
        problems.append(Problem(f"malformed CSV: {error}", how, f"{name}:{line}"))
    if not records and not problems:
        problems.append(_is_empty(name))
    return Contents(records, problems)


def read_tsv(path: Path, name: str) -> Contents:
    """As csv, with tabs between the values."""
    return read_csv(path, name, delimiter="\t")


def read_parquet(path: Path, name: str) -> Contents:
    """An Arrow table."""
    import pyarrow
    import pyarrow.parquet

    try:
        # Not `read_table`: on a path it looks for a partitioned data set and invents columns from folder names.
        table = pyarrow.parquet.ParquetFile(path).read()
    except pyarrow.ArrowException as error:
        return Contents([], [Problem(f"not a parquet file: {error}", "write it again", name)])
    if table.num_rows == 0:
        return Contents([], [_is_empty(name)])
    rows = table.to_pylist()
    return Contents([(f"{name}: row {index}", drop_struct_nulls(row)) for index, row in enumerate(rows)], [])


READERS: dict[str, Callable[[Path, str], Contents]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
}
"""Suffix -> reader(file, its name in messages)."""


def drop_struct_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    """Remove null keys of nested structs, recursively; columns stay.

    An Arrow struct has the union of all rows' keys, so the arguments of one tool show up as nulls in another's.
    """
    return {name: _without_nulls(value) for name, value in fields.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


# -------------------------------------------------------------------------------------------- json with lines

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class _NoListError(Exception):
    """An object that holds no list of records, or several."""


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None, "the pattern matches the empty text"
    return match.end()


def _scan_list(text: str, at: int) -> tuple[list[Item], int]:
    """The list whose bracket is at `at`, and the place after it."""
    line, counted = text.count("\n", 0, at) + 1, at
    items: list[Item] = []
    at = _skip_space(text, at + 1)
    if text.startswith("]", at):
        return items, at + 1
    while True:
        line, counted = line + text.count("\n", counted, at), at
        value, at = _DECODER.raw_decode(text, at)
        items.append(Item(line, value))
        at = _skip_space(text, at)
        if text.startswith("]", at):
            return items, at + 1
        at = _skip_space(text, _expect(text, at, ","))


def _scan_object(text: str, at: int) -> tuple[dict[str, Any], int]:
    """The object whose brace is at `at`, its lists as lists of `Item`, and the place after it."""
    values: dict[str, Any] = {}
    at = _skip_space(text, at + 1)
    if text.startswith("}", at):
        return values, at + 1
    while True:
        key, at = _DECODER.raw_decode(text, at)
        if not isinstance(key, str):
            raise json.JSONDecodeError("expected a name in quotes", text, at)
        at = _skip_space(text, _expect(text, _skip_space(text, at), ":"))
        values[key], at = _scan_list(text, at) if text.startswith("[", at) else _DECODER.raw_decode(text, at)
        at = _skip_space(text, at)
        if text.startswith("}", at):
            return values, at + 1
        at = _skip_space(text, _expect(text, at, ","))


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
            Item(line, {"Definition": definition, **value} if isinstance(value, dict) else value)
            for line, value in lists["Instances"]
        ]
    of_objects = [name for name, items in lists.items() if items and all(isinstance(it.value, dict) for it in items)]
    if len(of_objects) != 1:
        found = f"several ({', '.join(of_objects)})" if of_objects else "none"
        raise _NoListError(f"an object that should hold one list of records holds {found}")
    return lists[of_objects[0]]


def _first_of_many_lines(text: str) -> bool:
    """Whether the text's first line is a whole JSON object with more after it."""
    line, _, rest = text.partition("\n")
    if not rest.strip():
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _keep_objects(name: str, items: list[Item]) -> Contents:
    records = [(f"{name}:{line}", item) for line, item in items if isinstance(item, dict)]
    problems = [
        Problem(f"expected an object, found {_kind(item)}", "give every record as {...}", f"{name}:{line}")
        for line, item in items
        if not isinstance(item, dict)
    ]
    return Contents(records, problems)


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _is_empty(name: str) -> Problem:
    return Problem("no records", "fill the file or leave it out", name)


def _not_utf8(name: str, data: bytes, error: UnicodeDecodeError, *, line: int | None = None) -> Problem:
    line = line or data.count(b"\n", 0, error.start) + 1
    return Problem(f"not UTF-8 (byte 0x{data[error.start]:02x})", "save the file as UTF-8", f"{name}:{line}")


def _malformed(name: str, error: ValueError | RecursionError, *, line: int | None = None) -> Problem:
    if isinstance(error, json.JSONDecodeError):
        what = f"malformed JSON: {error.msg} (column {error.colno})"
        return Problem(what, "correct the JSON", f"{name}:{line or error.lineno}")
    what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    return Problem(f"malformed JSON: {what}", "correct the JSON", name if line is None else f"{name}:{line}")
