"""AdamW's parameter groups and the learning rate of every step, as functions of the step alone.

There is no scheduler object: the learning rate follows from (step, total steps, section), so nothing about it needs
to be saved, and a resumed run cannot get it wrong.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from ftkit.recipe.schema import TrainingSection

RATE_FACTOR = "rate_factor"
"""Key of an optimizer's group."""
WSD_DECAY_SHARE = 0.2
"""Share of the run over which wsd (warm-up, stable, decay) falls (Hu et al. 2024, https://arxiv.org/abs/2404.06395)."""


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], section: TrainingSection, rate_factor: Callable[[str], float]
) -> torch.optim.AdamW:
    """Fused AdamW over the trained parameters; decay on matrices only, not on norms, biases and gates.

    Args:
        parameters: name -> trained parameter.
        rate_factor: name of a parameter -> what its learning rate is multiplied by.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decay = section.weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((rate_factor(name), decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": group, RATE_FACTOR: factor, "weight_decay": decay} for (factor, decay), group in groups.items()],
        lr=section.learning_rate,
        betas=(section.adam_beta1, section.adam_beta2),
        eps=section.adam_epsilon,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let every group learn at `rate` times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[RATE_FACTOR]


def warmup_steps(section: TrainingSection, total_steps: int) -> int:
    """Steps of warm-up in a run of `total_steps`."""
    asked = section.warmup_steps
    if asked is None:
        return min(max(5, math.ceil(0.03 * total_steps)), total_steps // 10)
    return asked if isinstance(asked, int) else math.ceil(asked * total_steps)


def learning_rate(step: int, total_steps: int, section: TrainingSection) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    Warm-up is linear and reaches the peak at its last step; the schedule then ends at `min_lr_ratio` of the peak in
    the step after the last one, so that no step is spent at a rate of 0.
    """
    warmup = warmup_steps(section, total_steps)
    if step < warmup:
        return section.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    shape = SCHEDULES[section.lr_scheduler_type](progress)
    floor = 1.0 if section.lr_scheduler_type == "constant" else section.min_lr_ratio
    return section.learning_rate * (floor + (1.0 - floor) * shape)


def _wsd(progress: float) -> float:
    return min(1.0, (1.0 - progress) / WSD_DECAY_SHARE)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
    "constant": lambda progress: 1.0,
    "wsd": _wsd,
}
"""lr_scheduler_type -> share of the peak at `progress` in [0, 1) of the time after the warm-up."""


def every(steps_or_share: int | float, total_steps: int) -> int:
    """A cadence in steps: a whole number as it is, a share of the run rounded, at least 1."""
    return steps_or_share if isinstance(steps_or_share, int) else max(1, round(steps_or_share * total_steps))
