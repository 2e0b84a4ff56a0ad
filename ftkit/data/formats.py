"""How rows are laid out: FORMATS says which columns a format has and how a row of it becomes a document.

To add a format: one function from a row to a document, and one line in FORMATS.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ftkit.data.fields import accepted_answers, answers_of, only_instance, pairs_of, text_of
from ftkit.data.problems import RowError, quoted, shorten
from ftkit.data.task_records import fill_template, generic_prompt, parse_template
from ftkit.data.turns import answer, check_order, parse_tools, parse_turns
from ftkit.data.types import Conversation, Document, Message, Row, Text
from ftkit.errors import KeyPath, UserError
from ftkit.recipe.schema import DatasetSection


def parse_alpaca(row: Row, dataset: DatasetSection) -> Document:
    """instruction, input, output; `history` holds earlier [question, answer] pairs, `instances` (self-instruct) one
    pair of input and output."""
    fields = row.fields
    if fields.get("instances") is not None and fields.get("output") is None:
        fields = fields | only_instance(fields["instances"])
    instruction, context = text_of(fields, "instruction"), text_of(fields, "input", default="")
    # One line break between the two, as LLaMA-Factory and axolotl render this format for chat models.
    prompt = "\n".join(part for part in (instruction, context) if part.strip())
    history = [
        message
        for question, reply in pairs_of(fields.get("history"))
        for message in (Message("user", question), answer(reply))
    ]
    target, references = answers_of(fields, "output")
    return _conversation(fields, [*history, _user(prompt), answer(target)], references=references)


def parse_sharegpt(row: Row, dataset: DatasetSection) -> Document:
    """conversations: a list of {from, value}; tool calls as turns of function_call and observation (Glaive)."""
    return _conversation(row.fields, parse_turns(row.fields.get("conversations"), "conversations", dataset.roles))


def parse_messages(row: Row, dataset: DatasetSection) -> Document:
    """messages: a list of {role, content} (OpenAI), with tool calls and marks of what is trained on."""
    return _conversation(row.fields, parse_turns(row.fields.get("messages"), "messages", dataset.roles))


def parse_prompt_completion(row: Row, dataset: DatasetSection) -> Document:
    """prompt and completion, each a text or a list of messages (TRL); only the completion is trained on."""
    fields = row.fields
    if isinstance(fields.get("prompt"), list):
        # Answers within the prompt are context.
        turns = parse_turns(fields["prompt"], "prompt", dataset.roles)
        prompt = [replace(turn, train=False) if turn.role == "assistant" else turn for turn in turns]
    else:
        prompt = [_user(text_of(fields, "prompt"))]
    completion = fields.get("completion")
    if isinstance(completion, list) and any(isinstance(turn, dict) for turn in completion):
        return _conversation(fields, [*prompt, *parse_turns(completion, "completion", dataset.roles)])
    target, references = answers_of(fields, "completion")
    return _conversation(fields, [*prompt, answer(target)], references=references)


def parse_text(row: Row, dataset: DatasetSection) -> Document:
    """text: trained on as a whole."""
    return Text(text_of(row.fields, "text"))


def parse_task(row: Row, dataset: DatasetSection) -> Document:
    """inputs (a mapping of fields) and target, phrased by the data set's template."""
    inputs = row.fields.get("inputs")
    if not isinstance(inputs, dict) or not inputs:
        raise RowError(f"inputs must be an object with fields, found {quoted(inputs)}", 'give {"text": "..."}')
    prompt = generic_prompt(inputs)
    if dataset.template is not None:
        prompt = fill_template(parse_template(dataset.template), inputs)
    target, references = answers_of(row.fields, "target")
    accepted = row.fields.get("references")
    if accepted is not None:
        references = tuple(accepted_answers({"references": accepted}, "references"))
    options = inputs.get("options")
    options = tuple(str(option) for option in options) if isinstance(options, list) else ()
    return _conversation(row.fields, [_user(prompt), answer(target)], references=references, options=options)


@dataclass(frozen=True, slots=True)
class Format:
    """One way to lay out rows."""

    columns: tuple[str, ...]
    """Columns that every row must have, by the format's own names."""
    parse: Callable[[Row, DatasetSection], Document]
    """A row, its columns under the format's own names, -> document; raises RowError."""
    optional: tuple[str, ...] = ()
    """Columns that are read where they are present."""
    instead: tuple[tuple[str, str], ...] = ()
    """(needed column, the optional one that can stand in for it)."""


_KWARGS = "chat_template_kwargs"

FORMATS: dict[str, Format] = {
    "alpaca": Format(
        ("instruction", "output"),
        parse_alpaca,
        optional=("input", "system", "history", "instances", "chat_template_kwargs"),
        instead=(("output", "instances"),),
    ),
    "sharegpt": Format(("conversations",), parse_sharegpt, optional=("system", "tools", _KWARGS)),
    "messages": Format(("messages",), parse_messages, optional=("system", "tools", _KWARGS)),
    "prompt_completion": Format(
        ("prompt", "completion"), parse_prompt_completion, optional=("system", "tools", _KWARGS)
    ),
    "text": Format(("text",), parse_text),
    "task": Format(("inputs", "target"), parse_task, optional=("references", "system", "cluster")),
}
"""The recipe's `format` -> how such rows are read."""

_OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "instruction": ("Definition", "question", "query", "prompt"),
    "input": ("context",),
    "output": ("response", "answer", "completion", "reply"),
    "conversations": ("conversation", "dialog", "dialogue"),
    "messages": ("conversation", "chat"),
    "prompt": ("question", "query", "input", "inputs"),
    "completion": ("response", "answer", "reply", "output", "chosen", "target", "targets"),
    "text": ("content", "document"),
    "target": ("answer", "label", "output"),
}
"""Column -> names that it has in other data sets; only for the fix that an error or a warning suggests."""


def detect_format(rows: Sequence[Row], dataset: DatasetSection, key: KeyPath) -> str:
    """The format whose columns the rows have.

    A column `text` beside those of another format is that format's rendering (as in tatsu-lab/alpaca).

    Raises:
        UserError: no format fits, or several do.
    """
    present = _present(rows)
    mapped = dataset.columns.model_dump(exclude_none=True)
    fitting = [
        name
        for name, format_ in FORMATS.items()
        if set(mapped) <= {*format_.columns, *format_.optional} and not _missing(name, dataset, present)
    ]
    if len(fitting) > 1 and "text" in fitting:
        fitting.remove("text")
    if len(fitting) == 1:
        return fitting[0]
    seen = f"columns {', '.join(present)}; first row {_short_row(rows[0])}{_other_layout(rows)}"
    if fitting:
        how = f"set `format:` to one of {', '.join(fitting)}"
        raise UserError(f"{dataset.path} fits several formats ({seen})", how=how, key=key)
    raise UserError(f"{dataset.path} fits no format ({seen})", how=_suggestion(present), key=key)


def source_columns(name: str, dataset: DatasetSection) -> dict[str, str]:
    """The format's columns, needed and optional -> the source's names for them."""
    mapped = dataset.columns.model_dump(exclude_none=True)
    return {column: mapped.get(column, column) for column in (*FORMATS[name].columns, *FORMATS[name].optional)}


# ------------------------------------------------------------------------------------------------------- checks


def check_section(name: str, dataset: DatasetSection, key: KeyPath) -> None:
    """Keys of the section that the format cannot use, and a template that cannot be read."""
    known = (*FORMATS[name].columns, *FORMATS[name].optional)
    for column in dataset.columns.model_dump(exclude_none=True):
        if column not in known:
            how = f"map {', '.join(known)}"
            raise UserError(f"format {name} has no column {column}", how=how, key=(*key, "columns", column))
    if dataset.template is None:
        return
    if name != "task":
        raise UserError(f"format {name} takes no template", how="remove it", key=(*key, "template"))
    try:
        parse_template(dataset.template)
    except ValueError as error:
        how = "write fields as {name}, braces as {{ and }}"
        raise UserError(f"not a template: {error}", how=how, key=(*key, "template")) from None


def check_columns(rows: Sequence[Row], name: str, dataset: DatasetSection, key: KeyPath) -> None:
    """Columns that no row has: one error instead of one a row."""
    present = _present(rows)
    for column, source in dataset.columns.model_dump(exclude_none=True).items():
        if source not in present:
            how = f"name one of {', '.join(present)}"
            raise UserError(f"{dataset.path} has no column {source}", how=how, key=(*key, "columns", column))
    if missing := _missing(name, dataset, present):
        seen = f"its columns: {', '.join(present)}; first row {_short_row(rows[0])}{_other_layout(rows)}"
        what = f"{dataset.path} lacks {', '.join(missing)} of format {name} ({seen})"
        mapping = _mapping(name, present) or f"{{{missing[0]}: NAME}}"
        how = f"map them (`columns: {mapping}`) or correct `format`"
        raise UserError(what, how=how, key=key)


def missing_columns(row: Row, name: str, dataset: DatasetSection) -> RowError | None:
    """What is wrong with a row that lacks columns of the format, as in files of several layouts; None if none is."""
    if not (missing := _missing(name, dataset, row.fields)):
        return None
    mapping = _mapping(name, list(row.fields)) or f"{{{missing[0]}: NAME}}"
    how = f"correct the row or, where all rows are so, map the columns (`columns: {mapping}`)"
    return RowError(f"no column {', '.join(missing)} of format {name}; columns there are {', '.join(row.fields)}", how)


def overlooked_columns(rows: Sequence[Row], name: str, dataset: DatasetSection) -> dict[str, str]:
    """Columns that are not read -> the optional column, not there, that each seems to be under another name."""
    present, sources = _present(rows), source_columns(name, dataset)
    unread = [column for column in present if column not in sources.values()]
    found: dict[str, str] = {}
    for column in FORMATS[name].optional:
        if sources[column] not in present:
            nearly = difflib.get_close_matches(column, unread, n=1, cutoff=0.8)
            known = [other for other in _OTHER_NAMES.get(column, ()) if other in unread]
            found |= dict.fromkeys([*known, *nearly][:1], column)
    return found


def _missing(name: str, dataset: DatasetSection, present: Iterable[str]) -> list[str]:
    """The needed columns that are not present, under the source's names."""
    sources, instead = source_columns(name, dataset), dict(FORMATS[name].instead)
    return [
        sources[column]
        for column in FORMATS[name].columns
        if sources[column] not in present and sources[instead.get(column, column)] not in present
    ]


def _present(rows: Sequence[Row]) -> list[str]:
    """All columns, in the order in which they appear."""
    return list(dict.fromkeys(column for row in rows for column in row.fields))


def _suggestion(present: Sequence[str]) -> str:
    """The fix for columns that fit no format: the first format that they fit under other names."""
    for name in FORMATS:
        if mapping := _mapping(name, present):
            return f"set `format: {name}` and `columns: {mapping}`"
    example = present[0] if present else "NAME"
    return f"set `format` and map its columns, e.g. `format: text` with `columns: {{text: {example}}}`"


def suggested(how: str) -> dict[str, Any] | None:
    """`format` and `columns` that `_suggestion` proposed in the words `how`; None where it knew none."""
    match = re.fullmatch(r"set `format: (\w+)` and `columns: \{(.*)\}`", how)
    if match is None:
        return None
    return {"format": match[1], "columns": dict(pair.split(": ", 1) for pair in match[2].split(", "))}


def _mapping(name: str, present: Sequence[str]) -> str | None:
    """The `columns` under which the source would fit the format, as YAML; None where nothing is known."""
    found: dict[str, str] = {}
    for column in (*FORMATS[name].columns, *FORMATS[name].optional):
        other = next((other for other in _OTHER_NAMES.get(column, ()) if other in present), None)
        if column not in present and other is not None and other not in found.values():
            found[column] = other
    if any(column not in present and column not in found for column in FORMATS[name].columns):
        return None
    return "{" + ", ".join(f"{column}: {source}" for column, source in found.items()) + "}"


def _short_row(row: Row) -> str:
    fields = shorten({name: shorten(value, width=40) for name, value in row.fields.items()}, width=240)
    return f"({row.where}) {fields}"


def _other_layout(rows: Sequence[Row]) -> str:
    """The first row that has none of the first row's columns; "" if there is none."""
    other = next((row for row in rows if row.fields and rows[0].fields.keys().isdisjoint(row.fields)), None)
    return "" if other is None else f"; {other.where} has others, {', '.join(other.fields)}"


# ------------------------------------------------------------------------------------------------ parts of a row


def _conversation(
    fields: Mapping[str, Any],
    messages: Iterable[Message],
    *,
    references: tuple[str, ...] = (),
    options: tuple[str, ...] = (),
) -> Conversation:
    """The messages in a checked order, with the row's `system` and `tools`."""
    messages = tuple(messages)
    system = text_of(fields, "system", default="")
    if system.strip():
        if messages[0].role == "system":
            raise RowError("a system column and a system turn", "keep one of them")
        messages = (Message("system", system), *messages)
    kwargs = fields.get("chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise RowError(f"chat_template_kwargs must be an object, found {quoted(kwargs)}", "give {...}")
    return Conversation(check_order(messages), parse_tools(fields.get("tools")), options, references, kwargs or {})


def _user(text: str) -> Message:
    if not text.strip():
        raise RowError("the prompt is empty", "fill it or remove the row")
    return Message("user", text)
