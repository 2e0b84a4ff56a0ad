"""Documents and examples in Arrow files, mapped into memory: any is at hand, and none takes memory of its own."""

import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ftkit.data.indexed import Indexed
from ftkit.data.types import IGNORE, EncodedExample, Example, RowContent, content_from_json

ROWS, EXAMPLES, DOCUMENTS, FACTS = "rows.arrow", "examples.arrow", "documents.arrow", "facts.json"
BATCH = 1024
"""Rows of an Arrow record batch."""
KEY = np.dtype("V16")
"""16 bytes that stand for a text."""

ROW_SCHEMA = pa.schema(
    [
        ("content", pa.large_binary()),
        ("where", pa.string()),
        ("cluster", pa.string()),
        ("index", pa.int64()),
        ("key", pa.binary(16)),
        ("record_key", pa.binary(16)),
        ("has_rationale", pa.bool_()),
    ]
)
EXAMPLE_SCHEMA = pa.schema(
    [
        ("input_ids", pa.large_list(pa.int32())),
        # Target tokens as bounds [start, end, start, end, ...].
        ("spans", pa.large_list(pa.int32())),
        ("num_targets", pa.int32()),
        ("truncated", pa.bool_()),
        ("dataset", pa.int32()),
        ("row", pa.int64()),
        ("digest", pa.binary(16)),
    ]
)


def write_table(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write record batches to an Arrow file, one in memory at a time."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def write_facts(directory: Path, facts: dict[str, Any]) -> None:
    """Write what else is known of an entry."""
    (directory / FACTS).write_text(json.dumps(facts) + "\n", encoding="utf-8")


def read_facts(directory: Path) -> dict[str, Any]:
    """What `write_facts` wrote."""
    facts: dict[str, Any] = json.loads((directory / FACTS).read_text(encoding="utf-8"))
    return facts


class _Table:
    """An Arrow file, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = pa.ipc.open_file(pa.memory_map(str(path), "r"))
        self._batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        self._ends = list(accumulate(batch.num_rows for batch in self._batches))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)

    def locate(self, index: int) -> tuple[pa.RecordBatch, int]:
        """The record batch of row `index`, and its place there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        return self._batches[number], index - (self._ends[number - 1] if number else 0)

    def column(self, name: str) -> np.ndarray:
        """A whole column of numbers or of keys, in memory."""
        parts = [batch.column(name) for batch in self._batches]
        if self._batches and pa.types.is_fixed_size_binary(parts[0].type):
            arrays = [np.frombuffer(part.buffers()[1], KEY)[part.offset : part.offset + len(part)] for part in parts]
        elif self._batches and pa.types.is_string(parts[0].type):
            arrays = [np.array(part.to_pylist(), dtype=object) for part in parts]
        else:
            arrays = [_numbers(part) for part in parts]
        return np.concatenate(arrays) if arrays else np.empty(0)


def _numbers(array: Any) -> np.ndarray:
    """The values of an Arrow array of numbers without nulls; `np.asarray` would import pandas, which takes a second."""
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.uint8())
    dtype = np.dtype(str(array.type).replace("double", "float64"))
    return np.frombuffer(array.buffers()[1], dtype)[array.offset : array.offset + len(array)]


class RowStore:
    """The rows of a data set that could be read."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._table = _Table(directory / ROWS)
        self._last: tuple[pa.RecordBatch | None, list[Any]] = (None, [])

    def __len__(self) -> int:
        return len(self._table)

    def __reduce__(self) -> tuple[Any, ...]:
        return RowStore, (self.directory,)

    def content(self, position: int) -> RowContent:
        """What a row was read as."""
        columns, place = self._locate(position)
        return content_from_json(columns[0][place].as_py())

    def where(self, position: int) -> str:
        """`file:line` of a row."""
        columns, place = self._locate(position)
        where: str = columns[1][place].as_py()
        return where

    def _locate(self, position: int) -> tuple[list[Any], int]:
        """The columns `content` and `where` of the row's batch, and its place there; mostly that of the row before."""
        batch, place = self._table.locate(position)
        if self._last[0] is not batch:
            self._last = (batch, [batch.column("content"), batch.column("where")])
        return self._last[1], place

    def column(self, name: str) -> np.ndarray:
        """`index`, `key`, `record_key`, `cluster` or `has_rationale` of all rows."""
        return self._table.column(name)


class ExampleStore(Indexed[EncodedExample]):
    """Encoded examples."""

    def __init__(self, path: Path) -> None:
        self._table = _Table(path)
        self.num_tokens = self._lengths("input_ids")
        """int32 [examples]"""
        self.num_targets: np.ndarray = self._table.column("num_targets").astype(np.int32)
        """int32 [examples]"""
        self.dataset: np.ndarray = self._table.column("dataset").astype(np.int32)
        """int32 [examples]"""
        self.truncated: np.ndarray = self._table.column("truncated").astype(bool)
        """bool [examples], whether text was cut."""
        self.digests = self._table.column("digest").astype(KEY)
        """[examples], 16 bytes of each one's ids and labels."""

    def __len__(self) -> int:
        return len(self._table)

    def at(self, index: int) -> EncodedExample:
        """Example `index`, from 0."""
        batch, place = self._table.locate(index)
        ids = _slice(batch.column("input_ids"), place).copy()
        labels = np.full_like(ids, IGNORE)
        for start, end in _slice(batch.column("spans"), place).reshape(-1, 2):
            labels[start:end] = ids[start:end]
        truncated = batch.column("truncated")[place].as_py()
        row, dataset = batch.column("row")[place].as_py(), batch.column("dataset")[place].as_py()
        return EncodedExample(Example(ids, labels, truncated), dataset, row)

    def _lengths(self, name: str) -> np.ndarray:
        parts = [np.diff(_numbers(batch.column(name).offsets)) for batch in self._table._batches]
        return np.concatenate(parts).astype(np.int32) if parts else np.empty(0, np.int32)


@dataclass(frozen=True)
class ExampleView(Indexed[EncodedExample]):
    """Some of a store's examples."""

    store: ExampleStore
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def at(self, index: int) -> EncodedExample:
        """The example at place `index` of the view."""
        return self.store.at(int(self.indices[index]))

    @property
    def num_tokens(self) -> np.ndarray:
        """int32 [examples]"""
        return self.store.num_tokens[self.indices]

    @property
    def num_targets(self) -> np.ndarray:
        """int32 [examples]"""
        return self.store.num_targets[self.indices]


def _slice(column: Any, place: int) -> np.ndarray:
    start, end = _numbers(column.offsets)[place : place + 2].tolist()
    return _numbers(column.values.slice(start, end - start))


@dataclass
class ExampleColumns:
    """Examples on their way into a file."""

    input_ids: list[np.ndarray] = field(default_factory=list)
    spans: list[np.ndarray] = field(default_factory=list)
    num_targets: list[int] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)
    dataset: list[int] = field(default_factory=list)
    row: list[int] = field(default_factory=list)
    digest: list[bytes] = field(default_factory=list)

    def to_batch(self) -> pa.RecordBatch:
        """As an Arrow record batch."""
        return pa.RecordBatch.from_arrays(
            [
                _as_lists(self.input_ids),
                _as_lists(self.spans),
                pa.array(self.num_targets, pa.int32()),
                pa.array(self.truncated, pa.bool_()),
                pa.array(self.dataset, pa.int32()),
                pa.array(self.row, pa.int64()),
                pa.array(self.digest, pa.binary(16)),
            ],
            schema=EXAMPLE_SCHEMA,
        )


def _as_lists(arrays: Sequence[np.ndarray]) -> pa.LargeListArray:
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
    values = np.concatenate(arrays).astype(np.int32) if arrays else np.empty(0, np.int32)
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))
