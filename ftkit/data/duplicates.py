"""Rows that say the same: equal up to case and white space, as they stand in their files or as they are read.

The same record may be phrased in one way for training and in another for measuring, and the same conversation may
stand in files of two formats.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ftkit.data.types import Conversation, RowContent, Text


def content_key(content: RowContent) -> bytes:
    """16 bytes, equal for rows whose texts are equal up to case and white space, whatever their format."""
    return _digest(_texts(content))


def record_key(fields: Mapping[str, Any]) -> bytes:
    """16 bytes, equal for records whose columns are equal up to case and white space, whatever is made of them."""
    return _digest(part for name in sorted(fields) for part in (name, _normalised(fields[name])))


def groups_of(*kinds: Sequence[np.ndarray]) -> list[np.ndarray]:
    """A number for each row, the same for rows of any data set that say the same.

    Args:
        kinds: of each kind of key, for each data set the keys of its rows, 16 bytes each. Two rows say the same if a
            key of any kind is the same, or if both say the same as a third.

    Returns:
        For each data set int64 [rows].
    """
    if not kinds[0]:
        return []
    first, *others = (np.unique(np.concatenate(keys), return_inverse=True)[1] for keys in kinds)
    numbers = first
    while True:
        before = numbers
        for groups in (*others, first):
            lowest = np.full(groups.max(initial=-1) + 1, len(groups))
            np.minimum.at(lowest, groups, numbers)
            numbers = lowest[groups]
        if np.array_equal(numbers, before):
            break
    return np.split(numbers, np.cumsum([len(part) for part in kinds[0]])[:-1])


def repeated(groups: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each data set bool [rows]: whether an earlier row, of it or of a data set before, says the same."""
    if not groups:
        return []
    together = np.concatenate(groups)
    _, first = np.unique(together, return_index=True)
    again = np.ones(len(together), bool)
    again[first] = False
    return np.split(again, np.cumsum([len(part) for part in groups])[:-1])


def _texts(content: RowContent) -> Iterator[str]:
    """The row's texts in order, normalised; empty ones are left out, so that null and "" are the same."""
    if isinstance(content, Text):
        values: list[Any] = [content.text]
    elif isinstance(content, Conversation):
        values = [
            part
            for message in content.messages
            for part in (message.role, message.reasoning_content, message.content, *map(_as_json, message.tool_calls))
        ]
        # The same turns are another row where other tools are offered or other turns are trained on.
        values += [
            *content.tools,
            *(f"{place} {m.train}" for place, m in enumerate(content.messages) if m.train is not None),
        ]
    else:
        values = [*content.fields.values(), *content.options, content.target]
    yield from filter(None, map(_normalised, values))


def _normalised(value: Any) -> str:
    text = value if isinstance(value, str) else "" if value is None else _as_json(value)
    return " ".join(text.split()).casefold()


def _as_json(value: Any) -> str:
    # Bytes and pictures, which no row is trained on, count by what Python says of them.
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=repr)


def _digest(texts: Iterable[str]) -> bytes:
    return hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=16).digest()
