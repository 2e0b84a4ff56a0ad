"""How many tokens a micro-batch holds and whether activations are recomputed: what decides the memory of a step."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ftkit.data.plan import Plan
from ftkit.data.types import EncodedExample
from ftkit.recipe.schema import Recipe
from ftkit.runs import BUDGET, recorded_environment

TOKENS_ON_GPU, TOKENS_ON_CPU = 8192, 2048
"""Where `max_tokens_per_device: auto` begins, unless `max_length` is larger."""
FULLEST = 16
"""Steps that are dealt to find the fullest micro-batch: those with most tokens."""


@dataclass(frozen=True)
class Budget:
    """Of a micro-batch. It changes neither the gradient nor the number of steps."""

    max_tokens: int
    checkpointing: bool

    def __str__(self) -> str:
        recomputed = ", activations recomputed" if self.checkpointing else ""
        return f"{self.max_tokens:,} tokens a micro-batch{recomputed}"


def first_budget(recipe: Recipe, device: torch.device | str) -> Budget:
    """What a run begins with: what the recipe says, and for `auto` the most that pays."""
    asked = recipe.training.max_tokens_per_device
    paying = TOKENS_ON_CPU if torch.device(device).type == "cpu" else TOKENS_ON_GPU
    tokens = max(recipe.data.max_length, paying) if asked == "auto" else asked
    return Budget(tokens, recipe.training.gradient_checkpointing is True)


def read_budget(run: Path) -> Budget | None:
    """What a run began with; None where it does not say. Going on with the same one gives the same bits."""
    values = recorded_environment(run).get(BUDGET)
    return Budget(**values) if isinstance(values, dict) else None


def smaller_budgets(recipe: Recipe, first: Budget, longest: int) -> Iterator[Budget]:
    """What may be tried after `first`, as far as the recipe leaves it open: less tokens, then recomputed activations.

    Args:
        longest: tokens of the longest document; a micro-batch holds one document at least, so less changes nothing.
    """
    halves = recipe.training.max_tokens_per_device == "auto"
    recomputes = recipe.training.gradient_checkpointing in ("auto", True)
    for checkpointing in dict.fromkeys([first.checkpointing, recomputes]):
        tokens = first.max_tokens
        if checkpointing != first.checkpointing:
            yield Budget(tokens, checkpointing)
        while halves and tokens > longest:
            tokens = max(longest, tokens // 2)
            yield Budget(tokens, checkpointing)


def fullest_batch(
    plan: Plan, *, world_size: int, max_tokens: int, packed: bool, before_each: int = 0
) -> list[EncodedExample]:
    """The micro-batch of the plan that holds most tokens, of those the one with the longest document."""
    batches = [
        batch
        for step in _fullest_steps(plan)
        for batch in plan.micro_batches(
            step, rank=0, world_size=world_size, max_tokens=max_tokens, packed=packed, before_each=before_each
        )
    ]

    def size(batch: list[EncodedExample]) -> tuple[int, int]:
        lengths = [before_each + example.example.num_tokens for example in batch] or [0]
        return (sum(lengths) if packed else max(lengths) * len(lengths)), max(lengths)

    return max(batches, key=size)


def accumulates(plan: Plan, *, world_size: int, max_tokens: int, packed: bool, before_each: int = 0) -> bool:
    """Whether a step of the plan has several micro-batches on a device: gradients then lie beside activations."""
    fullest = _fullest_steps(plan)
    lengths = plan.examples.num_tokens[plan.steps.order]
    # Of all others only those that are too large for one micro-batch are worth dealing.
    each = plan.steps.sums(np.ones_like(plan.examples.num_tokens))
    longest = int(lengths.max()) + before_each
    bound = plan.steps.sums(plan.examples.num_tokens) + before_each * each if packed else each * longest
    others = set(np.flatnonzero(bound > max_tokens).tolist()).difference(fullest)
    return any(
        len(
            plan.micro_batches(
                step, rank=0, world_size=world_size, max_tokens=max_tokens, packed=packed, before_each=before_each
            )
        )
        > 1
        for step in (*fullest, *others)
    )


def _fullest_steps(plan: Plan) -> list[int]:
    """Those with most tokens, and that of the longest document, which may fill a micro-batch by itself."""
    examples, steps = plan.examples, plan.steps
    tokens = steps.sums(examples.num_tokens)
    at = int(np.argmax(examples.num_tokens[steps.order]))
    of_longest = int(np.searchsorted(steps.bounds, at, side="right")) - 1
    return sorted({of_longest, *np.argsort(-tokens, kind="stable")[:FULLEST].tolist()})


def longest_document(plan: Plan, before_each: int = 0) -> int:
    """Tokens of the longest document that is trained on."""
    return before_each + int(plan.examples.num_tokens[plan.steps.order].max())
