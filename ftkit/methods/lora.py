"""`lora`: low-rank updates of linear layers (Hu et al. 2021, https://arxiv.org/abs/2106.09685), in peft's files."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ftkit.errors import UserError
from ftkit.methods.base import ComputeDelta, Delta, Gather, check_fits, freeze, gathered, seeded_generator
from ftkit.methods.dora import gains, row_norms
from ftkit.methods.files import LORA, BaseIdentity, lora_config, lora_section, read_adapter, trained_as, write_adapter
from ftkit.methods.lora_init import INITIALISATIONS, zeros
from ftkit.methods.lora_layer import LoraLayer, insert_lora, stacked, weight_OI
from ftkit.methods.targets import check_patterns, matching_value, select_targets, shortest_names
from ftkit.models.architecture import is_linear, linear_modules
from ftkit.recipe.method_schema import LoraMethod

name = "lora"
merge_refusal: str | None = None

PREFIX, A, B, MAGNITUDE = "base_model.model.", ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
"""peft's names in the file: base_model.model.PATH.lora_A.weight."""


def apply(model: PreTrainedModel, section: LoraMethod, *, seed: int) -> None:
    """Freeze the model and give every target its A and B."""
    layers = select_targets(model, section.targets, section.exclude)
    check_patterns(section.rank_pattern, layers, "rank_pattern")
    check_patterns(section.alpha_pattern, layers, "alpha_pattern")
    _insert(model, layers, section, seed=seed)


def trained_state(model: PreTrainedModel, *, gather: Gather | None = None) -> dict[str, Tensor]:
    """A and B of every layer, under peft's names, and with DoRA the lengths of its rows.

    Of a PiSSA [A; A0] and [B, -B0], a plain LoRA of twice the rank.
    """
    state: dict[str, Tensor] = {}
    for path, layer in _layers(model):
        whole = gathered({name: p for name, p in layer.named_parameters() if name.startswith("lora_")}, gather)
        a_RI, b_OR = stacked(whole["lora_A"], whole["lora_B"], whole.get("lora_A0"), whole.get("lora_B0"))
        state |= {f"{PREFIX}{path}{A}": a_RI, f"{PREFIX}{path}{B}": b_OR}
        if "lora_magnitude" in whole:
            state[f"{PREFIX}{path}{MAGNITUDE}"] = whole["lora_magnitude"]
    return state


@torch.no_grad()
def load_state(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Copy A and B, and lengths, back."""
    check_fits(trained_state(model), state)
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
    state = trained_state(model) if state is None else state
    # What peft reads is a plain LoRA of twice the rank; to go on training it takes to know which half is frozen.
    frozen_half = section if section.init == "pissa" else None
    write_adapter(directory, config, state, identity, base_dtype=model.dtype, trained_as=frozen_half)


def load(model: PreTrainedModel, directory: Path) -> LoraMethod:
    """Load an adapter of ftkit or peft. Which layers it adapts is told by the names of its weights."""
    config, state = read_adapter(directory, peft_type=LORA)
    section = trained_as(directory) or lora_section(config, directory)
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
    """What every adapted weight gains, in the order of `state`."""
    for path in adapted_paths(state):
        module = model.get_submodule(path)
        assert is_linear(module), path
        a_RI, b_OR, magnitude_O = (state.get(f"{PREFIX}{path}{part}") for part in (A, B, MAGNITUDE))
        assert a_RI is not None, path
        assert b_OR is not None, path
        yield f"{path}.weight", _delta(a_RI, b_OR, magnitude_O, _scale(section, path), isinstance(module, Conv1D))


def learning_rate_factor(name: str, section: LoraMethod) -> float:
    """B learns `learning_rate_ratio` times as fast as everything else (LoRA+)."""
    return section.learning_rate_ratio if name.endswith(".lora_B") else 1.0


def keeps_base(section: LoraMethod) -> bool:
    """Yes: nothing of the base trains."""
    return True


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
    names = (key.removeprefix(PREFIX) for key in state)
    return list(dict.fromkeys(key.removesuffix(A).removesuffix(B).removesuffix(MAGNITUDE) for key in names))


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


def _delta(a_RI: Tensor, b_OR: Tensor, magnitude_O: Tensor | None, scale: float, transposed: bool) -> ComputeDelta:
    def compute(weight: Tensor) -> Tensor:
        # The product first, then the scale, as peft does: whoever recomputes it so gets the same bits.
        delta_OI = (b_OR.float() @ a_RI.float()) * scale
        if magnitude_O is not None:
            weight_OI = weight.t() if transposed else weight
            tuned_OI = weight_OI + delta_OI
            gains_O = gains(magnitude_O.float(), torch.linalg.vector_norm(tuned_OI, dim=1))
            delta_OI = gains_O[:, None] * tuned_OI - weight_OI
        return delta_OI.t() if transposed else delta_OI

    return compute
