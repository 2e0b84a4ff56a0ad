"""One data set on its way through the plan: rows, documents, examples, and what became of each row."""

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ftkit.data.encode import Encoder
from ftkit.data.formats import detect_format, parse_rows, source_columns
from ftkit.data.mixture import choose_subset, row_key
from ftkit.data.problems import problems_error
from ftkit.data.sources import read_rows
from ftkit.data.types import DatasetCounts, Document, EncodedExample, Row
from ftkit.errors import KeyPath, Problem, UserError
from ftkit.recipe.schema import DatasetSection

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

NO_TARGET = "no token to train on"


@dataclass(frozen=True)
class Corpus:
    """The rows of one data set, parsed and cut to `max_samples`."""

    name: str
    key: KeyPath
    """The section's place in the recipe."""
    rows: list[Row]
    documents: list[Document]
    """One a row."""
    row_keys: list[bytes]
    """One a row: equal for rows that say the same."""
    rows_read: int
    """Before `max_samples`."""


@dataclass(frozen=True)
class Part:
    """Some rows of a corpus: those to train on, or those to measure."""

    corpus: Corpus
    positions: list[int]
    """Places in the corpus's rows, ascending."""
    dataset: int
    """The index that their examples carry."""


@dataclass(frozen=True)
class EncodedCorpus:
    """The examples of a part."""

    part: Part
    by_row: list[list[EncodedExample]]
    """Of every row that has any, in the rows' order."""
    counts: DatasetCounts
    whole: list[int]
    """Tokens of the longest example of each row that was kept whole."""
    incomplete: list[Document]
    """Documents of rows that were cut or lost an example; some of them are too long."""

    @property
    def documents(self) -> list[tuple[int, Document]]:
        """(`Row.index`, document) of every row that has examples."""
        used = {examples[0].row for examples in self.by_row}
        corpus = self.part.corpus
        rows = ((corpus.rows[position].index, corpus.documents[position]) for position in self.part.positions)
        return [(index, document) for index, document in rows if index in used]


def load_corpus(dataset: DatasetSection, name: str, *, base: Path, key: KeyPath, seed: int) -> Corpus:
    """Read and parse a data set, and take its subset.

    Raises:
        FtkitError: as `read_rows` and `parse_rows`.
    """
    rows = read_rows(dataset, base=base, key=key)
    dataset = dataset.model_copy(update={"format": dataset.format or detect_format(rows, dataset, key)})
    documents = parse_rows(rows, dataset, key=key)
    assert dataset.format is not None, "set two lines above"
    columns = list(source_columns(dataset.format, dataset).values())
    chosen = choose_subset(len(rows), dataset.max_samples, seed=seed, name=name)
    return Corpus(
        name,
        key,
        rows=[rows[position] for position in chosen],
        documents=[documents[position] for position in chosen],
        row_keys=[row_key(rows[position].fields, columns) for position in chosen],
        rows_read=len(rows),
    )


def encode_corpus(part: Part, encoder: Encoder, *, progress: Progress) -> EncodedCorpus:
    """Encode a part, every row once.

    Raises:
        UserError: the chat template does not take some rows (all of them at once).
    """
    corpus = part.corpus
    counts = DatasetCounts(corpus.name, rows=corpus.rows_read)
    encoded = EncodedCorpus(part, [], counts, [], [])
    problems: list[Problem] = []
    for done, position in enumerate(part.positions):
        progress(f"encoding {corpus.name}", done, len(part.positions))
        row, document = corpus.rows[position], corpus.documents[position]
        try:
            result = encoder.encode(document, row.where)
        except UserError as error:
            problems += error.problems
            continue
        examples = [
            EncodedExample(example, part.dataset, row.index) for example in result.examples if example.num_targets
        ]
        reason = result.reason or (NO_TARGET if len(examples) < max(1, len(result.examples)) else None)
        if reason is not None:
            counts.dropped.setdefault(reason, []).append(row.index)
        if reason is not None or any(example.truncated for example in result.examples):
            encoded.incomplete.append(document)
        else:
            encoded.whole.append(max(example.num_tokens for example in result.examples))
        if examples:
            encoded.by_row.append(examples)
            _count(counts, examples)
    if problems:
        raise problems_error(_merged(problems), of=corpus.name)
    return encoded


def nothing_to_train(part: Part, counts: DatasetCounts) -> Problem:
    """What to say of a part without a token to train on: which filter took its rows."""
    reasons = "; ".join(f"{len(rows)} rows: {reason}" for reason, rows in counts.dropped.items())
    too_short = any("max_length" in reason for reason in counts.dropped)
    how = "raise data.max_length" if too_short else "look at `train`, `weight`, empty answers and data.train_on"
    what = f"{counts.name} has no token to train on ({reasons})"
    return Problem(what, how, key=(*part.corpus.key, "path"))


def lengths_uncut(documents: Sequence[Document], encoder: Encoder) -> list[int]:
    """Tokens that the documents would have if nothing were cut; the longest example of each that has any."""
    unlimited = copy.copy(encoder)
    unlimited.max_length = sys.maxsize
    encoded = [unlimited.encode(document).examples for document in documents]
    return [max(example.num_tokens for example in examples) for examples in encoded if examples]


def _count(counts: DatasetCounts, examples: Sequence[EncodedExample]) -> None:
    counts.rows_used += 1
    counts.examples += len(examples)
    counts.tokens += sum(encoded.example.num_tokens for encoded in examples)
    counts.target_tokens += sum(encoded.example.num_targets for encoded in examples)
    counts.truncated += sum(encoded.example.truncated for encoded in examples)


def _merged(problems: Sequence[Problem]) -> list[Problem]:
    """One problem for all rows that have the same: a template refuses thousands of rows for one reason."""
    first: dict[tuple[str, str | None], Problem] = {}
    numbers: dict[tuple[str, str | None], int] = {}
    for problem in problems:
        same = (problem.what, problem.how)
        first.setdefault(same, problem)
        numbers[same] = numbers.get(same, 0) + 1
    return [
        replace(problem, what=f"{problem.what} (and {numbers[same] - 1} rows more)") if numbers[same] > 1 else problem
        for same, problem in first.items()
    ]
