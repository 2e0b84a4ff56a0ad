"""Which rows are used, and in which order: subset, validation split, draws of an epoch.

Every choice is a pure function of the seed and of names, so that one more process, data set or epoch changes no
other choice.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ftkit.errors import UserError
from ftkit.recipe.schema import DEFAULT_TEMPERATURE, MixingSection

MAX_VALIDATION_ROWS = 500
"""More rows hardly narrow an estimate of the loss, and every evaluation pays for them."""

_CHUNK = 4096
"""Fewest draws made at once where their number is not known before."""


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


def split_validation(
    groups: Sequence[np.ndarray], names: Sequence[str], *, val_size: float | int, seed: int
) -> list[np.ndarray]:
    """Choose the validation rows of every data set.

    Each gives its share. Rows of one group (those that say the same), of one data set or several, stay on one side;
    every data set keeps a row to train on; together they are at most `MAX_VALIDATION_ROWS`, and at least one where rows
    allow.

    Args:
        groups: for each data set its rows' numbers from `groups_of`.
        names: the data sets' labels.
        val_size: a share of the rows (float below 1) or their number (int); 0 chooses none.
        seed: the recipe's.

    Returns:
        For each data set the places of its validation rows, int64, ascending.

    Raises:
        UserError: the number leaves no row to train on.
    """
    sizes = [len(rows) for rows in groups]
    wanted = _wanted(val_size, sum(sizes))
    left = np.array(_quotas(wanted, sizes))
    members = _Members(groups)
    chosen: list[set[int]] = [set() for _ in groups]
    for dataset, rows in enumerate(groups):
        for place in random_generator(seed, "split", names[dataset]).permutation(len(rows)):
            if left[dataset] <= 0:
                break
            if int(place) in chosen[dataset]:
                continue
            datasets, places = members.of(int(rows[place]))
            needed = np.bincount(datasets, minlength=len(groups))
            if (needed <= left).all():
                left -= needed
                for member, at in zip(datasets.tolist(), places.tolist(), strict=True):
                    chosen[member].add(at)
    if wanted > 0 and not any(chosen):
        for member, at in members.smallest(sizes):
            chosen[member].add(at)
    return [np.array(sorted(places), np.int64) for places in chosen]


class _Members:
    """Which rows a group has."""

    def __init__(self, groups: Sequence[np.ndarray]) -> None:
        self._groups = np.concatenate([*groups, np.empty(0, np.int64)]).astype(np.int64)
        self._starts = np.cumsum([0, *(len(rows) for rows in groups)])
        self._order = np.argsort(self._groups, kind="stable")
        self._sorted = self._groups[self._order]

    def of(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """Data set and place of each row."""
        first, last = np.searchsorted(self._sorted, [group, group + 1])
        rows = self._order[first:last]
        datasets = np.searchsorted(self._starts, rows, side="right") - 1
        return datasets, rows - self._starts[datasets]

    def smallest(self, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """The fewest equal rows that leave every data set a row to train on; empty where there are none."""
        groups, counts = np.unique(self._groups, return_counts=True)
        for group in groups[np.argsort(counts, kind="stable")].tolist():
            datasets, places = self.of(group)
            taken = np.bincount(datasets, minlength=len(sizes))
            if len(places) <= MAX_VALIDATION_ROWS and all(taken < np.maximum(sizes, 1)):
                return list(zip(datasets.tolist(), places.tolist(), strict=True))
        return []


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


# --------------------------------------------------------------------------------------------------------- draws


class Draws(NamedTuple):
    """The rows of one epoch, in order."""

    dataset: np.ndarray
    """int64 [N], indices into the mixture's data sets."""
    position: np.ndarray
    """int64 [N], each one's place among its data set's training rows, from 0."""


@dataclass(frozen=True, slots=True)
class Source:
    """What mixing needs to know of a data set."""

    name: str
    """Its label; with the seed it decides the order of its rows."""
    size: int
    """Its training rows."""
    weight: float = 1.0
    repeat: int | None = None
    """How often its rows may be used; None: as often as the mixture wants."""


def mixing_rates(sources: Sequence[Source], mixing: MixingSection) -> np.ndarray:
    """Rows of each data set in an epoch, as the strategy wants them before rounding; float64 [data sets].

    concat: all of them. proportional: min(n, maximum), examples-proportional mixing with a cap (Raffel et al. 2020,
    https://arxiv.org/abs/1910.10683, section 3.5.2; FLAN, https://arxiv.org/abs/2109.01652, section 2.1).
    temperature: shares proportional to min(n, maximum)^(1 / temperature). weights: shares proportional to the weights.
    Except for concat, each data set's `weight` multiplies its rate. `epoch_size` sets the sum; without it an epoch is
    the sum of the capped sizes for proportional, and of all sizes elsewhere.
    """
    sizes = np.array([source.size for source in sources], np.float64)
    if mixing.strategy == "concat":
        return sizes
    weights = np.array([source.weight for source in sources], np.float64)
    capped = np.minimum(sizes, np.inf if mixing.cap is None else mixing.cap)
    if mixing.strategy == "weights":
        rates, total = weights, sizes.sum()
    elif mixing.strategy == "proportional":
        rates, total = weights * capped, (weights * capped).sum()
    else:
        temperature = mixing.temperature or DEFAULT_TEMPERATURE
        rates, total = weights * capped ** (1.0 / temperature), sizes.sum()
    return rates / rates.sum() * (mixing.epoch_size or total)


def draw_epoch(
    sources: Sequence[Source], mixing: MixingSection, *, epoch: int, drawn_before: Sequence[int], seed: int
) -> Draws:
    """The rows of one epoch, in order.

    Each data set gives the next rows of its own shuffled order, shuffled again whenever it is through; the next epoch
    goes on where this one stopped. How many is its rate, a fraction left over rounded up or down at random so that the
    epoch's size is kept (systematic sampling). With `stopping` the data set of every place is drawn at the rates until
    the first (or the last) one is through.

    Args:
        sources: the data sets.
        mixing: the recipe's section.
        epoch: number of the epoch, from 0.
        drawn_before: rows drawn from each data set in the epochs before this one.
        seed: the recipe's.
    """
    rng = random_generator(seed, "epoch", epoch)
    rates = mixing_rates(sources, mixing)
    if mixing.stopping is not None:
        order = _draw_until(rng, np.array([source.size for source in sources]), rates, mixing.stopping)
    else:
        # A shift of all bounds by the same random part of a row: counts add up, and are right on average.
        ends = np.cumsum(rates)
        ends[-1] = round(ends[-1])
        bounds = np.floor(np.concatenate([[0.0], ends]) + (rng.random() if _has_fractions(rates) else 0.5))
        order = rng.permutation(np.repeat(np.arange(len(sources)), np.diff(bounds).astype(np.int64)))
    order = _without_used_up(order, sources, drawn_before)
    position = np.empty(len(order), np.int64)
    for index, source in enumerate(sources):
        places = np.flatnonzero(order == index)
        position[places] = _walk(source, drawn_before[index], len(places), seed)
    return Draws(order, position)


def _has_fractions(rates: np.ndarray) -> bool:
    return bool(np.abs(rates - np.round(rates)).max() > 1e-6)


def _draw_until(rng: np.random.Generator, sizes: np.ndarray, rates: np.ndarray, stopping: str) -> np.ndarray:
    """The data set of every place, independent draws at the rates, until one or all have been seen once."""
    bounds = np.cumsum(rates) / rates.sum()
    bounds[-1] = 1.0
    order = np.empty(0, dtype=np.int64)
    while True:
        more = rng.random(max(_CHUNK, len(order)))
        order = np.concatenate([order, np.searchsorted(bounds, more, side="right")])
        # Place (from 1) at which each data set has been seen once; none yet: beyond the end.
        through = [
            int(np.flatnonzero(order == dataset)[size - 1]) + 1 if (order == dataset).sum() >= size else len(order) + 1
            for dataset, size in enumerate(sizes)
        ]
        end = min(through) if stopping == "first_exhausted" else max(through)
        if end <= len(order):
            return order[:end]


def _without_used_up(order: np.ndarray, sources: Sequence[Source], drawn_before: Sequence[int]) -> np.ndarray:
    """Without the draws of data sets whose rows have been used as often as they may be; the epoch gets shorter."""
    keep = np.ones(len(order), bool)
    for index, source in enumerate(sources):
        if source.repeat is not None:
            left = max(0, source.repeat * source.size - drawn_before[index])
            keep[np.flatnonzero(order == index)[left:]] = False
    return order[keep]


def _walk(source: Source, start: int, count: int, seed: int) -> np.ndarray:
    """`count` of the data set's rows from its `start`-th draw on: one shuffled order after another; int64 [count]."""
    parts, needed = [np.empty(0, np.int64)], count
    turn, at = divmod(start, source.size)
    while needed > 0:
        order = random_generator(seed, "walk", source.name, turn).permutation(source.size)[at : at + needed]
        parts.append(order)
        needed, turn, at = needed - len(order), turn + 1, 0
    return np.concatenate(parts)
