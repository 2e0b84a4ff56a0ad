"""Files of records, one reader a kind: a stream of records, each with its place, and of what is wrong between them.

json and jsonl are read here and not by a library, because users need the line of a bad row. jsonl, csv and parquet are
never in memory as a whole; a .json list is, as text.
"""

import csv
import datetime
import json
import math
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

from ftkit.data.json_records import NoListError, decode_json, repeated_key, scan_json, skip_space
from ftkit.errors import Problem


class Record(NamedTuple):
    """A record and its place."""

    where: str
    """`file:line`, or `file: row N` (from 0) where the file has no lines."""
    fields: dict[str, Any]


class BadRecord(NamedTuple):
    """A record that cannot be read, in a file that goes on after it; what ends a file is a bare `Problem`."""

    problem: Problem


Stream = Iterator[Record | BadRecord | Problem]


MAX_LINE = 64 * 2**20
"""Bytes of a line; no document is longer, but a file without line ends may be."""


def read_json(path: Path, name: str) -> Stream:
    """A list of objects, an object around one list of them, or (under the wrong suffix) JSON lines.

    Of an object the only list of objects is taken; of Super-NaturalInstructions, `Instances`, each with the file's
    `Definition` as a column of its own.
    """
    if (problem := _is_utf16(path, name)) is not None:
        yield problem
        return
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield _not_utf8(name, data, error)
        return
    del data
    start = skip_space(text, 0)
    if start == len(text):
        yield _is_empty(name)
        return
    if text[start] == "{" and _first_of_many_lines(text[start:]):
        yield from read_jsonl(path, name)
        return
    found = 0
    try:
        for line, item, source in scan_json(text, start):
            found += 1
            yield _kept(name, line, item, source)
    except NoListError as error:
        yield Problem(str(error), "give a list of objects, or one object a line in a .jsonl file", name)
        return
    except (ValueError, RecursionError) as error:
        yield _malformed(name, error)
        return
    if not found:
        yield _is_empty(name)


def read_jsonl(path: Path, name: str) -> Stream:
    """One JSON object a line; blank lines are skipped."""
    if (problem := _is_utf16(path, name)) is not None:
        yield problem
        return
    found = False
    with path.open("rb") as file:
        # Lines of bytes: str.splitlines also breaks at U+2028, which JSON strings may hold.
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
            if len(line) > MAX_LINE:
                found = True
                how = "put each object on a line of its own"
                what = f"the line is longer than {MAX_LINE // 2**20} MiB"
                yield BadRecord(Problem(what, how, f"{name}:{number}"))
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE)
                continue
            line = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).rstrip(b"\r\n")
            if not line.strip():
                continue
            if not found and (kind := _not_json_lines(line)) is not None:
                yield Problem(*kind, name)
                return
            found = True
            try:
                text = line.decode("utf-8")
                yield _kept(name, number, decode_json(text), text)
            except UnicodeDecodeError as error:
                yield BadRecord(_not_utf8(name, line, error, line=number))
            except (ValueError, RecursionError) as error:
                yield BadRecord(_malformed(name, error, line=number))
    if not found:
        yield _is_empty(name)


def read_csv(path: Path, name: str, *, delimiter: str = ",") -> Stream:
    """A table with a header line; every value is text."""
    # The module's own limit of 131,072 characters a value is far below what long documents need.
    csv.field_size_limit(2**31 - 1)
    if (problem := _is_utf16(path, name)) is not None:
        yield problem
        return
    header: list[str] | None = None
    found, line = False, 1
    # Bytes that are not UTF-8 become half surrogates, which are looked for record by record: the others can be read.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        # Not strict, a quote that is never closed would swallow the rest of the file in silence.
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            for values in reader:
                # `line_num` is the last line of a record, which may hold line breaks.
                place, line = f"{name}:{line}", reader.line_num + 1
                if not values:
                    continue
                wrong = _not_utf8_values(values, place)
                if header is None:
                    if wrong is not None:
                        yield wrong
                        return
                    header = values
                    if len(set(header)) < len(header) or "" in header:
                        yield Problem("an empty or a repeated column name", "name every column", place)
                        return
                    continue
                found = True
                if wrong is not None:
                    yield BadRecord(wrong)
                elif len(values) != len(header):
                    what = f"{len(values)} values for {len(header)} columns"
                    yield BadRecord(Problem(what, "quote values that hold commas", place))
                else:
                    yield Record(place, dict(zip(header, values, strict=True)))
        except csv.Error as error:
            yield Problem(f"malformed CSV: {error}", "close the quotes and double those within", f"{name}:{line}")
            return
    if not found:
        yield _is_empty(name)


def read_tsv(path: Path, name: str) -> Stream:
    """As csv, with tabs between the values."""
    return read_csv(path, name, delimiter="\t")


def read_parquet(path: Path, name: str) -> Stream:
    """An Arrow table."""
    import pyarrow
    import pyarrow.parquet

    index = 0
    try:
        # Not `read_table`: on a path it looks for a partitioned data set and invents columns from folder names.
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield Record(f"{name}: row {index}", plain_values(row))
                index += 1
    except pyarrow.ArrowException as error:
        yield Problem(f"not a parquet file: {error}", "write it again", name)
        return
    if index == 0:
        yield _is_empty(name)


READERS: dict[str, Callable[[Path, str], Stream]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
}
"""Suffix -> reader(file, its name in messages)."""


def plain_values(fields: dict[str, Any]) -> dict[str, Any]:
    """The values of a row of an Arrow table as JSON has them.

    Null keys of nested structs are removed: an Arrow struct has the union of all rows' keys, so the arguments of one
    tool show up as nulls in another's. Dates, times and decimals become their text, numbers that are none null. What
    is no text (bytes, pictures) stays, for who asks for that column to refuse.
    """
    return {name: _plain(value) for name, value in fields.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value) if isinstance(value, Decimal | datetime.timedelta | UUID) else value


# -------------------------------------------------------------------------------------------- what is wrong


def _first_of_many_lines(text: str) -> bool:
    """Whether the text's first line is a whole JSON object with more after it."""
    line, _, rest = text.partition("\n")
    if not rest.strip():
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _not_json_lines(line: bytes) -> tuple[str, str] | None:
    """What is wrong with a whole file whose first line this is, and how to mend it."""
    if line.lstrip().rstrip(b" ,") == b"[" or line.lstrip().startswith(b"[{"):
        return "a JSON list, not an object a line", "call it .json, or put each object on a line of its own"
    return None


def _kept(name: str, line: int, item: Any, text: str) -> Record | BadRecord:
    if isinstance(item, dict):
        if (key := repeated_key(text, item)) is not None:
            how = "keep one of them; readers of JSON take the last and say nothing"
            return BadRecord(Problem(f"the key {key} stands there twice", how, f"{name}:{line}"))
        return Record(f"{name}:{line}", item)
    what = f"expected an object, found {_kind(item)}"
    return BadRecord(Problem(what, "give every record as {...}", f"{name}:{line}"))


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _is_empty(name: str) -> Problem:
    return Problem("no records", "fill the file or leave it out", name)


def _not_utf8(name: str, data: bytes, error: UnicodeDecodeError, *, line: int | None = None) -> Problem:
    line = line or data.count(b"\n", 0, error.start) + 1
    return Problem(f"not UTF-8 (byte 0x{data[error.start]:02x})", "save the file as UTF-8", f"{name}:{line}")


def _not_utf8_values(values: Sequence[str], place: str) -> Problem | None:
    """What is wrong with values whose file was read with `surrogateescape`."""
    text = "".join(values)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        return Problem(f"not UTF-8 (byte 0x{byte:02x})", "save the file as UTF-8", place)
    return None


def _is_utf16(path: Path, name: str) -> Problem | None:
    """Told by its mark, or by every other byte of the beginning being null, as in UTF-16 of mostly ASCII text."""
    with path.open("rb") as file:
        start = file.read(64)
    halves = start[0::2], start[1::2]
    if not start.startswith((b"\xff\xfe", b"\xfe\xff")) and not any(
        half and half.count(0) > len(half) / 2 for half in halves
    ):
        return None
    return Problem("UTF-16, not UTF-8", "save it as UTF-8: iconv -f UTF-16 -t UTF-8 OLD > NEW", name)


def _malformed(name: str, error: ValueError | RecursionError, *, line: int | None = None) -> Problem:
    if isinstance(error, json.JSONDecodeError):
        what = f"malformed JSON: {error.msg} (column {error.colno})"
        return Problem(what, "correct the JSON", f"{name}:{line or error.lineno}")
    what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    return Problem(f"malformed JSON: {what}", "correct the JSON", name if line is None else f"{name}:{line}")
