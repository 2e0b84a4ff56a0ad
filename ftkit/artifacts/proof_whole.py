"""The proof on two whole models: base with adapters against the merged one, and what the stored precision costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ftkit.artifacts.proof import (
    MAX_RELATIVE_DIFFERENCE,
    Comparison,
    Prompt,
    check_loaded,
    compare,
    compute_logits,
    fold,
    nudge,
)
from ftkit.artifacts.updates import LoadedAdapter, applied
from ftkit.methods.base import ComputeDelta
from ftkit.models.load import BaseModel, load_weights
from ftkit.models.quantization import dequantize


@dataclass(frozen=True)
class Cast:
    """What serving in the stored precision changes: weights rounded to it and computed in it."""

    dtype: str
    max_abs_logit_difference: float
    """Of the merged model as it is served, to base and adapter in float32."""
    top1_agreement: float
    base_max_abs_logit_difference: float
    """The same for the base alone: what the precision costs without any merge."""
    base_top1_agreement: float


@dataclass(frozen=True)
class WholeProof:
    """What was found."""

    exact: Comparison
    """Adapted against merged, both float32, before any rounding."""
    rounding: Comparison | None
    """Merged against itself with every adapted weight moved by one step of float32; measured only where `exact` is far
    enough off for the question."""
    cast: Cast
    training: Comparison | None
    """The model as it was trained, on a quantised base, against the merged one, both float32; None where `exact` says
    just that."""


def prove_whole(
    adapters: Sequence[LoadedAdapter],
    base: BaseModel,
    merged: BaseModel,
    updates: Mapping[str, ComputeDelta],
    prompts: Sequence[Prompt],
    dtype: torch.dtype,
    *,
    trained_on: BaseModel | None = None,
) -> WholeProof:
    """Adapted against merged, both float32; and what computing in `dtype` changes, beside the same for the base.

    A quantised base computes its own logits as it does in training, and is dequantised to be merged into.

    Args:
        trained_on: the base as it was in training, where `base` is not that.

    Raises:
        CheckFailedError: `merged`, as transformers loads it, does not have the merged weights.
    """
    model = load_weights(base, dtype=torch.float32)
    known = _without_new_tokens(model, prompts)
    base_logits = compute_logits(model, known)
    dequantize(model)
    with applied(model, adapters):
        adapted_logits = compute_logits(model, prompts)
    fold(model, updates)
    merged_logits = compute_logits(model, prompts)
    exact = compare(adapted_logits, merged_logits)

    served = load_weights(merged, dtype=dtype)
    check_loaded(model, served)
    rounding = None
    if exact.relative > MAX_RELATIVE_DIFFERENCE:
        nudge(model, updates)
        rounding = compare(merged_logits, compute_logits(model, prompts))
    del model
    cast = compare(adapted_logits, compute_logits(served, prompts))
    del served
    base_served = load_weights(base, dtype=dtype)
    base_cast = compare(base_logits, compute_logits(base_served, known))
    del base_served
    training = None
    if trained_on is not None:
        training = compare(_trained_logits(trained_on, adapters, prompts), merged_logits)
    return WholeProof(
        exact,
        rounding,
        Cast(
            dtype=str(dtype).removeprefix("torch."),
            max_abs_logit_difference=cast.max_abs_logit_difference,
            top1_agreement=cast.top1_agreement,
            base_max_abs_logit_difference=base_cast.max_abs_logit_difference,
            base_top1_agreement=base_cast.top1_agreement,
        ),
        training,
    )


def _without_new_tokens(base: PreTrainedModel, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts as far as the base knows their tokens: an adapter's tokenizer may have more."""
    rows = base.get_input_embeddings().get_parameter("weight").shape[0]
    known = [[token for token in prompt if token < rows] for prompt in prompts]
    return [prompt for prompt in known if prompt]


def _trained_logits(base: BaseModel, adapters: Sequence[LoadedAdapter], prompts: Sequence[Prompt]) -> list[Tensor]:
    model = load_weights(base, dtype=torch.float32)
    dequantize(model)
    with applied(model, adapters):
        return compute_logits(model, prompts)
