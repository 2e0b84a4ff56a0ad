"""The proof module by module, for models of which two do not fit in memory.

Every adapted layer gets random input: what base and adapter make of it is compared with what the merged weight does.

Shape suffixes: T tokens, I input width, O output width.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ftkit.artifacts.layout import Layout
from ftkit.artifacts.proof import MAX_RELATIVE_DIFFERENCE
from ftkit.artifacts.updates import LoadedAdapter, lend, sum_layers
from ftkit.artifacts.weights import TensorFiles
from ftkit.errors import CheckFailedError
from ftkit.methods.base import ComputeDelta, merged_weight, seeded_generator
from ftkit.methods.lora_layer import base_product

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
) -> ModulesProof:
    """Compare the outputs of every adapted layer, one of them in memory at a time."""
    by_path: dict[str, list[tuple[float, nn.Module]]] = {}
    for adapter in adapters:
        for path, layer in adapter.layers.items():
            by_path.setdefault(path, []).append((adapter.weight, layer))
    exact: dict[str, float] = {}
    stored = 0.0
    with TensorFiles(source) as before, TensorFiles(merged) as after:
        for path, weighted in by_path.items():
            name, layer = f"{path}.weight", weighted[0][1]
            weight = layout.read(before, name).float()
            transposed = isinstance(layer, Conv1D)
            width = weight.shape[0 if transposed else 1]
            x_TI = torch.randn(TOKENS, width, generator=seeded_generator(0, path))
            adapted_TO = _adapted(weighted, weight, x_TI, transposed)
            folded = merged_weight(weight, updates[name])
            exact[path] = _difference(adapted_TO, base_product(x_TI, folded, None, transposed))
            written = layout.read(after, name).float()
            stored = max(stored, _difference(adapted_TO, base_product(x_TI, written, None, transposed)))
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


def _adapted(weighted: Sequence[tuple[float, nn.Module]], weight: Tensor, x_TI: Tensor, transposed: bool) -> Tensor:
    """What base and adapters compute, by the adapters' own layers; a bias would only be added on both sides."""
    lent = nn.Parameter(weight, requires_grad=False)
    with ExitStack() as stack:
        for _, layer in weighted:
            stack.enter_context(lend(layer, lent, None))
        base_TO = base_product(x_TI, weight, None, transposed)
        return base_TO + sum_layers(weighted, (x_TI,), base_TO)


def _difference(reference: Tensor, other: Tensor) -> float:
    largest = float(reference.abs().max())
    return float((reference - other).abs().max()) / largest if largest > 0 else 0.0
