"""The proof on two whole models: base with adapters against the merged one, and what the stored precision costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ftkit.artifacts.proof import Comparison, Prompt, check_loaded, compare, compute_logits, fold
from ftkit.artifacts.updates import LoadedAdapter, applied
from ftkit.methods.base import ComputeDelta
from ftkit.models.load import BaseModel, load_weights


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
    cast: Cast


def prove_whole(
    adapters: Sequence[LoadedAdapter],
    base: BaseModel,
    merged: BaseModel,
    updates: Mapping[str, ComputeDelta],
    prompts: Sequence[Prompt],
    dtype: torch.dtype,
) -> WholeProof:
    """Adapted against merged, both float32; and what computing in `dtype` changes, beside the same for the base.

    Raises:
        CheckFailedError: `merged`, as transformers loads it, does not have the merged weights.
    """
    model = load_weights(base, dtype=torch.float32)
    base_logits = compute_logits(model, prompts)
    with applied(model, adapters):
        adapted_logits = compute_logits(model, prompts)
    fold(model, updates)
    exact = compare(adapted_logits, compute_logits(model, prompts))

    served = load_weights(merged, dtype=dtype)
    check_loaded(model, served)
    del model
    cast = compare(adapted_logits, compute_logits(served, prompts))
    del served
    base_served = load_weights(base, dtype=dtype)
    base_cast = compare(base_logits, compute_logits(base_served, prompts))
    return WholeProof(
        exact,
        Cast(
            dtype=str(dtype).removeprefix("torch."),
            max_abs_logit_difference=cast.max_abs_logit_difference,
            top1_agreement=cast.top1_agreement,
            base_max_abs_logit_difference=base_cast.max_abs_logit_difference,
            base_top1_agreement=base_cast.top1_agreement,
        ),
    )
