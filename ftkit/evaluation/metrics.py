"""The metrics: what each needs from a model, how it scores one example, how scores become one number.

To add a metric: one function that scores an example, one line in `METRICS`.

Every metric is a ratio of two sums over examples, passed through `finish`: score = finish(sum of values / sum of
weights). That covers means (weight 1) as well as perplexity (weight = tokens), and lets a bootstrap resample any of
them by adding up rows.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Needs = Literal["generation", "options", "likelihood"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What one model did with one example. Only the parts that the task's metrics need are filled in."""

    text: str | None = None
    """Greedy continuation of the prompt."""
    option_log_likelihoods: tuple[float, ...] = ()
    """Log-probability of each option as the whole answer, in nats, in the order of the options."""
    negative_log_likelihood: float = 0.0
    """Of the reference answer (of the whole document, where it is plain text): the sum over its tokens, in nats."""
    num_tokens: int = 0
    """Tokens in that sum."""


@dataclass(frozen=True, slots=True)
class Truth:
    """What an answer is held against."""

    references: tuple[str, ...] = ()
    """Accepted answers; where there are several, the one that scores best counts."""
    options: tuple[str, ...] = ()
    """The answers to choose from."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One way to score a model on a task."""

    needs: Needs
    """What the model has to do: write an answer, rate the options, or rate the reference."""
    score: Callable[[Answer, Truth], tuple[float, float]]
    """One example's (value, weight)."""
    uses_references: bool = True
    """Whether an example without a reference cannot be scored."""
    uses_options: bool = False
    """Whether an example without options cannot be scored."""
    finish: Callable[[Any], Any] = lambda ratio: ratio
    """From the ratio of the sums to the score; works on arrays."""
    lower_is_better: bool = False

    def aggregate(self, values: np.ndarray, weights: np.ndarray) -> float:
        """The score of a set of examples.

        Args:
            values: float64 [n]
            weights: float64 [n]
        """
        return float(self.finish(values.sum() / weights.sum()))


# ---------------------------------------------------------------------------------------------------- scores


def score_rank_accuracy(answer: Answer, truth: Truth) -> tuple[float, float]:
    """1 if the option with the highest log-likelihood is an accepted answer. Of equal options the first one counts.

    The log-likelihood is the sum over the option's tokens, not divided by their number: the probability that the
    model would give exactly this answer.
    """
    chosen = truth.options[int(np.argmax(answer.option_log_likelihoods))]
    return float(_is_accepted(chosen, truth)), 1.0


def score_accuracy(answer: Answer, truth: Truth) -> tuple[float, float]:
    """1 if the option that the written answer names first is an accepted one; see `first_option`."""
    chosen = first_option(answer.text or "", truth.options)
    return float(chosen is not None and _is_accepted(chosen, truth)), 1.0


def score_exact_match(answer: Answer, truth: Truth) -> tuple[float, float]:
    """1 if the written answer is an accepted one, character for character.

    Only white space around the text and the way Unicode composes characters (NFC) are set aside. Case, punctuation
    and inner white space count: for JSON, code or labels they are part of the answer.
    """
    return float(_is_accepted(answer.text or "", truth)), 1.0


def score_token_f1(answer: Answer, truth: Truth) -> tuple[float, float]:
    """Overlap of words with the best-fitting reference; see `token_f1`."""
    return max(token_f1(answer.text or "", reference) for reference in truth.references), 1.0


def score_perplexity(answer: Answer, truth: Truth) -> tuple[float, float]:
    """Negative log-likelihood and number of tokens; perplexity is exp(sum of the one / sum of the other)."""
    del truth
    return answer.negative_log_likelihood, float(answer.num_tokens)


METRICS: dict[str, Metric] = {
    "rank_accuracy": Metric("options", score_rank_accuracy, uses_options=True),
    "exact_match": Metric("generation", score_exact_match),
    "accuracy": Metric("generation", score_accuracy, uses_options=True),
    "token_f1": Metric("generation", score_token_f1),
    "perplexity": Metric("likelihood", score_perplexity, uses_references=False, finish=np.exp, lower_is_better=True),
}
"""Name in a suite -> metric."""


# ---------------------------------------------------------------------------------------------------- text


def normalize_outer(text: str) -> str:
    """Unicode NFC, without white space around it."""
    return unicodedata.normalize("NFC", text).strip()


def _is_accepted(text: str, truth: Truth) -> bool:
    return normalize_outer(text) in {normalize_outer(reference) for reference in truth.references}


def first_option(text: str, options: tuple[str, ...]) -> str | None:
    """The option that occurs first in `text`, whole words only and whatever the case; None if none does.

    Where two options start at the same place ("New York", "New York City") the longer one counts.
    """
    text = normalize_outer(text)
    found: list[tuple[int, int, str]] = []
    for option in options:
        # Not \b: an option may begin or end in punctuation, as "(A)" does.
        match = re.search(rf"(?<!\w){re.escape(normalize_outer(option))}(?!\w)", text, re.IGNORECASE)
        if match is not None:
            found.append((match.start(), -len(option), option))
    return min(found)[2] if found else None


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_words(text: str) -> list[str]:
    """Words of `text` as SQuAD counts them (https://arxiv.org/abs/1606.05250): lower case, without punctuation and
    English articles."""
    text = unicodedata.normalize("NFC", text).lower().translate(_PUNCTUATION)
    return _ARTICLES.sub(" ", text).split()


def token_f1(text: str, reference: str) -> float:
    """Harmonic mean of precision and recall of words, each counted as often as it occurs in both.

    If either side has no words left, 1 where both have none, else 0 (as SQuAD 2.0 does).
    """
    words, reference_words = squad_words(text), squad_words(reference)
    if not words or not reference_words:
        return float(words == reference_words)
    common = (Counter(words) & Counter(reference_words)).total()
    return 2 * common / (len(words) + len(reference_words))
