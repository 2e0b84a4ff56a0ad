"""The whole run before its first step: every row read and encoded, every batch of every epoch drawn."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from ftkit.data.advice import warn_cut, warn_few_steps, warn_validation, warn_weights
from ftkit.data.batches import deal
from ftkit.data.corpus import Corpus, EncodedCorpus, Part, Progress, encode_corpus, load_corpus, nothing_to_train
from ftkit.data.encode import Encoder
from ftkit.data.mixture import draw_epoch, random_generator, split_validation
from ftkit.data.sources import dataset_names
from ftkit.data.types import DatasetCounts, Document, EncodedExample
from ftkit.errors import KeyPath, Problem, UserError
from ftkit.recipe.schema import DatasetSection, MixingSection, Recipe


@dataclass
class Plan:
    """What the loop trains on, step by step, and the rows that it is measured on."""

    examples: list[EncodedExample]
    """All training examples, each once."""
    steps: list[list[int]]
    """The global batch of each optimizer step: indices into `examples`."""
    epoch_of_step: list[float]
    """Epochs that are behind after each step; whole numbers where an epoch ends."""
    targets_per_step: list[int]
    """Target tokens of each global batch: the N that its loss is divided by."""
    dataset_names: list[str]
    """Labels of the training data sets; `EncodedExample.dataset` is an index into them."""
    counts: list[DatasetCounts]
    """Of each training data set: one pass over its training rows."""
    validation: dict[str, list[EncodedExample]]
    """Validation examples by data set; empty where nothing is measured. Where they come from data.eval, their
    `dataset` is 0."""
    validation_rows: dict[str, list[int]]
    """`Row.index` of every validation row that has examples."""
    validation_documents: dict[str, list[tuple[int, Document]]]
    """The same rows as (`Row.index`, document), for evaluation."""
    validation_counts: list[DatasetCounts]
    """Of each data set with validation rows."""
    fingerprint: str = field(init=False)
    """SHA-256 in hex over everything above that the weights depend on; see `fingerprint_until`."""
    warnings: list[str] = field(default_factory=list)
    """What the user should know before the run."""
    _fingerprints: list[str] = field(init=False, repr=False, compare=False)
    """By number of steps. All at once, since every checkpoint asks for its own."""

    def __post_init__(self) -> None:
        self._fingerprints = list(self._running_fingerprints())
        self.fingerprint = self._fingerprints[-1]

    def micro_batches(
        self, step: int, *, rank: int, world_size: int, max_tokens: int, packed: bool
    ) -> list[list[EncodedExample]]:
        """What `rank` runs in optimizer step `step` (from 0), one list a micro-batch, ready for `collate`.

        Every rank gets the same number of micro-batches; an empty one is run as well.
        """
        examples = [self.examples[index] for index in self.steps[step]]
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
        return self._fingerprints[min(step, len(self.steps))]

    def _running_fingerprints(self) -> Iterator[str]:
        digest = hashlib.sha256()
        for name, examples in self.validation.items():
            digest.update(name.encode())
            digest.update(b"".join(_digest(example) for example in examples))
        yield digest.hexdigest()
        digests: dict[int, bytes] = {}
        for batch in self.steps:
            digest.update(len(batch).to_bytes(8, "little"))
            for index in batch:
                if index not in digests:
                    digests[index] = _digest(self.examples[index])
                digest.update(digests[index])
            yield digest.hexdigest()


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
        progress: told how far it is; called for every row.

    Raises:
        FtkitError: a data set is missing, wrong or empty, or has no token to train on (all data sets at once).
    """
    _check_mixing(recipe.data.mixing)
    # 1. Rows -> documents, and which of them are measured and never trained on.
    train = _load(recipe.data.train, "train", directory, recipe.seed, progress)
    evaluation = _load(recipe.data.eval, "eval", directory, recipe.seed, progress)
    names = [corpus.name for corpus in train]
    held_out: list[list[int]] = [[] for _ in train]
    if not evaluation:
        keys = [corpus.row_keys for corpus in train]
        held_out = split_validation(keys, names, val_size=recipe.data.val_size, seed=recipe.seed)
    trained = [
        Part(corpus, sorted(set(range(len(corpus.rows))) - set(positions)), index)
        for index, (corpus, positions) in enumerate(zip(train, held_out, strict=True))
    ]
    split_off = [
        Part(corpus, positions, index)
        for index, (corpus, positions) in enumerate(zip(train, held_out, strict=True))
        if positions
    ]

    # 2. Documents -> examples, each row once.
    encoded = _encode(trained, encoder, progress)
    measured = _encode(split_off, encoder, progress, may_be_empty=True)
    measured += _encode([Part(c, list(range(len(c.rows))), 0) for c in evaluation], encoder, progress)

    # 3. Examples -> the batches of every step.
    examples: list[EncodedExample] = []
    indices: list[list[list[int]]] = []
    for corpus in encoded:
        indices.append([])
        for row in corpus.by_row:
            indices[-1].append(list(range(len(examples), len(examples) + len(row))))
            examples += row
    steps, epochs = _draw_steps(recipe, names, indices)
    targets = [example.example.num_targets for example in examples]

    plan = Plan(
        examples=examples,
        steps=steps,
        epoch_of_step=epochs,
        targets_per_step=[sum(targets[index] for index in step) for step in steps],
        dataset_names=names,
        counts=[corpus.counts for corpus in encoded],
        validation={corpus.counts.name: list(chain(*corpus.by_row)) for corpus in measured},
        validation_rows={corpus.counts.name: [index for index, _ in corpus.documents] for corpus in measured},
        validation_documents={corpus.counts.name: corpus.documents for corpus in measured},
        validation_counts=[corpus.counts for corpus in measured],
    )
    plan.warnings = [
        *warn_cut(encoded, encoder),
        *warn_few_steps(plan.steps, recipe.training),
        *warn_weights(recipe.data),
        *warn_validation(trained, [corpus.part for corpus in measured], recipe.data),
    ]
    return plan


def _load(
    datasets: Sequence[DatasetSection],
    which: str,
    directory: Callable[[KeyPath], Path],
    seed: int,
    progress: Progress,
) -> list[Corpus]:
    """All data sets of one list of the recipe, or one error for all that are wrong."""
    corpora: list[Corpus] = []
    problems: list[Problem] = []
    for index, (dataset, name) in enumerate(zip(datasets, dataset_names(datasets), strict=True)):
        progress(f"reading {name}", index, len(datasets))
        try:
            key = ("data", which, index)
            corpora.append(load_corpus(dataset, name, base=directory((*key, "path")), key=key, seed=seed))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError.of(problems)
    return corpora


def _encode(
    parts: Sequence[Part], encoder: Encoder, progress: Progress, *, may_be_empty: bool = False
) -> list[EncodedCorpus]:
    """The parts that have a token to train on; the others are left out, or all reported in one error."""
    encoded: list[EncodedCorpus] = []
    problems: list[Problem] = []
    for part in parts:
        try:
            corpus = encode_corpus(part, encoder, progress=progress)
        except UserError as error:
            problems += error.problems
            continue
        if corpus.by_row:
            encoded.append(corpus)
        elif not may_be_empty:
            problems.append(nothing_to_train(part, corpus.counts))
    if problems:
        raise UserError.of(problems)
    return encoded


def _draw_steps(
    recipe: Recipe, names: Sequence[str], indices: Sequence[Sequence[Sequence[int]]]
) -> tuple[list[list[int]], list[float]]:
    """The global batches of the run and the epochs behind each; `indices`: [data set][row] -> its examples."""
    training, mixing = recipe.training, recipe.data.mixing
    sizes = [len(rows) for rows in indices]
    weights = [dataset.weight for dataset in recipe.data.train]
    drawn = [0] * len(sizes)
    steps: list[list[int]] = []
    epochs: list[float] = []
    epoch = 0
    while (epoch < training.num_train_epochs) if training.max_steps is None else (len(steps) < training.max_steps):
        draws = draw_epoch(sizes, names, weights, mixing, epoch=epoch, drawn_before=drawn, seed=recipe.seed)
        for draw in draws:
            drawn[draw.dataset] += 1
        found = [index for draw in draws for index in indices[draw.dataset][draw.position]]
        # Shuffled once more, so that the pieces of a long row do not fill a batch.
        order = [found[place] for place in random_generator(recipe.seed, "examples", epoch).permutation(len(found))]
        for start in range(0, len(order), training.global_batch_size):
            steps.append(order[start : start + training.global_batch_size])
            epochs.append(epoch + min(1.0, (start + training.global_batch_size) / len(order)))
        epoch += 1
    return steps[: training.max_steps], epochs[: training.max_steps]


def _deal_to(
    rank: int, examples: Sequence[EncodedExample], *, world_size: int, max_tokens: int, packed: bool
) -> list[list[EncodedExample]]:
    lengths = [encoded.example.num_tokens for encoded in examples]
    dealt = deal(lengths, world_size=world_size, max_tokens=max_tokens, padded=not packed)
    return [[examples[position] for position in micro_batch] for micro_batch in dealt[rank]]


def _digest(encoded: EncodedExample) -> bytes:
    example = encoded.example
    content = example.input_ids.astype("<i4").tobytes() + example.labels.astype("<i4").tobytes()
    return hashlib.sha256(content).digest()


def _check_mixing(mixing: MixingSection) -> None:
    key = ("data", "mixing")
    if mixing.epoch_size is not None and mixing.stopping is not None:
        raise UserError("epoch_size and stopping both say when an epoch ends", how="keep one of them", key=key)
    if mixing.strategy == "concat" and (mixing.epoch_size is not None or mixing.stopping is not None):
        what = "concat takes every row once an epoch, it has no epoch_size or stopping"
        raise UserError(what, how="remove them or set `strategy: weights`", key=key)
