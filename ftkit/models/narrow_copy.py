"""A random model of an architecture, narrow and with one layer of every kind: what a recipe is tried on.

`small_copy.py` keeps every width, for proofs about attention; this one is as small as it gets, and keeps the
vocabulary, so that the model's own tokenizer fits.
"""

import re
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ftkit.models.small_copy import (
    add_noise,
    build_random,
    cut_experts,
    cut_towers,
    layer_kinds,
    plain_copy,
    text_config,
)

WIDTH, HEADS, HEAD_WIDTH = 64, 4, 16
"""Of the residual stream, of attention in query heads, and of one head, at most."""

MAX_PARAMETERS = 2 * 10**8
"""A copy above this is not built."""

_NO_WIDTH = re.compile("position|vocab|token|_id$|window|chunk|length|layers|expert|head|group|step|period|size_limit")
"""Names of numbers that are no width, should they happen to be the model's."""
_AT_MOST: tuple[tuple[re.Pattern[str], int], ...] = (
    (re.compile("head_dim$|d_head$|rotary_dim$|kv_channels$"), HEAD_WIDTH),
    (re.compile("intermediate|ffn|ff_dim|n_inner|d_ff|mlp_hidden"), 2 * WIDTH),
    (re.compile("lora_rank$|_rank$"), WIDTH // 2),
    (re.compile("state_size$|d_state$|per_layer_input$"), HEAD_WIDTH),
)
"""Names of widths, and the most that they may be."""
_OTHER_HEADS = re.compile("(num|n)_.*heads$")


def narrow_copy(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A random float32 model on the CPU with one layer of every kind, all tokens and a width of `WIDTH` at most.

    Where the layers' kinds follow from their places alone, it has the shortest prefix of layers that holds them all;
    where an architecture does not bear being narrowed, it keeps its width. Towers for images and sound keep one layer.
    Every parameter is noisy, and the global random state is left as it was.

    Raises:
        Exception: whatever transformers raises on a configuration that does not bear being cut either.
    """
    whole = build_random(plain_copy(config), device="meta", trust_remote_code=trust_remote_code)
    kinds = layer_kinds(whole, config)
    first = sorted({kinds.index(kind) for kind in kinds})
    prefix = list(range(1 + first[-1]))
    alone = first != prefix and _holds_every_kind(config, first, set(kinds), trust_remote_code)
    chosen = first if alone else prefix
    failure: Exception | None = None
    for narrow in (True, False):
        try:
            small = _cut(config, chosen, narrow=narrow)
            size = build_random(small, device="meta", trust_remote_code=trust_remote_code).num_parameters()
            if size > MAX_PARAMETERS:
                raise ValueError(f"{len(chosen)} layers have {size:,} parameters, too many")
            model = build_random(small, device="cpu", trust_remote_code=trust_remote_code)
            add_noise(model)
            _run(model)
            return model
        # Any model's code may fail in any way on a configuration that was cut.
        except Exception as error:
            failure = failure or error
    assert failure is not None, "one of the two was not returned"
    raise failure


def _holds_every_kind(config: PreTrainedConfig, layers: list[int], kinds: set[Any], trust_remote_code: bool) -> bool:
    """Whether a model of these layers alone has them as they are in the whole model."""
    try:
        small = _cut(config, layers, narrow=False)
        model = build_random(small, device="meta", trust_remote_code=trust_remote_code)
        return set(layer_kinds(model, small)) == kinds
    except Exception:
        return False


def _cut(config: PreTrainedConfig, layers: list[int], *, narrow: bool) -> PreTrainedConfig:
    small = plain_copy(config)
    text = text_config(small)
    _keep_layers(text, layers)
    if narrow:
        cut_experts(text)
        if text.hidden_size > WIDTH:
            _narrow(text)
    cut_towers(small)
    return small


def _keep_layers(text: PreTrainedConfig, layers: list[int]) -> None:
    whole, values = text.num_hidden_layers, text.to_dict()
    for name, value in values.items():
        if isinstance(value, list | tuple) and len(value) == whole:
            setattr(text, name, [value[layer] for layer in layers])
    text.num_hidden_layers = len(layers)
    if shared := values.get("num_kv_shared_layers"):
        # Counted from the last layer.
        text.num_kv_shared_layers = sum(layer >= whole - shared for layer in layers)


def _narrow(text: PreTrainedConfig) -> None:
    """Cut every width of a language model's configuration, so that they still fit each other."""
    width, values = text.hidden_size, text.to_dict()
    heads = text.num_attention_heads
    # Of the values, not of the object: Gemma 4 refuses to tell what differs between its layers.
    key_heads = values.get("num_key_value_heads") or heads
    head_width = values.get("head_dim") or width // heads
    new_heads = 1 << (min(HEADS, heads).bit_length() - 1)
    new_key_heads = new_heads if key_heads == heads else min(2, key_heads)
    for name, value in values.items():
        setattr(text, name, _narrowed(name, value, width))
    text.hidden_size, text.num_attention_heads = WIDTH, new_heads
    if "num_key_value_heads" in values and values["num_key_value_heads"] is not None:
        text.num_key_value_heads = new_key_heads
    if values.get("qk_nope_head_dim") and values.get("qk_rope_head_dim"):
        nope, rope = text.qk_nope_head_dim, text.qk_rope_head_dim
        for name in ("qk_head_dim", "head_dim"):
            if values.get(name) is not None:
                setattr(text, name, rope if values[name] == values["qk_rope_head_dim"] else nope + rope)
    _narrow_state_space(text, values)
    new_head_width = min(HEAD_WIDTH, head_width) if values.get("head_dim") else WIDTH // new_heads
    rope_parameters = getattr(text, "rope_parameters", None)
    if rope_parameters is not None:
        text.rope_parameters = _narrow_rope(rope_parameters, head_width, new_head_width)


def _narrowed(name: str, value: Any, width: int) -> Any:
    if isinstance(value, list | tuple) and value and all(isinstance(item, int) for item in value):
        return type(value)(_narrowed(name, item, width) for item in value)
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    for pattern, most in _AT_MOST:
        if pattern.search(name):
            return min(value, most)
    if _OTHER_HEADS.search(name):
        return min(value, 4 if "value" in name and "key_value" not in name else 2)
    return WIDTH if value == width and not _NO_WIDTH.search(name) else value


def _narrow_state_space(text: PreTrainedConfig, values: dict[str, Any]) -> None:
    """A state-space layer's heads fill `expand` times the model's width."""
    for prefix, heads, head in (("mamba_", "mamba_n_heads", "mamba_d_head"), ("", "num_heads", "head_dim")):
        expand = values.get(f"{prefix}expand")
        if expand and isinstance(values.get(heads), int):
            setattr(text, heads, int(expand * WIDTH) // getattr(text, head))
            if values.get(f"{prefix}d_ssm"):
                setattr(text, f"{prefix}d_ssm", int(expand * WIDTH))
    for name in ("mamba_n_groups", "mamba_ngroups", "n_groups"):
        if isinstance(values.get(name), int):
            setattr(text, name, 1)


def _narrow_rope(parameters: Any, before: int, after: int) -> Any:
    """Rotary settings with a number for each pair of a head's dimensions, cut to a narrower head."""
    if isinstance(parameters, dict):
        return {name: _narrow_rope(value, before, after) for name, value in parameters.items()}
    if isinstance(parameters, list) and parameters and all(isinstance(value, int | float) for value in parameters):
        if sum(parameters) == before // 2:
            # Sections for time, height and width.
            third = after // 2 // len(parameters)
            return [after // 2 - third * (len(parameters) - 1), *[third] * (len(parameters) - 1)]
        return parameters[: max(1, len(parameters) * after // before)]
    return parameters


@torch.no_grad()
def _run(model: PreTrainedModel) -> None:
    """Raise where the model does not compute, or computes what is no number."""
    ids = torch.arange(3, 11)[None]
    logits = model.eval()(input_ids=ids, use_cache=False).logits
    if not bool(logits.isfinite().all()):
        raise ValueError("the copy's logits are not finite")
