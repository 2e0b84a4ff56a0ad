"""The rows of every epoch, the form that each is asked in, and the batches that they make."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ftkit.data.corpus import Corpus, Progress
from ftkit.data.counting import check_any_target
from ftkit.data.encode import Encoder
from ftkit.data.encoding import Encoded, encode_jobs
from ftkit.data.mixture import Source, draw_epoch, random_generator
from ftkit.data.split import Split
from ftkit.data.steps import Steps
from ftkit.data.variants import choose_variants, job_type, most_shots, plain_jobs
from ftkit.errors import UserError
from ftkit.recipe.schema import Recipe

WINDOW = 1024
"""Examples, at least, within which an epoch's examples are shuffled once more."""


@dataclass
class Drawn:
    """The run's draws, encoded and dealt into steps."""

    encoded: Encoded
    jobs: np.ndarray
    """Every form of every row once."""
    steps: Steps
    epochs: list[float]
    """That are behind after each step."""


@dataclass
class _Epoch:
    """The draws of an epoch."""

    jobs: np.ndarray
    """In order; all of them, or as many as are needed."""
    num_rows: int
    """Of the whole epoch."""

    @property
    def whole(self) -> bool:
        return len(self.jobs) == self.num_rows


def draw_run(recipe: Recipe, train: Sequence[Corpus], split: Split, encoder: Encoder, progress: Progress) -> Drawn:
    """Draw, phrase and encode what the run trains on, and deal it into steps.

    Where `max_steps` ends the run inside an epoch, no more rows are encoded than it needs.

    Raises:
        UserError: a data set has no token to train on, the template refuses rows, or the mixture is used up.
    """
    training = recipe.training
    num_steps = training.max_steps
    rows = None if num_steps is None else num_steps * training.global_batch_size + _window(training.global_batch_size)
    while True:
        epochs, exhausted = _draw_epochs(recipe, train, split, rows)
        # Without `dtype`, numpy would turn the numbers round, and jobs sorted as bytes would lie all over the store.
        flat = np.concatenate([epoch.jobs for epoch in epochs], dtype=epochs[0].jobs.dtype)
        as_bytes = flat.view(np.dtype((np.void, flat.dtype.itemsize)))
        _, first, inverse = np.unique(as_bytes, return_index=True, return_inverse=True)
        jobs = flat[first]
        encoded = encode_jobs(jobs, train, encoder, skip_bad=recipe.data.on_bad_row == "skip", progress=progress)
        check_any_target(train, jobs, encoded)
        steps, passed = _deal_steps(recipe, epochs, inverse, encoded.first)
        if num_steps is None or len(steps) >= num_steps or exhausted:
            break
        assert rows is not None, "only max_steps asks for more"
        rows *= 2
    if num_steps is not None and len(steps) < num_steps:
        what = f"the mixture is used up after {len(steps)} of {num_steps} steps: `repeat` allows no more"
        raise UserError(what, how="raise `repeat`, or lower max_steps", key=("training", "max_steps"))
    if num_steps is not None:
        steps, passed = Steps(steps.order[: steps.bounds[num_steps]], steps.bounds[: num_steps + 1]), passed[:num_steps]
    return Drawn(encoded, jobs, steps, passed)


def _draw_epochs(
    recipe: Recipe, train: Sequence[Corpus], split: Split, max_rows: int | None
) -> tuple[list[_Epoch], bool]:
    """All epochs of the recipe, or as many as give `max_rows` rows; and whether there can be no more."""
    sources = [
        Source(corpus.name, len(places), corpus.section.weight, corpus.section.repeat)
        for corpus, places in zip(train, split.trained, strict=True)
    ]
    shots = most_shots(corpus.section for corpus in train if corpus.phrasings is not None)
    drawn = [0] * len(sources)
    epochs: list[_Epoch] = []
    count = 0
    while (len(epochs) < recipe.training.num_train_epochs) if max_rows is None else (count < max_rows):
        epoch = len(epochs)
        draws = draw_epoch(sources, recipe.data.mixing, epoch=epoch, drawn_before=drawn, seed=recipe.seed)
        if len(draws.dataset) == 0:
            if not epochs:
                raise UserError("the mixture draws no row", how="raise epoch_size", key=("data", "mixing"))
            return epochs, True
        jobs = np.empty(len(draws.dataset), job_type(shots))
        for index, (corpus, places) in enumerate(zip(train, split.trained, strict=True)):
            mine = np.flatnonzero(draws.dataset == index)
            drawn[index] += len(mine)
            positions = corpus.chosen[places]
            jobs[mine] = _jobs_of(recipe, index, corpus, positions[draws.position[mine]], positions, shots, epoch)
        epochs.append(_Epoch(jobs if max_rows is None else jobs[: max_rows - count], len(jobs)))
        count += len(epochs[-1].jobs)
    return epochs, False


def _jobs_of(
    recipe: Recipe, index: int, corpus: Corpus, positions: np.ndarray, pool: np.ndarray, shots: int, epoch: int
) -> np.ndarray:
    if corpus.phrasings is None:
        return plain_jobs(index, positions, shots)
    return choose_variants(
        index,
        positions,
        corpus.phrasings,
        corpus.section,
        corpus.store.column("has_rationale").astype(bool)[positions],
        pool,
        shots=shots,
        name=corpus.name,
        epoch=epoch,
        seed=recipe.seed,
    )


def _deal_steps(
    recipe: Recipe, epochs: Sequence[_Epoch], inverse: np.ndarray, first: np.ndarray
) -> tuple[Steps, list[float]]:
    """Batches of examples, epoch by epoch; the last one of an epoch may be smaller.

    Where the last epoch was broken off, only what does not depend on its rest is dealt.
    """
    size = recipe.training.global_batch_size
    parts: list[np.ndarray] = []
    bounds, passed = [0], []
    jobs_done = 0
    for number, epoch in enumerate(epochs):
        numbers = inverse[jobs_done : jobs_done + len(epoch.jobs)]
        jobs_done += len(epoch.jobs)
        counts = first[numbers + 1] - first[numbers]
        offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        found = np.repeat(first[numbers], counts) + offsets
        # Shuffled once more, so that the pieces of a long row do not fill a batch.
        order = _shuffled(found, _window(size), random_generator(recipe.seed, "examples", number))
        total = max(1.0, len(order) * epoch.num_rows / len(epoch.jobs))
        if not epoch.whole:
            order = order[: len(order) // _window(size) * _window(size) // size * size]
        parts.append(order)
        for start in range(0, len(order), size):
            bounds.append(bounds[-1] + min(size, len(order) - start))
            passed.append(number + min(1.0, (start + size) / total))
    return Steps(np.concatenate(parts), bounds), passed


def _window(batch_size: int) -> int:
    return max(WINDOW, 16 * batch_size)


def _shuffled(found: np.ndarray, window: int, rng: np.random.Generator) -> np.ndarray:
    """Shuffled within windows, so that the beginning does not depend on how much follows."""
    return np.concatenate([rng.permutation(found[start : start + window]) for start in range(0, len(found), window)])
