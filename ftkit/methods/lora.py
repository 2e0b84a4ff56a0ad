"""`lora`: low-rank updates of linear layers (Hu et al. 2021, https://arxiv.org/abs/2106.09685), in peft's files."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from ftkit.methods.dora import row_norms
from ftkit.methods.files import LORA, BaseIdentity, lora_config, lora_section, read_adapter, trained_as, write_adapter
from ftkit.methods.lora_experts import (
    NESTED,
    ExpertsDelta,
    expert_layers,
    insert_experts,
    names_for_peft,
    saved_names,
    select_experts,
    stack_factors,
    to_peft,
)
from ftkit.methods.lora_init import INITIALISATIONS, Factors, zeros
from ftkit.methods.lora_layer import LoraLayer, insert_lora, stacked, weight_OI
from ftkit.methods.lora_saved import (
    MAGNITUDE,
    PREFIX,
    A,
    B,
    adapted_paths,
    low_rank_delta,
    path_of,
    rank_of,
    saved_experts,
    scale_of,
)
from ftkit.methods.new_rows import (
    INDICES,
    INSIDE,
    indices_for_peft,
    insert_saved_rows,
    load_rows,
    row_deltas,
    saved_rows,
    without_copies,
)
from ftkit.methods.saved_modules import (
    check_ties,
    paths_for_peft,
    saved_module_names,
    saved_parameters,
    tied_names,
    train_modules,
)
from ftkit.methods.targets import check_patterns, select_targets, shortest_names
from ftkit.models.architecture import is_linear, linear_modules
from ftkit.models.quantization import quantization_of
from ftkit.models.soft_prompt import PARAMETER as PROMPT
from ftkit.models.token_rows import owners
from ftkit.recipe.method_schema import LoraMethod

name = "lora"
merge_refusal: str | None = None


def apply(model: PreTrainedModel, section: LoraMethod, *, seed: int) -> None:
    """Freeze the model and give every target its A and B."""
    layers = select_targets(model, section.targets, section.exclude, with_experts=bool(section.target_parameters))
    experts = select_experts(model, section.target_parameters)
    adapted = [*layers, *(f"{path}.{name}" for path, names in experts.items() for name in names)]
    check_patterns(section.rank_pattern, adapted, "rank_pattern")
    check_patterns(section.alpha_pattern, adapted, "alpha_pattern")
    _insert(model, layers, experts, section, seed=seed)


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
    for path, experts in expert_layers(model):
        factors = experts.factors()
        for name, begin in saved_names(path, list(factors)).items():
            own = gathered({"a": factors[name].lora_A, "b": factors[name].lora_B}, gather)
            a, b = to_peft(own["a"], own["b"])
            state |= {f"{PREFIX}{begin}{A[1:]}": a, f"{PREFIX}{begin}{B[1:]}": b}
    saved = saved_parameters(model)
    once = gathered({str(id(parameter)): parameter for parameter in saved.values()}, gather)
    state |= {f"{PREFIX}{name}": rows for name, rows in gathered(saved_rows(model), gather).items()}
    return state | {f"{PREFIX}{name}": once[str(id(parameter))] for name, parameter in saved.items()}


@torch.no_grad()
def load_state(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Copy A and B, lengths, and the modules trained in full back."""
    check_ties(model, state, prefix=PREFIX)
    state = without_copies(model, state, PREFIX)
    check_fits(trained_state(model), state)
    load_rows(model, state, PREFIX)
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
    for path, experts in expert_layers(model):
        factors = experts.factors()
        for name, begin in saved_names(path, list(factors)).items():
            a_ERI, b_EOR = saved_experts(state, begin, experts=len(factors[name].lora_A))
            factors[name].lora_A.copy_(a_ERI)
            factors[name].lora_B.copy_(b_EOR)


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
    if stacks := {path: list(experts.factors()) for path, experts in expert_layers(model)}:
        config["target_parameters"] = names_for_peft(model, stacks)
    # Without the flag peft warns that training would cut the tie; the file holds both names.
    config |= {"modules_to_save": saved_module_names(model) or None, "ensure_weight_tying": bool(tied_names(model))}
    if (indices := indices_for_peft(model)) is not None:
        config[INDICES] = indices
    state = trained_state(model) if state is None else state
    # What peft reads is a plain LoRA of twice the rank; to go on training it takes to know which half is frozen.
    frozen_half = section if section.init == "pissa" else None
    write_adapter(
        directory,
        config,
        state,
        identity,
        base_dtype=_base_dtype(model),
        base_quantization=quantization_of(model),
        trained_as=frozen_half,
    )


def load(model: PreTrainedModel, directory: Path) -> LoraMethod:
    """Load an adapter of ftkit or peft. Which layers it adapts is told by the names of its weights."""
    config, state = read_adapter(directory, peft_type=LORA)
    section = trained_as(directory) or _section_of_peft(model, config, directory)
    layers = linear_modules(model)
    experts = select_experts(model, section.target_parameters)
    paths = [path for path in adapted_paths(state) if path.removesuffix(f".{NESTED[:-1]}") not in experts]
    unknown = sorted(set(paths) - set(layers))
    if unknown or not (paths or experts):
        raise UserError(
            f"adapts {unknown[0]}, which is no linear layer of this model's blocks" if unknown else "adapts nothing",
            how="load it on the base model it was trained on",
            where=str(directory),
        )
    _insert(model, {path: layers[path] for path in paths}, experts, section, seed=None)
    insert_saved_rows(model, config, directory)
    load_state(model, state)
    return section


def deltas(model: PreTrainedModel, state: Mapping[str, Tensor], section: LoraMethod) -> Iterator[Delta]:
    """What every weight gains: layers in the order of `state`, experts, then weights that trained in full."""
    experts = select_experts(model, section.target_parameters)
    for path in adapted_paths(state):
        if path.removesuffix(f".{NESTED[:-1]}") in experts:
            continue
        module = model.get_submodule(path)
        assert is_linear(module), path
        yield f"{path}.weight", low_rank_delta(state, section, path, transposed=isinstance(module, Conv1D))
    for path, names in experts.items():
        for name, begin in saved_names(path, names).items():
            weight = f"{path}.{name}"
            factors = saved_experts(state, begin, experts=len(model.get_parameter(weight)))
            yield weight, ExpertsDelta(*factors, scale_of(section, weight))
    yield from row_deltas(model, state, PREFIX)
    replacements: dict[int, Replacement] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (tuned := state.get(f"{PREFIX}{name}")) is not None:
            yield name, replacements.setdefault(id(parameter), Replacement(tuned))


def learning_rate_factor(name: str, section: LoraMethod) -> float:
    """B learns `learning_rate_ratio` times as fast as everything else (LoRA+), a soft prompt at a rate of its own."""
    if name.endswith(PROMPT):
        return section.soft_prompt_learning_rate_ratio
    return section.learning_rate_ratio if name.endswith(".lora_B") else 1.0


def places(model: PreTrainedModel) -> tuple[str, ...]:
    """Every layer that `targets` names."""
    return ()


def notes(model: PreTrainedModel) -> tuple[str, ...]:
    """Which modules train because others that they are tied to do, and which rows of new tokens."""
    tied = tuple(f"{' and '.join(names)} are tied in this model: both train, as one" for names in tied_names(model))
    tables: dict[nn.Parameter, list[str]] = {}
    for path, owner in owners(model):
        tables.setdefault(owner.token_rows, []).append(path)
    new = (f"{len(rows)} new tokens: their rows of {' and '.join(paths)}" for rows, paths in tables.items())
    return *tied, *(f"{text} train{', as one: they are tied' if len(tables) == 1 else ''}" for text in new)


def keeps_base(section: LoraMethod) -> bool:
    """Yes, unless modules of the base train in full."""
    return not section.modules_to_save


@contextmanager
def disabled(model: PreTrainedModel) -> Iterator[None]:
    """The base model, while inside."""
    layers = [layer for _, layer in (*_layers(model), *expert_layers(model))]
    tables = [owner for _, owner in owners(model)]
    before, rows_before = [layer.lora_enabled for layer in layers], [owner.rows_enabled for owner in tables]
    try:
        for layer in layers:
            layer.lora_enabled = False
        for owner in tables:
            owner.rows_enabled = False
        yield
    finally:
        for owner, enabled in zip(tables, rows_before, strict=True):
            owner.rows_enabled = enabled
        for layer, enabled in zip(layers, before, strict=True):
            layer.lora_enabled = enabled


def named_weights(model: PreTrainedModel, state: Iterable[str], section: LoraMethod) -> dict[str, str]:
    """Name in a saved state -> name of the base weight that it belongs to."""
    of_experts = {
        f"{PREFIX}{begin}{part[1:]}": f"{path}.{name}"
        for path, names in select_experts(model, section.target_parameters).items()
        for name, begin in saved_names(path, names).items()
        for part in (A, B)
    }
    others = {key: _weight_of(key) for key in state if key not in of_experts}
    return others | of_experts


def _weight_of(key: str) -> str:
    if INSIDE in key:
        return f"{key.removeprefix(PREFIX).partition(INSIDE)[0]}.weight"
    return f"{path_of(key)}.weight" if key.endswith((A, B, MAGNITUDE)) else key.removeprefix(PREFIX)


def _section_of_peft(model: PreTrainedModel, config: Mapping[str, Any], directory: Path) -> LoraMethod:
    section = lora_section(config, directory)
    return section.model_copy(update={"modules_to_save": paths_for_peft(model, section.modules_to_save)})


def _base_dtype(model: PreTrainedModel) -> torch.dtype:
    """The precision of the frozen weights; `model.dtype` is that of the first one, which may train."""
    frozen = (p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point())
    return next(frozen, model.dtype)


def _insert(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Module],
    experts: Mapping[str, Sequence[str]],
    section: LoraMethod,
    *,
    seed: int | None,
) -> None:
    """Give every layer its factors: initial ones, or where `seed` is None zeros to load saved ones into."""
    assert not any(True for _ in _layers(model)), "the model has LoRA layers already"
    freeze(model)
    for path, module in layers.items():
        weight, rank, scale = weight_OI(module), rank_of(section, path), scale_of(section, path)
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
    for path, names in experts.items():
        module = model.get_submodule(path)
        insert_experts(module, {name: _expert_factors(module, path, name, section, seed) for name in names})
    train_modules(model, section.modules_to_save, [*layers, *experts])


def _expert_factors(
    module: nn.Module, path: str, name: str, section: LoraMethod, seed: int | None
) -> tuple[Factors, float]:
    """What the experts' weight `name` begins with, and its scale."""
    whole = f"{path}.{name}"
    rank, scale = rank_of(section, whole), scale_of(section, whole)
    generator = None if seed is None else seeded_generator(seed, whole)

    def make(weight: Tensor) -> Factors:
        if generator is None:
            return zeros(weight, rank)
        return INITIALISATIONS[section.init](weight, rank, scale, generator)

    return stack_factors(module.get_parameter(name), make), scale


def _layers(model: PreTrainedModel) -> Iterator[tuple[str, LoraLayer]]:
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield path, module
