"""Rows that say the same: equal up to case and white space, whatever their format."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ftkit.data.types import Conversation, RowContent, Text


def content_key(content: RowContent) -> bytes:
    """16 bytes, equal for rows whose texts are equal up to case and white space."""
    parts = "\0".join(_texts(content))
    return hashlib.blake2b(parts.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def groups_of(keys: Sequence[np.ndarray]) -> list[np.ndarray]:
    """A number for each row, the same for rows of any data set that say the same.

    Args:
        keys: for each data set the keys of its rows, 16 bytes each.

    Returns:
        For each data set int64 [rows].
    """
    if not keys:
        return []
    _, numbers = np.unique(np.concatenate(keys), return_inverse=True)
    return np.split(numbers, np.cumsum([len(part) for part in keys])[:-1])


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
    else:
        values = [*content.fields.values(), *content.options, content.target]
    for value in values:
        text = value if isinstance(value, str) else "" if value is None else _as_json(value)
        if text := " ".join(text.split()).casefold():
            yield text


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
