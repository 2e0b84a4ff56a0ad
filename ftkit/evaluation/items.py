"""Rows as questions: a task of a suite, or a run's validation rows, as items with what answers are held against."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ftkit.data.problems import problems_error, shorten
from ftkit.data.row_parser import parse_rows
from ftkit.data.sources import read_rows
from ftkit.data.types import Conversation, Document, Row, Text
from ftkit.errors import KeyPath, Problem, UserError
from ftkit.evaluation.metrics import METRICS, Truth, normalize_outer
from ftkit.evaluation.schema import TaskSection
from ftkit.recipe.schema import ColumnsSection

DEFAULT_SEED = 42
"""Of the rows that `limit` keeps and of the rows that are shown as examples: the same in every evaluation."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question."""

    document: Document
    """A conversation that ends in the reference answer, or plain text."""
    truth: Truth
    """Accepted answers, the document's own first, and options; empty where there are none."""
    where: str
    """`file:line` of its row."""

    @property
    def question(self) -> Conversation:
        """The conversation before the answer."""
        assert isinstance(self.document, Conversation), "plain text asks nothing"
        return replace(self.document, messages=self.document.messages[:-1])


@dataclass(frozen=True, slots=True)
class Task:
    """Items that are scored alike."""

    name: str
    metrics: tuple[str, ...]
    """Names in METRICS."""
    items: tuple[Item, ...]
    cluster: str | None = None
    max_new_tokens: int | None = None
    """Tokens an answer may have; None: from the references' lengths."""
    rates_all_turns: bool = False
    """Whether perplexity counts every turn that the recipe trains on, as a run's eval_loss does, or the answer only."""


def validation_tasks(
    documents: Mapping[str, Sequence[tuple[int, Document]]], *, limit: int | None = None, seed: int = DEFAULT_SEED
) -> tuple[Task, ...]:
    """Tasks from a run's validation rows: perplexity, and exact match and token-F1 where there are reference answers.

    Perplexity is the exponential of what the run logs as eval_loss of these rows.

    Args:
        documents: by data set (row id, document); conversations end in an assistant turn.
        limit: at most so many rows a data set.
        seed: of the subset.
    """
    tasks = []
    for name, rows in documents.items():
        kept = [rows[index] for index in _subset(len(rows), limit, seed, name)]
        items = tuple(Item(document, _truth_of(document), f"{name} row {row}") for row, document in kept)
        has_references = any(item.truth.references for item in items)
        metrics = ("perplexity", "exact_match", "token_f1") if has_references else ("perplexity",)
        tasks.append(Task(name, metrics, items, rates_all_turns=True))
    return tuple(tasks)


def read_task(
    section: TaskSection, *, base: Path, key: KeyPath, limit: int | None = None, seed: int = DEFAULT_SEED
) -> Task:
    """Read a task's rows.

    Args:
        section: the task.
        base: the directory that a relative `path` starts from.
        key: the section's place in the suite, for errors.
        limit: at most so many rows, in addition to the task's own limit.
        seed: of subset and shots.

    Raises:
        UserError: the rows cannot be read, or lack what the task's metrics need (all of them at once).
    """
    dataset = section.dataset()
    rows = read_rows(dataset, base=base, key=key)
    if section.template is not None:
        rows = _records(rows, section, key)
        dataset = dataset.model_copy(update={"columns": ColumnsSection()})
    parsed = parse_rows(rows, dataset, key=key, base=base, seed=seed)
    rows, documents = [row for row, _ in parsed], [document for _, document in parsed]
    truths = [_truth_of(document) for document in documents]
    if section.options is not None:
        truths = [replace(truth, options=section.options) for truth in truths]
    if section.options_field is not None:
        lists = [_listed_options(row, section.options_field) for row in rows]
        truths = [replace(truth, options=options) for truth, options in zip(truths, lists, strict=True)]
    items = [Item(document, truth, row.where) for document, truth, row in zip(documents, truths, rows, strict=True)]
    _check_items(items, section, key)

    limits = [number for number in (section.limit, limit) if number is not None]
    kept = _subset(len(items), min(limits, default=None), seed, section.name)
    chosen = [items[index] for index in kept]
    if section.shots:
        rng = np.random.default_rng([seed, zlib.crc32(section.name.encode()), section.shots])
        chosen = [_with_shots(item, items, section.shots, rng, key) for item in chosen]
    return Task(section.name, section.metrics, tuple(chosen), section.cluster, section.max_new_tokens)


# ------------------------------------------------------------------------------------------------- rows to items


def _records(rows: Sequence[Row], section: TaskSection, key: KeyPath) -> list[Row]:
    """Plain rows and task records as task records whose inputs are all the fields that a template may name."""
    columns = section.columns
    inputs_name, target_name, system_name = columns.inputs or "inputs", columns.target or "target", columns.system
    present = list(dict.fromkeys(name for row in rows for name in row.fields))
    if target_name not in present:
        raise UserError(
            f"{section.path} has no column {target_name} with the answers; its columns: {', '.join(present)}",
            how="name it, e.g. `columns: {target: label}`",
            key=key,
        )
    labels = _label_names([row.fields.get(target_name) for row in rows], section.options)
    records = []
    for row, label in zip(rows, labels, strict=True):
        own = row.fields.get(inputs_name)
        fields = {name: value for name, value in row.fields.items() if name not in (inputs_name, target_name)}
        record = {"inputs": fields | own if isinstance(own, dict) else row.fields, "target": label}
        if row.fields.get("references") is not None:
            record["references"] = row.fields["references"]
        if system_name is not None:
            record["system"] = row.fields.get(system_name)
        records.append(replace(row, fields=record))
    return records


def _label_names(labels: Sequence[Any], options: tuple[str, ...] | None) -> list[Any]:
    """Class numbers, from 0, as options; labels that are options already stay, numbers among them too.

    Decided for the whole column: with the options 1 to 5, the labels 0 to 4 are numbers of classes, 1 to 5 are not.
    """
    texts = [str(label) for label in labels]
    if options is None or set(texts) <= set(options):
        return list(labels)
    if all(text.isdecimal() and int(text) < len(options) for text in texts):
        return [options[int(text)] for text in texts]
    return list(labels)


def _truth_of(document: Document) -> Truth:
    if isinstance(document, Text):
        return Truth()
    last = document.messages[-1]
    assert last.role == "assistant", "a conversation ends in an assistant turn"
    if last.tool_calls or not last.content.strip():
        return Truth(options=document.options)  # no text that a written answer could be compared with
    return Truth(tuple(dict.fromkeys((last.content, *document.references))), document.options)


def _listed_options(row: Row, name: str) -> tuple[str, ...]:
    """The row's own options; empty where the field holds none, which `_check_items` reports."""
    inputs = row.fields.get("inputs")
    value = row.fields.get(name, inputs.get(name) if isinstance(inputs, dict) else None)
    values = value if isinstance(value, list) else []
    return tuple(str(option) for option in values if isinstance(option, str | int | float))


def _check_items(items: Sequence[Item], section: TaskSection, key: KeyPath) -> None:
    """Every item must have what the task's metrics need."""
    metrics = [METRICS[name] for name in section.metrics]
    uses_options = any(metric.uses_options for metric in metrics)
    if uses_options and not any(item.truth.options for item in items):
        how = "list them as `options`, or name the column that holds them as `options_field`"
        raise UserError(f"{', '.join(section.metrics)} needs answers to choose from", how=how, key=key)
    if (section.shots or any(metric.uses_references for metric in metrics)) and isinstance(items[0].document, Text):
        how = "measure perplexity, or give rows with a question and an answer"
        raise UserError("plain text asks nothing that could be answered", how=how, key=key)
    problems = []
    for item in items:
        if isinstance(item.document, Conversation) and not item.truth.references:
            problems.append(Problem("the answer has no text", "fill it or remove the row", item.where))
        elif uses_options and not _among_options(item.truth):
            options = shorten(", ".join(item.truth.options)) or "none"
            what = f"the answer {shorten(item.truth.references[0])!r} is not among the options ({options})"
            problems.append(Problem(what, "correct the row or the options", item.where))
    if problems:
        raise problems_error(problems, of=section.path)


def _among_options(truth: Truth) -> bool:
    options = {normalize_outer(option) for option in truth.options}
    return any(normalize_outer(reference) in options for reference in truth.references)


def _subset(count: int, limit: int | None, seed: int, name: str) -> list[int]:
    """Positions of a seeded random subset, in their order; all of them where the limit allows it."""
    if limit is None or limit >= count:
        return list(range(count))
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return sorted(rng.choice(count, size=limit, replace=False).tolist())


def _with_shots(item: Item, items: Sequence[Item], shots: int, rng: np.random.Generator, key: KeyPath) -> Item:
    """The item's conversation after `shots` others of the task, solved."""
    others = [other.document for other in items if other.document != item.document]
    if len(others) < shots:
        how = f"set it to at most {len(others)}"
        raise UserError(f"{shots} solved examples need as many other rows", how=how, key=(*key, "shots"))
    drawn = [others[index] for index in rng.choice(len(others), size=shots, replace=False)]
    assert isinstance(item.document, Conversation)
    system = tuple(message for message in item.document.messages if message.role == "system")
    turns = tuple(
        message
        for document in (*drawn, item.document)
        if isinstance(document, Conversation)
        for message in document.messages
        if message.role != "system"
    )
    return replace(item, document=replace(item.document, messages=system + turns))
