"""Exact causal attention inside each document of a packed row.

The bounds of the documents travel as forward keywords under transformers' own names (`cu_seq_lens_q` ...), from
`document_kwargs` through the model to the attention function. transformers hands a function registered only in its
`AttentionInterface` no mask: window, soft-cap and sinks are the function's own task.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from ftkit.data.batches import Batch

NAME = "ftkit"
"""What `attn_implementation` calls this attention."""


@dataclass(slots=True)
class CallCounter:
    """How often the attention function ran; passed to the model as the keyword `attention_calls`."""

    count: int = 0


def register() -> None:
    """Make `attn_implementation="ftkit"` known to transformers. May be called again."""
    AttentionInterface.register(NAME, document_attention)


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
    lengths = cu_seq_lens_q.diff().tolist()
    outputs = []
    # One split each way: its backward is one concatenation, where slices would each fill a whole row with zeros.
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        if softcap is None and s_aux is None:
            output = _fused(q, k, v, scaling, dropout, sliding_window)
        else:
            output = _explicit(q, k, v, scaling, dropout, sliding_window, softcap, s_aux)
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1), None


def _check(query: Tensor, key: Tensor, mask: Tensor | None, bounds: Tensor | None, kwargs: dict[str, Any]) -> None:
    if bounds is None:
        raise ValueError("no document bounds reached the attention: pass document_kwargs(batch) to the model")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2] or int(bounds[-1]) != query.shape[2]:
        shapes = f"queries {list(query.shape)}, keys {list(key.shape)}, bounds to {int(bounds[-1])}"
        raise ValueError(f"document bounds describe one packed row without a cache; got {shapes}")
    if mask is not None or kwargs.get("position_bias") is not None or kwargs.get("is_causal") is False:
        raise ValueError("masks, position biases and bidirectional attention are not supported")


def _fused(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, dropout: float, window: int | None) -> Tensor:
    """Plain softmax attention in one kernel; [1, H, L, Dv]."""
    mask = None if window is None or q.shape[2] <= window else _window_mask(q.shape[2], window, q.device)
    grouped = q.shape[1] != k.shape[1]
    # The fast kernels share key heads by themselves only without a mask and up to width 256, on a GPU not in float32.
    shares = mask is None and k.shape[-1] == v.shape[-1] <= 256 and not (q.is_cuda and q.dtype == torch.float32)
    if grouped and not shares:
        k, v, grouped = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1]), False
    return scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with what no fused kernel offers, in the order of operations of transformers; [1, H, L, Dv]."""
    num_heads, length = q.shape[1], q.shape[2]
    scores = q @ _repeat_heads(k, num_heads).mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~_window_mask(length, window or length, q.device), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores).view(1, -1, 1, 1).expand(1, num_heads, length, 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)[..., :length]
    return drop(weights, dropout) @ _repeat_heads(v, num_heads)


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """bool [length, length]: which keys (columns) a query (row) sees, itself and the `window` - 1 before it."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return seen.triu(1 - window)


def _repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)
