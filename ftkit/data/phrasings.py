"""Rows put into words: the library of phrasings, several for each data set (FLAN, Wei et al. 2021,
https://arxiv.org/abs/2109.01652, section 2.1).

`library/CLUSTER.yaml` holds an entry a data set; a user's own file has the same form. `task_rows.py` reads a raw row
into a `TaskRecord`, and a phrasing makes a prompt and a target of that.
"""

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from ftkit.data.problems import shorten
from ftkit.data.task_records import Piece, fill_template, parse_template
from ftkit.data.types import Conversation, Message, TaskRecord
from ftkit.errors import KeyPath, Problem, UserError
from ftkit.recipe.marked_yaml import read_yaml
from ftkit.recipe.section import ListOf, NonEmpty, Section

LIBRARY = Path(__file__).parent / "library"
LETTERS = string.ascii_uppercase


class PhrasingSection(Section):
    """One way to ask."""

    prompt: NonEmpty
    """What the user says, with columns of the row in braces, {options}, {lettered} and {choices}."""
    target: NonEmpty = "{target}"
    """What the model answers, with {target}, {letter}, {rationale} and columns of the row in braces."""
    rationale: bool = False
    """Whether it asks for the reasoning before the answer; for rows that have a rationale."""
    inverted: bool = False
    """Whether it turns the task round: the answer is given, and what it belongs to is written."""


class PhrasingsSection(Section):
    """How the rows of one data set are read and put into words."""

    path: NonEmpty | None = None
    """Hub id whose column names the phrasings use."""
    subset: NonEmpty | None = None
    """Its configuration."""
    split: NonEmpty = "train"
    """Its training split."""
    names_from: NonEmpty | None = None
    """Where the column names are from, or "not verified"."""
    cluster: NonEmpty | None = None
    """The kind of task; in the library, the name of the file."""
    target: NonEmpty = "target"
    """Column with the answer; a dotted path reaches into structs."""
    labels: Annotated[ListOf[NonEmpty], Field(min_length=2)] | None = None
    """What class numbers mean, counted from 0; false is 0 and true is 1. They are the options."""
    target_keys: NonEmpty | ListOf[NonEmpty] | None = None
    """Keys of the options, or the column that lists them: the answer's place among them is that of its option."""
    target_index: Annotated[int, Field(ge=0, le=1)] | None = None
    """The answer is the number of its option, counted from 0 or from 1."""
    options: NonEmpty | ListOf[NonEmpty] | None = None
    """The row's options: the column that lists them, or a filling for each."""
    sort_options: bool = False
    """Whether options are sorted: where the columns fix the place of the right one, a model would learn the place."""
    skip: ListOf[int | str] = ()
    """Answers that say there is none; such rows are dropped."""
    target_after: NonEmpty | None = None
    """The answer is what follows the last such mark."""
    rationale: NonEmpty | None = None
    """Column with the reasoning that leads to the answer."""
    rationale_before: NonEmpty | None = None
    """The reasoning is what stands before the last such mark."""
    rationale_without: NonEmpty | None = None
    """Regular expression of what is no part of the reasoning, and is taken out of it."""
    phrasings: Annotated[ListOf[NonEmpty | PhrasingSection], Field(min_length=1)]
    """The ways to ask; a text is a prompt whose answer is {target}."""

    @field_validator("phrasings")
    @classmethod
    def _all_can_be_read(cls, phrasings: tuple[str | PhrasingSection, ...]) -> tuple[str | PhrasingSection, ...]:
        for phrasing in phrasings:
            section = PhrasingSection(prompt=phrasing) if isinstance(phrasing, str) else phrasing
            for text in (section.prompt, section.target):
                parse_template(text)
            if section.rationale and "{rationale}" not in section.target:
                raise ValueError(f"a rationale phrasing whose target has no {{rationale}}: {shorten(section.prompt)}")
        if all(not isinstance(phrasing, str) and (phrasing.rationale or phrasing.inverted) for phrasing in phrasings):
            raise ValueError("at least one phrasing must ask for the answer alone")
        return phrasings

    @field_validator("rationale_without")
    @classmethod
    def _is_a_regular_expression(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from None
        return pattern

    @model_validator(mode="after")
    def _one_way_to_the_answer(self) -> "PhrasingsSection":
        ways = [name for name in ("labels", "target_keys", "target_index") if getattr(self, name) is not None]
        if len(ways) > 1:
            raise ValueError(f"{' and '.join(ways)} exclude each other")
        if (self.target_keys is not None or self.target_index is not None) and self.options is None:
            raise ValueError(f"{ways[0]} needs options")
        if self.labels is not None and self.options is not None:
            raise ValueError("labels are the options; remove options")
        if self.sort_options and (ways or self.options is None):
            raise ValueError("sort_options needs options, and an answer that is the text of one")
        return self


@dataclass(frozen=True, slots=True)
class Phrasing:
    """A phrasing, its texts split at their fields."""

    prompt: tuple[Piece, ...]
    target: tuple[Piece, ...]
    rationale: bool
    inverted: bool


class PhrasingSet:
    """The phrasings of one data set, and how its rows are read."""

    def __init__(self, name: str, section: PhrasingsSection) -> None:
        self.name = name
        self.section = section
        self.phrasings = tuple(_compile(phrasing) for phrasing in section.phrasings)
        self.plain = tuple(i for i, p in enumerate(self.phrasings) if not p.rationale)
        """Phrasings for the answer alone, inverted ones among them."""
        self.direct = tuple(i for i in self.plain if not self.phrasings[i].inverted)
        """Those that ask for the answer: the ones to measure with."""
        self.reasoned = tuple(i for i, p in enumerate(self.phrasings) if p.rationale)
        """Those that ask for the reasoning and the answer."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the phrasings print, by their own names."""
        pieces = [piece for phrasing in self.phrasings for piece in (*phrasing.prompt, *phrasing.target)]
        return tuple(dict.fromkeys(field for _, field in pieces if field is not None and field not in DERIVED))

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """All columns that rows need, by the phrasings' names: printed, and of options, answer and reasoning."""
        section = self.section
        if isinstance(section.options, str):
            of_options = [section.options]
        else:
            pieces = [piece for filling in section.options or () for piece in parse_template(filling)]
            of_options = [field for _, field in pieces if field is not None]
        keys = [section.target_keys] if isinstance(section.target_keys, str) else []
        rationale = [section.rationale] if section.rationale is not None else []
        return tuple(dict.fromkeys([*self.columns, *of_options, *keys, section.target, *rationale]))

    def as_json(self) -> dict[str, Any]:
        """Everything that decides how rows are read and put into words, as plain values."""
        return self.section.model_dump(mode="json")

    def phrase(self, record: TaskRecord, index: int) -> tuple[str, str]:
        """Prompt and target of a record in phrasing `index`.

        Raises:
            RowError: the phrasing names a column that the row lacks, or options that it has not.
        """
        phrasing = self.phrasings[index]
        fields = record.fields | _derived(record)
        return fill_template(phrasing.prompt, fields).strip(), fill_template(phrasing.target, fields).strip()


DERIVED = ("target", "rationale", "options", "lettered", "choices", "letter")
"""Fields of phrasings that no column has to provide."""


def _derived(record: TaskRecord) -> dict[str, Any]:
    """What phrasings may name besides columns."""
    fields: dict[str, Any] = {"target": record.target}
    if record.rationale is not None:
        fields["rationale"] = record.rationale
    if record.options:
        fields["options"] = list(record.options)
        fields["choices"] = in_words(record.options)
        fields["lettered"] = "\n".join(f"({a}) {option}" for a, option in zip(LETTERS, record.options, strict=False))
    if record.target in record.options[: len(LETTERS)]:
        fields["letter"] = f"({LETTERS[record.options.index(record.target)]})"
    return fields


def in_words(options: Sequence[str]) -> str:
    """ "a, b or c"."""
    return " or ".join([", ".join(options[:-1]), options[-1]] if len(options) > 1 else options)


def _compile(phrasing: str | PhrasingSection) -> Phrasing:
    section = PhrasingSection(prompt=phrasing) if isinstance(phrasing, str) else phrasing
    return Phrasing(parse_template(section.prompt), parse_template(section.target), section.rationale, section.inverted)


def phrase(record: TaskRecord, phrasings: PhrasingSet, index: int, shots: Sequence[TaskRecord] = ()) -> Conversation:
    """A record as a conversation: the prompt, after solved examples in the same phrasing, and the answer."""
    prompt, target = phrasings.phrase(record, index)
    # An example that the phrasing cannot be filled with (no rationale, say) is left out.
    reasoned = phrasings.phrasings[index].rationale
    usable = [s for s in shots if bool(s.options) == bool(record.options) and not (reasoned and s.rationale is None)]
    solved = ["\n\n".join(phrasings.phrase(shot, index)) for shot in usable]
    text = "\n\n\n".join([*solved, prompt])
    accepted = record.references if target == record.target else (target,)
    # The answers to choose from are in the form in which the phrasing wants them.
    letters = tuple(f"({letter})" for letter, _ in zip(LETTERS, record.options, strict=False))
    options = next((choice for choice in (record.options, letters) if target in choice), ())
    return Conversation((Message("user", text), Message("assistant", target)), (), options, accepted)


# ------------------------------------------------------------------------------------------------------- finding


@cache
def library() -> dict[str, PhrasingSet]:
    """Every data set of the library by name."""
    sets: dict[str, PhrasingSet] = {}
    for path in sorted(LIBRARY.glob("*.yaml")):
        for name, phrasings in read_phrasings(path, cluster=path.stem).items():
            assert name not in sets, f"{name} stands twice in the library"
            sets[name] = phrasings
    return sets


def library_clusters() -> set[str]:
    """Names of the library's clusters."""
    return {phrasings.section.cluster for phrasings in library().values() if phrasings.section.cluster is not None}


def read_phrasings(path: Path, *, cluster: str | None = None) -> dict[str, PhrasingSet]:
    """The entries of a file.

    Raises:
        UserError: what is wrong with the file, a problem each.
    """
    raw, marks = read_yaml(path)
    if not isinstance(raw, dict) or not raw:
        raise UserError("a file of phrasings maps names of data sets to their phrasings", where=str(path))
    sets: dict[str, PhrasingSet] = {}
    problems: list[Problem] = []
    for name, values in raw.items():
        try:
            section = PhrasingsSection.model_validate(values)
        except ValidationError as error:
            problems += [Problem(_in_words(detail), key=_key(str(name), detail["loc"])) for detail in error.errors()]
            continue
        sets[str(name)] = PhrasingSet(str(name), section.model_copy(update={"cluster": section.cluster or cluster}))
    if problems:
        raise UserError.of(problems).located(marks)
    return sets


def find_phrasings(templates: str | Sequence[str], *, base: Path, key: KeyPath) -> PhrasingSet:
    """What a recipe's `templates` names: an entry of the library, of a file (`FILE.yaml`, `FILE.yaml:NAME`), or a list
    of prompts.

    Raises:
        UserError: there is none of that name.
    """
    if not isinstance(templates, str):
        try:
            return PhrasingSet("own", PhrasingsSection(phrasings=tuple(templates)))
        except ValidationError as error:
            raise UserError(_in_words(error.errors()[0]), key=key) from None
    file, _, name = templates.partition(".yaml")
    if not templates.endswith(".yaml") and ".yaml:" not in templates:
        if templates in library():
            return library()[templates]
        close = get_close_matches(templates, library(), n=3)
        how = f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(sorted(library()))}"
        raise UserError(f"the library has no phrasings {templates}", how=f"{how} (or name a .yaml file)", key=key)
    sets = read_phrasings(base / f"{file}.yaml")
    name = name.removeprefix(":")
    if not name and len(sets) == 1:
        return next(iter(sets.values()))
    if name not in sets:
        how = f"write {file}.yaml:NAME with one of {', '.join(sets)}"
        raise UserError(f"{file}.yaml has {len(sets)} data sets, none called {name or 'by no name'}", how=how, key=key)
    return sets[name]


def _in_words(detail: Mapping[str, Any]) -> str:
    return str(detail["msg"]).removeprefix("Value error, ")


def _key(name: str, place: tuple[int | str, ...]) -> KeyPath:
    return (name, *place)
