"""What the files of a LoRA say by themselves, without a model: names in peft's format, factors, updates."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ftkit.errors import UserError
from ftkit.methods.dora import gains
from ftkit.methods.files import LORA, lora_section, read_adapter, trained_as
from ftkit.methods.lora_experts import NESTED, ExpertsDelta, from_peft, named_experts, saved_names
from ftkit.methods.lora_init import Factors
from ftkit.methods.new_rows import INSIDE
from ftkit.methods.targets import matching_value
from ftkit.recipe.method_schema import LoraMethod

PREFIX, A, B, MAGNITUDE = "base_model.model.", ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
"""peft's names in the file: base_model.model.PATH.lora_A.weight."""


@dataclass(frozen=True, eq=False)
class LowRankDelta:
    """The `ComputeDelta` of a LoRA."""

    a_RI: Tensor
    b_OR: Tensor
    magnitude_O: Tensor | None
    scale: float
    transposed: bool
    """Whether the weight is [I, O]."""

    @property
    def depends_on_weight(self) -> bool:
        """With DoRA, which takes the weight's direction and gives it another length."""
        return self.magnitude_O is not None

    def __call__(self, weight: Tensor) -> Tensor:
        """scale * B A; with DoRA m * V / |V| - W."""
        # The product first, then the scale, as peft does: whoever recomputes it so gets the same bits.
        delta_OI = (self.b_OR.float() @ self.a_RI.float()) * self.scale
        if self.magnitude_O is not None:
            weight_OI = weight.t() if self.transposed else weight
            tuned_OI = weight_OI + delta_OI
            gains_O = gains(self.magnitude_O.float(), torch.linalg.vector_norm(tuned_OI, dim=1))
            delta_OI = gains_O[:, None] * tuned_OI - weight_OI
        return delta_OI.t() if self.transposed else delta_OI


@dataclass(frozen=True, eq=False)
class SavedLora:
    """An adapter as its files hold it."""

    section: LoraMethod
    deltas: dict[str, LowRankDelta | ExpertsDelta]
    """Path of every adapted layer, name of every adapted stack of experts -> what its weight [O, I] gains."""
    in_full: tuple[str, ...]
    """Names of the parameters that trained in full besides."""


def read_saved(directory: Path) -> SavedLora:
    """Read an adapter of ftkit or peft whose base is not at hand.

    Raises:
        UserError: the files are damaged, of another method, or use something that ftkit lacks.
    """
    config, state = read_adapter(directory, peft_type=LORA)
    section = trained_as(directory) or lora_section(config, directory)
    others = [
        name.removeprefix(PREFIX) for name in state if not name.endswith((A, B, MAGNITUDE)) and INSIDE not in name
    ]
    if unknown := [name for name in others if ".lora_" in name]:
        what = f"holds {unknown[0]}, which is of no linear layer"
        raise UserError(what, how="merge it into its base with peft's merge_and_unload", where=str(directory))
    deltas = dict(_saved_delta(state, section, path) for path in adapted_paths(state))
    return SavedLora(section, deltas, tuple(others))


def low_rank_delta(state: Mapping[str, Tensor], section: LoraMethod, path: str, *, transposed: bool) -> LowRankDelta:
    """What the weight of the layer at `path` gains.

    Raises:
        UserError: its A and B are not a pair.
    """
    a_RI, b_OR = _factors(state, path)
    magnitude_O = state.get(f"{PREFIX}{path}{MAGNITUDE}")
    return LowRankDelta(a_RI, b_OR, magnitude_O, scale_of(section, path), transposed)


def expert_by_expert(delta: ExpertsDelta) -> list[LowRankDelta]:
    """The updates of a stack's experts, each on its own."""
    pairs = zip(delta.a_ERI, delta.b_EOR, strict=True)
    return [LowRankDelta(a_RI, b_OR, None, delta.scale, transposed=False) for a_RI, b_OR in pairs]


def saved_experts(state: Mapping[str, Tensor], begin: str, *, experts: int) -> Factors:
    """A [E, R, I] and B [E, O, R] of a stack; `begin` is what the names of its factors begin with (`saved_names`)."""
    return from_peft(state[f"{PREFIX}{begin}{A[1:]}"], state[f"{PREFIX}{begin}{B[1:]}"], experts)


def adapted_paths(state: Iterable[str]) -> list[str]:
    """Paths of the layers that have weights of LoRA among the names of a saved state."""
    return list(dict.fromkeys(path_of(key) for key in state if key.endswith((A, B, MAGNITUDE))))


def path_of(key: str) -> str:
    """Path of the layer that a LoRA's tensor in a saved state belongs to."""
    name = key.removeprefix(PREFIX)
    return next(name.removesuffix(part) for part in (A, B, MAGNITUDE) if name.endswith(part))


def rank_of(section: LoraMethod, path: str) -> int:
    """Rank of the layer at `path`."""
    return matching_value(section.rank_pattern, path, section.rank)


def scale_of(section: LoraMethod, path: str) -> float:
    """What B A is multiplied by in the layer at `path`."""
    rank, alpha = rank_of(section, path), matching_value(section.alpha_pattern, path, section.alpha)
    return alpha / math.sqrt(rank) if section.rank_stabilized else alpha / rank


def _saved_delta(
    state: Mapping[str, Tensor], section: LoraMethod, path: str
) -> tuple[str, LowRankDelta | ExpertsDelta]:
    """What is at `path` in the file: a layer, or a stack of experts, whose A has the rows of all of them."""
    module = path.removesuffix(f".{NESTED[:-1]}")
    names = {
        begin: name for name, begin in saved_names(module, named_experts(module, section.target_parameters)).items()
    }
    if (name := names.get(f"{path}.")) is not None:
        weight = f"{module}.{name}"
        (a, b), rank = _factors(state, path), rank_of(section, weight)
        if len(a) > rank and len(a) % rank == 0:
            return weight, ExpertsDelta(*from_peft(a, b, len(a) // rank), scale_of(section, weight))
    return path, low_rank_delta(state, section, path, transposed=False)


def _factors(state: Mapping[str, Tensor], path: str) -> Factors:
    a_RI, b_OR = state.get(f"{PREFIX}{path}{A}"), state.get(f"{PREFIX}{path}{B}")
    if a_RI is None or b_OR is None or a_RI.shape[0] != b_OR.shape[1]:
        raise UserError(f"the saved A and B of {path} do not belong together", how="restore the adapter's files")
    return a_RI, b_OR
