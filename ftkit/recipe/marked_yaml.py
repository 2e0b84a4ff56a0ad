"""Safe YAML with line marks: recipes, suites, launch files.

Scalars follow YAML 1.2's core schema: `1e-4` is a number, `on`, `off`, `yes` and `no` are text, only `true` and `false`
are booleans, dates are text. `010` is refused: it is 8 to some readers and 10 to others. Duplicate keys, tags and keys
that are not text are errors. Aliases and `<<` work. Size, depth and the number of values after aliases are expanded are
capped, so that no file takes more than a moment or the interpreter's stack.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.events import (
    AliasEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from ftkit.errors import KeyPath, StorageError, UserError
from ftkit.recipe.scalars import parse_scalar

MAX_BYTES = 256 * 1024
"""About a second of parsing; recipes have a few kilobytes."""
MAX_DEPTH = 20
MAX_VALUES = 100_000
"""Values in the result, those behind aliases counted every time."""


def read_yaml(path: Path) -> tuple[Any, dict[KeyPath, str]]:
    """Read a YAML file of one document.

    Returns:
        Plain values (dicts with text keys, lists, scalars), and the place, `file:line`, of every key path; the root's
        is ().

    Raises:
        UserError: there is no such file, or what it holds is not the YAML described above.
        StorageError: the file cannot be read.
    """
    return parse_yaml(_read_text(path), str(path))


def parse_yaml(text: str, name: str) -> tuple[Any, dict[KeyPath, str]]:
    """Like `read_yaml`, for text in memory; `name` stands for the file in marks and errors."""
    marks: dict[KeyPath, str] = {}
    try:
        value = _Composer(text, name).document(marks)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _error(name, line, f"the character U+{error.character:04X} is not allowed", "remove it") from None
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(name, error, text.splitlines()) from None
    return value, marks


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError("no such file", where=str(path), how=_similar(path)) from None
    except IsADirectoryError:
        raise UserError("is a directory, not a YAML file", where=str(path), how="name the file in it") from None
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except ValueError:  # A NUL character in the name.
        raise UserError("is not a file name", where=repr(str(path))) from None
    if len(content) > MAX_BYTES:
        raise UserError(f"is larger than {MAX_BYTES // 1024} KiB", where=str(path), how="name a YAML file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        what = f"byte {content[error.start]:#04x} is not UTF-8"
        raise _error(str(path), line, what, "save the file as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _similar(path: Path) -> str:
    """The fix for a file that is not there."""
    others = [*path.parent.glob("*.yaml"), *path.parent.glob("*.yml")]
    names = difflib.get_close_matches(path.name, [other.name for other in others], n=1)
    return f"did you mean {path.with_name(names[0])}?" if names else "check the path"


@dataclass(frozen=True, slots=True)
class _Anchored:
    """A node that aliases may repeat."""

    value: Any
    marks: dict[KeyPath, str]
    """Places of everything inside, relative to the node."""
    size: int
    depth: int


class _Composer:
    """Builds values from the parser's events. Its recursion is as deep as the document, which `MAX_DEPTH` caps."""

    def __init__(self, text: str, name: str) -> None:
        self._name = name
        self._events: Iterator[Event] = yaml.parse(text, Loader=yaml.SafeLoader)
        self._anchors: dict[str, _Anchored | None] = {}
        """None while the node is still being read: an alias to it would be endless."""
        self._num_values = 0

    def document(self, marks: dict[KeyPath, str]) -> Any:
        """The only document's value; `marks` is filled with the places of its keys."""
        next(self._events)  # The start of the stream.
        start = next(self._events)
        if not isinstance(start, DocumentStartEvent):
            raise UserError("the file is empty", where=self._name, how="write the keys into it")
        first = next(self._events)
        if isinstance(first, ScalarEvent) and first.value == "" and first.implicit[0]:
            raise UserError("the file is empty", where=self._name, how="write the keys into it")
        value, inner = self._node(first, depth=1)
        next(self._events)  # The end of the document.
        if isinstance(extra := next(self._events), DocumentStartEvent):
            raise self._error(extra, "a second document starts here", "keep one document in a file, without ---")
        marks.update(inner)
        return value

    def _node(self, event: Event, *, depth: int) -> tuple[Any, dict[KeyPath, str]]:
        """The value of the node that starts with `event`, and the places of everything in it, relative to it."""
        assert isinstance(event, NodeEvent)
        if isinstance(event, AliasEvent):
            return self._alias(event, depth)
        self._count(event, 1)
        if depth > MAX_DEPTH:
            raise self._error(event, f"values are nested more than {MAX_DEPTH} deep", "make it flatter")
        if isinstance(event, ScalarEvent | CollectionStartEvent) and event.tag is not None:
            raise self._error(event, f"the tag {_plain_tag(event.tag)} is not read", "remove it (quotes make text)")
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        before = self._num_values
        marks: dict[KeyPath, str]
        if isinstance(event, ScalarEvent):
            value, marks = self._scalar(event), {(): self._place(event)}
        elif isinstance(event, SequenceStartEvent):
            value, marks = self._sequence(event, depth)
        else:
            assert isinstance(event, MappingStartEvent)
            value, marks = self._mapping(event, depth)
        if event.anchor is not None:
            inner_depth = max(len(path) for path in marks)
            self._anchors[event.anchor] = _Anchored(value, marks, self._num_values - before + 1, inner_depth)
        return value, marks

    def _scalar(self, event: ScalarEvent) -> Any:
        if not event.implicit[0]:  # Quoted, or a block of text.
            return event.value
        return parse_scalar(event.value, where=self._place(event))

    def _sequence(self, start: Event, depth: int) -> tuple[list[Any], dict[KeyPath, str]]:
        values: list[Any] = []
        marks: dict[KeyPath, str] = {(): self._place(start)}
        while not isinstance(event := next(self._events), SequenceEndEvent):
            value, inner = self._node(event, depth=depth + 1)
            marks.update({(len(values), *path): place for path, place in inner.items()})
            values.append(value)
        return values, marks

    def _mapping(self, start: Event, depth: int) -> tuple[dict[str, Any], dict[KeyPath, str]]:
        values: dict[str, Any] = {}
        marks: dict[KeyPath, str] = {(): self._place(start)}
        merged: list[tuple[dict[str, Any], dict[KeyPath, str]]] = []
        while isinstance(event := next(self._events), NodeEvent):
            key = self._key(event)
            if key == "<<" and isinstance(event, ScalarEvent) and event.implicit[0]:
                merged += self._merge(event, depth)
                continue
            if key in values:
                first = marks[(key,)].rpartition(":")[2]
                raise self._error(event, f"{key} is given twice, first in line {first}", "keep one of them")
            value, inner = self._node(next(self._events), depth=depth + 1)
            values[key] = value
            marks.update({(key, *path): place for path, place in inner.items()})
            marks[(key,)] = self._place(event)
        for source, places in merged:
            for key in source.keys() - values.keys():
                values[key] = source[key]
                marks.update({path: place for path, place in places.items() if path[:1] == (key,)})
        return values, marks

    def _key(self, event: Event) -> str:
        if not isinstance(event, ScalarEvent):
            kind = "an alias" if isinstance(event, AliasEvent) else "a list or mapping"
            raise self._error(event, f"a key is text, not {kind}", "write a name before the colon")
        if event.tag is not None or event.anchor is not None:
            raise self._error(event, "a key has neither tag nor anchor", "write a plain name before the colon")
        if event.implicit[0] and not isinstance(self._scalar(event), str):
            what = f"a key is text, not {event.value or 'nothing'}"
            raise self._error(event, what, "put it in quotes, or write a name")
        return str(event.value)

    def _merge(self, event: Event, depth: int) -> list[tuple[dict[str, Any], dict[KeyPath, str]]]:
        """What `<<: *one` or `<<: [*one, *two]` adds; earlier ones win, and the mapping's own keys over all."""
        value, marks = self._node(next(self._events), depth=depth + 1)
        if isinstance(value, dict):
            return [(value, marks)]
        if isinstance(value, list) and all(isinstance(item, dict) for item in value):
            return [
                (item, {path[1:]: place for path, place in marks.items() if path[:1] == (index,)})
                for index, item in enumerate(value)
            ]
        raise self._error(event, "<< takes a mapping or a list of mappings", "give it an alias of one")

    def _alias(self, event: AliasEvent, depth: int) -> tuple[Any, dict[KeyPath, str]]:
        if event.anchor not in self._anchors:
            raise self._error(event, f"there is no anchor &{event.anchor} before this alias", "define it above")
        target = self._anchors[event.anchor]
        if target is None:
            raise self._error(event, f"*{event.anchor} lies inside &{event.anchor} itself", "write the value out")
        self._count(event, target.size)
        if depth + target.depth > MAX_DEPTH:
            raise self._error(event, f"values are nested more than {MAX_DEPTH} deep", "make it flatter")
        return _copy(target.value), dict(target.marks)

    def _count(self, event: Event, number: int) -> None:
        self._num_values += number
        if self._num_values > MAX_VALUES:
            raise self._error(event, f"there are more than {MAX_VALUES:,} values, aliases expanded", "write less")

    def _place(self, event: Event) -> str:
        return f"{self._name}:{_line(event)}"

    def _error(self, event: Event, what: str, how: str) -> UserError:
        return _error(self._name, _line(event), what, how)


def _line(event: Event) -> int:
    assert event.start_mark is not None
    return event.start_mark.line + 1


def _copy(value: Any) -> Any:
    """A copy with containers of its own: what an alias stands for is changed in one place only."""
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _plain_tag(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")


def _error(name: str, line: int, what: str, how: str) -> UserError:
    return UserError(what, how=how, where=f"{name}:{line}")


_SYNTAX: tuple[tuple[str, str, str], ...] = (
    ("character '\\t'", "a tab where YAML allows only spaces", "indent with spaces"),
    ("cannot start any token", "text cannot start with this character", "put the text in quotes"),
    (
        "mapping values are not allowed",
        "a colon where no key can stand",
        "check the indentation, and put text that holds ': ' in quotes",
    ),
    ("could not find expected ':'", "a key without its colon", "write `key: value`, and check the indentation"),
    ("expected <block end>", "the line does not fit the lines above it", "check its indentation"),
    ("found unexpected end of stream", "a quote is not closed", "close it"),
    ("<stream end>", "a bracket or brace is not closed", "close it"),
)
"""Words of PyYAML's complaints -> what is wrong and how to mend it; the first that fits."""


_TEXT_IN_BRACKETS = re.compile(r"(^\s*|[:-]\s+)(\{[^{}]*\}|\[[^\[\]]*\])\s*[^\s,#\]}]")
"""A value that starts with a bracket, and goes on after the one that closes it: meant as text."""


def _syntax_error(name: str, error: yaml.MarkedYAMLError, lines: Sequence[str]) -> UserError:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark is not None else 1
    for number in {line, max(1, line - 1)}:  # PyYAML finds out where the next token starts.
        if number <= len(lines) and _TEXT_IN_BRACKETS.search(lines[number - 1]):
            what = "the text goes on after the bracket that closes it"
            return _error(name, number, what, "put text that starts with a bracket or brace in quotes")
    problem = str(error.problem or error.context)
    for words, what, how in _SYNTAX:
        if words in problem:
            return _error(name, line, what, how)
    return _error(name, line, f"not valid YAML: {problem}", "check this line's brackets, quotes and indentation")
