"""What attention modules are given to look at beside the tokens: prefixes, and prompts behind a gate.

Both are child modules of the attention module that they belong to, and enter in the attention function, which is handed
that module (`attention.py`). So they need no cache, work for packed and padded rows and while generating, and a layer
whose activations are recomputed finds them where it found them before.

Shape suffixes: N rows of the prompt, H query heads, K key and value heads, T tokens, D width of a head, C of the model.
"""

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ftkit.errors import UserError
from ftkit.models.architecture import describe
from ftkit.models.soft_prompt import prompt_ids

PREFIX, GATED = "prefix", "gated_prompt"
"""Names of the modules, inside the attention module."""


class Prefix(nn.Module):
    """Keys and values that every token sees before the document's own (P-Tuning v2, Liu et al. 2022,
    https://arxiv.org/abs/2110.07602; prefix-tuning, Li and Liang 2021, https://arxiv.org/abs/2101.00190).

    They count as N tokens before the first: windows that slide leave them behind, and the document's positions begin
    at N (`shift_positions`). The keys are used as they are, without a rotation.
    """

    def __init__(self, keys_NKD: Tensor, values_NKD: Tensor) -> None:
        super().__init__()
        self.prefix_keys, self.prefix_values = nn.Parameter(keys_NKD), nn.Parameter(values_NKD)
        self.enabled = True

    def before(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """[B, K, T, D] each -> [B, K, N + T, D]."""
        if self.prefix_keys.shape[1:] != key.shape[1::2] or self.prefix_values.shape[1:] != value.shape[1::2]:
            raise ValueError(f"keys {list(key.shape)} do not go with a prefix {list(self.prefix_keys.shape)}")
        own = [part.transpose(0, 1).to(key.dtype).expand(len(key), -1, -1, -1) for part in self.parts()]
        return torch.cat([own[0], key], dim=2), torch.cat([own[1], value], dim=2)

    def parts(self) -> tuple[nn.Parameter, nn.Parameter]:
        """Keys and values, [N, K, D] each."""
        return self.prefix_keys, self.prefix_values


class GatedPrompt(nn.Module):
    """A prompt that every token looks at apart from the others (LLaMA-Adapter, Zhang et al. 2023,
    https://arxiv.org/abs/2303.16199, equations 6 to 9): gate * softmax(q K^T) V is added to what attention returns.

    Keys and values are the layer's own projections of the prompt, not rotated; the gate starts at zero.
    """

    def __init__(self, prompt_NC: Tensor) -> None:
        super().__init__()
        self.adaption_prompt = nn.Parameter(prompt_NC[None])
        """[1, N, C], as peft has it."""
        self.adaption_gate = nn.Parameter(prompt_NC.new_zeros(1))
        self.enabled = True

    def forward(self, attention: nn.Module, query: Tensor, scaling: float | None) -> Tensor:
        """What is added, [B, T, H, D], for queries [B, H, T, D]."""
        key, value = self._projected(attention, query)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32) * self.adaption_gate
        return (weights.to(query.dtype) @ value).transpose(1, 2)

    def _projected(self, attention: nn.Module, query: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the prompt, [1, K, N, D]."""
        heads = []
        for name in ("k", "v"):
            states = attention.get_submodule(f"{name}_proj")(self.adaption_prompt.to(query.dtype))
            norm = getattr(attention, f"{name}_norm", None)
            width = query.shape[-1] if name == "k" else getattr(attention, "v_head_dim", query.shape[-1])
            # Qwen 3 and Gemma 3 normalise each head by itself, OLMo 2 all of them together.
            whole = norm is not None and next(iter(norm.parameters())).shape[-1] == states.shape[-1] != width
            states = norm(states) if norm is not None and whole else states
            states = states.unflatten(-1, (-1, width))
            heads.append((norm(states) if norm is not None and not whole else states).transpose(1, 2))
        return heads[0], heads[1]


def virtual_tokens(model: PreTrainedModel) -> int:
    """How many positions come before a document's first token: a soft prompt's, or a prefix'."""
    prefixes = (module for module in model.modules() if isinstance(module, Prefix) and module.enabled)
    return len(prompt_ids(model)) + max((len(prefix.prefix_keys) for prefix in prefixes), default=0)


def prefix_of(attention: nn.Module) -> Prefix | None:
    """The prefix of an attention module, where it has one that is switched on."""
    prefix: Prefix | None = attention._modules.get(PREFIX)  # type: ignore[assignment]  # asked in every layer
    return prefix if prefix is not None and prefix.enabled else None


def gated_prompt_of(attention: nn.Module) -> GatedPrompt | None:
    """Likewise its gated prompt."""
    prompt: GatedPrompt | None = attention._modules.get(GATED)  # type: ignore[assignment]
    return prompt if prompt is not None and prompt.enabled else None


def shift_positions(model: PreTrainedModel, by: int) -> None:
    """Let positions count from `by` on, wherever the model's prefixes are switched on.

    Raises:
        UserError: the model cannot be told positions.
    """
    # Not the backbone, past which OPT's head calls the decoder directly.
    decoder = describe(model).decoder
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        raise UserError(
            f"{type(model).__name__} takes no position_ids, so its tokens cannot be moved behind a prefix",
            how="set method.type: soft_prompt",
            key=("method", "type"),
        )
    first = next(module for module in model.modules() if isinstance(module, Prefix))
    decoder.register_forward_pre_hook(partial(_shift, first, by), with_kwargs=True)


def _shift(
    prefix: Prefix, by: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Hook before the decoder."""
    if not prefix.enabled:
        return None
    positions = kwargs.get("position_ids")
    if positions is None:
        tokens = kwargs.get("inputs_embeds") if kwargs.get("input_ids") is None else kwargs["input_ids"]
        positions = _positions(args[0] if tokens is None else tokens, kwargs)
    return args, kwargs | {"position_ids": positions + by}


def _positions(tokens: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """int64 [B or 1, T]: where tokens stand that come without positions; padding does not count."""
    length, mask = tokens.shape[1], kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -length:]
    # The name of the keyword has changed in transformers 5.
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    past = 0 if cache is None else cache.get_seq_length()
    return torch.arange(past, past + length, device=tokens.device)[None]
