"""Values of a row's columns, checked: texts, answers, pairs."""

from collections.abc import Mapping
from typing import Any

from ftkit.data.problems import RowError, quoted


def text_of(fields: Mapping[str, Any], column: str, *, default: str | None = None) -> str:
    """The column's text; a missing or null one is `default`, or an error where there is none."""
    value = fields.get(column)
    value = default if value is None else value
    if not isinstance(value, str):
        found = "it is missing" if value is None else f"found {quoted(value)}"
        raise RowError(f"{column} must be text, {found}", "give a text")
    return value


def answers_of(fields: Mapping[str, Any], column: str) -> tuple[str, tuple[str, ...]]:
    """The answer to train on, and all accepted ones where there are several (Super-NaturalInstructions)."""
    accepted = accepted_answers(fields, column)
    return accepted[0], tuple(accepted) if len(accepted) > 1 else ()


def accepted_answers(fields: Mapping[str, Any], column: str) -> list[str]:
    """A text or a number as text, or a list of them: every answer that counts as right."""
    value = fields.get(column)
    values = value if isinstance(value, list) and value else [value]
    if any(isinstance(item, bool) or not isinstance(item, str | int | float) for item in values):
        found = "it is missing" if value is None else f"found {quoted(value)}"
        raise RowError(f"{column} must be text, a number or a list of them, {found}", "give a text")
    return [str(item) for item in values]


def pairs_of(history: Any) -> list[tuple[str, str]]:
    """LLaMA-Factory's history: [question, answer] pairs."""
    if history is None:
        return []
    if isinstance(history, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair) for pair in history
    ):
        return [(question, reply) for question, reply in history]
    raise RowError(f"history must be a list of [question, answer], found {quoted(history)}", "give pairs of texts")


def only_instance(instances: Any) -> dict[str, Any]:
    """The input and output of self-instruct's `instances`, of which there must be one."""
    if isinstance(instances, list) and len(instances) == 1 and isinstance(instances[0], dict):
        return {"input": instances[0].get("input"), "output": instances[0].get("output")}
    raise RowError(f"instances must hold one {{input, output}}, found {quoted(instances)}", "give a row each")
