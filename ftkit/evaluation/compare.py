"""Asks several models the same and compares their answers."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from transformers import PreTrainedModel

from ftkit.console import Console
from ftkit.data.types import Example, Text
from ftkit.evaluation.bootstrap import is_significant, percentile_interval, resample_scores
from ftkit.evaluation.generation import cached_tokens, generate
from ftkit.evaluation.items import Item, Task
from ftkit.evaluation.likelihood import Likelihoods, score_targets
from ftkit.evaluation.metrics import METRICS, Answer, Metric
from ftkit.evaluation.prompts import Prompts
from ftkit.evaluation.report import Comparison, Report, Result, Usage
from ftkit.models.attention_prompts import virtual_tokens

ANSWER_MARGIN, MAX_ANSWER = 16, 512
"""Tokens an answer may have by default: so many more than the longest accepted answer, at most so many."""
MAX_TOKENS = 4096
"""Tokens of a batch, padding included."""


@dataclass(frozen=True)
class Contestant:
    """A model that takes part."""

    label: str
    """In tables and results; each contestant's own."""
    model: PreTrainedModel
    """In eval mode, with an attention implementation that takes padded batches."""
    prompts: Prompts
    """How it is asked: for all contestants by the same template, each with its own tokenizer."""


@dataclass(frozen=True)
class _Scores:
    """One contestant's examples of one task and metric."""

    metric: Metric
    values: np.ndarray
    weights: np.ndarray
    items: tuple[int, ...]
    """Positions of the examples among the task's items."""
    seed: int

    @property
    def score(self) -> float:
        return self.metric.aggregate(self.values, self.weights)

    def resampled(self) -> np.ndarray:
        return resample_scores(self.values, self.weights, self.metric.finish, seed=self.seed)


def evaluate_models(
    contestants: Sequence[Contestant],
    tasks: Sequence[Task],
    *,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
    console: Console | None = None,
) -> Report:
    """Score every contestant on every task, and compare the first one with each of the others.

    Args:
        contestants: the tuned model first, then what it is compared with.
        tasks: names differ.
        seed: of the bootstrap; the models do nothing at random.
        max_tokens: tokens a batch may hold, padding and generated ones included.
        console: shows progress.

    Raises:
        UserError: the chat template cannot render an item; names its row.
        NonFiniteError: a model's logits are not finite.
    """
    labels = [contestant.label for contestant in contestants]
    assert len(set(labels)) == len(labels), "labels differ"
    answers: dict[str, dict[str, list[Answer]]] = {}
    usage, notes = Usage(), []
    for contestant in contestants:
        asker = _Asker(contestant, max_tokens, console or Console(quiet=True))
        assert not contestant.model.training, "a model is evaluated in eval mode"
        answers[contestant.label] = {task.name: asker.answer(task) for task in tasks}
        usage = Usage(usage.tokens_run + asker.tokens_run, usage.tokens_generated + asker.tokens_generated)
        notes += asker.notes

    results, comparisons = [], []
    for task in tasks:
        for name in task.metrics:
            scores = {label: _scores(name, task, answers[label][task.name], seed) for label in labels}
            samples = {label: score.resampled() for label, score in scores.items() if score.items}
            for label, sample in samples.items():
                score, interval = scores[label].score, percentile_interval(sample)
                n = len(scores[label].items)
                results.append(Result(label, task.name, task.cluster, name, score, interval, n))
            for label in labels[1:]:
                tuned, base = scores[labels[0]], scores[label]
                if name == "perplexity" and not np.array_equal(tuned.weights, base.weights):
                    notes.append(
                        f"{task.name}: the perplexities of {labels[0]} and {label} are not compared, they are over"
                        " different tokens"
                    )
                elif tuned.items:
                    assert tuned.items == base.items, "the same examples for both"
                    interval = percentile_interval(samples[labels[0]] - samples[label])
                    significant = is_significant(interval, len(tuned.items))
                    pair = (base.score, tuned.score, tuned.score - base.score)
                    comparisons.append(Comparison(task.name, name, *pair, interval, significant, label, labels[0]))
    return Report(tuple(results), tuple(comparisons), usage, tuple(dict.fromkeys(notes)), answers)


def _scores(name: str, task: Task, answers: Sequence[Answer], seed: int) -> _Scores:
    """The items that can be scored: those with a reference, or with tokens to rate."""
    metric = METRICS[name]
    scored = [
        index
        for index, (item, answer) in enumerate(zip(task.items, answers, strict=True))
        if (answer.num_tokens > 0 if metric.needs == "likelihood" else bool(item.truth.references))
    ]
    pairs = [metric.score(answers[index], task.items[index].truth) for index in scored]
    values, weights = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return _Scores(metric, values, weights, tuple(scored), zlib.crc32(f"{seed} {task.name}".encode()))


class _Asker:
    """Asks one contestant, and counts what that takes."""

    def __init__(self, contestant: Contestant, max_tokens: int, console: Console) -> None:
        self._model, self._prompts, self._label = contestant.model, contestant.prompts, contestant.label
        self._max_tokens, self._console = max_tokens, console
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None) or 2**30
        self._context = int(positions) - virtual_tokens(self._model)
        self.tokens_run = self.tokens_generated = 0
        self.notes: list[str] = []

    def answer(self, task: Task) -> list[Answer]:
        """One answer an item, with the parts that the task's metrics need."""
        needs = {METRICS[name].needs for name in task.metrics}
        answers = [Answer()] * len(task.items)
        if "likelihood" in needs:
            answers = self._rate_references(task, answers)
        if "options" in needs:
            answers = self._rate_options(task, answers)
        if "generation" in needs:
            answers = self._write(task, answers)
        return answers

    def _rate_references(self, task: Task, answers: list[Answer]) -> list[Answer]:
        examples = [self._rated(task, item) for item in task.items]
        likelihoods = self._score([example for group in examples for example in group], f"{task.name}: perplexity")
        return [
            replace(answer, negative_log_likelihood=-float(sums.sum()), num_tokens=int(counts.sum()))
            for answer, sums, counts in zip(
                answers,
                _regroup(likelihoods.log_likelihoods, examples),
                _regroup(likelihoods.num_targets, examples),
                strict=True,
            )
        ]

    def _rated(self, task: Task, item: Item) -> list[Example]:
        if task.rates_all_turns or isinstance(item.document, Text):
            return self._prompts.document(item, self._context)
        return [self._prompts.answered(item, item.truth.references[0], self._context)]

    def _rate_options(self, task: Task, answers: list[Answer]) -> list[Answer]:
        examples = [
            [self._prompts.answered(item, option, self._context) for option in item.truth.options]
            for item in task.items
        ]
        likelihoods = self._score([example for group in examples for example in group], f"{task.name}: options")
        sums = _regroup(likelihoods.log_likelihoods, examples)
        return [
            replace(answer, option_log_likelihoods=tuple(map(float, group)))
            for answer, group in zip(answers, sums, strict=True)
        ]

    def _write(self, task: Task, answers: list[Answer]) -> list[Answer]:
        """Greedy answers to the items that have references."""
        asked = [index for index, item in enumerate(task.items) if item.truth.references]
        items = [task.items[index] for index in asked]
        room = min(task.max_new_tokens or self._longest_answer(items), self._context // 2)
        questions = [self._prompts.question(item, self._context - room) for item in items]
        end = self._prompts.answer_end(items)
        with self._console.progress(f"{self._label}, {task.name}: answers", total=len(items)) as bar:
            generations = generate(
                self._model,
                questions,
                end_ids=self._end_ids(),
                max_new_tokens=room,
                max_tokens=max(self._max_tokens, cached_tokens(self._model)),
                is_complete=None if end is None else lambda ids: end in self._prompts.decode(ids),
                on_progress=bar.update,
            )
        self.tokens_run += sum(generation.num_fed for generation in generations)
        self.tokens_generated += sum(generation.num_generated for generation in generations)
        answers = list(answers)
        for index, generation in zip(asked, generations, strict=True):
            text = self._prompts.decode(generation.ids)
            answers[index] = replace(answers[index], text=(text.partition(end)[0] if end else text).strip())
        return answers

    def _longest_answer(self, items: Sequence[Item]) -> int:
        lengths = (
            self._prompts.answered(item, reference, self._context).num_targets
            for item in items
            for reference in item.truth.references
        )
        return min(max(lengths) + ANSWER_MARGIN, MAX_ANSWER)

    def _end_ids(self) -> tuple[int, ...]:
        """The template's and the model's own: a base model may end a turn in another token than the tuned one."""
        own = self._model.generation_config.eos_token_id if self._model.generation_config else None
        own_ids = own if isinstance(own, list) else [] if own is None else [own]
        return tuple(dict.fromkeys((*self._prompts.end_ids, *own_ids)))

    def _score(self, examples: Sequence[Example], what: str) -> Likelihoods:
        with self._console.progress(f"{self._label}, {what}", total=len(examples)) as bar:
            likelihoods = score_targets(self._model, examples, max_tokens=self._max_tokens, on_progress=bar.update)
        self.tokens_run += likelihoods.tokens_run
        return likelihoods


def _regroup(flat: np.ndarray, groups: Sequence[Sequence[Example]]) -> list[np.ndarray]:
    """Cut an array of one entry an example into one array a group."""
    bounds = np.cumsum([0, *map(len, groups)])
    return [flat[start:end] for start, end in pairwise(bounds)]
