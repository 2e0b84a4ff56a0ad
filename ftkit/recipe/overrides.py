"""`key=value` on the command line, e.g. `training.learning_rate=1e-4` or `data.train.0.max_samples=100`.

Relative paths in it start from the working directory: see `LoadedRecipe.directory`.
"""

from collections.abc import Sequence
from typing import Any

from ftkit.errors import KeyPath, Problem, UserError, dotted
from ftkit.recipe import shape
from ftkit.recipe.marked_yaml import parse_yaml
from ftkit.recipe.names import DATASET_LISTS, canonical, explain_unknown
from ftkit.recipe.scalars import parse_scalar

WHERE = "command line"
"""What stands for file and line in errors."""


def apply_overrides(raw: dict[str, Any], marks: dict[KeyPath, str], overrides: Sequence[str]) -> list[Problem]:
    """Set each `key=value` in `raw`, later ones over earlier ones; the keys' marks become `WHERE`."""
    problems: list[Problem] = []
    for text in overrides:
        try:
            _apply(raw, marks, text)
        except UserError as error:
            problems += error.problems
    return problems


def parse_value(text: str, key: str) -> Any:
    """The value of `key=text`: quoted text, a list in [] or a mapping in {} as YAML, anything else as a plain scalar.

    Raises:
        UserError: brackets or quotes that do not match, or a number with a leading zero.
    """
    text = text.strip()
    if not text.startswith(("[", "{", "'", '"')):
        return parse_scalar(text, where=f"{WHERE}: {key}")
    try:
        return parse_yaml(text, WHERE)[0]
    except UserError as error:
        what = error.problems[0].what
        how = f"text that starts with a bracket or quote is quoted twice: {key}='\"...\"'"
        if "not closed" in what:
            # The shell cuts at spaces.
            how = f"put the whole argument in quotes: '{key}=...'; {how}"
        raise UserError(what, how=how, where=f"{WHERE}: {key}") from None


def _apply(raw: dict[str, Any], marks: dict[KeyPath, str], text: str) -> None:
    name, equals, value_text = text.partition("=")
    name = name.strip()
    if not equals or not all(name.split(".")):
        how = "write it as key=value, e.g. training.learning_rate=1e-4, and one with spaces in quotes: 'key=[a, b]'"
        raise UserError(f"{text!r} sets no key", how=how, where=WHERE)
    value = parse_value(value_text, name)
    written = tuple(int(part) if part.isdecimal() else part for part in name.split("."))
    path, convert = canonical(written) or (written, None)
    for length in range(1, len(path) + 1):
        if shape.at(path[:length]) is None and not shape.is_open(path[: length - 1]):
            problem = explain_unknown(written) if path != written else explain_unknown(written, length)
            raise UserError(problem.what, how=problem.how, where=f"{WHERE}: {name}")
    _set(raw, path, convert(value) if convert else value, name)
    for mark in [mark for mark in marks if mark[: len(path)] == path]:
        del marks[mark]
    marks[path] = WHERE


def _set(raw: dict[str, Any], path: KeyPath, value: Any, name: str) -> None:
    container: Any = raw
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(container, list):
            # One more than there are adds an entry.
            if not isinstance(part, int) or part > len(container):
                raise _no_such_entry(path[:depth], container, name)
            if part == len(container):
                container.append(None)
        elif not isinstance(container, dict):
            raise UserError(f"{dotted(path[:depth])} has no keys", how="set it as a whole", where=f"{WHERE}: {name}")
        else:
            container.setdefault(part, None)
        if last:
            container[part] = value
        elif container[part] is None:
            container[part] = [] if path[: depth + 1] in DATASET_LISTS else {}
        container = container[part]


def _no_such_entry(path: KeyPath, entries: list[Any], name: str) -> UserError:
    count = f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'}, counted from 0" if entries else "no entries"
    how = f"choose one of them, or {len(entries)} to add one" if entries else "write 0 to add one"
    return UserError(f"{dotted(path)} has {count}", how=how, where=f"{WHERE}: {name}")
