"""Soft prompts: trained vectors in the place of token embeddings (Lester et al. 2021, https://arxiv.org/abs/2104.08691).

A prompt's rows have ids of their own, below zero: -1 is the first row, -2 the second. Whoever makes a model's input
puts them before the first token of every document (`prompt_ids`), and from there on they are tokens like others: they
have positions, take part in packing, padding, caches and masks, and every document of a packed row gets its own. Only
the lookup knows them: hooks around the embedding hand it ids that it knows, and put the prompt's rows where they
belong. So the prompt's vectors are what the first layer reads, after any factor that the embedding applies (Gemma's).

Shape suffixes: N rows of the prompt, D width.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ftkit.errors import UserError
from ftkit.models.architecture import describe

CHILD, PARAMETER = "soft_prompt", "prompt_embeddings"
"""Names of the module, inside the embedding, and of its rows."""


class SoftPrompt(nn.Module):
    """The rows, float32; the embedding's output tells the dtype that they are used in."""

    def __init__(self, rows_ND: Tensor) -> None:
        super().__init__()
        self.prompt_embeddings = nn.Parameter(rows_ND)
        self.enabled = True
        self.ids: Tensor | None = None
        """What the embedding is looking up, while it does."""

    def forward(self, known: Tensor) -> Tensor:
        """[..., D], looked up with every id below zero as 0 -> [..., D] with the prompt's rows."""
        ids, self.ids = self.ids, None
        if ids is None:
            return known
        # Every row takes part in every backward pass, as DDP wants it: with a gradient of zero where no id asks.
        rows = F.embedding((-1 - ids).clamp(0, len(self.prompt_embeddings) - 1), self.prompt_embeddings)
        return torch.where((ids < 0)[..., None], rows.to(known.dtype), known)


def insert_soft_prompt(model: PreTrainedModel, rows_ND: Tensor) -> SoftPrompt:
    """Give the model a prompt; it trains.

    Raises:
        UserError: the model looks tokens up in a second table too, which has no row for a prompt.
    """
    if getattr(model.config.get_text_config(), "hidden_size_per_layer_input", None):
        raise UserError(
            f"{type(model).__name__} looks tokens up in every layer, and a soft prompt has no row there",
            how="set method.type: lora without soft_prompt",
            key=("method",),
        )
    embeddings = describe(model).embeddings
    assert soft_prompt(model) is None, "the model has a soft prompt already"
    prompt = SoftPrompt(rows_ND)
    embeddings.add_module(CHILD, prompt)
    embeddings.register_forward_pre_hook(partial(_hand_over, prompt))
    embeddings.register_forward_hook(_put_in_place)
    return prompt


def soft_prompt(model: PreTrainedModel) -> SoftPrompt | None:
    """The model's prompt, where it has one."""
    prompt = getattr(describe(model).embeddings, CHILD, None)
    assert prompt is None or isinstance(prompt, SoftPrompt)
    return prompt


def prompt_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """What to put before the first token of every document: one id a row of the prompt, none without a prompt."""
    prompt = soft_prompt(model)
    return () if prompt is None or not prompt.enabled else ids_of_prompt(len(prompt.prompt_embeddings))


def ids_of_prompt(rows: int) -> tuple[int, ...]:
    """The ids of a prompt of so many rows."""
    return tuple(range(-1, -1 - rows, -1))


@torch.no_grad()
def looked_up(model: PreTrainedModel, ids_N: Tensor) -> Tensor:
    """float32 [N, D]: what the first layer reads for these tokens."""
    embeddings = describe(model).embeddings
    rows: Tensor = embeddings(ids_N.to(next(embeddings.parameters()).device))
    return rows.detach().float().clone()


def _hand_over(prompt: SoftPrompt, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Hook before the lookup, whose argument all models pass by place."""
    if not prompt.enabled:
        return None
    prompt.ids = args[0]
    return args[0].clamp_min(0), *args[1:]


def _put_in_place(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Hook after the lookup."""
    prompt = module.get_submodule(CHILD)
    result: Tensor = prompt(output)
    return result
