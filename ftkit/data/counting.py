"""What became of the rows: the figures of the mixture table."""

from collections.abc import Sequence

import numpy as np

from ftkit.data.corpus import Corpus
from ftkit.data.encoding import Encoded
from ftkit.data.types import DatasetCounts
from ftkit.errors import Problem, UserError


def count_datasets(
    train: Sequence[Corpus],
    num_trained: Sequence[int],
    dropped: Sequence[dict[str, list[int]]],
    overlapping: Sequence[dict[str, list[int]]],
    *,
    jobs: np.ndarray,
    encoded: Encoded,
    order: np.ndarray,
) -> list[DatasetCounts]:
    """What became of every training data set, over the whole run.

    Args:
        train: the data sets.
        num_trained: rows of each that may be trained on.
        dropped: of each, reason -> row ids, before anything was encoded.
        overlapping: of each, what they say the same as -> row ids, of rows that are trained on all the same.
        jobs: what was encoded.
        encoded: what became of the jobs.
        order: int64, the examples of all steps.
    """
    examples, per_job = encoded.examples, np.diff(encoded.first)
    job_of_example = np.repeat(np.arange(len(jobs)), per_job)
    counts = []
    for index, corpus in enumerate(train):
        mine = jobs["dataset"] == index
        of_it = order[examples.dataset[order] == index]
        drawn = job_of_example[of_it]
        without = len(np.unique(jobs["position"][mine & (per_job == 0)]))
        counts.append(
            DatasetCounts(
                corpus.name,
                rows=corpus.rows_read,
                rows_used=len(np.unique(jobs["position"][drawn])),
                examples=len(of_it),
                tokens=int(examples.num_tokens[of_it].sum(dtype=np.int64)),
                target_tokens=int(examples.num_targets[of_it].sum(dtype=np.int64)),
                truncated=num_truncated(encoded, jobs, mine),
                dropped=corpus.dropped | dropped[index] | dropped_rows(encoded, jobs, corpus, mine),
                share=len(of_it) / max(1, len(order)),
                # A row of several examples is drawn as a whole.
                epochs=float((1.0 / per_job[drawn]).sum() / max(1, num_trained[index] - without)),
                overlapping=overlapping[index],
            )
        )
    return counts


def num_truncated(encoded: Encoded, jobs: np.ndarray, mine: np.ndarray) -> int:
    """Rows of which an example was cut."""
    job_of_example = np.repeat(np.arange(len(jobs)), np.diff(encoded.first))
    cut = job_of_example[encoded.examples.truncated]
    return len(np.unique(jobs["position"][cut[mine[cut]]]))


def dropped_rows(
    encoded: Encoded, jobs: np.ndarray, corpus: Corpus, mine: np.ndarray | None = None
) -> dict[str, list[int]]:
    """Reason -> row ids, of rows of which at least a part has become no example."""
    dropped: dict[str, list[int]] = {}
    index = corpus.store.column("index")
    for number, reason in enumerate(encoded.reasons):
        found = encoded.reason == number if mine is None else (encoded.reason == number) & mine
        if found.any():
            dropped[reason] = np.unique(index[jobs["position"][found]]).tolist()
    return dropped


def check_any_target(train: Sequence[Corpus], jobs: np.ndarray, encoded: Encoded) -> None:
    """Every data set has a token to train on."""
    problems = []
    has_any = np.diff(encoded.first) > 0
    for index, corpus in enumerate(train):
        mine = jobs["dataset"] == index
        if mine.any() and not (mine & has_any).any():
            counts = DatasetCounts(corpus.name, dropped=dropped_rows(encoded, jobs, corpus, mine))
            problems.append(nothing_to_train(corpus, counts))
    if problems:
        raise UserError.of(problems)


def nothing_to_train(corpus: Corpus, counts: DatasetCounts) -> Problem:
    """What to say of a data set without a token to train on: which filter took its rows."""
    reasons = "; ".join(f"{len(rows)} rows: {reason}" for reason, rows in counts.dropped.items())
    too_short = any("max_length" in reason for reason in counts.dropped)
    how = "raise data.max_length" if too_short else "look at `train`, `weight`, empty answers and data.train_on"
    what = f"{counts.name} has no token to train on ({reasons})"
    return Problem(what, how, key=(*corpus.key, "path"))
