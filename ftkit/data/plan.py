"""The whole run before its first step: every row read, every draw made, phrased and encoded, every batch dealt."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

import numpy as np

from ftkit.data import advice
from ftkit.data.batches import deal
from ftkit.data.corpus import Corpus, Progress, load_corpus
from ftkit.data.duplicates import groups_of, repeated
from ftkit.data.encode import Encoder
from ftkit.data.encoding import Encoded, encode_jobs
from ftkit.data.mixture import Source, draw_epoch, random_generator, split_validation
from ftkit.data.sources import dataset_names
from ftkit.data.store import ExampleStore, ExampleView
from ftkit.data.types import DatasetCounts, Document, EncodedExample
from ftkit.data.variants import JOB, choose_variants, document_of, measured_jobs, plain_jobs
from ftkit.errors import KeyPath, Problem, UserError
from ftkit.recipe.schema import DatasetSection, Recipe

SAME_AS_EARLIER = "says the same as an earlier row (data.deduplicate)"
SAME_AS_VALIDATION = "says the same as a validation row (data.deduplicate)"
WINDOW = 1024
"""Examples, at least, within which an epoch's examples are shuffled once more."""


class Steps(Sequence[list[int]]):
    """The global batch of each optimizer step: indices of examples."""

    def __init__(self, order: np.ndarray, bounds: Sequence[int] | np.ndarray) -> None:
        """`order`: int64, the examples of all steps; step s has order[bounds[s] : bounds[s + 1]]."""
        self.order, self.bounds = order, np.asarray(bounds, np.int64)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @overload
    def __getitem__(self, index: int) -> list[int]: ...

    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...

    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        if isinstance(index, slice):
            return [self[step] for step in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        indices: list[int] = self.order[self.bounds[index] : self.bounds[index + 1]].tolist()
        return indices

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum over each step's examples of `values` [examples]; int64 [steps]."""
        return np.add.reduceat(values[self.order].astype(np.int64), self.bounds[:-1])


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
    counts: list[DatasetCounts]
    """Of each training data set, over the whole run."""
    validation: dict[str, ExampleView]
    """Validation examples by data set; empty where nothing is measured."""
    validation_rows: dict[str, list[int]]
    """`Row.index` of every validation row that has examples."""
    validation_documents: dict[str, Sequence[tuple[int, Document]]]
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
        self, step: int, *, rank: int, world_size: int, max_tokens: int, packed: bool
    ) -> list[list[EncodedExample]]:
        """What `rank` runs in optimizer step `step` (from 0), one list a micro-batch, ready for `collate`.

        Every rank gets the same number of micro-batches; an empty one is run as well.
        """
        examples = ExampleView(self.examples, np.array(self.steps[step], np.int64))
        return _deal_to(rank, examples, world_size=world_size, max_tokens=max_tokens, packed=packed)

    def validation_batches(
        self, name: str, *, rank: int, world_size: int, max_tokens: int, packed: bool
    ) -> list[list[EncodedExample]]:
        """What `rank` runs to measure the validation rows of one data set."""
        return _deal_to(rank, self.validation[name], world_size=world_size, max_tokens=max_tokens, packed=packed)

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
) -> Plan:
    """Read, parse, split and encode all data, and draw every batch of the run.

    Args:
        recipe: the whole recipe.
        encoder: turns documents into examples.
        directory: of a key whose value is a relative path, where that path starts (`LoadedRecipe.directory`).
        progress: told how far it is.

    Raises:
        FtkitError: a data set is missing, wrong or empty, or has no token to train on (all data sets at once).
    """
    # 1. Rows -> documents, and which of them are measured and never trained on.
    train = _load(recipe, recipe.data.train, "train", directory, progress)
    evaluation = _load(recipe, recipe.data.eval, "eval", directory, progress)
    split = _split(recipe, train, evaluation)

    # 2. Draws of every epoch -> jobs, each form of a row once -> examples.
    measured = _encode_measured(recipe, train, evaluation, split, encoder, progress)
    drawn = _draw_run(recipe, train, split, encoder, progress)

    # 3. Examples -> the batches of every step.
    names = [corpus.name for corpus in train]
    plan = Plan(
        examples=drawn.encoded.examples,
        steps=drawn.steps,
        epoch_of_step=drawn.epochs,
        dataset_names=names,
        counts=_count(train, split, drawn),
        validation={part.name: part.examples for part in measured},
        validation_rows={part.name: part.rows for part in measured},
        validation_documents={part.name: part for part in measured},
        validation_counts=[part.counts for part in measured],
    )
    plan.warnings = [
        *advice.warn_cut(drawn.encoded.uncut, recipe.data.max_length),
        *advice.warn_few_steps(plan.steps, recipe.training),
        *advice.warn_repeats(plan.counts),
        *split.warnings,
    ]
    return plan


def _load(
    recipe: Recipe,
    datasets: Sequence[DatasetSection],
    which: str,
    directory: Callable[[KeyPath], Path],
    progress: Progress,
) -> list[Corpus]:
    """All data sets of one list of the recipe, or one error for all that are wrong."""
    corpora: list[Corpus] = []
    problems: list[Problem] = []
    for index, (dataset, name) in enumerate(zip(datasets, dataset_names(datasets), strict=True)):
        key: KeyPath = ("data", which, index)
        base = directory((*key, "path"))
        try:
            corpus = load_corpus(dataset, name, recipe.data, base=base, key=key, seed=recipe.seed, progress=progress)
            corpora.append(corpus)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError.of(problems)
    return corpora


# ------------------------------------------------------------------------------------------------------ the split


@dataclass
class _Split:
    """Which rows are trained on and which are measured."""

    trained: list[np.ndarray]
    """For each training data set int64, places among its chosen rows."""
    held_out: list[np.ndarray]
    """The same of its validation rows."""
    dropped: list[dict[str, list[int]]]
    """For each training data set: reason -> row ids."""
    duplicates: list[int]
    """For each training data set: rows that say the same as an earlier one, dropped or not."""
    warnings: list[str]


def _split(recipe: Recipe, train: Sequence[Corpus], evaluation: Sequence[Corpus]) -> _Split:
    data = recipe.data
    groups = groups_of([corpus.keys for corpus in (*train, *evaluation)])
    trained_groups, measured_groups = groups[: len(train)], groups[len(train) :]
    names = [corpus.name for corpus in train]
    held_out = [np.empty(0, np.int64) for _ in train]
    if not evaluation:
        held_out = split_validation(trained_groups, names, val_size=data.val_size, seed=recipe.seed)
    measured = np.concatenate([*measured_groups, np.empty(0, np.int64)])
    split = _Split([], held_out, [], [], [])
    for corpus, rows, out, again in zip(train, trained_groups, held_out, repeated(trained_groups), strict=True):
        keep = np.ones(len(rows), bool)
        keep[out] = False
        also_measured = keep & np.isin(rows, measured)
        split.duplicates.append(int((again & keep).sum()))
        dropped: dict[str, list[int]] = {}
        if data.deduplicate:
            for reason, unwanted in ((SAME_AS_VALIDATION, also_measured), (SAME_AS_EARLIER, again & ~also_measured)):
                if (gone := np.flatnonzero(unwanted & keep)).size:
                    dropped[reason] = corpus.row_ids(gone).tolist()
                    keep[gone] = False
        split.trained.append(np.flatnonzero(keep))
        split.dropped.append(dropped)
        split.warnings += advice.warn_duplicates(corpus, again & keep, also_measured & keep)
    if not evaluation and not any(len(out) for out in held_out) and data.val_size:
        split.warnings.append("too few different rows to split any off; there is no validation")
    for index, places in enumerate(split.trained):
        if len(places) == 0:
            what = f"{names[index]} has no row left to train on"
            how = "all of its rows are validation rows or duplicates; remove it"
            raise UserError(what, how=how, key=(*train[index].key, "path"))
    return split


@dataclass(frozen=True)
class _Measured(Sequence[tuple[int, Document]]):
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

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        corpus = self.corpus
        return self.rows[index], document_of(self.jobs[index], corpus.store, corpus.phrasings, corpus.section)


def _encode_measured(
    recipe: Recipe,
    train: Sequence[Corpus],
    evaluation: Sequence[Corpus],
    split: _Split,
    encoder: Encoder,
    progress: Progress,
) -> list[_Measured]:
    """Validation rows, encoded; data sets without any are left out."""
    if evaluation:
        parts = [(corpus, np.arange(len(corpus.chosen))) for corpus in evaluation]
    else:
        parts = [(corpus, out) for corpus, out in zip(train, split.held_out, strict=True) if len(out)]
    measured: list[_Measured] = []
    problems: list[Problem] = []
    for corpus, places in parts:
        positions = corpus.chosen[places]
        if corpus.phrasings is not None:
            jobs = measured_jobs(0, positions, corpus.phrasings, name=corpus.name, seed=recipe.seed)
        else:
            jobs = plain_jobs(0, positions)
        try:
            encoded = encode_jobs(jobs, [corpus], encoder, progress=progress)
        except UserError as error:
            problems += error.problems
            continue
        has_any = np.diff(encoded.first) > 0
        counts = DatasetCounts(corpus.name, rows=corpus.rows_read)
        counts.dropped = _dropped(encoded, jobs, corpus)
        counts.rows_used, counts.examples = int(has_any.sum()), len(encoded.examples)
        counts.tokens = int(encoded.examples.num_tokens.sum(dtype=np.int64))
        counts.target_tokens = int(encoded.examples.num_targets.sum(dtype=np.int64))
        counts.truncated = int((encoded.uncut > recipe.data.max_length)[has_any].sum())
        if not has_any.any():
            if evaluation:
                problems.append(_nothing_to_train(corpus, counts))
            continue
        view = ExampleView(encoded.examples, np.arange(len(encoded.examples)))
        rows = corpus.row_ids(places[has_any]).tolist()
        measured.append(_Measured(corpus.name, corpus, jobs[has_any], rows, view, counts))
    if problems:
        raise UserError.of(problems)
    return measured


# ------------------------------------------------------------------------------------------------------- the draws


@dataclass
class _Drawn:
    """The run's draws, encoded and dealt into steps."""

    encoded: Encoded
    jobs: np.ndarray
    """Every form of every row once."""
    steps: Steps
    epochs: list[float]
    uses: np.ndarray
    """int64 [jobs], how often the run draws each."""


def _draw_run(recipe: Recipe, train: Sequence[Corpus], split: _Split, encoder: Encoder, progress: Progress) -> _Drawn:
    training = recipe.training
    num_steps = training.max_steps
    rows = None if num_steps is None else num_steps * training.global_batch_size + _window(training.global_batch_size)
    while True:
        epochs, complete = _draw_epochs(recipe, train, split, rows)
        flat = np.concatenate(epochs)
        _, first, inverse, uses = np.unique(
            flat.view(np.dtype((np.void, JOB.itemsize))), return_index=True, return_inverse=True, return_counts=True
        )
        jobs = flat[first]
        encoded = encode_jobs(jobs, train, encoder, progress=progress)
        _check_any_target(train, jobs, encoded)
        steps, passed = _deal_steps(recipe, epochs, inverse, encoded.first)
        if num_steps is None or len(steps) >= num_steps or complete:
            break
        assert rows is not None, "only max_steps asks for more"
        rows *= 2
    if num_steps is not None and len(steps) < num_steps:
        what = f"the mixture is used up after {len(steps)} of {num_steps} steps: `repeat` allows no more"
        raise UserError(what, how="raise `repeat`, or lower max_steps", key=("training", "max_steps"))
    if num_steps is not None:
        steps, passed = Steps(steps.order[: steps.bounds[num_steps]], steps.bounds[: num_steps + 1]), passed[:num_steps]
    return _Drawn(encoded, jobs, steps, passed, uses)


def _draw_epochs(
    recipe: Recipe, train: Sequence[Corpus], split: _Split, max_rows: int | None
) -> tuple[list[np.ndarray], bool]:
    """The jobs of each epoch in order: all epochs of the recipe, or as many as give `max_rows` rows; and whether there
    can be no more."""
    sections = recipe.data.train
    sources = [
        Source(corpus.name, len(places), section.weight, section.repeat)
        for corpus, places, section in zip(train, split.trained, sections, strict=True)
    ]
    drawn = [0] * len(sources)
    epochs: list[np.ndarray] = []
    count = 0
    while (len(epochs) < recipe.training.num_train_epochs) if max_rows is None else (count < max_rows):
        epoch = len(epochs)
        draws = draw_epoch(sources, recipe.data.mixing, epoch=epoch, drawn_before=drawn, seed=recipe.seed)
        if len(draws.dataset) == 0:
            if not epochs:
                raise UserError("the mixture draws no row", how="raise epoch_size", key=("data", "mixing"))
            return epochs, True
        jobs = np.empty(len(draws.dataset), JOB)
        for index, (corpus, places) in enumerate(zip(train, split.trained, strict=True)):
            mine = np.flatnonzero(draws.dataset == index)
            drawn[index] += len(mine)
            positions = corpus.chosen[places]
            jobs[mine] = _jobs_of(recipe, index, corpus, positions[draws.position[mine]], positions, epoch)
        if max_rows is not None:
            jobs = jobs[: max_rows - count]
        epochs.append(jobs)
        count += len(jobs)
    return epochs, False


def _jobs_of(
    recipe: Recipe, index: int, corpus: Corpus, positions: np.ndarray, pool: np.ndarray, epoch: int
) -> np.ndarray:
    if corpus.phrasings is None:
        return plain_jobs(index, positions)
    return choose_variants(
        index,
        positions,
        corpus.phrasings,
        corpus.section,
        corpus.store.column("has_rationale").astype(bool)[positions],
        pool,
        name=corpus.name,
        epoch=epoch,
        seed=recipe.seed,
    )


def _deal_steps(
    recipe: Recipe, epochs: Sequence[np.ndarray], inverse: np.ndarray, first: np.ndarray
) -> tuple[Steps, list[float]]:
    """Batches of examples, epoch by epoch; the last one of an epoch may be smaller."""
    size = recipe.training.global_batch_size
    parts: list[np.ndarray] = []
    bounds, passed = [0], []
    jobs_done = 0
    for epoch, jobs in enumerate(epochs):
        numbers = inverse[jobs_done : jobs_done + len(jobs)]
        jobs_done += len(jobs)
        counts = first[numbers + 1] - first[numbers]
        offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        found = np.repeat(first[numbers], counts) + offsets
        # Shuffled once more, so that the pieces of a long row do not fill a batch.
        order = _shuffled(found, _window(size), random_generator(recipe.seed, "examples", epoch))
        parts.append(order)
        for start in range(0, len(order), size):
            bounds.append(bounds[-1] + min(size, len(order) - start))
            passed.append(epoch + min(1.0, (start + size) / len(order)))
    return Steps(np.concatenate(parts), bounds), passed


def _window(batch_size: int) -> int:
    return max(WINDOW, 16 * batch_size)


def _shuffled(found: np.ndarray, window: int, rng: np.random.Generator) -> np.ndarray:
    """Shuffled within windows, so that the beginning does not depend on how much follows."""
    return np.concatenate([rng.permutation(found[start : start + window]) for start in range(0, len(found), window)])


# -------------------------------------------------------------------------------------------------------- counting


def _count(train: Sequence[Corpus], split: _Split, drawn: _Drawn) -> list[DatasetCounts]:
    """What became of every training data set, over the whole run."""
    examples, order = drawn.encoded.examples, drawn.steps.order
    per_dataset = np.bincount(examples.dataset[order], minlength=len(train))
    counts = []
    for index, corpus in enumerate(train):
        mine = drawn.jobs["dataset"] == index
        used = mine & (np.diff(drawn.encoded.first) > 0)
        of_it = order[examples.dataset[order] == index]
        dropped = corpus.dropped | split.dropped[index] | _dropped(drawn.encoded, drawn.jobs, corpus, mine)
        counts.append(
            DatasetCounts(
                corpus.name,
                rows=corpus.rows_read,
                rows_used=len(np.unique(drawn.jobs["position"][used])),
                examples=len(of_it),
                tokens=int(examples.num_tokens[of_it].sum(dtype=np.int64)),
                target_tokens=int(examples.num_targets[of_it].sum(dtype=np.int64)),
                truncated=int(_truncated(drawn.encoded, mine)),
                dropped=dropped,
                share=float(per_dataset[index] / max(1, len(order))),
                epochs=float(drawn.uses[mine].sum() / len(split.trained[index])),
                duplicates=split.duplicates[index],
            )
        )
    return counts


def _truncated(encoded: Encoded, mine: np.ndarray) -> int:
    """Rows of which an example was cut."""
    count = 0
    for job in np.flatnonzero(mine & (encoded.reason < 0) | (mine & (np.diff(encoded.first) > 0))):
        if encoded.uncut[job] == 0:
            continue
        count += any(encoded.examples[i].example.truncated for i in range(encoded.first[job], encoded.first[job + 1]))
    return count


def _dropped(
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


def _check_any_target(train: Sequence[Corpus], jobs: np.ndarray, encoded: Encoded) -> None:
    """Every data set has a token to train on."""
    problems = []
    has_any = np.diff(encoded.first) > 0
    for index, corpus in enumerate(train):
        mine = jobs["dataset"] == index
        if mine.any() and not (mine & has_any).any():
            counts = DatasetCounts(corpus.name, dropped=_dropped(encoded, jobs, corpus, mine))
            problems.append(_nothing_to_train(corpus, counts))
    if problems:
        raise UserError.of(problems)


def _nothing_to_train(corpus: Corpus, counts: DatasetCounts) -> Problem:
    """What to say of a data set without a token to train on: which filter took its rows."""
    reasons = "; ".join(f"{len(rows)} rows: {reason}" for reason, rows in counts.dropped.items())
    too_short = any("max_length" in reason for reason in counts.dropped)
    how = "raise data.max_length" if too_short else "look at `train`, `weight`, empty answers and data.train_on"
    what = f"{counts.name} has no token to train on ({reasons})"
    return Problem(what, how, key=(*corpus.key, "path"))


def _deal_to(
    rank: int, examples: ExampleView, *, world_size: int, max_tokens: int, packed: bool
) -> list[list[EncodedExample]]:
    dealt = deal(examples.num_tokens.tolist(), world_size=world_size, max_tokens=max_tokens, padded=not packed)
    return [[examples[position] for position in micro_batch] for micro_batch in dealt[rank]]
