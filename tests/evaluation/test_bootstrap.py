"""Intervals: they cover the truth about as often as they say, and pairing makes them narrower."""

import numpy as np
import pytest

from ftkit.evaluation.bootstrap import is_significant, percentile_interval, resample_scores
from ftkit.evaluation.metrics import METRICS


def mean(ratio: np.ndarray) -> np.ndarray:
    return ratio


def interval(values: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    return percentile_interval(resample_scores(values, np.ones(len(values)), mean, seed=seed))


def test_95_percent_intervals_cover_the_mean_about_95_percent_of_the_time() -> None:
    rng = np.random.default_rng(0)
    covered = []
    for trial in range(300):
        low, high = interval(rng.normal(3.0, 2.0, size=80), seed=trial)
        covered.append(low <= 3.0 <= high)
    assert 0.90 <= np.mean(covered) <= 0.98


def test_the_width_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(1).random(400)
    low, high = interval(values)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert low < values.mean() < high


def test_it_depends_on_nothing_but_values_and_seed() -> None:
    values = np.random.default_rng(2).random(50)
    assert interval(values, seed=7) == interval(values, seed=7)
    assert interval(values, seed=7) != interval(values, seed=8)


def test_many_examples_are_drawn_in_pieces() -> None:
    values = np.random.default_rng(3).random(20_000)  # 1,000 resamples of these do not fit into one piece
    samples = resample_scores(values, np.ones(len(values)), mean, seed=0)
    assert samples.shape == (1000,)
    assert samples.std() == pytest.approx(values.std() / np.sqrt(len(values)), rel=0.15)
    assert len(np.unique(samples)) == 1000


def test_pairing_narrows_the_interval_of_a_difference() -> None:
    rng = np.random.default_rng(4)
    difficulty = rng.normal(size=200)  # shared by both models
    base, tuned = difficulty + rng.normal(scale=0.1, size=200), difficulty + 0.1 + rng.normal(scale=0.1, size=200)
    paired = percentile_interval(
        resample_scores(tuned, np.ones(200), mean, seed=0) - resample_scores(base, np.ones(200), mean, seed=0)
    )
    unpaired = percentile_interval(
        resample_scores(tuned, np.ones(200), mean, seed=0) - resample_scores(base, np.ones(200), mean, seed=1)
    )
    assert (paired[1] - paired[0]) < 0.3 * (unpaired[1] - unpaired[0])
    assert is_significant(paired, 200)
    assert not is_significant(unpaired, 200)


def test_perplexity_resamples_both_sums() -> None:
    metric = METRICS["perplexity"]
    tokens = np.array([1.0, 5.0, 50.0] * 20)
    samples = resample_scores(0.7 * tokens, tokens, metric.finish, seed=0)
    assert samples == pytest.approx(np.exp(0.7))  # every example has the same loss a token


@pytest.mark.parametrize(
    ("bounds", "count", "expected"),
    [
        ((0.1, 0.3), 50, True),
        ((-0.3, -0.1), 50, True),
        ((-0.1, 0.3), 50, False),
        ((0.0, 0.3), 50, False),
        ((1, 1), 5, False),
    ],
)
def test_significant_means_that_the_interval_excludes_zero(
    bounds: tuple[float, float], count: int, expected: bool
) -> None:
    assert is_significant(bounds, count) is expected
