"""What the tests of all methods share: sections, inputs, a loss."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ftkit.methods.table import METHODS
from ftkit.recipe.schema import AdapterMethod, FullMethod, LoraMethod, Section
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
}
CASES = [(architecture, case) for architecture in CONFIGS for case in SECTIONS]


def method_of(case: str):
    """The method of a key of SECTIONS."""
    return METHODS[SECTIONS[case].type]


def applied(architecture: str, case: str, *, seed: int = 1, **overrides) -> PreTrainedModel:
    """A tiny model with the method of `case`."""
    model = tiny_model(architecture, **overrides)
    method_of(case).apply(model, SECTIONS[case], seed=seed)
    return model


def inputs() -> Tensor:
    """int64 [2, 12]"""
    return torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Logits of `inputs()`, without dropout."""
    return model.eval()(input_ids=inputs()).logits


def loss(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    """Mean next-token loss."""
    ids = inputs() if ids is None else ids
    return F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


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
