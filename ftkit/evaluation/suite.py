"""A suite: its YAML file and the rows that it names, as tasks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ftkit.errors import FtkitError, KeyPath, Problem, UserError
from ftkit.evaluation.items import DEFAULT_SEED, Task, read_task
from ftkit.evaluation.schema import PromptMode, SuiteSection, TaskSection, did_you_mean
from ftkit.recipe.marked_yaml import read_yaml
from ftkit.recipe.schema import ColumnsSection
from ftkit.recipe.shape import describe, expected


@dataclass(frozen=True, slots=True)
class Suite:
    """A suite, its rows read."""

    prompt: PromptMode
    tasks: tuple[Task, ...]


def read_suite(path: Path, *, limit: int | None = None, seed: int = DEFAULT_SEED) -> Suite:
    """Read a suite and its rows.

    Args:
        path: the YAML file.
        limit: at most so many rows a task, in addition to the tasks' own limits.
        seed: of subsets and shots.

    Raises:
        UserError: all problems of the file, or else all of the tasks' rows, each with its place.
        NetworkError, StorageError: a task's rows cannot be fetched or opened.
    """
    raw, marks = read_yaml(path)
    if not isinstance(raw, dict):
        raise UserError(f"a suite is a mapping of keys, not {describe(raw)}", how="list its `tasks`", where=marks[()])
    wrong = _unknown_columns(raw)
    try:
        section = SuiteSection.model_validate(raw)
    except ValidationError as error:
        wrong = [*_problems(error, raw), *wrong]
    if wrong:
        marks.setdefault(("tasks",), marks[()])
        raise UserError.of(wrong).located(marks)
    tasks: list[Task] = []
    problems: list[Problem] = []
    for index, task in enumerate(section.tasks):
        try:
            tasks.append(read_task(task, base=path.parent, key=("tasks", index), limit=limit, seed=seed))
        except UserError as error:
            problems += error.located(marks).problems
        except FtkitError as error:
            raise error.located(marks) from None
    if problems:
        raise UserError.of(problems)
    return Suite(section.prompt, tuple(tasks))


def _problems(error: ValidationError, raw: dict[str, Any]) -> list[Problem]:
    """One problem for each key that is wrong, whatever number of types was tried for it."""
    problems: dict[KeyPath, Problem] = {}
    for detail in error.errors():
        if detail["type"] == "too_short" and detail["input"]:
            continue  # counts only the valid items of a list; the others have errors of their own
        key = detail["loc"] if detail["type"] == "missing" else _existing(detail["loc"], raw)
        problems.setdefault(key, _problem(key, detail))
    return list(problems.values())


def _problem(key: KeyPath, detail: ErrorDetails) -> Problem:
    # ("tasks", 0, "columns", "target"): the section that a name belongs to follows from its depth.
    section = (SuiteSection, SuiteSection, SuiteSection, TaskSection, ColumnsSection)[min(len(key), 4)]
    name = str(key[-1]) if key else ""
    if detail["type"] == "missing":
        return Problem("required key is missing", "add it", key=key)
    if detail["type"] == "extra_forbidden":
        return Problem("unknown key", did_you_mean(name, section.model_fields), key=key)
    if detail["type"] == "value_error":
        what, _, mend = detail["msg"].removeprefix("Value error, ").partition("; ")
        return Problem(what, mend or None, key=key)
    if name not in section.model_fields:  # an item of a list, of options for example
        how = "put it in quotes" if detail["type"] == "string_type" else None
        return Problem(f"{detail['msg'].lower()}, got {describe(detail['input'])}", how, key=key)
    wanted = expected(section.model_fields[name].rebuild_annotation())
    return Problem(f"expected {wanted}, got {describe(detail['input'])}", key=key)


def _unknown_columns(raw: dict[str, Any]) -> list[Problem]:
    """Columns that no format has; with `templates` the phrasings decide."""
    problems = []
    tasks = raw.get("tasks")
    for index, task in enumerate(tasks if isinstance(tasks, list) else []):
        columns = task.get("columns") if isinstance(task, dict) and "templates" not in task else None
        for name in columns if isinstance(columns, dict) else ():
            if name not in ColumnsSection.model_fields:
                how = did_you_mean(str(name), ColumnsSection.model_fields)
                problems.append(Problem("unknown key", how, key=("tasks", index, "columns", name)))
    return problems


def _existing(place: KeyPath, raw: Any) -> KeyPath:
    """The part of pydantic's location that lies in the file: its names for the members of a union do not."""
    for length, part in enumerate(place):
        inside = range(len(raw)) if isinstance(raw, list) else raw if isinstance(raw, dict) else ()
        if part not in inside:
            return place[:length]
        raw = raw[part]
    return place
