"""LoRA of experts that a model keeps as one tensor [E, O, I] (Mixtral and its kin in transformers 5).

Every expert has an A and a B of its own, of the same rank. peft calls this `target_parameters` and adds s * B A to the
whole stack in every forward; here an expert's update is applied to the tokens that are sent to it, beside its frozen
weight, so that nothing of the stack's size is formed. The router is no such tensor and is never adapted.

Shape suffixes: N tokens, E experts, I input width, O output width, R rank, K experts a token is sent to.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ftkit.errors import UserError
from ftkit.methods.lora_init import Factors
from ftkit.methods.lora_layer import LowRankLinear
from ftkit.models.architecture import stacked_experts

KEY = ("method", "target_parameters")
FACTORS = "lora_"
"""The factors of `gate_up_proj` are the child `lora_gate_up_proj` of its module."""
NESTED = "base_layer."
"""peft wraps a module once for each of its parameters, the first one innermost: this goes before its names."""
PROJECTIONS = ("gate_up_proj", "down_proj")
"""The weights of every module that can be adapted, in the order in which it owns them."""


class ExpertFactors(nn.Module):
    """A and B of one stack of experts."""

    def __init__(self, a_ERI: Tensor, b_EOR: Tensor, scale: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(a_ERI)
        self.lora_B = nn.Parameter(b_EOR)
        self.scale = scale


class LoraExperts(nn.Module):
    """What `insert_experts` puts before a module's own class: two projections an expert, some of them with a LoRA."""

    lora_enabled: bool

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[N, I] and twice [N, K] -> [N, I]"""
        if not self.lora_enabled:
            output: Tensor = super().forward(hidden_states, top_k_index, top_k_weights)
            return output
        output = torch.zeros_like(hidden_states)
        experts = len(self.get_parameter("down_proj"))
        for expert in top_k_index.unique().tolist():
            # One past the last stands for experts that other processes have.
            if expert < experts:
                token, place = torch.where(top_k_index == expert)
                apply_gate: Any = self._apply_gate
                gated = apply_gate(self._project("gate_up_proj", expert, hidden_states[token]))
                result = self._project("down_proj", expert, gated) * top_k_weights[token, place, None]
                output.index_add_(0, token, result.to(output.dtype))
        return output

    def factors(self) -> dict[str, ExpertFactors]:
        """Name of an adapted weight -> its factors, in the order in which the module owns the weights."""
        names = [name for name, _ in self.named_parameters(recurse=False)]
        children = {name: getattr(self, f"{FACTORS}{name}", None) for name in names}
        return {name: child for name, child in children.items() if isinstance(child, ExpertFactors)}

    def _project(self, name: str, expert: int, x_NI: Tensor) -> Tensor:
        weight_OI, own = self.get_parameter(name)[expert], getattr(self, f"{FACTORS}{name}", None)
        if own is None:
            return F.linear(x_NI, weight_OI.to(x_NI.dtype))
        a_RI, b_OR = own.lora_A[expert], own.lora_B[expert]
        product: Tensor = LowRankLinear.apply(
            x_NI, weight_OI, None, a_RI, b_OR, None, None, None, own.scale, 1.0, False, None
        )
        return product


@dataclass(frozen=True, eq=False)
class ExpertsDelta:
    """The `ComputeDelta` of a stack of experts."""

    a_ERI: Tensor
    b_EOR: Tensor
    scale: float

    @property
    def depends_on_weight(self) -> bool:
        """No."""
        return False

    def __call__(self, weight: Tensor) -> Tensor:
        """scale * B A of every expert, [E, O, I]."""
        return torch.bmm(self.b_EOR.float(), self.a_ERI.float()) * self.scale


def select_experts(model: PreTrainedModel, names: Sequence[str]) -> dict[str, list[str]]:
    """Path of a module -> those of its stacked weights that `names` choose, in the module's order.

    Args:
        names: last components of the weights' paths, as peft matches `target_parameters`.

    Raises:
        UserError: a name matches no stack of experts, or one that this layer cannot compute.
    """
    there = stacked_experts(model) if names else []
    for name in names:
        if not any(_matches(weight, name) for weight in there):
            known = ", ".join(dict.fromkeys(".".join(weight.split(".")[-2:]) for weight in there))
            how = f"there are {known}" if known else "this model has none: choose linear layers with targets"
            raise UserError(f"{name} matches no stack of experts", how=how, key=KEY)
    chosen: dict[str, list[str]] = {}
    for weight in there:
        if any(_matches(weight, name) for name in names):
            path, _, own = weight.rpartition(".")
            if not _computable(model.get_submodule(path)):
                what = f"the experts of this model ({type(model.get_submodule(path)).__name__}) cannot be adapted yet"
                raise UserError(what, how="leave target_parameters out", key=KEY)
            chosen.setdefault(path, []).append(own)
    return chosen


def named_experts(path: str, names: Sequence[str]) -> list[str]:
    """Which weights the module at `path` has adapted if it is one of experts, where there is no model to ask."""
    return [own for own in PROJECTIONS if any(_matches(f"{path}.{own}", name) for name in names)]


def names_for_peft(model: PreTrainedModel, chosen: Mapping[str, Sequence[str]]) -> list[str]:
    """Names that peft matches to exactly the chosen weights: two components where these suffice, else whole paths."""
    weights = {f"{path}.{name}" for path, names in chosen.items() for name in names}
    short = sorted({".".join(weight.split(".")[-2:]) for weight in weights})
    matched = {name for name, _ in model.named_parameters() if any(_matches(name, one) for one in short)}
    return short if matched == weights else sorted(weights)


def saved_names(path: str, names: Sequence[str]) -> dict[str, str]:
    """Name of an adapted weight of the module at `path` -> what peft's names of its factors begin with.

    Args:
        names: all adapted weights of the module, in its order.
    """
    return {name: f"{path}.{NESTED * (len(names) - 1 - index)}" for index, name in enumerate(names)}


def to_peft(a_ERI: Tensor, b_EOR: Tensor) -> Factors:
    """A and B as peft lays them out: [E * R, I] and [O, R * E]."""
    if a_ERI.ndim < 3:
        # A process that does not write a checkpoint has empty tensors without dimensions here.
        return a_ERI, b_EOR
    return a_ERI.flatten(0, 1), b_EOR.permute(1, 2, 0).flatten(1)


def from_peft(a: Tensor, b: Tensor, experts: int) -> Factors:
    """A [E, R, I] and B [E, O, R] from peft's [E * R, I] and [O, R * E]."""
    return a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts)).permute(2, 0, 1)


def insert_experts(module: nn.Module, factors: Mapping[str, tuple[Factors, float]]) -> LoraExperts:
    """Let a module of experts compute with updates: it changes its class in place, as in `insert_lora`.

    Args:
        factors: name of a weight -> A [E, R, I] and B [E, O, R] to start from, and the scale of B A.
    """
    for name, ((a_ERI, b_EOR), scale) in factors.items():
        device = module.get_parameter(name).device
        module.add_module(f"{FACTORS}{name}", ExpertFactors(a_ERI.to(device), b_EOR.to(device), scale))
    base = type(module)
    # The name stays: transformers and others tell kinds of module by it.
    module.__class__ = type(base.__name__, (LoraExperts, base), {"__module__": __name__})
    assert isinstance(module, LoraExperts)
    module.lora_enabled = True
    return module


def summed_factors(weighted: Sequence[tuple[float, LoraExperts]]) -> dict[str, tuple[Factors, float]]:
    """Name of a weight -> factors and scale of one update that is the weighted sum of several layers'.

    What an expert computes is not linear in its weights: updates are added up before, outputs cannot be after.
    """
    names = dict.fromkeys(name for _, layer in weighted for name in layer.factors())
    summed: dict[str, tuple[Factors, float]] = {}
    for name in names:
        parts = [(weight, layer.factors()[name]) for weight, layer in weighted if name in layer.factors()]
        a_ERI = torch.cat([part.lora_A.detach() for _, part in parts], dim=1)
        b_EOR = torch.cat([part.lora_B.detach() * (weight * part.scale) for weight, part in parts], dim=2)
        summed[name] = (a_ERI, b_EOR), 1.0
    return summed


def expert_layers(model: nn.Module) -> Iterator[tuple[str, LoraExperts]]:
    """Path and module of everything that `insert_experts` changed."""
    for path, module in model.named_modules():
        if isinstance(module, LoraExperts):
            yield path, module


def stack_factors(weight_EOI: Tensor, make: Callable[[Tensor], Factors]) -> Factors:
    """A [E, R, I] and B [E, O, R] from what `make` gives for the weight of each expert."""
    factors = [make(weight_OI) for weight_OI in weight_EOI]
    return torch.stack([a_RI for a_RI, _ in factors]), torch.stack([b_OR for _, b_OR in factors])


def _matches(weight: str, name: str) -> bool:
    return weight == name or weight.endswith(f".{name}")


def _computable(module: Any) -> bool:
    """Whether its experts are two plain projections with a gate between them: gate and up as one weight [E, O, I]."""
    plain = not any(getattr(module, name, True) for name in ("is_transposed", "has_bias", "has_post_expert_norm"))
    gated = all(getattr(module, name, False) for name in ("has_gate", "is_concatenated"))
    return plain and gated and all(hasattr(module, name) for name in PROJECTIONS)
