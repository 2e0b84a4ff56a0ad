"""Where a decoder model keeps its parts, found from its module tree and configuration.

A decoder is, in all of transformers' causal language models, a module that owns the token embedding, the list of
`num_hidden_layers` blocks and the final norm. That rule finds the blocks without knowing the model's name; only the
parts inside a block are told by the names that the field gives them (`o_proj`, `mlp`, ...).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import NoReturn

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ftkit.errors import UserError
from ftkit.models.multimodal import is_multimodal

ATTENTION_NAMES = ("attn", "attention")
"""An attention module has one of these in its name: self_attn, attn, self_attention, linear_attn."""
OUTPUT_PROJECTION_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "wo")
"""The last linear layer of an attention module. Not found by position: Phi 3 declares `o_proj` before `qkv_proj`."""
FEED_FORWARD_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
ROUTER_NAMES = ("gate", "router", "shared_expert_gate")
"""Linear layers that choose experts, where they are not of a router class of their own."""


@dataclass(frozen=True)
class Part:
    """A module and its path from the model's root."""

    path: str
    module: nn.Module


@dataclass(frozen=True)
class Architecture:
    """The parts of a causal language model."""

    backbone: nn.Module
    """The model without its head: what is called to get hidden states."""
    decoder: nn.Module
    """The module that owns the blocks; the backbone itself in most models."""
    blocks: tuple[nn.Module, ...]
    blocks_path: str
    """Path of the list of blocks from the model's root, e.g. `model.layers`."""
    embeddings: nn.Module
    head: nn.Module
    final_norm: Part | None
    """The norm between the last block and the head, where there is one."""


@dataclass(frozen=True)
class BlockParts:
    """The parts of a block that write to the residual stream."""

    attention: Part
    output_projection: Part
    """The linear layer that is last in the attention module."""
    feed_forward_input: Part
    """The module that reads the feed-forward input: the whole `mlp`, or the first of two bare linear layers."""
    feed_forward: Part
    """The module whose output is the feed-forward output: the whole `mlp`, or the second of two bare linear layers."""


def describe(model: PreTrainedModel) -> Architecture:
    """The parts of `model`, also after a method has been applied to it.

    Raises:
        UserError: it has no head, or no list of blocks beside its token embedding.
    """
    try:
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:
        # Several models in one, as Qwen 2.5 Omni.
        _refuse(model, "it does not tell its token embedding")
    if head is None:
        _refuse(model, "it has no output head")
    config = model.config.get_text_config(decoder=True)
    num_blocks = config.num_hidden_layers
    for path, module in model.named_modules():
        # A vision tower may have as many layers: the decoder's are those beside the token embedding.
        if not any(child is embeddings for child in module.children()):
            continue
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == num_blocks:
                prefix = f"{path}." if path else ""
                return Architecture(
                    backbone=_backbone(model, module),
                    decoder=module,
                    blocks=tuple(child),
                    blocks_path=f"{prefix}{name}",
                    embeddings=embeddings,
                    head=head,
                    final_norm=_final_norm(prefix, module, config.hidden_size),
                )
    _refuse(model, f"no list of {num_blocks} blocks lies beside its token embedding")


def block_parts(architecture: Architecture) -> list[BlockParts]:
    """The attention and the feed-forward part of every block.

    Raises:
        UserError: a block has not exactly one of each; the message lists the block's children.
    """
    return [
        _block_parts(f"{architecture.blocks_path}.{index}", block) for index, block in enumerate(architecture.blocks)
    ]


def is_linear(module: nn.Module) -> bool:
    """Whether `module` multiplies by one weight matrix: `nn.Linear`, or GPT-2's `Conv1D`, which keeps it transposed."""
    return isinstance(module, nn.Linear | Conv1D)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Input and output width of a linear layer."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def linear_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Path -> linear layer of the decoder blocks, in the model's order: no head, no router, no vision tower.

    A layer that several blocks share appears once, under its first path.
    """
    modules = _block_modules(model)
    return {path: module for path, module in modules if is_linear(module) and not _is_router(path, module)}


def key_value_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """Heads of keys and values, and the width of one, in the attention layers of a model with this configuration."""
    text = config.get_text_config(decoder=True)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return getattr(text, "num_key_value_heads", None) or text.num_attention_heads, width


def norm_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Path -> normalisation layer with weights: those of the decoder blocks and the final one."""
    norms = {path: module for path, module in _block_modules(model) if is_norm(module)}
    final = describe(model).final_norm
    return norms if final is None else norms | {final.path: final.module}


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a normalisation layer with weights; transformers has one class of them for each model."""
    parameters = list(module.parameters())
    return "norm" in type(module).__name__.lower() and bool(parameters) and all(p.ndim == 1 for p in parameters)


def stacked_experts(model: PreTrainedModel) -> list[str]:
    """Names of the decoder blocks' weights [experts, ...]: experts kept as one tensor, not as linear layers."""
    return [
        f"{path}.{name}"
        for path, module in _block_modules(model)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and "expert" in path
    ]


def towers(model: PreTrainedModel) -> dict[str, list[nn.Parameter]]:
    """Path -> weights of every part of a multimodal model that no text reaches: towers for images, projectors.

    That is all but the decoder and its head; a text-only model has none.
    """
    if not is_multimodal(model.config):
        return {}
    architecture = describe(model)
    language = {id(p) for part in (architecture.decoder, architecture.head) for p in part.parameters()}
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in language:
            # The first of `model`, `model.vision_tower`, ... that does not hold the blocks.
            paths = accumulate(name.split("."), "{}.{}".format)
            tower = next(path for path in paths if not architecture.blocks_path.startswith(f"{path}."))
            found.setdefault(tower, []).append(parameter)
    return found


def _block_modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Every module inside the decoder blocks once, with its path from the model's root."""
    architecture = describe(model)
    seen: set[nn.Module] = set()
    for index, block in enumerate(architecture.blocks):
        yield from block.named_modules(memo=seen, prefix=f"{architecture.blocks_path}.{index}")


def _is_router(path: str, module: nn.Module) -> bool:
    name = path.rpartition(".")[2]
    return name in ROUTER_NAMES or "router" in name or type(module).__name__.endswith("Router")


def _backbone(model: PreTrainedModel, decoder: nn.Module) -> nn.Module:
    # `base_model` is the model itself where its class names a prefix that it does not have (Llama 4's text model).
    return decoder if model.base_model is model else model.base_model


def _final_norm(prefix: str, decoder: nn.Module, width: int) -> Part | None:
    """The last norm of the model's width that the decoder itself owns; Bloom has one for its embeddings before it."""
    norms = [
        Part(f"{prefix}{name}", child)
        for name, child in decoder.named_children()
        if is_norm(child) and all(parameter.shape == (width,) for parameter in child.parameters())
    ]
    return norms[-1] if norms else None


def _block_parts(path: str, block: nn.Module) -> BlockParts:
    with_weights = {name: child for name, child in block.named_children() if any(True for _ in child.parameters())}
    children = {name: child for name, child in with_weights.items() if not is_norm(child)}
    attention = [name for name in children if any(part in name for part in ATTENTION_NAMES)]
    if len(attention) != 1:
        _refuse_block(path, block, "an attention module")
    attention_path, attention_module = f"{path}.{attention[0]}", children.pop(attention[0])
    projections = [
        Part(f"{attention_path}.{name}", module)
        for name, module in attention_module.named_modules()
        if name.rpartition(".")[2] in OUTPUT_PROJECTION_NAMES and is_linear(module)
    ]
    if len(projections) != 1:
        _refuse_block(attention_path, attention_module, "an output projection")
    names = _feed_forward_names(children)
    if names is None:
        _refuse_block(path, block, "a feed-forward module")
    first, last = names
    return BlockParts(
        attention=Part(attention_path, attention_module),
        output_projection=projections[0],
        feed_forward_input=Part(f"{path}.{first}", children[first]),
        feed_forward=Part(f"{path}.{last}", children[last]),
    )


def _feed_forward_names(children: dict[str, nn.Module]) -> tuple[str, str] | None:
    """Which children of a block, attention and norms set aside, read the feed-forward input and give its output.

    One and the same in most models; None if it is not clear.
    """
    named = [name for name in children if name in FEED_FORWARD_NAMES]
    if len(named) == 1:
        return named[0], named[0]
    if len(children) == 1 or (children and all(is_linear(child) for child in children.values())):
        # OPT and its kin have no module for it: the block itself owns `fc1` and `fc2`.
        names = list(children)
        return names[0], names[-1]
    return None


def _refuse(model: PreTrainedModel, why: str) -> NoReturn:
    raise UserError(
        f"{type(model).__name__} is no decoder that ftkit knows: {why}",
        how="choose a causal language model of the Llama, Qwen, Gemma, Mistral or GPT kind, or one built around it",
        key=("base_model",),
    )


def _refuse_block(path: str, module: nn.Module, what: str) -> NoReturn:
    children = ", ".join(f"{name} ({type(child).__name__})" for name, child in module.named_children())
    raise UserError(
        f"cannot tell {what} in {path}, which has: {children or 'nothing'}",
        how="use `type: lora` or `type: full`, which need no such place",
        key=("method", "type"),
    )
