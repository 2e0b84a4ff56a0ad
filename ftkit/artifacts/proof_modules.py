"""The proof module by module, for models of which two do not fit in memory.

Every adapted layer gets random input: what base and adapter make of it is compared with what the merged weight does.

Shape suffixes: T tokens, E experts, I input width, O output width, R rank.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ftkit.artifacts.layout import Layout
from ftkit.artifacts.proof import MAX_RELATIVE_DIFFERENCE
from ftkit.artifacts.updates import LoadedAdapter, lend, sum_layers
from ftkit.errors import CheckFailedError
from ftkit.methods.base import ComputeDelta, merged_weight, seeded_generator
from ftkit.methods.lora_experts import LoraExperts
from ftkit.methods.lora_layer import base_product
from ftkit.models.files import TensorFiles

TOKENS = 16


@dataclass(frozen=True)
class ModulesProof:
    """What merge_report.json says of a proof module by module; differences as shares of a module's largest output."""

    modules: int
    max_relative_difference: float
    """Between base with adapters and the merged weight before it is rounded, both float32."""
    worst: str | None
    """The module with that difference."""
    stored_max_relative_difference: float
    """The same for the merged weight as it is stored, rounded."""


@torch.no_grad()
def prove_modules(
    adapters: Sequence[LoadedAdapter],
    updates: Mapping[str, ComputeDelta],
    layout: Layout,
    source: Path,
    merged: Path,
    held: Mapping[str, ComputeDelta],
) -> ModulesProof:
    """Compare the outputs of every adapted layer, one of them in memory at a time.

    Args:
        held: of the base's weights, what turns them into those that training computed with: quantised ones.
    """
    by_path: dict[str, list[tuple[float, nn.Module]]] = {}
    for adapter in adapters:
        for path, layer in adapter.layers.items():
            by_path.setdefault(path, []).append((adapter.weight, layer))
    exact: dict[str, float] = {}
    stored = 0.0
    with TensorFiles(source) as before, TensorFiles(merged) as after:
        for path, weighted in by_path.items():
            for name, compute in _weights(path, weighted).items():
                weight = layout.read(before, name).float()
                weight = merged_weight(weight, held[name]) if name in held else weight
                written = layout.read(after, name).float()
                width = weight.shape[0 if isinstance(weighted[0][1], Conv1D) else -1]
                x_TI = torch.randn(TOKENS, width, generator=seeded_generator(0, name))
                adapted = compute(x_TI, weight, weighted)
                folded = merged_weight(weight, updates[name])
                exact[name] = _difference(adapted, compute(x_TI, folded, ()))
                stored = max(stored, _difference(adapted, compute(x_TI, written, ())))
    # NaN compares with nothing: it counts as the largest.
    worst = max(exact, key=lambda path: math.inf if math.isnan(exact[path]) else exact[path], default=None)
    return ModulesProof(len(exact), exact[worst] if worst is not None else 0.0, worst, stored)


def check_modules(proof: ModulesProof) -> None:
    """Check that no module differs by more than rounding.

    Raises:
        CheckFailedError: one does, or is not finite.
    """
    # "not <=" so that NaN fails too.
    if not proof.max_relative_difference <= MAX_RELATIVE_DIFFERENCE:
        raise CheckFailedError(
            f"the merged {proof.worst} differs from the adapted one by {proof.max_relative_difference:.3g} of its "
            f"largest output; allowed are {MAX_RELATIVE_DIFFERENCE:g}",
            how="use the adapter without merging, and report this",
        )


Weighted = Sequence[tuple[float, nn.Module]]
"""Weight and layer of each adapter."""


def _weights(path: str, weighted: Weighted) -> dict[str, Callable[[Tensor, Tensor, Weighted], Tensor]]:
    """Name of each adapted weight of the module at `path` -> what computes with it and some of the adapters."""
    if not isinstance(weighted[0][1], LoraExperts):
        transposed = isinstance(weighted[0][1], Conv1D)
        return {f"{path}.weight": partial(_linear, transposed=transposed)}
    names = dict.fromkeys(name for _, layer in weighted if isinstance(layer, LoraExperts) for name in layer.factors())
    return {f"{path}.{name}": partial(_experts, name=name) for name in names}


def _linear(x_TI: Tensor, weight: Tensor, weighted: Weighted, *, transposed: bool) -> Tensor:
    """[T, O] by the adapters' own layers; a bias would only be added on both sides."""
    lent = nn.Parameter(weight, requires_grad=False)
    with ExitStack() as stack:
        for _, layer in weighted:
            stack.enter_context(lend(layer, lent, None))
        base_TO = base_product(x_TI, weight, None, transposed)
        return base_TO + sum_layers(weighted, (x_TI,), base_TO)


def _experts(x_TI: Tensor, weight_EOI: Tensor, weighted: Weighted, *, name: str) -> Tensor:
    """[E, T, O]: what every expert makes of all tokens."""
    output_ETO = x_TI @ weight_EOI.transpose(1, 2)
    for weight, layer in weighted:
        assert isinstance(layer, LoraExperts)
        if (own := layer.factors().get(name)) is not None:
            lowered_ETR = x_TI @ own.lora_A.transpose(1, 2)
            output_ETO = output_ETO + weight * own.scale * (lowered_ETR @ own.lora_B.transpose(1, 2))
    return output_ETO


def _difference(reference: Tensor, other: Tensor) -> float:
    largest = float(reference.abs().max())
    return float((reference - other).abs().max()) / largest if largest > 0 else 0.0
