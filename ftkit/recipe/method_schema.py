"""The ways to train, one class a method; a part of the recipe's schema."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationInfo, field_validator, model_validator

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
    target_parameters: ListOf[NonEmpty] = ()
    """Names of weights that hold all experts of a layer, e.g. [experts.gate_up_proj, experts.down_proj]: each expert
    gets an update of its own. Without dropout, `dora` and `init: pissa`."""
    modules_to_save: ListOf[NonEmpty] = ()
    """Names of modules that train in full besides, e.g. [embed_tokens, lm_head]; tied ones train together."""
    soft_prompt: PositiveInt | None = None
    """Train a soft prompt of so many vectors besides; it is saved in prompt/, beside adapter/."""
    soft_prompt_learning_rate_ratio: PositiveFloat = 150.0
    """The prompt's learning rate is so many times `training.learning_rate`."""
    init_from: NonEmpty | None = None
    """Run or LoRA directory (relative to the recipe) whose trained weights training goes on from, at step 0."""

    @field_validator("targets", "exclude")
    @classmethod
    def _pattern_compiles(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(value, str):
            _compile(value)
        return value

    @field_validator("target_parameters")
    @classmethod
    def _plain_updates(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        given = {"dropout": info.data.get("dropout"), "dora": info.data.get("dora")}
        given["init: pissa"] = info.data.get("init") == "pissa"
        if value and (refused := [name for name, set_ in given.items() if set_]):
            raise ValueError(f"experts have plain updates only: leave out method.{refused[0]}")
        return value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns_compile(cls, value: dict[str, Any]) -> dict[str, Any]:
        for pattern in value:
            _compile(pattern)
        return value


NonLinearity = Literal[
    "gelu", "relu", "silu", "tanh", "swish", "sigmoid", "leaky_relu", "elu", "celu", "selu", "mish", "relu2", "relu6",
    "hardswish", "hardsigmoid", "hardtanh", "logsigmoid", "softplus", "softsign", "sqrtsoftplus", "laplace",
    "quick_gelu", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python", "gelu_python_tanh",
    "gelu_10", "linear",
]  # fmt: skip
"""transformers' names, then torch's; none has weights of its own."""
PARALLEL_SCALE = 4.0
"""What He et al. 2022 multiply a parallel adapter by."""


class AdapterMethod(Section):
    """Bottleneck adapters (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751): h + scale * up(f(down(h)))."""

    type: Literal["adapter"]
    """The method."""
    bottleneck: PositiveInt | None = 64
    """Width m of the bottleneck; an adapter has 2md + d + m parameters at model width d."""
    reduction_factor: PositiveFloat | None = None
    """Given in place of `bottleneck`: the bottleneck's width is that of the model, divided by it and rounded down."""
    non_linearity: NonLinearity = "gelu"
    """The function f between the projections, by its name in transformers or torch."""
    placement: Annotated[ListOf[Literal["attention", "feed_forward"]], Field(min_length=1)] = (
        "attention",
        "feed_forward",
    )
    """The parts of each layer that get an adapter: both (Houlsby et al.), or the feed-forward alone (Pfeiffer et al.
    2021, https://arxiv.org/abs/2005.00247)."""
    insertion: Literal["sequential", "parallel"] = "sequential"
    """sequential: an adapter reads and changes what its part writes. parallel: it reads what the part reads and adds to
    what that writes (He et al. 2022, https://arxiv.org/abs/2110.04366)."""
    scale: PositiveFloat = 1.0
    """Number that what the adapter adds is multiplied by; for parallel ones 4 where it is left out, as in the paper."""
    dropout: Share = 0.0
    """Probability of dropping an element of f's output."""
    train_norms: bool = False
    """Train the model's normalisation layers too, as the first paper does."""
    soft_prompt: PositiveInt | None = None
    """Train a soft prompt of so many vectors besides; it is saved in prompt/, beside adapter/."""
    soft_prompt_learning_rate_ratio: PositiveFloat = 100.0
    """The prompt's learning rate is so many times `training.learning_rate`."""
    init_from: NonEmpty | None = None
    """Run or adapter directory (relative to the recipe) whose trained weights training goes on from, at step 0."""

    @model_validator(mode="before")
    @classmethod
    def _fill_dependent_defaults(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        width = {"bottleneck": None} if raw.get("reduction_factor") is not None else {}
        scale = {"scale": PARALLEL_SCALE} if raw.get("insertion") == "parallel" else {}
        # A resolved recipe with a reduction factor says `bottleneck: null`; without one null is the default.
        given = {name: value for name, value in raw.items() if name != "bottleneck" or value is not None}
        return width | scale | given

    @field_validator("reduction_factor")
    @classmethod
    def _one_width(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("bottleneck") is not None:
            raise ValueError("method.bottleneck says the width already; keep one of them")
        return value

    @field_validator("placement")
    @classmethod
    def _in_order(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """The order of the parts in a layer, each once: however it was written, it means the same."""
        return tuple(part for part in ("attention", "feed_forward") if part in value)


class SoftPromptMethod(Section):
    """Trained vectors before every document's first token (Lester et al. 2021, https://arxiv.org/abs/2104.08691)."""

    type: Literal["soft_prompt"]
    """The method."""
    num_virtual_tokens: PositiveInt = 20
    """Vectors of the prompt."""
    init: Literal["vocabulary", "random"] = "vocabulary"
    """What they start from: the embeddings of tokens drawn from the 5,000 most common ones, or numbers drawn uniformly
    from -0.5 to 0.5, as in the paper."""
    init_text: NonEmpty | None = None
    """Text whose tokens' embeddings they start from instead, repeated or cut to the prompt's length."""
    init_from: NonEmpty | None = None
    """Run or prompt directory (relative to the recipe) whose trained prompt training goes on from, at step 0."""

    @field_validator("init_text")
    @classmethod
    def _one_start(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("init") == "random":
            raise ValueError("a prompt that starts from a text does not start at random: leave method.init out")
        return value


class PrefixMethod(Section):
    """Trained keys and values before those of every layer (P-Tuning v2, Liu et al. 2022,
    https://arxiv.org/abs/2110.07602)."""

    type: Literal["prefix"]
    """The method."""
    num_virtual_tokens: PositiveInt = 20
    """Keys and values of each layer."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of what they start from."""
    init_from: NonEmpty | None = None
    """Run or prefix directory (relative to the recipe) whose trained prefix training goes on from, at step 0."""


class LlamaAdapterMethod(Section):
    """A prompt in each of the upper layers, behind a gate that starts at zero (LLaMA-Adapter, Zhang et al. 2023,
    https://arxiv.org/abs/2303.16199)."""

    type: Literal["llama_adapter"]
    """The method."""
    num_virtual_tokens: PositiveInt = 10
    """Vectors of the prompt of each layer."""
    num_layers: PositiveInt | None = None
    """How many layers get one, from the last one down; left out: all but the first two, as in the paper."""
    init_from: NonEmpty | None = None
    """Run or adapter directory (relative to the recipe) whose trained prompts training goes on from, at step 0."""


def _compile(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern} is not a regular expression: {error}") from None
