"""Greedy answers, in batches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ftkit.models.architecture import key_value_shape
from ftkit.models.soft_prompt import prompt_ids

CACHE_BYTES, MOST_TOKENS = 2**30, 32_768
"""Size of the key-value cache that batches are filled up to, and tokens of a batch at most."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What the model wrote after one prompt."""

    ids: tuple[int, ...]
    """Without the token that ended it."""
    num_fed: int
    """Tokens of its prompt, padding included."""
    num_generated: int
    """Tokens written, the ending one included."""
    finished: bool
    """Whether it ended by itself, not at `max_new_tokens`."""
    end_id: int | None = None
    """The token that ended it; None where none of `end_ids` did."""


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    end_ids: Sequence[int],
    max_new_tokens: int,
    max_tokens: int,
    is_complete: Callable[[Sequence[int]], bool] | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Generation]:
    """Continue each prompt with the most probable token, until one of `end_ids` or `max_new_tokens`.

    Prompts are sorted by length, batched and left-padded; what a prompt gets does not depend on the others, up to
    float rounding where two tokens are almost equally probable. Sampling, penalties and length rules of the model's own
    generation config are set aside, so that every model is asked in the same way.

    Args:
        model: in eval mode, with an attention implementation that takes padded batches.
        prompts: token ids, at least one each.
        end_ids: tokens that end an answer.
        max_new_tokens: per answer.
        max_tokens: tokens a batch may hold, padding and new tokens included; a longer prompt is a batch of its own.
        is_complete: given the new ids of a row, whether it needs no more; the last id is kept.
        on_progress: called with the number of prompts done.
    """
    generations: dict[int, Generation] = {}
    for indices in _batches(prompts, max_new_tokens, max_tokens):
        batch = [prompts[index] for index in indices]
        generations.update(
            zip(indices, _generate_batch(model, batch, end_ids, max_new_tokens, is_complete), strict=True)
        )
        on_progress(len(generations))
    return [generations[index] for index in range(len(prompts))]


def cached_tokens(model: PreTrainedModel) -> int:
    """Tokens whose keys and values take `CACHE_BYTES`, at most `MOST_TOKENS`.

    A step of generation reads every weight once, however many rows it serves: large batches are nearly free.
    """
    heads, width = key_value_shape(model.config)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    bytes_per_token = 2 * layers * heads * width * model.dtype.itemsize
    return min(MOST_TOKENS, CACHE_BYTES // bytes_per_token)


def _batches(prompts: Sequence[Sequence[int]], max_new_tokens: int, max_tokens: int) -> Iterator[list[int]]:
    """Longest first, so that a batch too large for the memory shows at once."""
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    start = 0
    while start < len(order):
        rows = max(1, max_tokens // (len(prompts[order[start]]) + max_new_tokens))
        yield order[start : start + rows]
        start += rows


def _generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    end_ids: Sequence[int],
    max_new_tokens: int,
    is_complete: Callable[[Sequence[int]], bool] | None,
) -> list[Generation]:
    # A soft prompt comes before the first token: after the padding.
    before = prompt_ids(model)
    prompts = [(*before, *prompt) for prompt in prompts]
    length = max(map(len, prompts))
    input_ids_BT = torch.zeros(len(prompts), length, dtype=torch.int64)  # the mask hides padding, whatever its id
    mask_BT = torch.zeros(len(prompts), length, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        input_ids_BT[row, length - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        mask_BT[row, length - len(prompt) :] = 1

    ended_at: dict[int, int] = {}  # row -> its number of new tokens; what it goes on to write is dropped

    def note_endings(ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        del scores
        for row, new_ids in enumerate(ids[:, length:].tolist()):
            if row not in ended_at and (new_ids[-1] in end_ids or (is_complete is not None and is_complete(new_ids))):
                ended_at[row] = len(new_ids)
        return torch.tensor([row in ended_at for row in range(len(prompts))], device=ids.device)

    config = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0, use_cache=True)
    with _plain_generation_config(model), torch.no_grad():
        output_BT = model.generate(  # type: ignore[operator]  # of GenerationMixin, which causal models have
            input_ids_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            generation_config=config,
            stopping_criteria=[note_endings],
        )
    generations = []
    for row, new_ids in enumerate(output_BT[:, length:].tolist()):
        new_ids = new_ids[: ended_at.get(row, max_new_tokens)]
        end_id = new_ids[-1] if new_ids and new_ids[-1] in end_ids else None
        kept = new_ids if end_id is None else new_ids[:-1]
        generations.append(Generation(tuple(kept), length, len(new_ids), finished=row in ended_at, end_id=end_id))
    return generations


@contextmanager
def _plain_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Hide the model's own generation config: `generate` takes whatever is unset in ours from it (Qwen's repetition
    penalty, temperatures, end tokens)."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
