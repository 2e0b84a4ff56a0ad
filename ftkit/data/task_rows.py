"""Raw rows of public data sets, read for their phrasings: which column holds the answer, and what it means."""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from ftkit.data.phrasings import PhrasingSet
from ftkit.data.problems import RowError, quoted
from ftkit.data.task_records import fill_template, parse_template, render_field
from ftkit.data.types import TaskRecord

LETTERS = string.ascii_uppercase
_MISSING = object()
"""Stands for a column that a row does not have."""


class SkippedRow(Exception):
    """A row that says itself that it has no answer."""


def read_record(
    phrasings: PhrasingSet, row: Mapping[str, Any], columns: Mapping[str, str], labels: Mapping[str, str]
) -> TaskRecord:
    """Read a row.

    Args:
        phrasings: what is needed of it.
        row: its columns; those of a task record's `inputs` count as the row's own.
        columns: the phrasings' names of columns -> the row's.
        labels: the row's answers -> the phrasings', where they differ.

    Raises:
        SkippedRow: it has no answer, and says so.
        RowError: a column is missing or its value is not understood.
    """
    section = phrasings.section
    inputs = row.get("inputs")
    view = _Columns({**row, **inputs} if isinstance(inputs, dict) else row, columns)
    options = section.labels or _options(section.options, view)
    options = tuple(sorted(options)) if section.sort_options else options
    value = view.value(section.target, instead="target")
    if value in section.skip:
        raise SkippedRow(f"no answer ({section.target} is {value})")
    values = value if isinstance(value, list) and value else [value]
    references = [_answer(phrasings, item, options, view, labels) for item in values]
    accepted = view.value("references", default=None)
    references += [str(item) for item in accepted] if isinstance(accepted, list) else []
    return TaskRecord(
        fields={name: _printable(name, view.value(name)) for name in phrasings.columns},
        target=references[0],
        references=tuple(dict.fromkeys(references)),
        options=options,
        rationale=_rationale(phrasings, view),
    )


def _printable(name: str, value: Any) -> Any:
    """The value of a column that a phrasing prints: a text, a number, nothing, or a list of such."""
    values = value if isinstance(value, list) else [value]
    if all(item is None or isinstance(item, str | int | float) for item in values):
        return value
    parts = ", ".join(f"{{{name}.{part}}}" for part in value) if isinstance(value, dict) else ""
    raise RowError(
        f"{name} must be text, a number or a list of them to be printed, found {quoted(value)}",
        f"name a part of it: {parts}" if parts else "name another column",
    )


class _Columns:
    """A row's columns under the phrasings' names; a dotted name reaches into structs."""

    def __init__(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> None:
        self._row, self._columns = row, columns

    def value(self, name: str, *, instead: str | None = None, default: Any = _MISSING) -> Any:
        """The value of a column, or of `instead`, as task records call it.

        Raises:
            RowError: the row has neither, and there is no default.
        """
        value = self._find(name)
        if value is _MISSING and instead is not None and name not in self._columns:
            value = self._row.get(instead, _MISSING)
        if value is not _MISSING:
            return value
        if default is not _MISSING:
            return default
        how = f"map it (`columns: {{{name}: NAME}}`); the row has {', '.join(self._row)}"
        raise RowError(f"there is no column {self._columns.get(name, name)}", how)

    def has(self, names: Sequence[str]) -> bool:
        """Whether all these columns are there."""
        return all(self._find(name) is not _MISSING for name in names)

    def _find(self, name: str) -> Any:
        name = self._columns.get(name, name)
        if name in self._row:
            return self._row[name]
        value: Any = self._row
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                return _MISSING
            value = value[part]
        return value


def _options(wanted: str | tuple[str, ...] | None, view: _Columns) -> tuple[str, ...]:
    """The row's own options: a column of them, a filling for each, or those of a task record."""
    own = view.value("options", default=None)
    if isinstance(wanted, tuple):
        fillings = [parse_template(filling) for filling in wanted]
        names = [name for pieces in fillings for _, name in pieces if name is not None]
        if own is None or view.has(names):
            values = {name: view.value(name) for name in names}
            return tuple(fill_template(pieces, values).strip() for pieces in fillings)
    elif wanted is not None:
        own = view.value(wanted, instead="options")
    elif own is None:
        return ()
    if not isinstance(own, list) or not own:
        raise RowError(f"{wanted or 'options'} must list the options, found {quoted(own)}", "give a list")
    return without_letters([str(item).strip() for item in own])


def without_letters(options: Sequence[str]) -> tuple[str, ...]:
    """ "A) 21", "(B) 7" ... without their letters, where every option has its own."""
    bare = []
    for letter, option in zip(LETTERS, options, strict=False):
        start = option.removeprefix("(")
        if not (start[:1] == letter and start[1:2] in (")", ".", ":")):
            return tuple(options)
        bare.append(start[2:].strip())
    return tuple(bare) if len(bare) == len(options) else tuple(options)


def _answer(
    phrasings: PhrasingSet, value: Any, options: tuple[str, ...], view: _Columns, labels: Mapping[str, str]
) -> str:
    """The answer as text."""
    section = phrasings.section
    if not isinstance(value, str | int | float):
        raise RowError(f"{section.target} must be text or a number, found {quoted(value)}", "give a text")
    text = str(value).lower() if isinstance(value, bool) else str(value).strip()
    text = labels.get(text, text)
    if section.labels is not None:
        return _among_labels(text, value, section.labels)
    if section.target_after is not None:
        text = text.rpartition(section.target_after)[2].strip()
    if section.target_keys is None and section.target_index is None:
        return text
    # Keys come first: "2" may be an option's text, too.
    place = _place(phrasings, text, view)
    if place is None and text in options:
        return text
    if place is None or not 0 <= place < len(options):
        what = f"{section.target} {quoted(value)} is none of the {len(options)} options"
        raise RowError(what, "correct the row, or map what it says with `labels`")
    return options[place]


def _place(phrasings: PhrasingSet, text: str, view: _Columns) -> int | None:
    """Which option, from 0, the answer stands for."""
    section = phrasings.section
    if section.target_index is not None:
        return int(text) - section.target_index if text.isdecimal() else None
    keys: Any = section.target_keys
    if isinstance(keys, str):
        keys = view.value(keys, default=list(LETTERS))
    names, key = [str(item) for item in keys], text.strip("().: ")
    return names.index(key) if key in names else None


def _among_labels(text: str, value: Any, labels: tuple[str, ...]) -> str:
    for label in labels:
        if text.casefold() == label.casefold():
            return label
    number = int(value) if isinstance(value, bool) else int(text) if text.isdecimal() else -1
    if not 0 <= number < len(labels):
        what = f"the answer {quoted(value)} is none of {', '.join(labels[:8])}{', ...' if len(labels) > 8 else ''}"
        raise RowError(what, f'say what it means, e.g. `labels: {{"{text}": {labels[0]}}}`')
    return labels[number]


def _rationale(phrasings: PhrasingSet, view: _Columns) -> str | None:
    """The reasoning, where the row has one."""
    section = phrasings.section
    if section.rationale is None:
        return None
    own = view.value("rationale", default=None)
    value = view.value(section.rationale, default=own) if own is None else own
    text = " ".join(map(str, value)) if isinstance(value, list) else render_field(value)
    mark = section.rationale_before
    if own is None and mark is not None:
        text = text.rpartition(mark)[0] if mark in text else ""
    if section.rationale_without is not None:
        text = re.sub(section.rationale_without, "", text)
    return text.strip() or None
