"""What an evaluation found: for machines as JSON, for people as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from ftkit.console import make_table
from ftkit.evaluation.metrics import METRICS, Answer


@dataclass(frozen=True, slots=True)
class Result:
    """One model's score on one task."""

    model: str
    task: str
    cluster: str | None
    metric: str
    score: float
    interval: tuple[float, float]
    """95% percentile bootstrap over examples."""
    n: int
    """Examples scored."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The tuned model's score against another's on the same examples."""

    task: str
    metric: str
    base: float
    """The other model's score."""
    tuned: float
    difference: float
    """tuned - base"""
    interval: tuple[float, float]
    """Of the difference: 95% paired percentile bootstrap."""
    significant: bool
    """Whether the interval excludes 0."""
    base_model: str
    tuned_model: str


@dataclass(frozen=True, slots=True)
class Usage:
    """What the evaluation ran."""

    tokens_run: int = 0
    """Tokens fed to the models, padding included; generated ones not."""
    tokens_generated: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """All that an evaluation found."""

    results: tuple[Result, ...]
    comparisons: tuple[Comparison, ...]
    usage: Usage
    notes: tuple[str, ...] = ()
    """What a reader should know about the scores."""
    answers: Mapping[str, Mapping[str, Sequence[Answer]]] = field(default_factory=dict)
    """Model -> task -> one answer for each of the task's items, in their order."""

    def to_json(self) -> dict[str, Any]:
        """`results`, `comparisons`, `usage` and `notes` as plain values."""
        return {
            "results": [asdict(result) | {"interval": list(result.interval)} for result in self.results],
            "comparisons": [asdict(pair) | {"interval": list(pair.interval)} for pair in self.comparisons],
            "usage": asdict(self.usage),
            "notes": list(self.notes),
        }

    def to_table(self) -> Table:
        """A row for each task and metric: every model's score, and how the tuned one differs from each of the others.

        A triangle marks a significant difference, up for better; "~" stands where there is none.
        """
        results = {(result.model, result.task, result.metric): result for result in self.results}
        models = list(dict.fromkeys(result.model for result in self.results))
        models = [*models[1:], *models[:1]]  # what is compared with first, the tuned model last
        pairs = {(pair.base_model, pair.task, pair.metric): pair for pair in self.comparisons}
        clusters = any(result.cluster for result in self.results)
        columns = [("task", "left"), *([("cluster", "left")] if clusters else []), ("metric", "left"), ("n", "right")]
        columns += [(model, "right") for model in models]
        differences = ["difference"] if len(models) == 2 else [f"against {model}" for model in models[:-1]]
        columns += [(name, "right") for name in differences]
        table = make_table("evaluation (95% intervals; ↓ lower is better)", columns)
        for task, metric in dict.fromkeys((result.task, result.metric) for result in self.results):
            scored = [results.get((model, task, metric)) for model in models]
            first = next(result for result in scored if result is not None)
            compared = [pairs.get((model, task, metric)) for model in models[:-1]]
            table.add_row(
                task,
                *([first.cluster or ""] if clusters else []),
                metric + (" ↓" if METRICS[metric].lower_is_better else ""),
                str(first.n),
                *("" if result is None else _with_interval(result.score, result.interval) for result in scored),
                *("" if pair is None else _difference(pair) for pair in compared),
            )
        return table


def _with_interval(score: float, interval: tuple[float, float]) -> str:
    return f"{_number(score)} [{_number(interval[0])}, {_number(interval[1])}]"


def _difference(pair: Comparison) -> str:
    mark = "~"
    if pair.significant:
        better = (pair.difference < 0) == METRICS[pair.metric].lower_is_better
        mark = "▲" if better else "▼"
    low, high = pair.interval
    return f"{_signed(pair.difference)} [{_signed(low)}, {_signed(high)}] {mark}"


def _number(value: float) -> str:
    """Three decimals; large perplexities with as many as carry weight."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def _signed(value: float) -> str:
    return ("+" if value >= 0 else "-") + _number(abs(value))
