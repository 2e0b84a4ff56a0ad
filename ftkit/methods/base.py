"""What every way to train can do, as one protocol, and the few functions that all of them share.

A method is a module of functions (`methods/lora.py` ...) and keeps no state: everything it adds lives in the model.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ftkit.errors import Problem, UserError
from ftkit.methods.files import BaseIdentity
from ftkit.models.quantization import quantized_layers, round_trip, storage_bytes
from ftkit.models.token_rows import with_rows

Gather = Callable[[Tensor], Tensor]
"""Turns a shard into its full tensor, e.g. `distributed.whole`; a collective."""


class ComputeDelta(Protocol):
    """What merging adds to a base weight, from that weight: both float32, in the weight's own layout."""

    @property
    def depends_on_weight(self) -> bool:
        """Whether another base weight would gain something else: what was added once can then not be subtracted."""

    def __call__(self, weight: Tensor, /) -> Tensor:
        """What is added to `weight`."""


Delta = tuple[str, ComputeDelta]
"""Name of a base weight, and what to add to it."""


@dataclass(frozen=True, eq=False)
class Replacement:
    """The `ComputeDelta` of a weight that trained in full: merging puts `tuned` in its place."""

    tuned: Tensor

    @property
    def depends_on_weight(self) -> bool:
        """Yes: the old weight goes altogether."""
        return True

    def __call__(self, weight: Tensor) -> Tensor:
        """The difference, up to rounding; see `merged_weight`."""
        return self.tuned.float() - weight


@dataclass(frozen=True, eq=False)
class NewRows:
    """The `ComputeDelta` of a table whose rows of some tokens trained by themselves; it grows where it lacked them."""

    rows_KD: Tensor
    ids_K: Tensor
    """int64, ascending."""

    @property
    def depends_on_weight(self) -> bool:
        """Yes: the old rows go."""
        return True

    def __call__(self, weight: Tensor) -> Tensor:
        """The difference, up to rounding, from a weight that is followed by zeros; see `merged_weight`."""
        merged = merged_weight(weight, self)
        merged[: len(weight)] -= weight
        return merged


REPLACING = (Replacement, NewRows)
"""Those that put something in the place of a weight, and cannot be scaled."""


@dataclass(frozen=True, eq=False)
class OnDequantized:
    """The `ComputeDelta` of a weight that was quantised in training: what it then computed with, and an update."""

    quantization: str
    update: ComputeDelta | None
    """None where no adapter changes it."""

    @property
    def depends_on_weight(self) -> bool:
        """Yes: each weight has scales of its own."""
        return True

    def __call__(self, weight: Tensor) -> Tensor:
        """The difference, up to rounding; see `merged_weight`."""
        return merged_weight(weight, self) - weight


def merged_weight(weight: Tensor, delta: ComputeDelta) -> Tensor:
    """The weight after merging, float32. A replaced one is the tuned one bit for bit, as W + (W' - W) need not be."""
    if isinstance(delta, OnDequantized):
        weight = round_trip(weight, delta.quantization)
        return weight if delta.update is None else merged_weight(weight, delta.update)
    if isinstance(delta, NewRows):
        return with_rows(weight, delta.rows_KD.to(weight), delta.ids_K.to(weight.device))
    if isinstance(delta, Replacement):
        # A copy: where a base stores a tied weight twice, safetensors would refuse the same tensor under two names.
        return delta.tuned.to(torch.float32, copy=True)
    return weight + delta(weight)


class Method(Protocol):
    """One way to train. The functions of a method's module have these signatures; `section` is its recipe section."""

    name: str
    """Its `type` in the recipe."""
    merge_refusal: str | None
    """Why its result cannot be folded into the base weights, and what to do instead; None where it can."""

    def apply(self, model: PreTrainedModel, section: Any, *, seed: int) -> None:
        """Insert the method's modules in place, freeze the base and let exactly the method's parameters train.

        Trained parameters are float32. The initial values follow from `seed` and the modules' paths alone, not from
        the order of modules, other random draws, device or base dtype. Called once on an unsharded model, before DDP,
        `fully_shard` or `torch.compile`.

        Raises:
            UserError: the model has no place for it, with the recipe key at fault.
        """

    def trained_state(self, model: PreTrainedModel, *, gather: Gather | None = None) -> dict[str, Tensor]:
        """What is saved: name in the saved file -> tensor; it may share memory with the model.

        Where `gather` is given, every process must call this.
        """

    def load_state(self, model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
        """Copy the tensors of `trained_state` into a model that the method was applied to and that is not sharded.

        Raises:
            UserError: names or shapes do not agree; missing and unexpected ones are named.
        """

    def save(
        self,
        model: PreTrainedModel,
        section: Any,
        directory: Path,
        identity: BaseIdentity,
        *,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write `state` (default: `trained_state(model)`) and what is needed to load it. Called by one process.

        The same state gives the same bytes of weights.
        """

    def load(self, model: PreTrainedModel, directory: Path) -> Any:
        """Apply the method to a plain base model as `directory` says, load its weights and return its section.

        Raises:
            UserError: the files are damaged, of another method or base, or use something that ftkit lacks.
        """

    def deltas(self, model: PreTrainedModel, state: Mapping[str, Tensor], section: Any) -> Iterator[Delta]:
        """What merging adds to which base weight; `model` tells the layout and may be on the meta device.

        A tied weight comes under all of its names, with the same object. What trained in full is a `Replacement`.
        Repeating a computation on the same machine gives the same bits. Not to be called where `merge_refusal` is set.
        """

    def learning_rate_factor(self, name: str, section: Any) -> float:
        """What the learning rate of the trained parameter `name` of the model is multiplied by."""

    def places(self, model: PreTrainedModel) -> tuple[str, ...]:
        """Where modules were inserted, in words; empty where the recipe says it, or nothing was."""

    def notes(self, model: PreTrainedModel) -> tuple[str, ...]:
        """What the user should know of what trains, beside the numbers."""

    def keeps_base(self, section: Any) -> bool:
        """Whether the base's own weights stay as they are, so that `disabled(model)` computes the base model."""

    def disabled(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Inside this context the model computes as the base does; only where `keeps_base`."""


# ------------------------------------------------------------------------------------------- shared by the methods


def freeze(model: nn.Module) -> None:
    """No parameter trains."""
    model.requires_grad_(False)


def train_in_float32(parameter: nn.Parameter) -> None:
    """Let a parameter train, as a float32 master of itself; the object stays, and with it tying."""
    # Contiguous: a parameter that only shows its shape gets memory to train in.
    parameter.data = parameter.data.float().contiguous()
    parameter.requires_grad_(True)


@contextmanager
def switched_off(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside this context the `enabled` of these inserted modules is False, and the model computes without them."""
    before = [(module, module.enabled) for module in modules]
    try:
        for module, _ in before:
            module.enabled = False  # type: ignore[assignment]  # a plain attribute of ftkit's own modules
        yield
    finally:
        for module, enabled in before:
            module.enabled = enabled


def seeded_generator(seed: int, path: str) -> torch.Generator:
    """A CPU generator for the initial values of the module at `path`: another module's presence changes nothing."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def gathered(tensors: Mapping[str, Tensor], gather: Gather | None) -> dict[str, Tensor]:
    """The tensors without their gradient history, whole."""
    return {name: t.detach() if gather is None else gather(t.detach()) for name, t in tensors.items()}


@torch.no_grad()
def copy_strictly(targets: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy `state` into `targets`; both must have the same names and shapes.

    Raises:
        UserError: they do not; nothing was copied.
    """
    check_fits(targets, state)
    for name, target in targets.items():
        target.copy_(state[name])


def check_fits(targets: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Check that `state` has the names and shapes of `targets`.

    Raises:
        UserError: it does not, one line for each kind of difference.
    """
    differences = {
        "lack": [name for name in targets if name not in state],
        "do not fit this model": [name for name in state if name not in targets],
        "have another shape": [
            f"{name} {list(state[name].shape)} in place of {list(target.shape)}"
            for name, target in targets.items()
            if name in state and state[name].shape != target.shape
        ],
    }
    problems = [
        Problem(f"the saved weights {kind}: {_first(names)}", how="load them on the base model they were trained on")
        for kind, names in differences.items()
        if names
    ]
    if problems:
        raise UserError.of(problems)


def _first(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


# ------------------------------------------------------------------------------------------------------ the report


@dataclass(frozen=True)
class Precision:
    """Parameters of one precision."""

    dtype: torch.dtype
    trained: bool
    parameters: int
    """Weights, of which a byte of a quantised one holds several."""
    quantization: str | None = None
    """What they are kept in where `dtype` is only that of the codes."""
    bytes: int = 0
    """Scales of quantised weights included."""

    @property
    def name(self) -> str:
        """In words: bfloat16, nf4."""
        return self.quantization or str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Report:
    """What a run prints about its parameters before it starts; shared (tied) weights count once."""

    trainable_parameters: int
    total_parameters: int
    """Inserted parameters included."""
    saved_bytes: int
    """Size on disk of what is saved, file headers aside."""
    precision: tuple[Precision, ...]
    """Trained parts first, then by number of parameters."""
    places: tuple[str, ...] = ()
    """Where the method inserted modules, in words."""

    @property
    def share(self) -> float:
        """Trainable share of all parameters."""
        return self.trainable_parameters / self.total_parameters


def report(
    model: nn.Module, method: Method | None = None, *, beside: Mapping[str, Tensor] = MappingProxyType({})
) -> Report:
    """Count a model's parameters; under `fully_shard` the global numbers.

    Args:
        method: tells where it inserted modules, and what is saved, where that is not just what trains.
        beside: what is saved of a soft prompt beside it.
    """
    quantized = {layer.weight: layer for _, layer in quantized_layers(model)}
    counts: Counter[tuple[torch.dtype, bool, str | None]] = Counter()
    sizes: Counter[tuple[torch.dtype, bool, str | None]] = Counter()
    for parameter in model.parameters():
        layer = quantized.get(parameter)
        kind = parameter.dtype, parameter.requires_grad, layer.quantization if layer is not None else None
        counts[kind] += layer.in_features * layer.out_features if layer else parameter.numel()
        sizes[kind] += storage_bytes(layer) if layer else parameter.numel() * parameter.itemsize
    places: tuple[str, ...] = ()
    saved: Iterable[Tensor] = (parameter for parameter in model.parameters() if parameter.requires_grad)
    if method is not None:
        assert isinstance(model, PreTrainedModel)
        saved, places = (*method.trained_state(model).values(), *beside.values()), method.places(model)
    parts = [Precision(kind[0], kind[1], number, kind[2], sizes[kind]) for kind, number in counts.items()]
    return Report(
        trainable_parameters=sum(part.parameters for part in parts if part.trained),
        total_parameters=sum(part.parameters for part in parts),
        saved_bytes=sum(tensor.nbytes for tensor in saved),
        precision=tuple(sorted(parts, key=lambda part: (not part.trained, -part.parameters, str(part.dtype)))),
        places=places,
    )
