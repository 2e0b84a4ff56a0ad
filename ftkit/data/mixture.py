"""Which rows are used, and in which order: subset, validation split, draws of an epoch.

Every choice is a pure function of the seed and of names, so that one more process, data set or epoch changes no
other choice.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ftkit.errors import UserError
from ftkit.recipe.schema import MixingSection

MAX_VALIDATION_ROWS = 500
"""More rows hardly narrow an estimate of the loss, and every evaluation pays for them."""

_CHUNK = 4096
"""Fewest draws made at once where their number is not known before."""


class Draw(NamedTuple):
    """One row of an epoch."""

    dataset: int
    """Index into the mixture's data sets."""
    position: int
    """Place among the data set's training rows, from 0."""


def random_generator(seed: int, *names: object) -> np.random.Generator:
    """The stream of random numbers for one purpose: independent of the streams for other names."""
    digest = hashlib.sha256("\0".join(str(name) for name in names).encode()).digest()
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *np.frombuffer(digest, dtype="<u4")])))


def choose_subset(num_rows: int, max_samples: int | None, *, seed: int, name: str) -> list[int]:
    """Positions of at most `max_samples` rows, in their order; whatever the other data sets are."""
    if max_samples is None or num_rows <= max_samples:
        return list(range(num_rows))
    chosen = random_generator(seed, "subset", name).permutation(num_rows)[:max_samples]
    return sorted(int(position) for position in chosen)


# ----------------------------------------------------------------------------------------------- validation split


def row_key(fields: Mapping[str, Any], columns: Sequence[str]) -> bytes:
    """Equal for rows whose texts in `columns` are equal up to case and white space."""
    texts = "\0".join(text for column in columns for text in _texts(fields.get(column)))
    return hashlib.blake2b(texts.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def split_validation(
    keys: Sequence[Sequence[bytes]], names: Sequence[str], *, val_size: float | int, seed: int
) -> list[list[int]]:
    """Choose the validation rows of every data set.

    Each gives its share. Rows with one key, of one data set or several, stay on one side; every data set keeps a row to
    train on; together they are at most `MAX_VALIDATION_ROWS`, and at least one where rows allow.

    Args:
        keys: for each data set the `row_key` of its rows.
        names: the data sets' labels.
        val_size: a share of the rows (float below 1) or their number (int); 0 chooses none.
        seed: the recipe's.

    Returns:
        For each data set the positions of its validation rows, ascending.

    Raises:
        UserError: the number leaves no row to train on.
    """
    sizes = [len(rows) for rows in keys]
    wanted = _wanted(val_size, sum(sizes))
    quotas = _quotas(wanted, sizes)
    groups: dict[bytes, list[Draw]] = {}
    for dataset, rows in enumerate(keys):
        for position, row in enumerate(rows):
            groups.setdefault(row, []).append(Draw(dataset, position))
    chosen: list[set[int]] = [set() for _ in keys]
    left = list(quotas)
    for dataset, rows in enumerate(keys):
        for position in random_generator(seed, "split", names[dataset]).permutation(len(rows)):
            if left[dataset] <= 0:
                break
            group = groups[rows[position]]
            needed = np.bincount([draw.dataset for draw in group], minlength=len(keys))
            if position not in chosen[dataset] and all(n <= free for n, free in zip(needed, left, strict=True)):
                for draw in group:
                    chosen[draw.dataset].add(draw.position)
                    left[draw.dataset] -= 1
    if wanted > 0 and not any(chosen):
        for draw in _smallest_group(groups, sizes):
            chosen[draw.dataset].add(draw.position)
    return [sorted(positions) for positions in chosen]


def _wanted(val_size: float | int, total: int) -> int:
    if isinstance(val_size, int) and val_size >= total > 0:
        what = f"{val_size} validation rows leave none of {total} rows to train on"
        raise UserError(what, how="lower it", key=("data", "val_size"))
    wanted = val_size if isinstance(val_size, int) else max(round(val_size * total), int(val_size > 0))
    return max(0, min(wanted, MAX_VALIDATION_ROWS, total - 1))


def _quotas(wanted: int, sizes: Sequence[int]) -> list[int]:
    """Shares of `wanted` in proportion to the sizes, by largest remainder; each leaves a row to train on."""
    total = max(sum(sizes), 1)
    shares = [wanted * size / total for size in sizes]
    quotas = [int(share) for share in shares]
    by_remainder = sorted(range(len(sizes)), key=lambda index: (quotas[index] - shares[index], index))
    for index in by_remainder[: wanted - sum(quotas)]:
        quotas[index] += 1
    return [min(quota, max(size - 1, 0)) for quota, size in zip(quotas, sizes, strict=True)]


def _smallest_group(groups: Mapping[bytes, list[Draw]], sizes: Sequence[int]) -> list[Draw]:
    """The fewest equal rows that leave every data set a row to train on; empty where there are none."""
    for group in sorted(groups.values(), key=len):
        taken = np.bincount([draw.dataset for draw in group], minlength=len(sizes))
        if len(group) <= MAX_VALIDATION_ROWS and all(taken < np.maximum(sizes, 1)):
            return group
    return []


def _texts(value: Any) -> Iterator[str]:
    """The value's texts in order, normalised; empty ones are left out, so that null, "" and [] are the same."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif value is not None and (text := " ".join(str(value).split()).casefold()):
        yield text


# --------------------------------------------------------------------------------------------------------- draws


def draw_epoch(
    sizes: Sequence[int],
    names: Sequence[str],
    weights: Sequence[float],
    mixing: MixingSection,
    *,
    epoch: int,
    drawn_before: Sequence[int],
    seed: int,
) -> list[Draw]:
    """The rows of one epoch, in order.

    concat: every row once, shuffled over the whole mixture, each epoch in another order. weights: a data set is drawn
    for every place at the rate of its weight, and gives the next row of its own shuffled order, shuffled again
    whenever it is through; the next epoch goes on where this one stopped.

    Args:
        sizes: training rows of each data set.
        names: the data sets' labels; with the seed they decide each one's own order.
        weights: rates, of any sum.
        mixing: the recipe's section.
        epoch: number of the epoch, from 0.
        drawn_before: rows drawn from each data set in the epochs before this one.
        seed: the recipe's.
    """
    rng = random_generator(seed, "epoch", epoch)
    if mixing.strategy == "concat":
        rows = [Draw(dataset, position) for dataset, size in enumerate(sizes) for position in range(size)]
        return [rows[index] for index in rng.permutation(len(rows))]
    order = _draw_datasets(rng, np.asarray(sizes), np.asarray(weights, dtype=np.float64), mixing)
    walks = [_walk(size, name, start, seed) for size, name, start in zip(sizes, names, drawn_before, strict=True)]
    return [Draw(int(dataset), next(walks[dataset])) for dataset in order]


def _draw_datasets(
    rng: np.random.Generator, sizes: np.ndarray, weights: np.ndarray, mixing: MixingSection
) -> np.ndarray:
    """The data set of every place of an epoch, independent draws at the rates of the weights; int64 [places]."""
    bounds = np.cumsum(weights) / weights.sum()
    bounds[-1] = 1.0
    if mixing.stopping is None:
        return np.searchsorted(bounds, rng.random(mixing.epoch_size or int(sizes.sum())), side="right")
    order = np.empty(0, dtype=np.int64)
    while True:
        more = rng.random(max(_CHUNK, len(order)))
        order = np.concatenate([order, np.searchsorted(bounds, more, side="right")])
        # Place (from 1) at which each data set has been seen once; none yet: beyond the end.
        through = [
            int(np.flatnonzero(order == dataset)[size - 1]) + 1 if (order == dataset).sum() >= size else len(order) + 1
            for dataset, size in enumerate(sizes)
        ]
        end = min(through) if mixing.stopping == "first_exhausted" else max(through)
        if end <= len(order):
            return order[:end]


def _walk(size: int, name: str, start: int, seed: int) -> Iterator[int]:
    """The data set's rows from its `start`-th draw on: one shuffled order after another, without end."""
    turn, position = divmod(start, size)
    while True:
        order = random_generator(seed, "walk", name, turn).permutation(size)
        for index in order[position:]:
            yield int(index)
        turn, position = turn + 1, 0
