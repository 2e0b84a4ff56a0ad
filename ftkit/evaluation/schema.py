"""A suite's YAML: one class a section; typed, frozen, strict, as the recipe is. Plain data without torch."""

import difflib
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from ftkit.evaluation.metrics import METRICS
from ftkit.recipe.schema import ColumnsSection, DatasetSection
from ftkit.recipe.section import ListOf, NonEmpty, Section

PromptMode = Literal["auto", "chat", "raw"]

_TEMPLATE_COLUMNS = {"inputs", "target", "system"}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The fix for a name that is not known: the closest one, or all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}"


class TaskSection(Section):
    """One task of a suite."""

    name: NonEmpty
    """Label in tables and results; no two tasks share one."""
    path: str
    """A json, jsonl, csv or parquet file, a glob or a directory (relative to the suite), or a hub id."""
    metric: str | ListOf[str]
    """What is measured: one of the metrics' names, or a list of them."""
    template: str | None = None
    """How a row is phrased, with fields of the row or of its `inputs` in braces; else rows are read by `format`."""
    templates: NonEmpty | None = None
    """Phrasings of the library, or of a file (FILE.yaml:NAME); each row is asked in one of them, always the same."""
    labels: dict[str, str] = Field(default_factory=dict)
    """With templates: the source's answers in the phrasings' words."""
    options: Annotated[ListOf[str], Field(min_length=2)] | None = None
    """The answers to choose from, the same for every row; with a template, rows may give an answer's index, from 0."""
    options_field: str | None = None
    """The field of the row, or of its `inputs`, that lists its own options."""
    cluster: str | None = None
    """The kind of task, e.g. sentiment; in tables and results."""
    shots: Annotated[int, Field(ge=0)] = 0
    """Solved examples shown before each question: other rows of the task, drawn anew for each question."""
    limit: PositiveInt | None = None
    """At most so many rows, a seeded random subset."""
    max_new_tokens: PositiveInt | None = None
    """Tokens an answer may have; default 16 more than the longest accepted answer, at most 512."""
    format: Literal["alpaca", "sharegpt", "messages", "prompt_completion", "text", "task"] | None = None
    """How rows are laid out, where there is no template; detected when left out."""
    columns: ColumnsSection = ColumnsSection()
    """The source's names for the format's columns; with a template, `target` and `inputs`."""
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = Field(default_factory=dict)
    """The source's names for roles."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str = "test"
    """Split of a hub data set."""
    revision: str | None = None
    """Revision of a hub data set."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """`metric` as a list."""
        return (self.metric,) if isinstance(self.metric, str) else self.metric

    @field_validator("metric")
    @classmethod
    def _metrics_exist(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        names = (value,) if isinstance(value, str) else value
        if not names or len(set(names)) < len(names):
            raise ValueError("needs at least one metric, each once")
        for name in names:
            if name not in METRICS:
                raise ValueError(f"unknown metric {name}; {did_you_mean(name, METRICS)}")
        return value

    @model_validator(mode="after")
    def _keys_fit_together(self) -> "TaskSection":
        if self.templates is not None and (self.template is not None or self.format is not None):
            raise ValueError("templates, template and format exclude each other; keep one of them")
        if self.options is not None and self.options_field is not None:
            raise ValueError("options and options_field exclude each other; keep one of them")
        if self.template is not None and self.format not in (None, "task"):
            raise ValueError(f"a template takes fields of plain rows, not of format {self.format}; remove one of them")
        unused = self.columns.model_dump(exclude_none=True).keys() - _TEMPLATE_COLUMNS
        if self.template is not None and unused:
            names = ", ".join(sorted(unused))
            raise ValueError(f"with a template, columns maps inputs, target and system, not {names}; remove {names}")
        return self

    def dataset(self) -> DatasetSection:
        """The task's rows as a data set of a recipe."""
        shared = {"path", "name", "format", "columns", "roles", "template", "templates", "labels"}
        shared |= {"subset", "split", "revision"}
        values = {name: value for name, value in self if name in shared}
        return DatasetSection(**values | ({"format": "task"} if self.template is not None else {}))


class SuiteSection(Section):
    """A suite's file."""

    prompt: PromptMode = "auto"
    """chat: with the tuned run's chat template, for every model compared. raw: plain text. auto: chat, if any of the
    models has a chat template."""
    tasks: Annotated[ListOf[TaskSection], Field(min_length=1)]
    """The tasks, in the order of the table."""

    @field_validator("tasks")
    @classmethod
    def _names_differ(cls, tasks: tuple[TaskSection, ...]) -> tuple[TaskSection, ...]:
        names = [task.name for task in tasks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name} is the name of several tasks; give each its own (`metric` takes a list)")
        return tasks
