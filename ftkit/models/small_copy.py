"""A small random model that keeps every kind of layer of a large one: what proofs about an architecture run on."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ftkit.models.architecture import describe
from ftkit.models.multimodal import auto_class

WINDOW = 4
"""Tokens that a sliding window, or a chunk of chunked attention, has in the copy."""
VOCAB_SIZE = 64
FIRST_TOKEN = 3
"""The smallest id that is not special: padding, start and end are 0, 1 and 2."""

FEED_FORWARD_WIDTH = 256
MAX_PARAMETERS = 10**9
"""A copy above this (4 GB) is not built: the proof must fit beside the model that is to be trained."""

WINDOW_KEYS = ("sliding_window", "sliding_window_size", "window_size", "attention_window_size", "attention_chunk_size")
VOCAB_KEYS = ("vocab_size", "vocab_size_per_layer_input")
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
FEED_FORWARD_KEYS = ("intermediate_size", "intermediate_size_mlp", "moe_intermediate_size", "n_inner", "ffn_dim")
TOP_K_KEYS = ("num_experts_per_tok", "top_k_experts", "moe_top_k", "moe_k", "num_experts_per_token")
DEPTH_KEYS = ("num_hidden_layers", "depth", "num_layers", "n_layers")
SHALLOW_VOCABULARY = 32_768
"""Tokens of a shallow copy: enough for a head's product to be as fast as a whole one's."""
RANDOM_KEYS = ("drop", "jitter")
"""Parts of the names of settings that make a forward in training mode random."""


def small_copy(config: PreTrainedConfig) -> PreTrainedModel:
    """A random float32 model on the CPU, in training mode without dropout, built from a cut copy of `config`.

    It has the shortest prefix of layers that holds every kind of layer, at full width and with all heads, but with few
    tokens, few experts, narrow feed-forward layers and a window of `WINDOW` tokens. Every parameter is noisy: stock
    initialisation (zeros, ones, std 0.02) hides what a layer does. Towers for images and sound, which no text reaches,
    keep one layer. The global random state is left as it was.

    Raises:
        ValueError: it would have more than `MAX_PARAMETERS`.
        Exception: whatever transformers raises on a configuration that does not bear cutting.
    """
    # Meta tensors hold no numbers: these two cost no memory whatever the size of the model.
    whole = build_random(plain_copy(config), device="meta")
    kinds = layer_kinds(whole, config)
    small = _cut(config, num_layers=1 + max(kinds.index(kind) for kind in set(kinds)))
    size = build_random(small, device="meta").num_parameters()
    if size > MAX_PARAMETERS:
        layers = text_config(small).num_hidden_layers
        raise ValueError(f"every kind of layer takes {layers} layers of {size:,} parameters, too many")
    model = build_random(small, device="cpu")
    add_noise(model)
    return model.train()


def build_random(config: PreTrainedConfig, *, device: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """A float32 model as transformers initialises it, always the same; the global random state is left as it was."""
    with torch.device(device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build = auto_class(config).from_config
        model: PreTrainedModel = build(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    return model


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the language model, which is the whole one where there is nothing else."""
    return config.get_text_config(decoder=True)


def plain_copy(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy that builds an ordinary model with transformers' own choice of attention."""
    plain = copy.deepcopy(config)
    plain._attn_implementation = None
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    return plain


def layer_kinds(model: PreTrainedModel, config: PreTrainedConfig) -> list[tuple[Any, ...]]:
    """What kind each layer of `model`, which was built from `config`, is: equal where two are alike."""
    blocks = describe(model).blocks
    by_layer = [value for value in text_config(config).to_dict().values() if _is_by_layer(value, len(blocks))]
    return [(_kind(block), tuple(str(values[i]) for values in by_layer)) for i, block in enumerate(blocks)]


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """What makes one block differ from another: its modules' classes, shapes and settings, the layer's number aside."""
    return tuple(
        (
            path,
            type(module).__qualname__,
            tuple(sorted((name, tuple(parameter.shape)) for name, parameter in module.named_parameters(recurse=False))),
            tuple(sorted((name, str(value)) for name, value in vars(module).items() if _is_setting(name, value))),
        )
        for path, module in block.named_modules()
    )


def _is_setting(name: str, value: object) -> bool:
    # Floats scale (some by the depth of the layer) and never change what a token sees.
    return isinstance(value, bool | int | str) and not name.startswith(("_", "layer_i", "layer_n"))


def _is_by_layer(value: object, num_layers: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == num_layers and isinstance(value[0], bool | str)


def _cut(config: PreTrainedConfig, *, num_layers: int) -> PreTrainedConfig:
    small = plain_copy(config)
    text = text_config(small)
    _cut_text(text, num_layers=num_layers)
    cut_towers(small)
    for part in (small, text):
        part.pad_token_id, part.bos_token_id, part.eos_token_id = 0, 1, 2
    return small


def _cut_text(small: PreTrainedConfig, *, num_layers: int) -> None:
    values = small.to_dict()
    _cut_depth(small, num_layers=num_layers)
    for name, value in values.items():
        if name in WINDOW_KEYS and isinstance(value, int):
            setattr(small, name, min(WINDOW, value))
        elif name in VOCAB_KEYS and isinstance(value, int):
            setattr(small, name, VOCAB_SIZE)
        elif name in FEED_FORWARD_KEYS and isinstance(value, int):
            setattr(small, name, min(FEED_FORWARD_WIDTH, value))
        elif isinstance(value, int | float) and any(part in name for part in RANDOM_KEYS):
            setattr(small, name, type(value)(0))
    cut_experts(small)


def cut_experts(text: PreTrainedConfig) -> None:
    """Leave a mixture twice as many experts as a token chooses, and at least 8."""
    values = text.to_dict()
    top_k = next((values[name] for name in TOP_K_KEYS if isinstance(values.get(name), int)), 2)
    for name in EXPERT_KEYS:
        if isinstance(values.get(name), int):
            setattr(text, name, min(values[name], max(8, 2 * top_k)))


def _cut_depth(text: PreTrainedConfig, *, num_layers: int) -> None:
    whole = text.num_hidden_layers
    for name, value in text.to_dict().items():
        if isinstance(value, list | tuple) and len(value) == whole:
            setattr(text, name, value[:num_layers])
    text.num_hidden_layers = num_layers
    if getattr(text, "num_kv_shared_layers", None):
        # Counted from the last layer.
        text.num_kv_shared_layers = max(0, text.num_kv_shared_layers - (whole - num_layers))


def cut_towers(small: PreTrainedConfig) -> None:
    """Leave towers for images and sound, which no text reaches, one layer."""
    text = text_config(small)
    for part in small.sub_configs:
        tower = getattr(small, part, None)
        if isinstance(tower, PreTrainedConfig) and tower is not text:
            for name in DEPTH_KEYS:
                if isinstance(getattr(tower, name, None), int):
                    setattr(tower, name, 1)


@torch.no_grad()
def add_noise(model: PreTrainedModel) -> None:
    """Noise large enough to show what each weight does, small enough to leave attention scores of order one."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        scale = 0.3 if parameter.ndim < 2 else min(0.3, parameter.shape[-1] ** -0.5)
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)


def shallow(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of a model of the same width, with few layers, of every kind, and few tokens.

    At least two layers: the first may have less to do, where its input needs no gradient.

    Raises:
        Exception: whatever transformers raises on a configuration that does not bear cutting.
    """
    cut = plain_copy(config)
    text = text_config(cut)
    kinds = layer_kinds(build_random(cut, device="meta"), config)
    layers = min(text.num_hidden_layers, max(2, 1 + max(kinds.index(kind) for kind in set(kinds))))
    _cut_depth(text, num_layers=layers)
    for name in VOCAB_KEYS:
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, min(getattr(text, name), SHALLOW_VOCABULARY))
    for part in (cut, text):
        part.pad_token_id, part.bos_token_id, part.eos_token_id = 0, 1, 2
    return cut
