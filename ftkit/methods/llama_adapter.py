"""`llama_adapter`: a prompt in each of the upper layers, behind a gate that starts at zero (LLaMA-Adapter, Zhang et al.
2023, https://arxiv.org/abs/2303.16199).

N C + 1 parameters a layer, for N virtual tokens and width C; `models/attention_prompts.py` says what they compute. The
gate is one number a layer, as in the paper and in peft. With the gate at zero the model starts as the base, the gates
have a gradient from the first step on, and the prompts from the second.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ftkit.errors import UserError
from ftkit.methods.base import Delta, Gather, copy_strictly, freeze, gathered, seeded_generator, switched_off
from ftkit.methods.files import BaseIdentity, read_adapter, write_adapter
from ftkit.methods.lora_saved import PREFIX as MODEL
from ftkit.methods.prompt_files import LLAMA_ADAPTER, llama_adapter_config, prompt_section
from ftkit.models.architecture import Part, describe
from ftkit.models.attention import attend_to_prompts
from ftkit.models.attention_prompts import GATED, GatedPrompt
from ftkit.models.quantization import quantization_of
from ftkit.recipe.method_schema import LlamaAdapterMethod

LAYERS_WITHOUT = 2
"""The lowest layers, which the paper leaves out: 30 of 32 layers of the 7B model have prompts."""

name = "llama_adapter"
merge_refusal: str | None = (
    "gated prompts cannot be merged: they change no weight, attention looks at them beside the tokens; serve them with "
    "peft and the base model, or give `ftkit export --format adapter` to whoever does"
)


def apply(model: PreTrainedModel, section: LlamaAdapterMethod, *, seed: int) -> None:
    """Freeze the model and give the upper layers their prompts."""

    def drawn(path: str, shape: tuple[int, int]) -> Tensor:
        return torch.randn(shape, generator=seeded_generator(seed, path))

    _insert(model, section, drawn)


def trained_state(model: PreTrainedModel, *, gather: Gather | None = None) -> dict[str, Tensor]:
    """Prompts and gates, under peft's names."""
    return gathered(_trained(model), gather)


def load_state(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Copy prompts and gates back."""
    copy_strictly(_trained(model), state)


def save(
    model: PreTrainedModel,
    section: LlamaAdapterMethod,
    directory: Path,
    identity: BaseIdentity,
    *,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write what peft reads, where it knows the model: Llama's and Mistral's."""
    state = trained_state(model) if state is None else state
    paths = [path for path, _ in _prompts(model)]
    config = llama_adapter_config(section.num_virtual_tokens, len(paths), paths[0].rpartition(".")[2])
    dtype = describe(model).embeddings.get_parameter("weight").dtype
    quantization = quantization_of(model)
    write_adapter(directory, config, state, identity, base_dtype=dtype, base_quantization=quantization)


def load(model: PreTrainedModel, directory: Path) -> LlamaAdapterMethod:
    """Load gated prompts of ftkit or peft."""
    config, state = read_adapter(directory, peft_type=LLAMA_ADAPTER)
    section = prompt_section(LlamaAdapterMethod, config, directory)
    _insert(model, section, lambda path, shape: torch.zeros(shape))
    load_state(model, state)
    return section


def deltas(model: PreTrainedModel, state: Mapping[str, Tensor], section: LlamaAdapterMethod) -> Iterator[Delta]:
    """Refused: see `merge_refusal`."""
    raise AssertionError(merge_refusal)


def learning_rate_factor(name: str, section: LlamaAdapterMethod) -> float:
    """All learn at the recipe's rate."""
    return 1.0


def places(model: PreTrainedModel) -> tuple[str, ...]:
    """In which layers."""
    prompts = list(_prompts(model))
    rows = prompts[0][1].adaption_prompt.shape[1]
    return (f"{rows} gated vectors in each of the last {len(prompts)} layers ({prompts[0][0]} to {prompts[-1][0]})",)


def notes(model: PreTrainedModel) -> tuple[str, ...]:
    """None."""
    return ()


def keeps_base(section: LlamaAdapterMethod) -> bool:
    """Yes."""
    return True


def disabled(model: PreTrainedModel) -> AbstractContextManager[None]:
    """The base model, while inside."""
    return switched_off(prompt for _, prompt in _prompts(model))


def _insert(
    model: PreTrainedModel, section: LlamaAdapterMethod, initial: Callable[[str, tuple[int, int]], Tensor]
) -> None:
    """Give the last layers prompts that start from `initial(path, shape)`.

    Raises:
        UserError: the model has fewer such layers, or none whose keys and values have projections of their own.
    """
    assert not any(True for _ in _prompts(model)), "the model has gated prompts already"
    layers = _attention_layers(model)
    count = max(1, len(layers) - LAYERS_WITHOUT) if section.num_layers is None else section.num_layers
    if count > len(layers):
        raise UserError(
            f"the model has {len(layers)} attention layers, fewer than {count}",
            how=f"set at most {len(layers)}",
            key=("method", "num_layers"),
        )
    freeze(model)
    for layer in layers[-count:]:
        projection = layer.module.get_submodule("k_proj")
        shape = (section.num_virtual_tokens, _input_width(projection))
        device = next(projection.parameters()).device
        layer.module.add_module(GATED, GatedPrompt(initial(layer.path, shape).to(device)))
    attend_to_prompts(model)


def _attention_layers(model: PreTrainedModel) -> list[Part]:
    """Attention modules that have projections of keys and of values; a hybrid model has others besides."""
    architecture = describe(model)
    found = []
    for index, block in enumerate(architecture.blocks):
        for path, module in block.named_children():
            if hasattr(module, "k_proj") and hasattr(module, "v_proj"):
                found.append(Part(f"{architecture.blocks_path}.{index}.{path}", module))
    if not found:
        raise UserError(
            f"{type(model).__name__} projects queries, keys and values in one, and a gated prompt needs the last two",
            how="set method.type: prefix or soft_prompt",
            key=("method", "type"),
        )
    return found


def _input_width(projection: nn.Module) -> int:
    assert isinstance(projection.in_features, int), "linear, quantized or not"
    return projection.in_features


def _prompts(model: PreTrainedModel) -> Iterator[tuple[str, GatedPrompt]]:
    for path, module in model.named_modules():
        if isinstance(module, GatedPrompt):
            yield path.removesuffix(f".{GATED}"), module


def _trained(model: PreTrainedModel) -> dict[str, Tensor]:
    return {f"{MODEL}{path}.{name}": p for path, prompt in _prompts(model) for name, p in prompt.named_parameters()}
