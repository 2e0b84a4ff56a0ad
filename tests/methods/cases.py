"""What the tests of all methods share: sections, inputs, a loss."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ftkit.methods.table import METHODS
from ftkit.models.precision import compute_in
from ftkit.models.soft_prompt import prompt_ids
from ftkit.recipe.schema import (
    AdapterMethod,
    FullMethod,
    LlamaAdapterMethod,
    LoraMethod,
    PrefixMethod,
    Section,
    SoftPromptMethod,
)
from tests.tiny_models import CONFIGS, tiny_model

SECTIONS: dict[str, Section] = {
    "full": FullMethod(type="full"),
    "lora": LoraMethod(type="lora", rank=4, alpha=7.0),
    "lora-pissa": LoraMethod(type="lora", rank=4, alpha=7.0, init="pissa"),
    "lora-dora": LoraMethod(type="lora", rank=4, alpha=7.0, dora=True),
    # Llama, Gemma and GPT-2 tie it to the embeddings.
    "lora-modules": LoraMethod(type="lora", rank=4, alpha=7.0, modules_to_save=("lm_head",)),
    "adapter": AdapterMethod(type="adapter", bottleneck=6),
    "adapter-norms": AdapterMethod(type="adapter", bottleneck=6, non_linearity="tanh", train_norms=True),
    # A sixth of the width, rounded down: 5.
    "adapter-parallel": AdapterMethod(type="adapter", reduction_factor=6.0, insertion="parallel"),
    "soft_prompt": SoftPromptMethod(type="soft_prompt", num_virtual_tokens=5),
    "prefix": PrefixMethod(type="prefix", num_virtual_tokens=5),
    "llama_adapter": LlamaAdapterMethod(type="llama_adapter", num_virtual_tokens=5, num_layers=1),
}
REFUSED = {
    ("qwen3_5", "prefix"): "its layer 0 (linear_attention) keeps no keys and values of its tokens",
    **{(fused, "llama_adapter"): "queries, keys and values in one" for fused in ("gpt2", "phi3", "gpt_neox")},
}
"""(architecture, case) -> why the method does not go on it."""
ARCHITECTURES = (*CONFIGS, "phi3", "gpt_neox", "opt", "mixtral", "qwen3_5")
"""Those that every method is promised on."""
CASES = [(name, case) for name in ARCHITECTURES for case in SECTIONS if (name, case) not in REFUSED]
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def section_of(architecture: str, case: str) -> Section:
    """The recipe's section: Mixtral's feed-forward is a stack of experts, which only LoRA's `target_parameters` name.

    PiSSA and DoRA have no such update: there its attention alone is adapted.
    """
    section = SECTIONS[case]
    if architecture != "mixtral" or not isinstance(section, LoraMethod):
        return section
    plain = section.init != "pissa" and not section.dora
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    return section.model_copy(update={"targets": attention, "target_parameters": EXPERTS if plain else ()})


def computing(architecture: str, dtype: torch.dtype, change: Callable[[PreTrainedModel], object]) -> PreTrainedModel:
    """A tiny model with a base in `dtype`, as a run has it after `change`: what trains is cast where it is used."""
    model = tiny_model(architecture).to(dtype)
    change(model)
    if dtype != torch.float32:
        compute_in(model, dtype)
    return model


def method_of(case: str):
    """The method of a key of SECTIONS."""
    return METHODS[SECTIONS[case].type]


def applied(architecture: str, case: str, *, seed: int = 1, **overrides) -> PreTrainedModel:
    """A tiny model with the method of `case`."""
    model = tiny_model(architecture, **overrides)
    method_of(case).apply(model, section_of(architecture, case), seed=seed)
    return model


def inputs() -> Tensor:
    """int64 [2, 12]"""
    return torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Logits of `inputs()`, without dropout; those of a soft prompt before them are left out."""
    return model.eval()(input_ids=with_prompt(model, inputs())).logits[:, len(prompt_ids(model)) :]


def with_prompt(model: nn.Module, ids: Tensor) -> Tensor:
    """The ids of the model's soft prompt, where it has one, before those of every row."""
    before = torch.tensor(prompt_ids(model), dtype=torch.int64)
    return torch.cat([before.expand(len(ids), -1), ids], dim=1)


def loss(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    """Mean next-token loss."""
    ids = inputs() if ids is None else ids
    after = len(prompt_ids(model))
    logits = model(input_ids=with_prompt(model, ids)).logits[:, after:-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter that trains."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def perturb(model: nn.Module, seed: int = 3) -> None:
    """Noise on every trained parameter, as if it had trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained(model).values():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def batches(count: int) -> Iterator[Tensor]:
    """`count` batches that repeat after four, int64 [2, 12]: random, so only what comes again can be learned."""
    generator = torch.Generator().manual_seed(11)
    different = torch.randint(0, 256, (4, 2, 12), generator=generator)
    for index in range(count):
        yield different[index % 4]


def main(directory: Path) -> None:
    """A line for every case that was saved under `directory`: whether its logits are those saved beside it."""
    for architecture, case in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            saved = directory / str(dtype) / architecture / case
            model = computing(
                architecture, dtype, lambda fresh, case=case, saved=saved: method_of(case).load(fresh, saved)
            )
            equal = torch.equal(logits(model), torch.load(saved / "logits.pt"))
            print("equal" if equal else f"{architecture}-{case}-{dtype}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
