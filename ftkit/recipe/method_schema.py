"""The ways to train, one class a method; a part of the recipe's schema."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from ftkit.recipe.section import ListOf, NonEmpty, Section, Share


class FullMethod(Section):
    """Every weight trains."""

    type: Literal["full"]
    """The method."""


class LoraMethod(Section):
    """Low-rank updates (Hu et al. 2021, https://arxiv.org/abs/2106.09685): W + alpha / rank * B A."""

    type: Literal["lora"]
    """The method."""
    rank: PositiveInt = 16
    """Rank r of the update."""
    alpha: PositiveFloat = 32.0
    """Scale: the update is multiplied by alpha / rank."""
    rank_pattern: dict[NonEmpty, PositiveInt] = {}
    """Ranks of some layers: {name or regular expression that matches the end of a module's path: rank}; the first that
    matches counts."""
    alpha_pattern: dict[NonEmpty, PositiveFloat] = {}
    """Alphas of some layers, as in `rank_pattern`."""
    rank_stabilized: bool = False
    """Multiply the update by alpha / sqrt(rank) instead (rsLoRA, Kalajdzievski 2023), which suits large ranks."""
    init: Literal["kaiming", "gaussian", "pissa"] = "kaiming"
    """What A starts from while B is zero: Kaiming-uniform, or normal; pissa: A and B from the weight's largest singular
    components, which are taken off it (Meng et al. 2024, https://arxiv.org/abs/2404.02948)."""
    dora: bool = False
    """Train the lengths of the weights' rows by themselves, and only their direction by low-rank updates (DoRA, Liu et
    al. 2024, https://arxiv.org/abs/2402.09353)."""
    learning_rate_ratio: PositiveFloat = 1.0
    """The learning rate of B is so many times `training.learning_rate`, that of A (LoRA+, Hayou et al. 2024,
    https://arxiv.org/abs/2402.12354, who find 16 good at a smaller base rate)."""
    dropout: Share = 0.0
    """Probability of dropping an element of the update's input."""
    targets: NonEmpty | Annotated[ListOf[NonEmpty], Field(min_length=1)] = "all-linear"
    """`all-linear` (linear layers of the decoder blocks), a list of module names, or a regular expression that
    matches whole module paths."""
    exclude: NonEmpty | ListOf[NonEmpty] = ()
    """Modules left out: names, or a regular expression."""
    modules_to_save: ListOf[NonEmpty] = ()
    """Names of modules that train in full besides, e.g. [embed_tokens, lm_head]; tied ones train together."""
    init_from: NonEmpty | None = None
    """Run or LoRA directory (relative to the recipe) whose trained weights training goes on from, at step 0."""

    @field_validator("targets", "exclude")
    @classmethod
    def _pattern_compiles(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(value, str):
            _compile(value)
        return value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns_compile(cls, value: dict[str, Any]) -> dict[str, Any]:
        for pattern in value:
            _compile(pattern)
        return value


class AdapterMethod(Section):
    """Bottleneck adapters (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751): h + up(f(down(h))), two a layer."""

    type: Literal["adapter"]
    """The method."""
    bottleneck: PositiveInt = 64
    """Width m of the bottleneck; an adapter has 2md + d + m parameters at model width d."""
    non_linearity: Literal["gelu", "relu", "silu", "tanh"] = "gelu"
    """The function f between the projections."""
    train_norms: bool = False
    """Train the model's normalisation layers too, as the paper does."""
    init_from: NonEmpty | None = None
    """Run or adapter directory (relative to the recipe) whose trained weights training goes on from, at step 0."""


def _compile(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern} is not a regular expression: {error}") from None
