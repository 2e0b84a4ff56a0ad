"""Modules that train in full beside a LoRA: peft's `modules_to_save`, e.g. embeddings and head.

Their parameters train as float32 masters of themselves. Where the base ties two modules (embeddings and head), they
are one parameter and stay it: both train, and a file holds the weight under both names, since peft, which copies every
module that it saves, would leave the other one as it was.
"""

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ftkit.errors import UserError
from ftkit.methods.base import train_in_float32
from ftkit.methods.targets import matches_name, tower_of
from ftkit.models.quantization import quantization_of
from ftkit.models.soft_prompt import PARAMETER as PROMPT
from ftkit.models.token_rows import ROWS

KEY = ("method", "modules_to_save")


def train_modules(model: PreTrainedModel, names: Sequence[str], adapted: Iterable[str]) -> None:
    """Let every parameter of the modules called `names` train; names match as `targets` do, in the language model.

    Args:
        adapted: paths of the layers that have a LoRA.

    Raises:
        UserError: a name matches no module with weights, only some that no text reaches, or one that a LoRA adapts.
    """
    # A LoRA's own parameters lie in the layers that it adapts.
    paths = [path for path, module in model.named_modules() if path and next(module.parameters(), None) is not None]
    chosen = []
    for name in names:
        matched = [path for path in paths if matches_name(path, name)]
        if not matched:
            raise _unmatched(name, paths)
        in_language = [path for path in matched if tower_of(model, path) is None]
        if not in_language:
            what = f"{name} is only in {tower_of(model, matched[0])}, which no text reaches: it would not train"
            raise UserError(what, how="name modules of the language model", key=KEY)
        chosen += in_language
    for path in chosen:
        inside = [layer for layer in adapted if layer == path or layer.startswith(f"{path}.")]
        if inside:
            what = f"{path} trains in full, and method.targets adapts {inside[0]}"
            raise UserError(what, how="leave one of them out, with method.exclude or here", key=KEY)
    for path in chosen:
        module = model.get_submodule(path)
        if (quantization := quantization_of(module)) is not None:
            what = f"{path} is quantized ({quantization}), and a quantized weight cannot train in full"
            raise UserError(what, how="leave it out of modules_to_save, or model.quantization out", key=KEY)
        for parameter in module.parameters():
            train_in_float32(parameter)


def saved_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter that trains, of no LoRA, new token or prompt; a tied one under all of its names."""
    return {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad and not name.rpartition(".")[2].startswith(("lora_", ROWS, PROMPT))
    }


def saved_module_names(model: nn.Module) -> list[str]:
    """What peft is to be told: names of the modules that own these parameters, each of which it matches exactly."""
    paths = {name.rpartition(".")[0] for name in saved_parameters(model)}
    names = sorted({path.rpartition(".")[2] for path in paths})
    return names if set(paths_for_peft(model, names)) == paths else sorted(paths)


def paths_for_peft(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """The modules that peft takes for `names`: all whose path ends in one, be it in the middle of a component."""
    return tuple(path for path, _ in model.named_modules() if names and path.endswith(tuple(names)))


def tied_names(model: nn.Module) -> list[list[str]]:
    """The names of every saved parameter that has several."""
    by_parameter: dict[int, list[str]] = {}
    for name, parameter in saved_parameters(model).items():
        by_parameter.setdefault(id(parameter), []).append(name)
    return [names for names in by_parameter.values() if len(names) > 1]


def check_ties(model: nn.Module, state: Mapping[str, Tensor], *, prefix: str) -> None:
    """Check that a saved state has one value for all names of a tied parameter.

    Raises:
        UserError: it was trained with the tie cut, which this model cannot compute.
    """
    for names in tied_names(model):
        first, *others = (state.get(f"{prefix}{name}") for name in names)
        if not all(first is not None and other is not None and torch.equal(first, other) for other in others):
            raise UserError(
                f"its {' and '.join(names)} were trained apart, and this model ties them",
                how="merge it into its base with peft's merge_and_unload and use the merged model",
            )


def _unmatched(name: str, paths: Sequence[str]) -> UserError:
    there = Counter(path.rpartition(".")[2] for path in paths if not path.rpartition(".")[2].isdigit())
    close = difflib.get_close_matches(name, there, n=1)
    how = f"did you mean {close[0]}?" if close else f"there are {', '.join(there)}"
    return UserError(f"{name} is no module of this model that has weights", how=how, key=KEY)
