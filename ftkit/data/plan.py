"""The whole run before its first step: every row read, every draw made, phrased and encoded, every batch dealt."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ftkit.data import advice
from ftkit.data.batches import deal
from ftkit.data.corpus import Corpus, Progress, check_clusters, load_corpus
from ftkit.data.counting import count_datasets
from ftkit.data.draws import draw_run
from ftkit.data.encode import Encoder
from ftkit.data.measured import Measured, encode_measured
from ftkit.data.sources import dataset_names
from ftkit.data.split import split_rows
from ftkit.data.steps import Steps
from ftkit.data.store import ExampleStore, ExampleView
from ftkit.data.types import DatasetCounts, EncodedExample
from ftkit.errors import KeyPath, Problem, UserError
from ftkit.recipe.schema import DatasetSection, Recipe


@dataclass
class Plan:
    """What the loop trains on, step by step, and the rows that it is measured on."""

    examples: ExampleStore
    """All training examples, each once in each form that it is asked in; some may belong to validation rows."""
    steps: Steps
    """The global batch of each optimizer step: indices into `examples`."""
    epoch_of_step: list[float]
    """Epochs that are behind after each step; whole numbers where an epoch ends."""
    dataset_names: list[str]
    """Labels of the training data sets; `EncodedExample.dataset` is an index into them."""
    corpora: list[Corpus]
    """Their rows."""
    counts: list[DatasetCounts]
    """Of each training data set, over the whole run."""
    validation: dict[str, ExampleView]
    """Validation examples by data set; empty where nothing is measured."""
    validation_rows: dict[str, list[int]]
    """`Row.index` of every validation row that has examples."""
    validation_documents: dict[str, Measured]
    """The same rows as (`Row.index`, document), for evaluation."""
    validation_counts: list[DatasetCounts]
    """Of each data set with validation rows."""
    targets_per_step: list[int] = field(init=False)
    """Target tokens of each global batch: the N that its loss is divided by."""
    fingerprint: str = field(init=False)
    """SHA-256 in hex over everything above that the weights depend on; see `fingerprint_until`."""
    warnings: list[str] = field(default_factory=list)
    """What the user should know before the run."""

    def __post_init__(self) -> None:
        self.targets_per_step = self.steps.sums(self.examples.num_targets).tolist()
        self.fingerprint = self.fingerprint_until(len(self.steps))

    @property
    def num_tokens(self) -> int:
        """Tokens that run through the model in training, over all steps."""
        return int(self.examples.num_tokens[self.steps.order].sum(dtype=np.int64))

    def micro_batches(
        self, step: int, *, rank: int, world_size: int, max_tokens: int, packed: bool, before_each: int = 0
    ) -> list[list[EncodedExample]]:
        """What `rank` runs in optimizer step `step` (from 0), one list a micro-batch, ready for `collate`.

        `before_each` tokens more of every example count: those of a soft prompt before it.
        Every rank gets the same number of micro-batches; an empty one is run as well.
        """
        examples = ExampleView(self.examples, np.array(self.steps[step], np.int64))
        return _deal_to(rank, examples, world_size, max_tokens, packed, before_each)

    def validation_batches(
        self, name: str, *, rank: int, world_size: int, max_tokens: int, packed: bool, before_each: int = 0
    ) -> list[list[EncodedExample]]:
        """What `rank` runs to measure the validation rows of one data set."""
        return _deal_to(rank, self.validation[name], world_size, max_tokens, packed, before_each)

    def fingerprint_until(self, step: int) -> str:
        """SHA-256 in hex over validation rows, and ids, labels and order of what the first `step` steps train on.

        A longer run over the same data agrees with a shorter one up to the shorter one's end.
        """
        digest = hashlib.sha256()
        for name, examples in self.validation.items():
            digest.update(name.encode())
            digest.update(examples.store.digests[examples.indices].tobytes())
        bounds = self.steps.bounds[: step + 1]
        digest.update(np.diff(bounds).astype("<i8").tobytes())
        digest.update(self.examples.digests[self.steps.order[: bounds[-1]]].tobytes())
        return digest.hexdigest()


def make_plan(
    recipe: Recipe,
    encoder: Encoder,
    *,
    directory: Callable[[KeyPath], Path],
    progress: Progress = lambda what, done, total: None,
    first_rows: int | None = None,
) -> Plan:
    """Read, parse, split and encode all data, and draw every batch of the run.

    Args:
        recipe: the whole recipe.
        encoder: turns documents into examples.
        directory: of a key whose value is a relative path, where that path starts (`LoadedRecipe.directory`).
        progress: told how far it is.
        first_rows: read no more of each data set, where it is not cut to clusters.

    Raises:
        FtkitError: a data set is missing, wrong or empty, or has no token to train on (all data sets at once).
    """
    # 1. Rows -> documents, and which of them are measured and never trained on.
    train, evaluation = _load(recipe, directory, progress, first_rows)
    without_rows = check_clusters(recipe.data, train)
    left_out = [corpus.name for corpus in train if len(corpus.chosen) == 0]
    train = [corpus for corpus in train if len(corpus.chosen)]
    if not train:
        what = "the clusters leave no row to train on"
        raise UserError(what, how="change clusters or exclude_clusters", key=("data", "exclude_clusters"))
    split = split_rows(recipe, train, evaluation)

    # 2. Draws of every epoch -> jobs, each form of a row once -> examples.
    measured = encode_measured(recipe, train, evaluation, split, encoder, progress)
    drawn = draw_run(recipe, train, split, encoder, progress)

    # 3. Examples -> the batches of every step.
    names = [corpus.name for corpus in train]
    plan = Plan(
        examples=drawn.encoded.examples,
        steps=drawn.steps,
        epoch_of_step=drawn.epochs,
        dataset_names=names,
        corpora=train,
        counts=count_datasets(
            train,
            [len(places) for places in split.trained],
            split.dropped,
            split.overlapping,
            jobs=drawn.jobs,
            encoded=drawn.encoded,
            order=drawn.steps.order,
        ),
        validation={part.name: part.examples for part in measured},
        validation_rows={part.name: part.rows for part in measured},
        validation_documents={part.name: part for part in measured},
        validation_counts=[part.counts for part in measured],
    )
    plan.warnings = [
        *advice.warn_cut(names, drawn.jobs["dataset"], drawn.encoded.uncut, encoder.max_length),
        *advice.warn_few_steps(plan.steps, recipe.training),
        *advice.warn_repeats(plan.counts),
        *advice.warn_thinking(encoder.template, drawn.encoded.with_thoughts, len(drawn.jobs)),
        *advice.warn_no_reasoning(train),
        *advice.warn_overlooked([*train, *evaluation]),
        *split.warnings,
        *advice.warn_left_out(left_out),
        *advice.warn_no_such_cluster(without_rows),
    ]
    return plan


def _load(
    recipe: Recipe, directory: Callable[[KeyPath], Path], progress: Progress, first_rows: int | None
) -> tuple[list[Corpus], list[Corpus]]:
    """The data sets of data.train and of data.eval, or one error for all that are wrong."""
    problems: list[Problem] = []

    def load(which: str, datasets: Sequence[DatasetSection]) -> list[Corpus]:
        corpora: list[Corpus] = []
        for index, (dataset, name) in enumerate(zip(datasets, dataset_names(datasets), strict=True)):
            key: KeyPath = ("data", which, index)
            try:
                corpus = load_corpus(
                    dataset,
                    name,
                    recipe.data,
                    directory=directory,
                    key=key,
                    seed=recipe.seed,
                    progress=progress,
                    first_rows=first_rows,
                )
                corpora.append(corpus)
            except UserError as error:
                problems.extend(error.problems)
        return corpora

    train, evaluation = load("train", recipe.data.train), load("eval", recipe.data.eval)
    if problems:
        raise UserError.of(problems)
    return train, evaluation


def _deal_to(
    rank: int, examples: ExampleView, world_size: int, max_tokens: int, packed: bool, before_each: int
) -> list[list[EncodedExample]]:
    lengths = (examples.num_tokens + before_each).tolist()
    dealt = deal(lengths, world_size=world_size, max_tokens=max_tokens, padded=not packed)
    return [[examples[position] for position in micro_batch] for micro_batch in dealt[rank]]
