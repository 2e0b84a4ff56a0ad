"""`full`: every weight trains, as float32 masters; the result is an ordinary model directory."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ftkit.errors import UserError
from ftkit.methods.base import Delta, Gather, copy_strictly, gathered, train_in_float32
from ftkit.methods.files import BaseIdentity
from ftkit.models.quiet import quiet_transformers
from ftkit.recipe.method_schema import FullMethod

name = "full"
merge_refusal: str | None = (
    "a fully trained model has nothing to merge: its directory is the whole model; use it as it is"
)


def apply(model: PreTrainedModel, section: FullMethod, *, seed: int) -> None:
    """Let every parameter train. Tied weights are one parameter and stay it."""
    for parameter in model.parameters():
        train_in_float32(parameter)


def trained_state(model: PreTrainedModel, *, gather: Gather | None = None) -> dict[str, Tensor]:
    """The model's whole state under its own names; a tied weight once, under its first name."""
    return gathered(_state(model), gather)


def load_state(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Copy a whole state back; tied weights follow."""
    copy_strictly({name: tensor.detach() for name, tensor in _state(model).items()}, state)


def save(
    model: PreTrainedModel,
    section: FullMethod,
    directory: Path,
    identity: BaseIdentity,
    *,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model directory (config, generation config, safetensors) in the precision of `state`."""
    state = trained_state(model) if state is None else state
    quiet_transformers()
    model.save_pretrained(directory, state_dict={name: tensor.contiguous() for name, tensor in state.items()})


def load(model: PreTrainedModel, directory: Path) -> FullMethod:
    """Take over the weights of a model directory, as float32 masters."""
    section = FullMethod(type="full")
    apply(model, section, seed=0)
    quiet_transformers()
    # Through transformers, since its files need not carry the names that the model has in memory.
    loaded: Any = type(model).from_pretrained(
        directory, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    saved, info = loaded
    if info["missing_keys"]:
        what = f"lacks weights of {type(model).__name__}: {', '.join(sorted(info['missing_keys'])[:4])}"
        raise UserError(what, how="load it on the base model it was trained on", where=str(directory))
    load_state(model, trained_state(saved))
    return section


def deltas(model: PreTrainedModel, state: Mapping[str, Tensor], section: FullMethod) -> Iterator[Delta]:
    """Refused: see `merge_refusal`."""
    raise AssertionError(merge_refusal)


def learning_rate_factor(name: str, section: FullMethod) -> float:
    """All learn at the same rate."""
    return 1.0


def places(model: PreTrainedModel) -> tuple[str, ...]:
    """Nothing is inserted."""
    return ()


def notes(model: PreTrainedModel) -> tuple[str, ...]:
    """None."""
    return ()


def keeps_base(section: FullMethod) -> bool:
    """No: the base is what trains."""
    return False


def disabled(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Refused: the base is gone."""
    raise AssertionError("full training keeps no base; load it beside")


def _state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and persistent buffers, the first name of each tensor only."""
    seen: set[int] = set()
    state = {}
    # keep_vars: the parameters themselves, whose identity tells tied ones.
    for key, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[key] = tensor
    return state
