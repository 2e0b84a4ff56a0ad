"""Every metric on answers whose score is known."""

import math

import numpy as np
import pytest

from ftkit.evaluation.metrics import METRICS, Answer, Truth, first_option, token_f1

SENTIMENT = ("negative", "positive")


def score(name: str, answer: Answer, *references: str, options: tuple[str, ...] = ()) -> float:
    return METRICS[name].score(answer, Truth(references, options))[0]


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("positive", "positive", 1),
        ("  positive\n", "positive", 1),
        ("Positive", "positive", 0),
        ("positive.", "positive", 0),
        ('{"a": 1}', '{"a":1}', 0),
        ("cafe\u0301", "caf\u00e9", 1),  # the same letters, composed otherwise
        ("", "positive", 0),
    ],
)
def test_exact_match(answer: str, reference: str, expected: float) -> None:
    assert score("exact_match", Answer(text=answer), reference) == expected


def test_the_best_of_several_references_counts() -> None:
    assert score("exact_match", Answer(text="b"), "a", "b") == 1
    assert score("token_f1", Answer(text="red car"), "blue bike", "red bike") == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The cat sat.", "a cat sat", 1),  # articles, case and punctuation are set aside
        ("cat dog", "cat", 2 / 3),  # precision 1/2, recall 1
        ("cat cat", "cat", 2 / 3),  # a word counts as often as it occurs in both
        ("dog", "cat", 0),
        ("", "cat", 0),
        ("the", "a", 1),  # nothing left on either side
        ("Der Hund läuft", "der hund schläft", 2 / 3),
    ],
)
def test_token_f1(answer: str, reference: str, expected: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("I think it is Positive, not negative.", SENTIMENT, "positive"),
        ("unknowable piano", ("no", "yes"), None),  # whole words only
        ("(B) because (A) is wrong", ("(A)", "(B)"), "(B)"),
        ("New York City", ("New York", "New York City"), "New York City"),
        ("", SENTIMENT, None),
    ],
)
def test_first_option(text: str, options: tuple[str, ...], expected: str | None) -> None:
    assert first_option(text, options) == expected


def test_accuracy_needs_the_right_option() -> None:
    assert score("accuracy", Answer(text="It is positive."), "positive", options=SENTIMENT) == 1
    assert score("accuracy", Answer(text="It is positive."), "negative", options=SENTIMENT) == 0
    assert score("accuracy", Answer(text="Hard to say."), "negative", options=SENTIMENT) == 0


def test_rank_accuracy_takes_the_most_probable_option_and_the_first_of_equals() -> None:
    assert score("rank_accuracy", Answer(option_log_likelihoods=(-3.0, -2.0)), "positive", options=SENTIMENT) == 1
    assert score("rank_accuracy", Answer(option_log_likelihoods=(-2.0, -3.0)), "positive", options=SENTIMENT) == 0
    assert score("rank_accuracy", Answer(option_log_likelihoods=(-2.0, -2.0)), "negative", options=SENTIMENT) == 1


def test_perplexity_weighs_tokens_not_examples() -> None:
    metric = METRICS["perplexity"]
    answers = [Answer(negative_log_likelihood=2.0, num_tokens=1), Answer(negative_log_likelihood=3.0, num_tokens=9)]
    values, weights = np.array([metric.score(answer, Truth()) for answer in answers]).T
    assert metric.aggregate(values, weights) == pytest.approx(math.exp(5.0 / 10))


def test_every_metric_scores_any_answer_and_the_result_does_not_depend_on_the_order() -> None:
    rng = np.random.default_rng(0)
    truths = [Truth((option,), SENTIMENT) for option in SENTIMENT * 5]
    answers = [
        Answer(
            text=str(rng.choice(["positive", "negative thing", ""])),
            option_log_likelihoods=tuple(rng.normal(size=2)),
            negative_log_likelihood=float(rng.random()),
            num_tokens=int(rng.integers(1, 9)),
        )
        for _ in truths
    ]
    for metric in METRICS.values():
        values, weights = np.array([metric.score(a, t) for a, t in zip(answers, truths, strict=True)]).T
        order = rng.permutation(len(truths))
        shuffled = metric.aggregate(values[order], weights[order])
        assert metric.aggregate(values, weights) == pytest.approx(shuffled)
        assert math.isfinite(shuffled)
