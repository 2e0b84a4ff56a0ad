"""What a run will take, from its plan and the model's configuration alone: parameters, bytes, steps, tokens."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ftkit.methods.base import Report, report
from ftkit.methods.beside import notes_beside, state_beside
from ftkit.methods.table import METHODS
from ftkit.models.load import choose_compute_dtype, stored_quantization
from ftkit.models.multimodal import auto_class
from ftkit.models.quantization import quantize
from ftkit.training.prepare import Prepared, PreparedModel, apply_method

ADAMW_MOMENTS = 2
"""float32 tensors that AdamW keeps of each trained parameter."""
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Memory:
    """Bytes that do not depend on the batch; activations and logits come on top."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Of all three."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class ModelEstimate:
    """What a model and a method come to, whatever the data."""

    parameters: int
    """Of the model, inserted ones included."""
    trainable_parameters: int
    places: tuple[str, ...]
    """Where the method inserted modules, in words."""
    memory_bytes: Memory
    result_bytes: int
    """On disk, of what is handed over."""
    notes: tuple[str, ...]
    """What the method wants to be known."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Estimate(ModelEstimate):
    """What `ftkit plan` prints."""

    optimizer_steps: int
    tokens: int
    """That run through the model in training, over all epochs."""
    target_tokens: int
    """Of them, trained on."""
    disk_bytes: int
    """Of the result and the checkpoints that are kept."""


def estimate(prepared: Prepared, device: torch.device) -> Estimate:
    """Measure a run without loading a weight.

    Raises:
        UserError: the method finds no place in the model.
    """
    model, plan, training = estimate_model(prepared, device), prepared.plan, prepared.recipe.training
    checkpoint = model.trainable_parameters * FLOAT32_BYTES * (1 + ADAMW_MOMENTS)
    return Estimate(
        **vars(model),
        optimizer_steps=len(plan.steps),
        tokens=plan.num_tokens,
        target_tokens=sum(plan.targets_per_step),
        # The checkpoints of `save_total_limit`, the best one, and the result.
        disk_bytes=checkpoint * (training.save_total_limit + 1) + model.result_bytes,
    )


def estimate_model(prepared: PreparedModel, device: torch.device) -> ModelEstimate:
    """Count a model's parameters and their bytes: it is built on the meta device, as large as it may be.

    Raises:
        UserError: the method finds no place in the model.
    """
    counts, notes = _count(prepared, device)
    state = counts.trainable_parameters * FLOAT32_BYTES
    return ModelEstimate(
        parameters=counts.total_parameters,
        trainable_parameters=counts.trainable_parameters,
        places=counts.places,
        memory_bytes=Memory(sum(part.bytes for part in counts.precision), state, state * ADAMW_MOMENTS),
        result_bytes=counts.saved_bytes,
        notes=notes,
    )


def _count(prepared: PreparedModel, device: torch.device) -> tuple[Report, tuple[str, ...]]:
    recipe = prepared.recipe
    method = METHODS[recipe.method.type]
    compute_dtype, _ = choose_compute_dtype(recipe.model.dtype, device)
    dtype = torch.float32 if method.name == "full" else compute_dtype
    with torch.device("meta"):
        model = auto_class(prepared.config).from_config(
            prepared.config, dtype=dtype, trust_remote_code=prepared.base.trust_remote_code
        )
    if (quantization := prepared.base.quantization or stored_quantization(prepared.config)) is not None:
        quantize(model, quantization)
    apply_method(model, prepared)
    counts = report(model, method, beside=state_beside(model, recipe.method))
    return counts, (*method.notes(model), *notes_beside(recipe.method))
