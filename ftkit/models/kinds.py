"""A model's parameters by the kind of block that they belong to."""

from collections import defaultdict
from dataclasses import dataclass

from transformers import PreTrainedModel

from ftkit.models.architecture import ATTENTION_NAMES, describe, is_norm
from ftkit.models.quantization import quantized_layers

EMBEDDINGS, ATTENTION, FEED_FORWARD, NORMS, HEAD, OTHER = (
    "embeddings",
    "attention",
    "feed-forward",
    "norms",
    "head",
    "other",
)
KINDS = (EMBEDDINGS, ATTENTION, FEED_FORWARD, NORMS, HEAD, OTHER)


@dataclass(frozen=True)
class Kind:
    """Parameters of one kind of block, those that a method inserted in it included."""

    name: str
    parameters: int
    trainable: int


def kinds(model: PreTrainedModel) -> tuple[Kind, ...]:
    """Count them; tied weights once, as embeddings.

    In a decoder block, what lies below a module that is named like attention is attention, a norm is a norm, and the
    rest is the feed-forward part, experts and routers included. Towers for images and sound are "other".
    """
    architecture = describe(model)
    packed = {layer.weight: layer for _, layer in quantized_layers(model)}
    norms = {path for path, module in model.named_modules() if is_norm(module)}
    embeddings = {id(p) for p in architecture.embeddings.parameters()}
    head = {id(p) for p in architecture.head.parameters()}
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for path, parameter in model.named_parameters():
        if id(parameter) in embeddings:
            kind = EMBEDDINGS
        elif id(parameter) in head:
            kind = HEAD
        elif path.rpartition(".")[0] in norms:
            kind = NORMS
        elif path.startswith(f"{architecture.blocks_path}."):
            # Without the number of the block.
            below = path.removeprefix(f"{architecture.blocks_path}.").partition(".")[2]
            kind = ATTENTION if any(part in below for part in ATTENTION_NAMES) else FEED_FORWARD
        else:
            kind = OTHER
        layer = packed.get(parameter)
        number = parameter.numel() if layer is None else layer.in_features * layer.out_features
        counts[kind][0] += number
        counts[kind][1] += number if parameter.requires_grad else 0
    return tuple(Kind(name, *counts[name]) for name in KINDS if name in counts)
