"""Exact causal attention inside each document of a packed row.

The bounds of the documents travel as forward keywords under transformers' own names (`cu_seq_lens_q` ...), from
`document_kwargs` through the model to the attention function. transformers hands a function registered only in its
`AttentionInterface` no mask: window, soft-cap and sinks are the function's own task.

A second function, `padded_attention`, is for rows that are padded, or generated token by token, of models whose
attention modules were given prompts to look at (`attention_prompts.py`), of which the library's functions know nothing.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from ftkit.data.batches import Batch
from ftkit.models.attention_prompts import gated_prompt_of, prefix_of

NAME, PADDED_NAME = "ftkit", "ftkit_padded"
"""What `attn_implementation` calls `document_attention` and `padded_attention`."""


@dataclass(slots=True)
class CallCounter:
    """How often the attention function ran; passed to the model as the keyword `attention_calls`."""

    count: int = 0


def register() -> None:
    """Make both names of `attn_implementation` known to transformers. May be called again."""
    AttentionInterface.register(NAME, document_attention)
    AttentionInterface.register(PADDED_NAME, padded_attention)
    AttentionMaskInterface.register(PADDED_NAME, _whole_mask)


def attend_to_prompts(model: PreTrainedModel) -> None:
    """Have the model's attention look at the prompts of its modules: by `document_attention` where it does so already,
    else by `padded_attention`."""
    register()
    if model.config._attn_implementation != NAME:
        model.set_attn_implementation(PADDED_NAME)


def document_kwargs(batch: Batch) -> dict[str, Any]:
    """The forward keywords that tell the attention function where the documents of a packed batch lie."""
    assert batch.cu_seq_lens is not None, "the batch is padded"
    return bounds_kwargs(batch.cu_seq_lens)


def bounds_kwargs(bounds: Tensor) -> dict[str, Any]:
    """Forward keywords for one row with documents between the `bounds` [documents + 1], on the CPU."""
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    attention_calls: CallCounter | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each document to itself (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, eq. 1).

    Args:
        query: [1, H, T, D]; `key` [1, K, T, D] and `value` [1, K, T, Dv] may have fewer heads, K dividing H.
        attention_mask: must be None; the bounds say all there is.
        cu_seq_lens_q: int [documents + 1], bounds of the documents in the row, from 0 to T.
        scaling: factor of the scores; None is 1 / sqrt(D).
        dropout: probability of dropping an attention weight.
        sliding_window: a token sees itself and the `sliding_window` - 1 before it.
        softcap: scores become softcap * tanh(scores / softcap).
        s_aux: [H], the logit of each head's sink, which takes part in the softmax and has no value.

    Returns:
        [1, T, H, Dv], and None for the attention weights.

    Raises:
        ValueError: no bounds came through, or the call is not plain causal self-attention over one packed row.
    """
    if attention_calls is not None:
        attention_calls.count += 1
    _check(query, key, attention_mask, cu_seq_lens_q, kwargs)
    assert cu_seq_lens_q is not None, "checked above"
    prefix, gated = prefix_of(module), gated_prompt_of(module)
    lengths = cu_seq_lens_q.diff().tolist()
    outputs = []
    # One split each way: its backward is one concatenation, where slices would each fill a whole row with zeros.
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        k, v = (k, v) if prefix is None else prefix.before(k, v)
        length, keys = q.shape[2], k.shape[2]
        causal = keys == length and (sliding_window is None or keys <= sliding_window)
        seen = None if causal else _seen(length, keys, sliding_window, q.device)
        outputs.append(_attend(q, k, v, seen, scaling, dropout, softcap, s_aux).transpose(1, 2))
    output = torch.cat(outputs, dim=1)
    return output if gated is None else output + gated(module, query, scaling), None


def padded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The same for padded rows, and with a cache: [B, H, T, D] queries and [B, K, S, D] keys, S >= T.

    Args:
        attention_mask: bool [B, 1, T, S], which keys a query sees; windows are in it.
        position_ids: int64 [B or 1, T], prefix included: what a window leaves behind of that. Otherwise as above.

    Raises:
        ValueError: there is no mask.
    """
    if attention_mask is None or attention_mask.dtype != torch.bool:
        raise ValueError("the model hands its attention no mask of what each token sees")
    if (prefix := prefix_of(module)) is not None:
        key, value = prefix.before(key, value)
        rows, length = len(attention_mask), query.shape[2]
        seen = attention_mask.new_ones(rows, 1, length, len(prefix.prefix_keys))
        if sliding_window is not None:
            if position_ids is None:
                raise ValueError("the model does not tell its attention the positions, which its window goes by")
            columns = torch.arange(seen.shape[-1], device=seen.device)
            seen = seen & (columns > position_ids[:, None, :, None] - sliding_window)
        attention_mask = torch.cat([seen, attention_mask], dim=-1)
    output = _attend(query, key, value, attention_mask, scaling, dropout, softcap, s_aux).transpose(1, 2)
    gated = gated_prompt_of(module)
    return (output if gated is None else output + gated(module, query, scaling)).contiguous(), None


def _whole_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask for `padded_attention`, also where a plain causal one could be left out."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


def _check(query: Tensor, key: Tensor, mask: Tensor | None, bounds: Tensor | None, kwargs: dict[str, Any]) -> None:
    if bounds is None:
        raise ValueError("no document bounds reached the attention: pass document_kwargs(batch) to the model")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2] or int(bounds[-1]) != query.shape[2]:
        shapes = f"queries {list(query.shape)}, keys {list(key.shape)}, bounds to {int(bounds[-1])}"
        raise ValueError(f"document bounds describe one packed row without a cache; got {shapes}")
    if mask is not None or kwargs.get("position_bias") is not None or kwargs.get("is_causal") is False:
        raise ValueError("masks, position biases and bidirectional attention are not supported")


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention over the keys that each query sees, `seen` bool [.., L, S], or causally; [B, H, L, Dv]."""
    if softcap is None and sinks is None:
        return _fused(q, k, v, seen, scaling, dropout)
    seen = _seen(q.shape[2], k.shape[2], None, q.device) if seen is None else seen
    return _explicit(q, k, v, seen, scaling, dropout, softcap, sinks)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None, dropout: float) -> Tensor:
    """Plain softmax attention in one kernel."""
    grouped = q.shape[1] != k.shape[1]
    # The fast kernels share key heads by themselves only without a mask and up to width 256, on a GPU not in float32.
    shares = mask is None and k.shape[-1] == v.shape[-1] <= 256 and not (q.is_cuda and q.dtype == torch.float32)
    if grouped and not shares:
        k, v, grouped = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1]), False
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with what no fused kernel offers, in the order of operations of transformers."""
    num_heads, keys = q.shape[1], k.shape[2]
    scores = q @ _repeat_heads(k, num_heads).mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    # The lowest number, not minus infinity: a padding token may see nothing, and would make NaN of that.
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)[..., :keys]
    return functional.dropout(weights, dropout) @ _repeat_heads(v, num_heads)


def _seen(length: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """bool [length, keys]: which keys (columns) each of the last `length` tokens (rows) sees.

    Itself and those before it; with a window only the `window` - 1 before it.
    """
    past = keys - length
    seen = torch.ones(length, keys, dtype=torch.bool, device=device).tril(past)
    return seen if window is None else seen.triu(past + 1 - window)


def _repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)
