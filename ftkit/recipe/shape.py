"""The schema's shape: what stands at a key path, and how a value there is described in plain words."""

import re
import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from ftkit.errors import KeyPath
from ftkit.recipe.schema import Recipe
from ftkit.recipe.section import Section

LONGEST_QUOTE = 60
"""Characters of the user's text that a message repeats."""


def at(path: KeyPath) -> Any:
    """The annotation of what stands at `path`, or None where the schema has no such key.

    A key of any method counts under `method`; values of unknown keys (`chat_template_kwargs`) are `Any`.
    """
    annotation: Any = Recipe
    for part in path:
        annotation = _inside(annotation, part)
        if annotation is None:
            return None
    return annotation


def keys_at(path: KeyPath) -> list[str]:
    """Names of the keys that the section at `path` has; none where it is no section."""
    names = (name for section in _sections(at(path)) for name in section.model_fields)
    return list(dict.fromkeys(names))


def description(path: KeyPath) -> str:
    """The first sentence of the description of the key at `path`, without its full stop."""
    fields = [section.model_fields.get(str(path[-1])) for section in _sections(at(path[:-1]))]
    text = next((field.description for field in fields if field is not None and field.description), "")
    return " ".join(re.split(r"\.(?:\s|$)|;", text)[0].split())


def is_section(path: KeyPath) -> bool:
    """Whether a section, i.e. a mapping of known keys, stands at `path`."""
    return bool(_sections(at(path)))


def is_open(path: KeyPath) -> bool:
    """Whether the section at `path` takes other names than its own too."""
    return any(section.model_config["extra"] == "allow" for section in _sections(at(path)))


def is_union(annotation: Any) -> bool:
    """Whether several kinds of plain values fit, `null` aside."""
    return len(_members(annotation)) > 1 and not _sections(annotation)


def plain_type(annotation: Any) -> Any:
    """The annotation without `Annotated` and without `None`: a type, or a union of several."""
    members = _members(annotation)
    return members[0] if len(members) == 1 else annotation


def expected(annotation: Any) -> str:
    """What fits, in words: "a whole number above 0 or auto". `null` is left out: leaving the key out is plainer."""
    phrases: list[str] = []
    choices: list[str] = []
    for member, bounds in _alternatives(annotation):
        if member is bool:
            choices += ["true", "false"]
        elif get_origin(member) is Literal:
            choices += [str(choice) for choice in get_args(member)]
        elif member is not type(None):
            phrases.append(_phrase(member, bounds))
    if choices:
        phrases.append(choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}")
    return " or ".join(dict.fromkeys(phrases))


def describe(value: Any) -> str:
    """A value as users know it: "the text 'abc'", "the number 5", "nothing"."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case int() | float():
            return f"the number {value}"
        case "":
            return "empty text"
        case str():
            return f"the text {value!r}" if len(value) <= LONGEST_QUOTE else f"the text {value[:LONGEST_QUOTE]!r}..."
        case list() | tuple():
            return "a list" if value else "an empty list"
        case _:
            return "a mapping"


def choices_of(annotation: Any) -> list[str]:
    """The words that fit where only certain words do."""
    return [
        str(choice)
        for member, _ in _alternatives(annotation)
        if get_origin(member) is Literal
        for choice in get_args(member)
    ]


def _inside(annotation: Any, part: str | int) -> Any:
    sections = _sections(annotation)
    if sections:
        fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        return fields[0].rebuild_annotation() if fields else None
    for member in _members(annotation):
        origin, arguments = get_origin(member), get_args(member)
        if origin is tuple and isinstance(part, int):
            return arguments[0]
        if origin is dict:
            return arguments[1]
        if member is Any:
            return Any
    return None


def _sections(annotation: Any) -> list[type[Section]]:
    members = _members(annotation)
    sections = [member for member in members if isinstance(member, type) and issubclass(member, Section)]
    return sections if len(sections) == len(members) else []


def _members(annotation: Any) -> list[Any]:
    return [member for member, _ in _alternatives(annotation) if member is not type(None)]


def _alternatives(annotation: Any, bounds: tuple[Any, ...] = ()) -> Iterable[tuple[Any, tuple[Any, ...]]]:
    """The (type, bounds) that a value may have: unions and `Annotated` taken apart."""
    if get_origin(annotation) is Annotated:
        inner, *extra = get_args(annotation)
        constraints = [bound for item in extra for bound in (item.metadata if isinstance(item, FieldInfo) else [item])]
        yield from _alternatives(inner, (*bounds, *constraints))
    elif get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _alternatives(member, bounds)
    else:
        yield annotation, bounds


def _phrase(member: Any, bounds: tuple[Any, ...]) -> str:
    least = next((f"of at least {_number(bound.ge)}" for bound in bounds if isinstance(bound, Ge)), "")
    above = next((f"above {_number(bound.gt)}" for bound in bounds if isinstance(bound, Gt)), "")
    most = next((f"at most {_number(bound.le)}" for bound in bounds if isinstance(bound, Le)), "")
    below = next((f"below {_number(bound.lt)}" for bound in bounds if isinstance(bound, Lt)), "")
    limits = " and ".join(limit for limit in (least, above, most, below) if limit)
    if member is int:
        return f"a whole number {limits}".strip()
    if member is float:
        return f"a number {limits}".strip()
    if member is str:
        return "text"
    if get_origin(member) is tuple:
        items = "a list of mappings" if _sections(get_args(member)[0]) else "a list of names"
        return f"{items} (at least one)" if any(isinstance(bound, MinLen) for bound in bounds) else items
    return "any value" if member is Any else "a mapping"


def _number(bound: Any) -> str:
    """0.0 -> "0"."""
    return str(int(bound)) if bound == int(bound) else str(bound)
