"""Where a run stands: what changes from step to step besides weights, optimizer and generators."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor


@dataclass
class LoopState:
    """Kept in a checkpoint as JSON; Python's floats survive the way there and back bit for bit."""

    step: int = 0
    """Optimizer steps done."""
    best_metric: float | None = None
    """Lowest value of the metric for the best model among the evaluations that were saved."""
    best_step: int | None = None
    """Its step."""
    lowest_metric: float | None = None
    """Lowest value among all evaluations; early stopping counts from there."""
    evaluations_without_gain: int = 0
    """Evaluations since `lowest_metric`."""
    awaits_evaluation: bool = False
    """Whether the evaluation after `step` was ended by a signal, and is to be made anew before the run goes on."""
    metrics_lines: int = 0
    """Lines of metrics.jsonl when the checkpoint was written."""
    loss_sums: list[float] = field(default_factory=list)
    """Sum of losses by data set since the last logged line."""
    targets: list[int] = field(default_factory=list)
    """Target tokens by data set since the last logged line."""
    tokens: int = 0
    """Tokens since the last logged line."""

    @classmethod
    def fresh(cls, num_datasets: int) -> "LoopState":
        """The state before the first step."""
        return cls(loss_sums=[0.0] * num_datasets, targets=[0] * num_datasets)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "LoopState":
        """The state of a checkpoint: keys that are not the loop's are left out, missing ones have their default."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def record_step(self, loss_sums: Tensor, targets: list[int], tokens: int) -> None:
        """Count a finished step: float32 [num_datasets] sums of losses, targets by data set, tokens."""
        self.step += 1
        self.loss_sums = [old + new for old, new in zip(self.loss_sums, loss_sums.tolist(), strict=True)]
        self.targets = [old + new for old, new in zip(self.targets, targets, strict=True)]
        self.tokens += tokens

    def take_window(self, names: list[str]) -> dict[str, Any]:
        """What was summed since the last logged line, as metrics; the sums start again at 0."""
        metrics = {
            "loss": sum(self.loss_sums) / max(1, sum(self.targets)),
            "loss_by_dataset": {
                name: loss / count
                for name, loss, count in zip(names, self.loss_sums, self.targets, strict=True)
                if count
            },
            "tokens": self.tokens,
            "target_tokens": sum(self.targets),
        }
        self.loss_sums, self.targets, self.tokens = [0.0] * len(names), [0] * len(names), 0
        return metrics

    def record_evaluation(self, metric: float, *, saved: bool) -> None:
        """Count an evaluation; `saved` says whether a checkpoint of its step is part of the run.

        One that only a signal caused is not: the best step must not depend on interruptions.
        """
        self.awaits_evaluation = False
        if self.lowest_metric is None or metric < self.lowest_metric:
            self.lowest_metric, self.evaluations_without_gain = metric, 0
        else:
            self.evaluations_without_gain += 1
        if saved and (self.best_metric is None or metric < self.best_metric):
            self.best_metric, self.best_step = metric, self.step
