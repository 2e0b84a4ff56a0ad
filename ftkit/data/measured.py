"""Validation rows: those held back, or the data sets of data.eval."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ftkit.data.corpus import Corpus, Progress
from ftkit.data.counting import dropped_rows, nothing_to_train, num_truncated
from ftkit.data.encode import Encoder
from ftkit.data.encoding import encode_jobs
from ftkit.data.indexed import Indexed
from ftkit.data.split import Split
from ftkit.data.store import ExampleView
from ftkit.data.types import DatasetCounts, Document
from ftkit.data.variants import document_of, measured_jobs, plain_jobs
from ftkit.errors import Problem, UserError
from ftkit.recipe.schema import Recipe


@dataclass(frozen=True)
class Measured(Indexed[tuple[int, Document]]):
    """The validation rows of one data set."""

    name: str
    corpus: Corpus
    jobs: np.ndarray
    """Of the rows that have examples."""
    rows: list[int]
    examples: ExampleView
    counts: DatasetCounts

    def __len__(self) -> int:
        return len(self.jobs)

    def at(self, index: int) -> tuple[int, Document]:
        """(`Row.index`, document) at place `index`."""
        corpus = self.corpus
        return self.rows[index], document_of(self.jobs[index], corpus.store, corpus.phrasings, corpus.section)


def encode_measured(
    recipe: Recipe,
    train: Sequence[Corpus],
    evaluation: Sequence[Corpus],
    split: Split,
    encoder: Encoder,
    progress: Progress,
) -> list[Measured]:
    """Validation rows, encoded; data sets without any are left out."""
    if evaluation:
        # They belong to no training data set; losses by data set count them for the first.
        parts = [([corpus], 0, np.arange(len(corpus.chosen))) for corpus in evaluation]
    else:
        parts = [(list(train), index, out) for index, out in enumerate(split.held_out) if len(out)]
    measured: list[Measured] = []
    problems: list[Problem] = []
    for corpora, index, places in parts:
        corpus = corpora[index]
        positions = corpus.chosen[places]
        if corpus.phrasings is not None:
            jobs = measured_jobs(index, positions, corpus.phrasings, name=corpus.name, seed=recipe.seed)
        else:
            jobs = plain_jobs(index, positions)
        try:
            encoded = encode_jobs(jobs, corpora, encoder, skip_bad=recipe.data.on_bad_row == "skip", progress=progress)
        except UserError as error:
            problems += error.problems
            continue
        has_any = np.diff(encoded.first) > 0
        counts = DatasetCounts(corpus.name, rows=corpus.rows_read)
        counts.dropped = dropped_rows(encoded, jobs, corpus)
        counts.rows_used, counts.examples = int(has_any.sum()), len(encoded.examples)
        counts.tokens = int(encoded.examples.num_tokens.sum(dtype=np.int64))
        counts.target_tokens = int(encoded.examples.num_targets.sum(dtype=np.int64))
        counts.truncated = num_truncated(encoded, jobs, np.ones(len(jobs), bool))
        if not has_any.any():
            if evaluation:
                problems.append(nothing_to_train(corpus, counts))
            continue
        view = ExampleView(encoded.examples, np.arange(len(encoded.examples)))
        rows = corpus.row_ids(places[has_any]).tolist()
        measured.append(Measured(corpus.name, corpus, jobs[has_any], rows, view, counts))
    if problems:
        raise UserError.of(problems)
    return measured
