"""Where a key belongs: other tools' names, keys at the top level, and what an unknown key may have meant."""

import difflib
from collections.abc import Callable, Iterator
from typing import Any

from ftkit.errors import KeyPath, Problem, dotted
from ftkit.recipe import shape
from ftkit.recipe.foreign import FOREIGN, Alias, Refusal
from ftkit.recipe.foreign_values import CONVERSIONS, LATER_VALUES

SECTIONS = ("model", "data", "method", "training")
DATASET_LISTS = (("data", "train"), ("data", "eval"))


def _flat_names() -> dict[str, KeyPath]:
    """Our own keys by their bare names, where the name is no section's twice and no top-level key."""
    paths: dict[str, list[KeyPath]] = {}
    for section in SECTIONS:
        for name in shape.keys_at((section,)):
            paths.setdefault(name, []).append((section, name))
    top = shape.keys_at(())
    return {name: found[0] for name, found in paths.items() if len(found) == 1 and name not in top and name != "type"}


FLAT = _flat_names()
"""Our keys that may also stand at the top level: bare name -> path."""


def canonical(path: KeyPath) -> tuple[KeyPath, Callable[[Any], Any]] | None:
    """The path in our terms, and the value's conversion, where `path` uses another name or place; else None."""
    for length in range(1, len(path) + 1):
        head, rest = path[:length], path[length:]
        if shape.at(head) is not None:
            continue
        entry = _entry(head)
        if isinstance(entry, Alias):
            key = _absolute(entry, head)
            same_place = length == 1 or _pattern(head) in FOREIGN or key[: length - 1] == head[:-1]
            return (key + rest, entry.convert) if same_place else None
        if length == 1 and head[0] in FLAT:
            return FLAT[str(head[0])] + rest, _unchanged
        return None
    return None


def move_aliases(raw: dict[str, Any], marks: dict[KeyPath, str]) -> list[Problem]:
    """Put every value in `raw` where our schema has it, its marks too; report names that mean the same key twice."""
    problems: list[Problem] = []
    # From the outside in: a list of data sets at the top level may hold other tools' names in turn.
    for places in (_top_level, _in_sections, _in_datasets):
        for path in list(places(raw)):
            found = canonical(path)
            if found is None:
                continue
            target, convert = found
            container, source = _container(raw, target[:-1]), _container(raw, path[:-1])
            if container is None or source is None:  # No mapping stands there: validation will say so.
                continue
            value = source.pop(path[-1])
            if target[-1] in container:
                what = f"means the same as {dotted(target)}, which is given too"
                problems.append(Problem(what, "keep one of them", key=path))
                continue
            container[target[-1]] = convert(value)
            for mark in [mark for mark in marks if mark[: len(path)] == path]:
                marks[target + mark[len(path) :]] = marks[mark]
    return problems


def convert_values(value: Any, path: KeyPath = ()) -> Any:
    """`value`, which stands at `path`, with other tools' words in our terms everywhere inside."""
    if isinstance(value, dict):
        value = {key: convert_values(item, (*path, key)) for key, item in value.items()}
    elif isinstance(value, list):
        value = [convert_values(item, (*path, index)) for index, item in enumerate(value)]
    convert = CONVERSIONS.get(_pattern(path))
    return convert(value) if convert else value


def explain_unknown(path: KeyPath, length: int | None = None, siblings: list[str] | None = None) -> Problem:
    """Why there is no such key: path[:length] is the first part that the schema does not have.

    Args:
        siblings: the names that there are in its place, where not all that the schema has there.
    """
    length = len(path) if length is None else length
    head, rest = path[:length], path[length:]
    name = str(head[-1])
    entry = _entry(head)
    if isinstance(entry, Refusal):
        return Problem(entry.what, entry.how, key=path)
    holder = head[:-1]
    if shape.at(holder) is not None and not shape.keys_at(holder) and not shape.keys_at((*holder, 0)):
        expected = shape.expected(shape.at(holder))
        return Problem(f"{dotted(holder)} has no keys", f"set {dotted(holder)} to {expected}", key=path)
    elsewhere = _absolute(entry, head) if isinstance(entry, Alias) else FLAT.get(name)
    if elsewhere is not None:
        return Problem("unknown key", f"it belongs to {dotted(elsewhere)}", key=path)
    siblings = shape.keys_at(head[:-1]) if siblings is None else siblings
    if close := difflib.get_close_matches(name, siblings, n=1, cutoff=0.7):
        suggestion = (*head[:-1], close[0], *rest)
        found = canonical(suggestion)
        suggestion = found[0] if found else suggestion
        known = rest and shape.at(suggestion) is not None
        return Problem("unknown key", f"did you mean {dotted(suggestion) if known else close[0]}?", key=path)
    if length <= 2 and (close := difflib.get_close_matches(name, [*FLAT, *_alias_names()], n=1, cutoff=0.7)):
        found = canonical((close[0],))
        assert found is not None
        return Problem("unknown key", f"did you mean {dotted(found[0])}?", key=path)
    return Problem("unknown key", f"the keys here are {', '.join(siblings)}" if siblings else "remove it", key=path)


def is_harmless(path: KeyPath) -> bool:
    """Whether a run does the same without another tool's key there."""
    entry = _entry(path)
    return isinstance(entry, Refusal) and entry.harmless


def later_value(path: KeyPath, value: Any) -> str | None:
    """What to write instead of a value that belongs to a later version, or None."""
    known = LATER_VALUES.get(_pattern(path), {})
    if isinstance(value, str):
        return known.get(value)
    return known.get(type(value))


def _unchanged(value: Any) -> Any:
    return value


def _entry(path: KeyPath) -> Alias | Refusal | None:
    if (entry := FOREIGN.get(_pattern(path))) is not None:
        return entry
    in_section = len(path) == 1 or (len(path) == 2 and path[0] in SECTIONS)
    return FOREIGN.get(str(path[-1])) if in_section else None


def _absolute(entry: Alias, path: KeyPath) -> KeyPath:
    """The key that an alias at `path` stands for; inside a data set the table names it relative to the data set."""
    key: KeyPath = tuple(entry.key.split("."))
    return path[:3] + key if path[:2] in DATASET_LISTS else key


def _pattern(path: KeyPath) -> str:
    """("data", "eval", 0, "type") -> "data.train.*.type"."""
    parts = ["*" if isinstance(part, int) else part for part in path]
    if path[:2] == ("data", "eval"):
        parts[1] = "train"
    return ".".join(parts)


def _alias_names() -> list[str]:
    return [name for name, entry in FOREIGN.items() if isinstance(entry, Alias) and "." not in name]


def _top_level(raw: dict[str, Any]) -> Iterator[KeyPath]:
    yield from ((name,) for name in raw)


def _in_sections(raw: dict[str, Any]) -> Iterator[KeyPath]:
    for section in SECTIONS:
        if isinstance(raw.get(section), dict):
            yield from ((section, name) for name in raw[section])


def _in_datasets(raw: dict[str, Any]) -> Iterator[KeyPath]:
    for section, kind in DATASET_LISTS:
        datasets = raw[section].get(kind) if isinstance(raw.get(section), dict) else None
        for index, dataset in enumerate(datasets if isinstance(datasets, list) else []):
            if isinstance(dataset, dict):
                yield from ((section, kind, index, name) for name in dataset)


def _container(raw: dict[str, Any], path: KeyPath) -> dict[Any, Any] | None:
    """The mapping at `path`, made where it is missing; None where something else stands in the way."""
    container: Any = raw
    for part in path:
        if isinstance(container, list) and isinstance(part, int):
            container = container[part]
        elif isinstance(container, dict):
            if container.get(part) is None:
                container[part] = {}
            container = container[part]
        else:
            return None
    return container if isinstance(container, dict) else None
