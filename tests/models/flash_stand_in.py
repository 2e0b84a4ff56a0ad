"""The two functions of the package flash-attn that transformers calls, written out for a CPU and any precision."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, modeling_flash_attention_utils
from transformers.integrations import flash_attention


def use_stand_in(monkeypatch: pytest.MonkeyPatch, packed: Callable[..., Tensor] | None = None) -> None:
    """Let transformers find `flash_attention_2` installed and take the functions below, or `packed` for packed rows."""
    library = modeling_flash_attention_utils
    functions = (flash_attn_func, packed or flash_attn_varlen_func, None, library._pad_input, library._unpad_input)
    for name in ("_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn"):
        monkeypatch.setattr(library, name, None)
    for name in ("_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn", "_loaded_implementation"):
        monkeypatch.setattr(library, name, None)
    monkeypatch.setattr(library, "_lazy_imports", lambda *_, **__: functions)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True)
    # It looks for the dtype that float32 is to be cast to, as the kernels would need.
    monkeypatch.setattr(flash_attention, "get_target_dtype", lambda *_: None)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
) -> Tensor:
    """[T, H, D] with sequences between the bounds, and fewer key heads -> [T, H, D]."""
    assert causal
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    lengths = cu_seqlens_q.diff().tolist()
    assert dropout_p == 0.0
    parts = [
        _causal(*qkv, softmax_scale, window_size[0]) for qkv in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    ]
    return torch.cat(parts)


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, **kwargs: Any) -> Tensor:
    """[B, T, H, D] -> [B, T, H, D], every row one sequence."""
    assert causal
    left = kwargs.get("window_size", (-1, -1))[0]
    return torch.stack([_causal(*row, kwargs.get("softmax_scale"), left) for row in zip(q, k, v, strict=True)])


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float | None, left: int) -> Tensor:
    """Attention of one sequence [T, H, D]; a token sees itself and `left` before it, all of them where -1."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores_HTT = torch.einsum("thd,shd->hts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    seen = torch.ones(scores_HTT.shape[1:], dtype=torch.bool).tril()
    seen = seen if left < 0 else seen.triu(-left)
    return torch.einsum("hts,shd->thd", scores_HTT.masked_fill(~seen, -torch.inf).softmax(-1), v)
