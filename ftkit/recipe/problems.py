"""Pydantic's complaints in plain words: one problem for each key that is wrong, with the fix where it is known."""

import difflib
import re
from dataclasses import replace
from typing import Any, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ftkit.errors import KeyPath, Problem, UserError
from ftkit.recipe import shape
from ftkit.recipe.foreign_values import SPELT_OTHERWISE
from ftkit.recipe.names import DATASET_LISTS, explain_unknown, later_value
from ftkit.recipe.scalars import parse_scalar
from ftkit.recipe.schema import METHOD_SECTIONS, Recipe
from ftkit.recipe.section import Section

_SWITCHES = {"yes": "true", "on": "true", "no": "false", "off": "false"}


def validate(raw: dict[str, Any]) -> tuple[Recipe | None, list[Problem]]:
    """The recipe, or the problems that it has."""
    try:
        return Recipe.model_validate(raw), []
    except ValidationError as error:
        return None, explain(error)


def explain(error: ValidationError) -> list[Problem]:
    """The problems behind a failed validation; a value for which several types were tried is one problem."""
    problems: dict[KeyPath, Problem] = {}
    for detail in error.errors():
        key = _key_of(detail["loc"])
        if detail["type"] == "too_short" and detail["input"]:
            continue  # Counts only the valid items of a list; the others have errors of their own.
        if detail["type"].startswith("union_tag"):
            key = ("method", "type")
            problems.setdefault(key, _method_problem(detail["input"]))
        else:
            problems.setdefault(key, _problem(key, detail, _method_of(detail["loc"])))
    return list(problems.values())


def _key_of(loc: tuple[str | int, ...]) -> KeyPath:
    """Pydantic's location without the names of unions' branches: the method's type, the kinds of a plain value."""
    if loc[0] == "method":
        loc = (loc[0], *loc[2:])
    key: KeyPath = ()
    for part in loc:
        if shape.is_union(shape.at(key)):
            break
        key = (*key, part)
    return key


def _method_of(loc: tuple[str | int, ...]) -> type[Section] | None:
    """The section of the method that pydantic's location lies in."""
    return METHOD_SECTIONS.get(str(loc[1])) if loc[0] == "method" and len(loc) > 2 else None


def _problem(key: KeyPath, detail: ErrorDetails, method: type[Section] | None) -> Problem:
    value = detail["input"]
    if detail["type"] == "extra_forbidden":
        if shape.at(key) is not None:
            return _of_another_method(key, method)
        problem = explain_unknown(key, siblings=list(method.model_fields) if method is not None else None)
        if value is None and problem.how is not None and problem.how.startswith("the keys here are"):
            return replace(problem, how=f"write a list in brackets: [..., {key[-1]}]")
        return problem
    if detail["type"] == "missing":
        return Problem("required key is missing", f"add it: {shape.description(key)}", key=key)
    if detail["type"] == "value_error":
        return Problem(detail["msg"].removeprefix("Value error, "), key=key)
    if (instead := later_value(key, value)) is not None:
        return Problem(f"{shape.describe(value)} is not in this version", instead, key=key)
    own = method.model_fields.get(str(key[1])) if method is not None and len(key) == 2 else None
    annotation = own.rebuild_annotation() if own is not None else shape.at(key)
    what = f"expected {shape.expected(annotation)}, got {shape.describe(value)}"
    return Problem(what, _mend(key, annotation, value), key=key)


def _of_another_method(key: KeyPath, method: type[Section] | None) -> Problem:
    *others, last = (name for name, section in METHOD_SECTIONS.items() if key[1] in section.model_fields)
    owners = f"{', '.join(others)} and {last}" if others else last
    beside = key[1] == "num_virtual_tokens" and method is not None and "soft_prompt" in method.model_fields
    besides = "set method.soft_prompt to their number to train a soft prompt besides" if beside else "remove it"
    return Problem("no key of this method", f"it belongs to {owners}; {besides}, or change method.type", key=key)


def _method_problem(section: Any) -> Problem:
    key: KeyPath = ("method", "type")
    known = ", ".join(METHOD_SECTIONS)
    if not isinstance(section, dict) or "type" not in section:
        return Problem("required key is missing", f"choose one of {known}", key=key)
    name = section["type"]
    if isinstance(name, str) and name in SPELT_OTHERWISE:
        return Problem(f"{name} is no method of its own here", SPELT_OTHERWISE[name], key=key)
    if (instead := later_value(key, name)) is not None:
        return Problem(f"the method {name} is not in this version", instead, key=key)
    close = difflib.get_close_matches(name, METHOD_SECTIONS, n=1) if isinstance(name, str) else []
    how = f"did you mean {close[0]}?" if close else f"choose one of {known}"
    return Problem(f"unknown method, {shape.describe(name)}", how, key=key)


def _mend(key: KeyPath, annotation: Any, value: Any) -> str | None:
    """An imperative phrase for the slips that people make, or None."""
    if shape.is_section(key):
        return _mend_section(key, value)
    if choices := shape.choices_of(annotation):
        close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.6)
        if close and close[0] != str(value):
            return f"did you mean {close[0]}?"
    kind = shape.plain_type(annotation)
    if kind is bool and isinstance(value, str):
        return f"write {_SWITCHES[value.lower()]}" if value.lower() in _SWITCHES else None
    if kind is str and isinstance(value, bool | int | float):
        return "put it in quotes"
    if isinstance(value, dict):
        return _mend_mapping(key, annotation, value)
    if get_origin(kind) is tuple and value is not None and not isinstance(value, list):
        if key in DATASET_LISTS:
            return f"write [{{path: {value}}}]" if isinstance(value, str) else "start each entry with a dash"
        return "write it as a list: [...]"
    if isinstance(value, str):
        return _mend_number(annotation, value)
    return _mend_fraction(key, value) if isinstance(value, float) and "whole" in shape.expected(annotation) else None


def _mend_mapping(key: KeyPath, annotation: Any, value: dict[str, Any]) -> str | None:
    """For a mapping where plain values fit: braces that were meant as text, or a section in place of its only value."""
    kind = shape.plain_type(annotation)
    if kind is str:
        text = "{" + ", ".join(value) + "}" if not any(value.values()) else "{...}"
        return f'put text that starts with a brace in quotes: "{text}", on the command line twice: \'"{text}"\''
    if len(value) == 1 and "number" in shape.expected(annotation):
        return f"write {key[-1]}: {next(iter(value.values()))}"
    if get_origin(kind) is tuple:
        return "start each entry with a dash" if key in DATASET_LISTS else "write it as a list: [...]"
    return None


def _mend_fraction(key: KeyPath, value: float) -> str | None:
    if key == ("training", "num_train_epochs"):
        return "set training.max_steps for a part of an epoch"
    return f"write {int(value)}" if value.is_integer() else None


def _mend_number(annotation: Any, text: str) -> str | None:
    if "number" not in shape.expected(annotation):
        return None
    plain = re.sub(r"[_, ]", "", text)
    if percent := re.fullmatch(r"(\d+(?:\.\d+)?)%", plain):
        return f"write {float(percent[1]) / 100:g}"
    try:
        number = parse_scalar(plain)
    except UserError:
        return None
    if isinstance(number, bool) or not isinstance(number, int | float):
        return None
    return "remove the quotes" if plain == text else f"write {plain}"


def _mend_section(key: KeyPath, value: Any) -> str:
    if key == ("model",) and isinstance(value, str):
        return "the base model's name belongs to base_model"
    if key == ("method",) and value in METHOD_SECTIONS:
        return f"write method: {{type: {value}}}"
    if key[:2] in (("data", "train"), ("data", "eval")) and isinstance(value, str):
        return f"write path: {value}"
    return f"write its keys below it: {', '.join(shape.keys_at(key)[:4])}, ..."
