"""How sure a score is: percentile bootstrap over examples (Efron 1979, https://doi.org/10.1214/aos/1176344552)."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

RESAMPLES = 1000
CONFIDENCE = 0.95
MIN_EXAMPLES = 6
"""Below this no difference is significant: even if all n examples agree in its sign, that happens by chance in
2 * 0.5^n of cases, which is under 5% from 6 on. (A percentile interval of few equal values has no width at all.)"""

_DRAWS_AT_ONCE = 2**22
"""Indices drawn at a time, 32 MiB."""


def resample_scores(
    values: np.ndarray, weights: np.ndarray, finish: Callable[[Any], Any], *, seed: int, resamples: int = RESAMPLES
) -> np.ndarray:
    """The score of `resamples` sets of n examples drawn with replacement: finish(sum of values / sum of weights).

    The draws depend on n and `seed` only: two models on the same examples get the same ones, so that the difference of
    their results, element by element, is a paired bootstrap.

    Args:
        values: float64 [n], n > 0
        weights: float64 [n]
        finish: from the ratio to the score, on arrays.
        seed: of the draws.
        resamples: how many.

    Returns:
        float64 [resamples]
    """
    sums = [(values[draws].sum(axis=1), weights[draws].sum(axis=1)) for draws in _draws(len(values), seed, resamples)]
    return np.asarray(finish(np.concatenate([value / weight for value, weight in sums])), dtype=np.float64)


def percentile_interval(samples: np.ndarray) -> tuple[float, float]:
    """The central 95% of resampled scores."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return float(low), float(high)


def is_significant(interval: tuple[float, float], num_examples: int) -> bool:
    """Whether the interval of a difference excludes 0, on enough examples to say so."""
    return num_examples >= MIN_EXAMPLES and not interval[0] <= 0 <= interval[1]


def _draws(count: int, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """int64 [some, count] each, `resamples` rows in all."""
    rng = np.random.default_rng(seed)
    rows = max(1, _DRAWS_AT_ONCE // count)
    for start in range(0, resamples, rows):
        yield rng.integers(count, size=(min(rows, resamples - start), count))
