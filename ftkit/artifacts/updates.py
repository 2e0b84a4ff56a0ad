"""What adapters add to a base: folded into a weight, or at run time, layer by layer; two routes to the same model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ftkit.artifacts.adapters import WeightedAdapter
from ftkit.errors import CheckFailedError, UserError
from ftkit.methods import lora
from ftkit.methods.base import REPLACING, ComputeDelta, NewRows, OnDequantized, merged_weight
from ftkit.methods.files import LORA, read_adapter
from ftkit.methods.lora_experts import LoraExperts, insert_experts, summed_factors
from ftkit.models.load import BaseModel, load_config
from ftkit.models.multimodal import auto_class
from ftkit.models.quantization import quantizable


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter's own weights, apart from any base."""

    name: str
    """As the user wrote it."""
    weight: float
    layers: Mapping[str, nn.Module]
    """Path -> layer that computes base and adapter once it is lent the base's weight (`lend`)."""
    deltas: Mapping[str, ComputeDelta]
    """Name of a weight in the running model -> what merging at weight 1 adds to it."""

    @property
    def depends_on_weight(self) -> bool:
        """Whether what it adds depends on the base's weights (DoRA); what replaces them does not."""
        return any(delta.depends_on_weight for name, delta in self.deltas.items() if name not in self.replacements)

    @property
    def replacements(self) -> dict[str, ComputeDelta]:
        """Those of the deltas whose weight trained in full, or rows of it."""
        return {name: delta for name, delta in self.deltas.items() if isinstance(delta, REPLACING)}

    @property
    def new_tokens(self) -> list[int]:
        """Ids of the tokens whose rows trained."""
        return [int(token) for delta in self.deltas.values() if isinstance(delta, NewRows) for token in delta.ids_K]


@dataclass(frozen=True)
class Part:
    """What one adapter adds to one weight."""

    adapter: str
    weight: float
    delta: ComputeDelta


@dataclass(frozen=True)
class Update:
    """What all adapters add to one weight; a `ComputeDelta`."""

    parts: tuple[Part, ...]

    @property
    def depends_on_weight(self) -> bool:
        """Whether one of the parts does."""
        return any(part.delta.depends_on_weight for part in self.parts)

    def __call__(self, weight: Tensor) -> Tensor:
        """The sum of the parts, in their order, each computed from the base's float32 weight."""
        first, *others = self.parts
        total = first.delta(weight) * first.weight
        for part in others:
            total.add_(part.delta(weight) * part.weight)
        return total


def load_adapter(adapter: WeightedAdapter, base: BaseModel) -> LoadedAdapter:
    """Read an adapter of a base whose weights are not read.

    Raises:
        UserError: its files are damaged, or do not fit the base.
        CheckFailedError: one of its tensors would be left out.
    """
    skeleton = build_skeleton(base)
    section = lora.load(skeleton, adapter.directory)
    _, state = read_adapter(adapter.directory, peft_type=LORA)
    deltas = dict(lora.deltas(skeleton, state, section))
    named = lora.named_weights(skeleton, state, section)
    if lost := [key for key in state if named[key] not in deltas]:
        what = f"{lost[0]} of {adapter.directory} would go into no weight of the base"
        raise CheckFailedError(what, how="use the adapter without merging, and report this")
    paths = [path_of(name) for name, delta in deltas.items() if not isinstance(delta, REPLACING)]
    layers = {path: skeleton.get_submodule(path).eval() for path in paths}
    return LoadedAdapter(adapter.target.label, adapter.weight, layers, deltas)


def sum_updates(adapters: Sequence[LoadedAdapter]) -> dict[str, ComputeDelta]:
    """Name of a weight in the running model -> what all adapters add to it.

    Raises:
        UserError: a weight that trained in full would be scaled, or changed by another adapter too.
    """
    parts: dict[str, list[Part]] = {}
    for adapter in adapters:
        for name, delta in adapter.deltas.items():
            parts.setdefault(name, []).append(Part(adapter.name, adapter.weight, delta))
    return {name: _update(name, of_weight) for name, of_weight in parts.items()}


def _update(name: str, parts: Sequence[Part]) -> ComputeDelta:
    """Raises a UserError where a weight that trained in full would have to be scaled, added to or taken off."""
    replacing = [part for part in parts if isinstance(part.delta, REPLACING)]
    if not replacing:
        return Update(tuple(parts))
    # One takes the place of the base's weight, and of what others that are subtracted had put there.
    placed = [part for part in replacing if part.weight == 1.0]
    others = [part for part in parts if part not in placed]
    if len(placed) == 1 and all(part in replacing and part.weight == -1.0 for part in others):
        return placed[0].delta
    how_much = "rows of new tokens in {}" if isinstance(replacing[0].delta, NewRows) else "{} in full (modules_to_save)"
    what = f"{replacing[0].adapter} trained {how_much.format(path_of(name))}"
    if replacing[0].weight < 0 and len(parts) == 1:
        raise UserError(f"{what}: what it replaced is gone", how="use the base that it was merged into")
    raise UserError(what, how="merge it at weight 1, and with adapters that leave this module alone")


def dequantized_weights(skeleton: PreTrainedModel, quantization: str | None) -> dict[str, ComputeDelta]:
    """Name of every weight that `quantization` takes -> what turns it into what a quantised layer computes with."""
    if quantization is None:
        return {}
    return {f"{path}.weight": OnDequantized(quantization, None) for path in quantizable(skeleton)}


def on_dequantized(held: Mapping[str, ComputeDelta], updates: Mapping[str, ComputeDelta]) -> Mapping[str, ComputeDelta]:
    """The updates, added to what `dequantized_weights` gives, and what no update changes."""
    added = {
        name: OnDequantized(delta.quantization, updates.get(name))
        for name, delta in held.items()
        if isinstance(delta, OnDequantized)
    }
    return {**updates, **added}


def build_skeleton(base: BaseModel) -> PreTrainedModel:
    """The model with names, shapes and layers, but without numbers: each parameter shows one zero and takes no memory.

    It is on the CPU, not on the meta device, so that what an adapter puts into it is real.
    """
    config = load_config(base)
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(config).from_config(config, trust_remote_code=base.trust_remote_code)
    empty: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay one
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            nothing = torch.zeros(()).expand(parameter.shape)
            setattr(module, name, empty.setdefault(parameter, nn.Parameter(nothing, requires_grad=False)))
    return model


@contextmanager
def applied(model: PreTrainedModel, adapters: Sequence[LoadedAdapter]) -> Iterator[None]:
    """Inside, every adapted layer adds what each adapter's own layer makes of the same input: nothing is folded."""
    by_path: dict[str, list[tuple[float, nn.Module]]] = {}
    for adapter in adapters:
        for path, layer in adapter.layers.items():
            by_path.setdefault(path, []).append((adapter.weight, layer))
    with ExitStack() as stack:
        for adapter in adapters:
            for name, replacement in adapter.replacements.items():
                stack.enter_context(_replaced(model, name, replacement))
        for path, weighted in by_path.items():
            module = model.get_submodule(path)
            experts = [(weight, layer) for weight, layer in weighted if isinstance(layer, LoraExperts)]
            if not experts:
                for _, layer in weighted:
                    stack.enter_context(lend(layer, module.get_parameter("weight"), getattr(module, "bias", None)))
            hook = _computing(module, experts) if experts else _adding(weighted)
            handle = module.register_forward_hook(hook)
            stack.callback(handle.remove)
        yield


@contextmanager
def lend(layer: nn.Module, weight: nn.Parameter, bias: nn.Parameter | None) -> Iterator[None]:
    """Inside, `layer` computes with these in place of its own."""
    own = layer.get_parameter("weight"), getattr(layer, "bias", None)
    _set_weights(layer, weight, bias)
    try:
        yield
    finally:
        _set_weights(layer, *own)


@contextmanager
def _replaced(model: nn.Module, name: str, replacement: ComputeDelta) -> Iterator[None]:
    """Inside, the model computes with what takes the place of its parameter `name`."""
    path, _, own_name = name.rpartition(".")
    module, own = model.get_submodule(path), model.get_parameter(name)
    tuned = merged_weight(own.detach().float(), replacement).to(own)
    module.register_parameter(own_name, nn.Parameter(tuned, requires_grad=False))
    try:
        yield
    finally:
        module.register_parameter(own_name, own)


def sum_layers(weighted: Sequence[tuple[float, nn.Module]], inputs: tuple[Any, ...], base: Tensor) -> Tensor:
    """What adapters add to the output of a layer.

    Args:
        weighted: weight and layer of each adapter, the layers lent the base's weight.
        base: what the layer computes without adapters, which is part of what each of theirs computes.
    """
    total: Tensor = sum(weight * (layer(*inputs) - base) for weight, layer in weighted)
    return total


def path_of(weight_name: str) -> str:
    """Path of the layer that a weight belongs to."""
    return weight_name.rpartition(".")[0]


def _set_weights(layer: nn.Module, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
    layer.register_parameter("weight", weight)
    layer.register_parameter("bias", bias)


def _adding(weighted: Sequence[tuple[float, nn.Module]]) -> Callable[..., Tensor]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + sum_layers(weighted, inputs, output)

    return hook


def _computing(module: nn.Module, experts: Sequence[tuple[float, LoraExperts]]) -> Callable[..., Tensor]:
    """A hook that gives what a module of experts computes with the updates of several adapters."""
    adapted = deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})
    adapted = insert_experts(adapted, summed_factors(experts))

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        result: Tensor = adapted(*inputs)
        return result

    return hook
