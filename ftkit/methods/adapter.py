"""`adapter`: bottleneck adapters (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751, figure 2 and section 2.1).

    h' = h + f(h D^T + d) U^T + u        D [m, width], U [width, m]: 2md + d + m parameters at width d

Two a block, each on what a sublayer is about to write to the residual stream: after the attention's output projection
and after the feed-forward output, in both cases before a post-norm (Gemma) and before the residual sum. GPT-2's dropout
on these outputs comes after the first adapter (it follows the projection inside the attention module) and before the
second (it is the last part of `mlp`).

An adapter is a child module `adapter` of the module whose output it changes, called by a forward hook. So the base
keeps its classes and the names of its weights, which a wrapper would change, and any feed-forward class will do, which
a replacement of linear layers would not; a hook runs alike under checkpointing, DDP, `fully_shard` and `torch.compile`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ftkit.methods.base import Delta, Gather, copy_strictly, freeze, gathered, seeded_generator, train_in_float32
from ftkit.methods.files import (
    BOTTLENECK,
    BaseIdentity,
    bottleneck_config,
    bottleneck_section,
    read_adapter,
    write_adapter,
)
from ftkit.models.architecture import block_parts, describe, linear_shape, norm_modules
from ftkit.recipe.method_schema import AdapterMethod

name = "adapter"
merge_refusal: str | None = (
    "bottleneck adapters cannot be merged: they have a non-linearity, so no weight of the base can stand for them; "
    "use the adapter directory with `ftkit eval`, or hand it on with `ftkit export --format adapter`"
)

CHILD = "adapter"
"""Name of the child module; files call its weights PATH.adapter.down.weight etc."""

NON_LINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class BottleneckAdapter(nn.Module):
    """h + up(f(down(h))), the identity at first.

    `down` starts as torch's linear layers do (Kaiming-uniform, a = sqrt(5)) and `up` at zero, as A and B of a LoRA: the
    tuned model starts exactly as the base, and `up` has a gradient from the first step on, `down` from the second. The
    paper draws both from N(0, 0.01^2), which is near the identity; its scale would not follow the width.

    The projections are plain linear layers: where the model computes in another precision than float32,
    `models/precision.py` casts their weights as it does all trained ones.
    """

    def __init__(self, width: int, bottleneck: int, non_linearity: str, generator: torch.Generator) -> None:
        super().__init__()
        self.down = nn.utils.skip_init(nn.Linear, width, bottleneck)
        self.up = nn.utils.skip_init(nn.Linear, bottleneck, width)
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5, generator=generator)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.non_linearity = non_linearity
        self.enabled = True

    def forward(self, h: Tensor) -> Tensor:
        """[..., width] -> [..., width]"""
        if not self.enabled:
            return h
        output: Tensor = h + self.up(NON_LINEARITIES[self.non_linearity](self.down(h)))
        return output


def apply(model: PreTrainedModel, section: AdapterMethod, *, seed: int) -> None:
    """Freeze the model and give every block its two adapters; with `train_norms` the norms train too."""
    assert not any(True for _ in _adapters(model)), "the model has bottleneck adapters already"
    freeze(model)
    for block in block_parts(describe(model)):
        # Both outputs have the width of the residual stream, which the projection tells.
        width = linear_shape(block.output_projection.module)[1]
        for part in (block.output_projection, block.feed_forward):
            path = f"{part.path}.{CHILD}"
            adapter = BottleneckAdapter(width, section.bottleneck, section.non_linearity, seeded_generator(seed, path))
            part.module.add_module(CHILD, adapter.to(next(part.module.parameters()).device))
            part.module.register_forward_hook(_adapt)
    if section.train_norms:
        for norm in norm_modules(model).values():
            for parameter in norm.parameters():
                train_in_float32(parameter)


def trained_state(model: PreTrainedModel, *, gather: Gather | None = None) -> dict[str, Tensor]:
    """The adapters, and the norms where they train, under the model's own names."""
    return gathered(_trained(model), gather)


def load_state(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Copy adapters, and norms, back."""
    copy_strictly(_trained(model), state)


def save(
    model: PreTrainedModel,
    section: AdapterMethod,
    directory: Path,
    identity: BaseIdentity,
    *,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter directory: peft's file names, ftkit's own `peft_type`."""
    state = trained_state(model) if state is None else state
    write_adapter(directory, bottleneck_config(section), state, identity, base_dtype=model.dtype)


def load(model: PreTrainedModel, directory: Path) -> AdapterMethod:
    """Load bottleneck adapters of ftkit."""
    config, state = read_adapter(directory, peft_type=BOTTLENECK)
    section = bottleneck_section(config, directory)
    apply(model, section, seed=0)
    load_state(model, state)
    return section


def deltas(model: PreTrainedModel, state: Mapping[str, Tensor], section: AdapterMethod) -> Iterator[Delta]:
    """Refused: see `merge_refusal`."""
    raise AssertionError(merge_refusal)


def learning_rate_factor(name: str, section: AdapterMethod) -> float:
    """All learn at the same rate."""
    return 1.0


def notes(model: PreTrainedModel) -> tuple[str, ...]:
    """None."""
    return ()


def keeps_base(section: AdapterMethod) -> bool:
    """Yes, unless the base's norms train."""
    return not section.train_norms


@contextmanager
def disabled(model: PreTrainedModel) -> Iterator[None]:
    """The base model, while inside; norms that were trained stay as they are."""
    adapters = list(_adapters(model))
    before = [adapter.enabled for adapter in adapters]
    try:
        for adapter in adapters:
            adapter.enabled = False
        yield
    finally:
        for adapter, enabled in zip(adapters, before, strict=True):
            adapter.enabled = enabled


def _adapt(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook. A mixture of experts may return its routing beside the hidden states."""
    adapter = module.get_submodule(CHILD)
    return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)


def _adapters(model: PreTrainedModel) -> Iterator[BottleneckAdapter]:
    return (module for module in model.modules() if isinstance(module, BottleneckAdapter))


def _trained(model: PreTrainedModel) -> dict[str, Tensor]:
    return {path: parameter for path, parameter in model.named_parameters() if parameter.requires_grad}
