"""Task records ({inputs: {...}, target: ...}) put into words."""

import string
from collections.abc import Mapping
from typing import Any

from ftkit.data.problems import RowError

Piece = tuple[str, str | None]
"""Literal text, and the field that follows it."""


def parse_template(template: str) -> tuple[Piece, ...]:
    """Split "Review: {text}" at its fields; `{{` and `}}` are braces.

    Only the names of fields stand between braces: no attributes, indices or format specifications are evaluated.

    Raises:
        ValueError: a brace without its partner, or more than a name between braces.
    """
    pieces: list[Piece] = []
    for literal, field, specification, conversion in string.Formatter().parse(template):
        if field == "" or specification or conversion:
            raise ValueError(f"'{{{field}}}' is no field name; write {{{{ and }}}} for braces")
        pieces.append((literal, field))
    return tuple(pieces)


def fill_template(pieces: tuple[Piece, ...], inputs: Mapping[str, Any]) -> str:
    """The template with the record's fields; a list becomes lines that start with "- ".

    Raises:
        RowError: the template names a field that the record lacks.
    """
    missing = [field for _, field in pieces if field is not None and field not in inputs]
    if missing:
        names = ", ".join(f"{{{name}}}" for name in missing)
        raise RowError(f"the template's {names} is no field of the record", f"use its fields: {', '.join(inputs)}")
    return "".join(literal + ("" if field is None else render_field(inputs[field])) for literal, field in pieces)


def generic_prompt(inputs: Mapping[str, Any]) -> str:
    """A record without a template: a line "field: value" each; lists below their name, empty fields left out."""
    lines = []
    for name, value in inputs.items():
        if text := render_field(value):
            lines.append(f"{name}:\n{text}" if isinstance(value, list) else f"{name}: {text}")
    return "\n".join(lines)


def render_field(value: Any) -> str:
    """A field as text: lists as lines that start with "- ", null as nothing, no white space around it."""
    if isinstance(value, list):
        return "\n".join(f"- {item}" for item in value if item is not None)
    return "" if value is None else str(value).strip()
