"""Rows put into words: the library of phrasings, several for each data set (FLAN, Wei et al. 2021,
https://arxiv.org/abs/2109.01652, section 2.1), and the reading of raw rows that they need.

`library/CLUSTER.yaml` holds an entry a data set; a user's own file has the same form. A raw row becomes a `TaskRecord`
(its columns, the answer as text, the options, the rationale), and a phrasing makes a prompt and a target of that.
"""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from ftkit.data.problems import RowError, quoted, shorten
from ftkit.data.task_records import Piece, fill_template, parse_template, render_field
from ftkit.errors import KeyPath, Problem, UserError
from ftkit.recipe.marked_yaml import read_yaml
from ftkit.recipe.schema import ListOf, NonEmpty, Section

LIBRARY = Path(__file__).parent / "library"
LETTERS = string.ascii_uppercase
MISSING = object()
"""Stands for a column that a row does not have."""


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
    skip: ListOf[int | str] = ()
    """Answers that say there is none; such rows are dropped."""
    target_after: NonEmpty | None = None
    """The answer is what follows the last such mark."""
    rationale: NonEmpty | None = None
    """Column with the reasoning that leads to the answer."""
    rationale_before: NonEmpty | None = None
    """The reasoning is what stands before the last such mark."""
    phrasings: Annotated[ListOf[NonEmpty | PhrasingSection], Field(min_length=1)]
    """The ways to ask; a text is a prompt whose answer is {target}."""

    @field_validator("phrasings")
    @classmethod
    def _all_can_be_read(
        cls, phrasings: tuple[str | PhrasingSection, ...]
    ) -> tuple[str | PhrasingSection, ...]:
        for phrasing in phrasings:
            section = PhrasingSection(prompt=phrasing) if isinstance(phrasing, str) else phrasing
            for text in (section.prompt, section.target):
                parse_template(text)
            if section.rationale and "{rationale}" not in section.target:
                raise ValueError(f"a rationale phrasing whose target has no {{rationale}}: {shorten(section.prompt)}")
        if all(not isinstance(phrasing, str) and (phrasing.rationale or phrasing.inverted) for phrasing in phrasings):
            raise ValueError("at least one phrasing must ask for the answer alone")
        return phrasings

    @model_validator(mode="after")
    def _one_way_to_the_answer(self) -> "PhrasingsSection":
        ways = [name for name in ("labels", "target_keys", "target_index") if getattr(self, name) is not None]
        if len(ways) > 1:
            raise ValueError(f"{' and '.join(ways)} exclude each other")
        if self.target_keys is not None or self.target_index is not None:
            if self.options is None:
                raise ValueError(f"{ways[0]} needs options")
        if self.labels is not None and self.options is not None:
            raise ValueError("labels are the options; remove options")
        return self


@dataclass(frozen=True, slots=True)
class Phrasing:
    """A phrasing, its texts split at their fields."""

    prompt: tuple[Piece, ...]
    target: tuple[Piece, ...]
    rationale: bool
    inverted: bool


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """A row, read for its phrasings."""

    fields: Mapping[str, Any]
    """The row's columns under the phrasings' names."""
    target: str
    references: tuple[str, ...]
    """All accepted answers, the target first."""
    options: tuple[str, ...]
    rationale: str | None


class SkippedRow(Exception):
    """A row that says itself that it has no answer."""


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
        """The columns that are read, by the phrasings' own names."""
        s = self.section
        named = [s.target, s.rationale, s.target_keys, s.options]
        columns = [name for name in named if isinstance(name, str)]
        for phrasing in self.phrasings:
            columns += [field for _, field in (*phrasing.prompt, *phrasing.target) if field]
        for filling in s.options if isinstance(s.options, tuple) else ():
            columns += [field for _, field in parse_template(filling) if field]
        return tuple(dict.fromkeys(name for name in columns if name not in DERIVED))

    def read(
        self, row: Mapping[str, Any], columns: Mapping[str, str], labels: Mapping[str, str]
    ) -> TaskRecord:
        """Read a row.

        Args:
            row: its columns; those of a task record's `inputs` count as the row's own.
            columns: the phrasings' names -> the row's.
            labels: the row's answers -> the phrasings', where they differ.

        Raises:
            SkippedRow: it has no answer, and says so.
            RowError: a column is missing or its value is not understood.
        """
        inputs = row.get("inputs")
        flat = {**row, **inputs} if isinstance(inputs, dict) else row
        view = _View(flat, columns)
        options = self._options(view)
        value = view.get(self.section.target, "target")
        if value in self.section.skip:
            raise SkippedRow(f"no answer ({self.section.target} is {value})")
        values = value if isinstance(value, list) and value else [value]
        accepted = flat.get("references") if "references" in flat else None
        references = [self._answer(item, options, view, labels) for item in values]
        references += [str(item) for item in accepted or () if str(item) not in references]
        if self.section.labels is not None:
            options = self.section.labels
        return TaskRecord(view, references[0], tuple(references), options, self._rationale(view))

    def phrase(self, record: TaskRecord, index: int) -> tuple[str, str]:
        """Prompt and target of a record in phrasing `index`.

        Raises:
            RowError: the phrasing names a column that the row lacks.
        """
        phrasing = self.phrasings[index]
        fields = _Derived(record)
        return fill_template(phrasing.prompt, fields).strip("\n"), fill_template(phrasing.target, fields).strip()

    def _options(self, view: "_View") -> tuple[str, ...]:
        wanted = self.section.options
        if wanted is None:
            value = view.get("options", default=None)  # a task record's own
            return without_letters([str(item) for item in value]) if isinstance(value, list) else ()
        if isinstance(wanted, str):
            value = view.get(wanted, "options")
            if not isinstance(value, list) or not value:
                raise RowError(f"{wanted} must list the options, found {quoted(value)}", "give a list")
            return without_letters([str(item) for item in value])
        if view.get("options", default=None) and view.lacks(wanted):
            return without_letters([str(item) for item in view.get("options")])
        return tuple(fill_template(parse_template(filling), view) for filling in wanted)

    def _answer(self, value: Any, options: tuple[str, ...], view: "_View", labels: Mapping[str, str]) -> str:
        """The answer as text."""
        section = self.section
        if value is None or isinstance(value, list | dict):
            raise RowError(f"{section.target} must be text or a number, found {quoted(value)}", "give a text")
        text = str(value).strip() if not isinstance(value, bool) else str(value).lower()
        text = labels.get(text, text)
        if section.labels is not None:
            return _among_labels(text, value, section.labels)
        if section.target_after is not None:
            text = text.rpartition(section.target_after)[2].strip()
        if text in options:
            return text
        place = self._place(text, view)
        if place is None:
            return text
        if not 0 <= place < len(options):
            raise RowError(f"{section.target} {quoted(value)} is none of the {len(options)} options", "correct the row")
        return options[place]

    def _place(self, text: str, view: "_View") -> int | None:
        """Which option the answer stands for; None where answers are given as text."""
        section = self.section
        if section.target_index is not None:
            return int(text) - section.target_index if text.isdecimal() else -1
        if section.target_keys is None:
            return None
        if isinstance(section.target_keys, str):
            keys = view.get(section.target_keys, default=list(LETTERS))
        else:
            keys = list(section.target_keys)
        key = text.strip("().: ")
        return [str(item) for item in keys].index(key) if key in map(str, keys) else -1

    def _rationale(self, view: "_View") -> str | None:
        if self.section.rationale is None:
            return None
        value = view.get(self.section.rationale, "rationale", default=None)
        if value is MISSING or value is None:
            return None
        text = render_field(value) if not isinstance(value, list) else " ".join(str(item) for item in value)
        if self.section.rationale_before is not None and self.section.rationale_before in text:
            text = text.rpartition(self.section.rationale_before)[0]
        return text.strip() or None


DERIVED = ("target", "rationale", "options", "lettered", "choices", "letter")
"""Fields of phrasings that no column has to provide."""


class _View(Mapping[str, Any]):
    """A row's columns under the phrasings' names; a dotted name reaches into structs."""

    def __init__(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> None:
        self._row, self._columns = row, columns

    def get(self, name: str, instead: str | None = None, default: Any = MISSING) -> Any:  # type: ignore[override]
        """The value of a column, or of `instead` where the row is a task record that calls it so.

        Raises:
            RowError: the row has neither, and there is no default.
        """
        value = _reach(self._row, self._columns.get(name, name))
        if value is MISSING and instead is not None and name not in self._columns:
            value = self._row.get(instead, MISSING)
        if value is not MISSING:
            return value
        if default is not MISSING:
            return default
        how = f"map it (`columns: {{{name}: NAME}}`); the row has {', '.join(self._row)}"
        raise RowError(f"there is no column {self._columns.get(name, name)}", how)

    def lacks(self, fillings: Sequence[str]) -> bool:
        """Whether a column that the fillings name is missing."""
        names = [field for filling in fillings for _, field in parse_template(filling) if field]
        return any(_reach(self._row, self._columns.get(name, name)) is MISSING for name in names)

    def __getitem__(self, name: str) -> Any:
        return self.get(name)

    def __contains__(self, name: object) -> bool:
        return _reach(self._row, self._columns.get(str(name), str(name))) is not MISSING

    def __iter__(self) -> Any:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)


class _Derived(Mapping[str, Any]):
    """The columns of a record, and what is made of its answer and options."""

    def __init__(self, record: TaskRecord) -> None:
        self._record = record

    def __getitem__(self, name: str) -> Any:
        record = self._record
        match name:
            case "target":
                return record.target
            case "rationale" if record.rationale is not None:
                return record.rationale
            case "options" if record.options:
                return list(record.options)
            case "choices" if record.options:
                return in_words(record.options)
            case "lettered" if record.options:
                return "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, record.options, strict=False))
            case "letter" if record.target in record.options:
                return f"({LETTERS[record.options.index(record.target)]})"
        return record.fields[name]

    def __contains__(self, name: object) -> bool:
        record = self._record
        if name == "target" or (name == "rationale" and record.rationale is not None):
            return True
        if name in ("options", "choices", "lettered") and record.options:
            return True
        return (name == "letter" and record.target in record.options) or name in record.fields

    def __iter__(self) -> Any:
        return iter(self._record.fields)

    def __len__(self) -> int:
        return len(self._record.fields)


def in_words(options: Sequence[str]) -> str:
    """ "a, b or c"."""
    return " or ".join([", ".join(options[:-1]), options[-1]] if len(options) > 1 else options)


def without_letters(options: Sequence[str]) -> tuple[str, ...]:
    """ "A) 21", "(B) 7" ... without their letters, where every option has its own."""
    bare = []
    for letter, option in zip(LETTERS, options, strict=False):
        start = option.lstrip().removeprefix("(")
        if not (start[:1] == letter and start[1:2] in (")", ".", ":")):
            return tuple(options)
        bare.append(start[2:].strip())
    return tuple(bare)


def _reach(row: Mapping[str, Any], name: str) -> Any:
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return MISSING
        value = value[part]
    return value


def _among_labels(text: str, value: Any, labels: tuple[str, ...]) -> str:
    for label in labels:
        if text.casefold() == label.casefold():
            return label
    number = int(value) if isinstance(value, bool) else int(text) if text.isdecimal() else -1
    if not 0 <= number < len(labels):
        how = f"say what it means, e.g. `labels: {{{text}: {labels[0]}}}`"
        raise RowError(f"the answer {quoted(value)} is none of {', '.join(labels)}", how)
    return labels[number]


def _compile(phrasing: str | PhrasingSection) -> Phrasing:
    section = PhrasingSection(prompt=phrasing) if isinstance(phrasing, str) else phrasing
    return Phrasing(
        parse_template(section.prompt), parse_template(section.target), section.rationale, section.inverted
    )


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
        from difflib import get_close_matches

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
