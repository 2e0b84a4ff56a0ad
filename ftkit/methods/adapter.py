"""`adapter`: bottleneck adapters (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751, figure 2 and section 2.1).

    h' = h + scale * (dropout(f(x D^T + d)) U^T + u)     D [m, width], U [width, m]: 2md + d + m parameters at width d

Two a block, or one (Pfeiffer et al. 2021), each on what a sublayer is about to write to the residual stream, h: after
the attention's output projection and after the feed-forward output, in both cases before a post-norm (Gemma) and before
the residual sum. GPT-2's dropout on these outputs comes after the first adapter (it follows the projection inside the
attention module) and before the second (it is the last part of `mlp`).

A sequential adapter reads what it changes, x = h. A parallel one (He et al. 2022, https://arxiv.org/abs/2110.04366)
reads what the sublayer itself does: the input of the attention or feed-forward module, after its pre-norm.

An adapter is a child module `adapter` of the module whose output it changes, called by a forward hook; a parallel one
is handed its input by a hook before the module that reads it. So the base keeps its classes and the names of its
weights, which a wrapper would change, and any feed-forward class will do, or none: OPT's blocks own two bare linear
layers. A hook runs alike under checkpointing, DDP, `fully_shard` and `torch.compile`.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS, ACT2FN

from ftkit.errors import UserError
from ftkit.methods.base import (
    Delta,
    Gather,
    copy_strictly,
    freeze,
    gathered,
    seeded_generator,
    switched_off,
    train_in_float32,
)
from ftkit.methods.files import (
    BOTTLENECK,
    BaseIdentity,
    bottleneck_config,
    bottleneck_section,
    read_adapter,
    write_adapter,
)
from ftkit.models.architecture import BlockParts, Part, block_parts, describe, linear_shape, norm_modules
from ftkit.models.quantization import quantization_of
from ftkit.models.soft_prompt import PARAMETER as PROMPT
from ftkit.recipe.method_schema import AdapterMethod

name = "adapter"
merge_refusal: str | None = (
    "bottleneck adapters cannot be merged: they have a non-linearity, so no weight of the base can stand for them; "
    "use the adapter directory with `ftkit eval`, or hand it on with `ftkit export --format adapter`"
)

CHILD = "adapter"
"""Name of the child module; files call its weights PATH.adapter.down.weight etc."""


class BottleneckAdapter(nn.Module):
    """h + scale * up(dropout(f(down(x)))), equal to h at first.

    `down` starts as torch's linear layers do (Kaiming-uniform, a = sqrt(5)) and `up` at zero, as A and B of a LoRA: the
    tuned model starts exactly as the base, and `up` has a gradient from the first step on, `down` from the second. The
    paper draws both from N(0, 0.01^2), which is near the identity; its scale would not follow the width.

    The projections are plain linear layers: where the model computes in another precision than float32,
    `models/precision.py` casts their weights as it does all trained ones.
    """

    def __init__(
        self,
        width: int,
        bottleneck: int,
        generator: torch.Generator,
        *,
        non_linearity: str = "gelu",
        scale: float = 1.0,
        dropout: float = 0.0,
        place: str = "",
    ) -> None:
        super().__init__()
        self.down = nn.utils.skip_init(nn.Linear, width, bottleneck)
        self.up = nn.utils.skip_init(nn.Linear, bottleneck, width)
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5, generator=generator)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.non_linearity = non_linearity_named(non_linearity)
        self.scale, self.dropout = scale, dropout
        self.place = place
        """Where it is, in words."""
        self.enabled = True
        self.input: Tensor | None = None
        """What a parallel adapter is to read, from where the sublayer begins to where it ends."""

    def forward(self, h: Tensor) -> Tensor:
        """[..., width] -> [..., width]"""
        if not self.enabled:
            return h
        x, self.input = h if self.input is None else self.input, None
        inner = F.dropout(self.non_linearity(self.down(x)), self.dropout, training=self.training)
        return torch.add(h, self.up(inner), alpha=self.scale)


def non_linearity_named(name: str) -> Callable[[Tensor], Tensor]:
    """The function of that name in transformers or, where it has none, in torch."""
    function: Callable[[Tensor], Tensor] = ACT2FN[name] if name in ACT2CLS else getattr(F, name)
    return function


def apply(model: PreTrainedModel, section: AdapterMethod, *, seed: int) -> None:
    """Freeze the model and give every block its adapters; with `train_norms` the norms train too."""
    assert not any(True for _ in _adapters(model)), "the model has bottleneck adapters already"
    freeze(model)
    for place in _places(model, section):
        path = f"{place.writes.path}.{CHILD}"
        adapter = BottleneckAdapter(
            place.width,
            _bottleneck_at(place.width, section),
            seeded_generator(seed, path),
            non_linearity=section.non_linearity,
            scale=section.scale,
            dropout=section.dropout,
            place=place.name,
        )
        writer = place.writes.module
        writer.add_module(CHILD, adapter.to(next(writer.parameters()).device))
        writer.register_forward_hook(_adapt)
        if section.insertion == "parallel":
            place.reads.module.register_forward_pre_hook(partial(_hand_over, adapter), with_kwargs=True)
    if section.train_norms:
        for norm in norm_modules(model).values():
            for parameter in norm.parameters():
                train_in_float32(parameter)


def sized(model: PreTrainedModel, section: AdapterMethod) -> AdapterMethod:
    """The section with the bottleneck's width in place of a factor that gives it."""
    width = next(_places(model, section)).width
    return section.model_copy(update={"bottleneck": _bottleneck_at(width, section), "reduction_factor": None})


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
    config, quantization = bottleneck_config(section), quantization_of(model)
    write_adapter(directory, config, state, identity, base_dtype=model.dtype, base_quantization=quantization)


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
    """All learn at the same rate, but for a soft prompt beside them."""
    return section.soft_prompt_learning_rate_ratio if name.endswith(PROMPT) else 1.0


def notes(model: PreTrainedModel) -> tuple[str, ...]:
    """None."""
    return ()


def places(model: PreTrainedModel) -> tuple[str, ...]:
    """How many adapters are where."""
    return tuple(f"{count} x {place}" for place, count in Counter(each.place for each in _adapters(model)).items())


def keeps_base(section: AdapterMethod) -> bool:
    """Yes, unless the base's norms train."""
    return not section.train_norms


def disabled(model: PreTrainedModel) -> AbstractContextManager[None]:
    """The base model, while inside; norms that were trained stay as they are."""
    return switched_off(_adapters(model))


@dataclass(frozen=True)
class _Place:
    """A sublayer that gets an adapter."""

    reads: Part
    """The module whose input is the sublayer's."""
    writes: Part
    """The module whose output is the sublayer's."""
    width: int
    name: str


def _places(model: PreTrainedModel, section: AdapterMethod) -> Iterator[_Place]:
    architecture = describe(model)
    for index, block in enumerate(block_parts(architecture)):
        # Both outputs have the width of the residual stream, which the projection tells.
        width = linear_shape(block.output_projection.module)[1]
        for part in section.placement:
            reads, writes = _ends(block, part)
            shown = (writes,) if section.insertion == "sequential" else (reads, writes)
            names = [end.path.removeprefix(f"{architecture.blocks_path}.{index}.") for end in shown]
            # What lies inside the module that reads need not be named.
            where = names[0] if names[-1].startswith(names[0]) else " to ".join(names)
            relation = "after" if section.insertion == "sequential" else "beside"
            yield _Place(reads, writes, width, f"{relation} {part.replace('_', '-')} ({where})")


def _ends(block: BlockParts, part: str) -> tuple[Part, Part]:
    """The module that reads the input of a block's part, and the one that writes its output."""
    if part == "attention":
        return block.attention, block.output_projection
    return block.feed_forward_input, block.feed_forward


def _bottleneck_at(width: int, section: AdapterMethod) -> int:
    if section.reduction_factor is None:
        assert section.bottleneck is not None, "the schema fills it in"
        return section.bottleneck
    bottleneck = int(width / section.reduction_factor)
    if bottleneck < 1:
        raise UserError(
            f"the model's width is {width}, which divided by {section.reduction_factor:g} leaves no bottleneck",
            how=f"set at most {width}",
            key=("method", "reduction_factor"),
        )
    return bottleneck


def _hand_over(adapter: BottleneckAdapter, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Hook before a sublayer: its first argument, which models pass by place or by name, are the hidden states."""
    if adapter.enabled:
        adapter.input = next(iter((*args, *kwargs.values())))


def _adapt(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Hook after a sublayer. A mixture of experts may return its routing beside the hidden states."""
    adapter = module.get_submodule(CHILD)
    return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)


def _adapters(model: PreTrainedModel) -> Iterator[BottleneckAdapter]:
    return (module for module in model.modules() if isinstance(module, BottleneckAdapter))


def _trained(model: PreTrainedModel) -> dict[str, Tensor]:
    """All that trains, but for a soft prompt beside the adapters, which has a file of its own."""
    named = ((path, parameter) for path, parameter in model.named_parameters() if parameter.requires_grad)
    return {path: parameter for path, parameter in named if not path.endswith(PROMPT)}
