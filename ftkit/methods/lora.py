"""`lora`: low-rank updates of linear layers (Hu et al. 2021, https://arxiv.org/abs/2106.09685), in peft's files."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ftkit.errors import UserError
from ftkit.methods.base import (
    Delta,
    Gather,
    Replacement,
    check_fits,
    freeze,
    gathered,
    seeded_generator,
)
from ftkit.methods.dora import gains, row_norms
from ftkit.methods.files import LORA, BaseIdentity, lora_config, lora_section, read_adapter, trained_as, write_adapter
from ftkit.methods.lora_init import INITIALISATIONS, zeros
from ftkit.methods.lora_layer import LoraLayer, insert_lora, stacked, weight_OI
from ftkit.methods.saved_modules import (
    check_ties,
    paths_for_peft,
    saved_names,
    saved_parameters,
    tied_names,
    train_modules,
)
from ftkit.methods.targets import check_patterns, matching_value, select_targets, shortest_names
from ftkit.models.architecture import is_linear, linear_modules
from ftkit.recipe.method_schema import LoraMethod

name = "lora"
merge_refusal: str | None = None

PREFIX, A, B, MAGNITUDE = "base_model.model.", ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
"""peft's names in the file: base_model.model.PATH.lora_A.weight."""


@dataclass(frozen=True, eq=False)
class LowRankDelta:
    """The `ComputeDelta` of an adapted weight: scale * B A, and under DoRA what the lengths of its rows make of it."""

    a_RI: Tensor
    b_OR: Tensor
    magnitude_O: Tensor | None
    """Trained lengths of the weight's rows (DoRA); else None."""
    scale: float
    transposed: bool = False
    """Whether the weight is [I, O]."""

    def __call__(self, weight: Tensor) -> Tensor:
        """The difference in the layout of `weight`."""
        # The product first, then the scale, as peft does: whoever recomputes it so gets the same bits.
        delta_OI = (self.b_OR.float() @ self.a_RI.float()) * self.scale
        if self.magnitude_O is not None:
            weight_OI = weight.t() if self.transposed else weight
            tuned_OI = weight_OI + delta_OI
            gains_O = gains(self.magnitude_O.float(), torch.linalg.vector_norm(tuned_OI, dim=1))
            delta_OI = gains_O[:, None] * tuned_OI - weight_OI
        return delta_OI.t() if self.transposed else delta_OI


def apply(model: PreTrainedModel, section: LoraMethod, *, seed: int) -> None:
    """Freeze the model and give every target its A and B."""
    layers = select_targets(model, section.targets, section.exclude)
    check_patterns(section.rank_pattern, layers, "rank_pattern")
    check_patterns(section.alpha_pattern, layers, "alpha_pattern")
    _insert(model, layers, section, seed=seed)


def trained_state(model: PreTrainedModel, *, gather: Gather | None = None) -> dict[str, Tensor]:
    """A and B of every layer, under peft's names, with DoRA the lengths of its rows, and the modules trained in full.

    Of a PiSSA [A; A0] and [B, -B0], a plain LoRA of twice the rank.
    """
    state: dict[str, Tensor] = {}
    for path, layer in _layers(model):
        whole = gathered({name: p for name, p in layer.named_parameters() if name.startswith("lora_")}, gather)
        a_RI, b_OR = stacked(whole["lora_A"], whole["lora_B"], whole.get("lora_A0"), whole.get("lora_B0"))
        state |= {f"{PREFIX}{path}{A}": a_RI, f"{PREFIX}{path}{B}": b_OR}
        if "lora_magnitude" in whole:
            state[f"{PREFIX}{path}{MAGNITUDE}"] = whole["lora_magnitude"]
    saved = saved_parameters(model)
    once = gathered({str(id(parameter)): parameter for parameter in saved.values()}, gather)
    return state | {f"{PREFIX}{name}": once[str(id(parameter))] for name, parameter in saved.items()}


@torch.no_grad()
def load_state(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Copy A and B, lengths, and the modules trained in full back."""
    check_ties(model, state, prefix=PREFIX)
    check_fits(trained_state(model), state)
    for name, parameter in saved_parameters(model).items():
        parameter.copy_(state[f"{PREFIX}{name}"])
    for path, layer in _layers(model):
        a_RI, b_OR, rank = state[f"{PREFIX}{path}{A}"], state[f"{PREFIX}{path}{B}"], layer.lora_A.shape[0]
        layer.lora_A.copy_(a_RI[:rank])
        layer.lora_B.copy_(b_OR[:, :rank])
        if layer.lora_A0 is not None and layer.lora_B0 is not None:
            layer.lora_A0.copy_(a_RI[rank:])
            layer.lora_B0.copy_(-b_OR[:, rank:])
        if layer.lora_magnitude is not None:
            layer.lora_magnitude.copy_(state[f"{PREFIX}{path}{MAGNITUDE}"])


def save(
    model: PreTrainedModel,
    section: LoraMethod,
    directory: Path,
    identity: BaseIdentity,
    *,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write what peft's `PeftModel.from_pretrained` reads."""
    layers = dict(_layers(model))
    transposed = any(isinstance(layer, Conv1D) for layer in layers.values())
    config = lora_config(section, shortest_names(model, layers), fan_in_fan_out=transposed)
    # Without the flag peft warns that training would cut the tie; the file holds both names.
    config |= {"modules_to_save": saved_names(model) or None, "ensure_weight_tying": bool(tied_names(model))}
    state = trained_state(model) if state is None else state
    # What peft reads is a plain LoRA of twice the rank; to go on training it takes to know which half is frozen.
    frozen_half = section if section.init == "pissa" else None
    write_adapter(directory, config, state, identity, base_dtype=_base_dtype(model), trained_as=frozen_half)


def load(model: PreTrainedModel, directory: Path) -> LoraMethod:
    """Load an adapter of ftkit or peft. Which layers it adapts is told by the names of its weights."""
    config, state = read_adapter(directory, peft_type=LORA)
    section = trained_as(directory) or _section_of_peft(model, config, directory)
    layers = linear_modules(model)
    paths = adapted_paths(state)
    unknown = sorted(set(paths) - set(layers))
    if unknown or not paths:
        raise UserError(
            f"adapts {unknown[0]}, which is no linear layer of this model's blocks" if unknown else "adapts nothing",
            how="load it on the base model it was trained on",
            where=str(directory),
        )
    _insert(model, {path: layers[path] for path in paths}, section, seed=None)
    load_state(model, state)
    return section


def deltas(model: PreTrainedModel, state: Mapping[str, Tensor], section: LoraMethod) -> Iterator[Delta]:
    """What every weight gains: those that are adapted, in the order of `state`, then those that trained in full."""
    for path, delta in low_rank_deltas(state, section):
        module = model.get_submodule(path)
        assert is_linear(module), path
        yield f"{path}.weight", replace(delta, transposed=isinstance(module, Conv1D))
    replacements: dict[int, Replacement] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (tuned := state.get(f"{PREFIX}{name}")) is not None:
            yield name, replacements.setdefault(id(parameter), Replacement(tuned))


def low_rank_deltas(state: Mapping[str, Tensor], section: LoraMethod) -> Iterator[tuple[str, LowRankDelta]]:
    """Path of every adapted layer and what its weight [O, I] gains: what an adapter's files say without a model.

    Raises:
        UserError: a layer's A and B are not a pair.
    """
    for path in adapted_paths(state):
        a_RI, b_OR, magnitude_O = (state.get(f"{PREFIX}{path}{part}") for part in (A, B, MAGNITUDE))
        if a_RI is None or b_OR is None or a_RI.shape[0] != b_OR.shape[1]:
            raise UserError(f"the saved A and B of {path} do not belong together", how="restore the adapter's files")
        yield path, LowRankDelta(a_RI, b_OR, magnitude_O, _scale(section, path))


@dataclass(frozen=True, eq=False)
class SavedLora:
    """What the files of an adapter say without a model."""

    section: LoraMethod
    deltas: dict[str, LowRankDelta]
    """Path of every adapted layer -> what its weight [O, I] gains."""
    in_full: tuple[str, ...]
    """Names of the parameters that trained in full besides."""


def read_saved(directory: Path) -> SavedLora:
    """Read an adapter of ftkit or peft whose base is not at hand.

    Raises:
        UserError: the files are damaged, of another method, or use something that ftkit lacks.
    """
    config, state = read_adapter(directory, peft_type=LORA)
    section = trained_as(directory) or lora_section(config, directory)
    others = [name.removeprefix(PREFIX) for name in state if not name.endswith((A, B, MAGNITUDE))]
    if unknown := [name for name in others if ".lora_" in name]:
        what = f"holds {unknown[0]}, which is of no linear layer"
        raise UserError(what, how="merge it into its base with peft's merge_and_unload", where=str(directory))
    return SavedLora(section, dict(low_rank_deltas(state, section)), tuple(others))


def learning_rate_factor(name: str, section: LoraMethod) -> float:
    """B learns `learning_rate_ratio` times as fast as everything else (LoRA+)."""
    return section.learning_rate_ratio if name.endswith(".lora_B") else 1.0


def places(model: PreTrainedModel) -> tuple[str, ...]:
    """Every layer that `targets` names."""
    return ()


def notes(model: PreTrainedModel) -> tuple[str, ...]:
    """Which modules train because others that they are tied to do."""
    return tuple(f"{' and '.join(names)} are tied in this model: both train, as one" for names in tied_names(model))


def keeps_base(section: LoraMethod) -> bool:
    """Yes, unless modules of the base train in full."""
    return not section.modules_to_save


@contextmanager
def disabled(model: PreTrainedModel) -> Iterator[None]:
    """The base model, while inside."""
    layers = [layer for _, layer in _layers(model)]
    before = [layer.lora_enabled for layer in layers]
    try:
        for layer in layers:
            layer.lora_enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.lora_enabled = enabled


def adapted_paths(state: Iterable[str]) -> list[str]:
    """Paths of the layers that have weights of LoRA among the names of a saved state."""
    parts = [
        (key.removeprefix(PREFIX), suffix) for key in state for suffix in (A, B, MAGNITUDE) if key.endswith(suffix)
    ]
    return list(dict.fromkeys(name.removesuffix(suffix) for name, suffix in parts))


def _section_of_peft(model: PreTrainedModel, config: Mapping[str, Any], directory: Path) -> LoraMethod:
    section = lora_section(config, directory)
    return section.model_copy(update={"modules_to_save": paths_for_peft(model, section.modules_to_save)})


def _base_dtype(model: PreTrainedModel) -> torch.dtype:
    """The precision of the frozen weights; `model.dtype` is that of the first one, which may train."""
    return next((parameter.dtype for parameter in model.parameters() if not parameter.requires_grad), model.dtype)


def _insert(model: PreTrainedModel, layers: Mapping[str, nn.Module], section: LoraMethod, *, seed: int | None) -> None:
    """Give every layer its factors: initial ones, or where `seed` is None zeros to load saved ones into."""
    assert not any(True for _ in _layers(model)), "the model has LoRA layers already"
    freeze(model)
    for path, module in layers.items():
        weight, rank, scale = weight_OI(module), _rank(section, path), _scale(section, path)
        if seed is None:
            factors = zeros(weight, rank)
        else:
            factors = INITIALISATIONS[section.init](weight, rank, scale, seeded_generator(seed, path))
        start = (factors[0].clone(), factors[1].clone()) if section.init == "pissa" else None
        magnitude = None
        if section.dora:
            a_RI, b_OR = stacked(*factors, *(start or (None, None)))
            magnitude = row_norms(weight, a_RI.to(weight.device), b_OR.to(weight.device), scale)
        insert_lora(module, factors, scale=scale, dropout=section.dropout, start=start, magnitude=magnitude)
    train_modules(model, section.modules_to_save, layers)


def _rank(section: LoraMethod, path: str) -> int:
    return matching_value(section.rank_pattern, path, section.rank)


def _scale(section: LoraMethod, path: str) -> float:
    """What B A is multiplied by in the layer at `path`."""
    rank, alpha = _rank(section, path), matching_value(section.alpha_pattern, path, section.alpha)
    return alpha / math.sqrt(rank) if section.rank_stabilized else alpha / rank


def _layers(model: PreTrainedModel) -> Iterator[tuple[str, LoraLayer]]:
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield path, module
