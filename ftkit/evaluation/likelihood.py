"""How probable a model finds given tokens: what perplexity and the ranking of options rest on."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ftkit.data.types import IGNORE, Example
from ftkit.errors import NonFiniteError
from ftkit.models.soft_prompt import prompt_ids

MAX_LOGITS = 2**27
"""Elements of the largest tensor of logits: 512 MiB in float32. One document is never split, whatever it needs."""
ROWS_AT_ONCE = 128
"""Positions whose log-softmax is formed in float32 at a time."""


@dataclass(frozen=True, slots=True)
class Likelihoods:
    """One entry an example."""

    log_likelihoods: np.ndarray
    """float64 [n], nats: the sum over the example's targets."""
    num_targets: np.ndarray
    """int64 [n]"""
    tokens_run: int
    """Tokens that went through the model, padding included."""


def score_targets(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    max_tokens: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Likelihoods:
    """Sum of log p(target | everything before it) over the targets of each example.

    Examples are sorted and batched, right-padded; the result does not depend on it beyond rounding. The head is applied
    only to the positions in a batch from which a target is predicted. Logits become float32 before the softmax.

    Args:
        model: in eval mode, with an attention implementation that takes padded batches.
        max_tokens: tokens a batch may hold, padding included; a longer example is a batch of its own.
        on_progress: called with the number of examples done.

    Raises:
        NonFiniteError: the model's logits are not finite.
    """
    log_likelihoods = np.zeros(len(examples), dtype=np.float64)
    tokens_run = done = 0
    takes_positions = "logits_to_keep" in inspect.signature(model.forward).parameters
    vocabulary = model.config.get_text_config().vocab_size
    scored = [index for index, example in enumerate(examples) if example.num_targets]
    for indices in _batches(examples, scored, max_tokens=max_tokens, max_positions=MAX_LOGITS // vocabulary):
        batch = [examples[index] for index in indices]
        sums, tokens = _score_batch(model, batch, takes_positions)
        log_likelihoods[indices] = sums
        tokens_run += tokens
        done += len(indices)
        on_progress(done)
    if not np.isfinite(log_likelihoods).all():
        raise NonFiniteError(
            "the model's log-probabilities are not finite", how="load it in float32 (`model.dtype: float32`)"
        )
    return Likelihoods(log_likelihoods, np.array([e.num_targets for e in examples], dtype=np.int64), tokens_run)


def _batches(
    examples: Sequence[Example], indices: Sequence[int], *, max_tokens: int, max_positions: int
) -> Iterator[list[int]]:
    """Longest first, so that a batch too large for the memory shows at once; alike lengths and prompts together."""
    first_target = {index: int(np.argmax(examples[index].labels != IGNORE)) for index in indices}
    order = sorted(indices, key=lambda index: (-examples[index].num_tokens, first_target[index], index))
    batch: list[int] = []
    for index in order:
        longest = examples[(batch or [index])[0]].num_tokens
        # The head runs on every position that any row needs, for all rows: their span bounds the logits.
        span = longest - min(first_target[other] for other in (*batch, index))
        rows = len(batch) + 1
        if batch and (rows * longest > max_tokens or rows * span > max_positions):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _score_batch(model: PreTrainedModel, batch: Sequence[Example], takes_positions: bool) -> tuple[np.ndarray, int]:
    """Sums of the targets' log-probabilities, float64 [B], and the number of tokens run."""
    # A soft prompt comes before the first token.
    before = torch.tensor(prompt_ids(model), dtype=torch.int64)
    start = len(before)
    length = start + max(example.num_tokens for example in batch)
    input_ids_BT = torch.zeros(len(batch), length, dtype=torch.int64)  # the mask hides padding, whatever its id
    labels_BT = torch.full((len(batch), length), IGNORE, dtype=torch.int64)
    mask_BT = torch.zeros(len(batch), length, dtype=torch.int64)
    for row, example in enumerate(batch):
        end = start + example.num_tokens
        input_ids_BT[row, :start], mask_BT[row, :end] = before, 1
        input_ids_BT[row, start:end] = torch.from_numpy(example.input_ids.astype(np.int64))
        labels_BT[row, start:end] = torch.from_numpy(example.labels.astype(np.int64))

    is_target_BT = labels_BT[:, 1:] != IGNORE  # labels[t] is predicted from position t - 1
    positions_P = is_target_BT.any(dim=0).nonzero().squeeze(-1)
    targets_BP = labels_BT[:, 1:][:, positions_P]
    device = model.device
    with torch.no_grad():
        inputs = {"input_ids": input_ids_BT.to(device), "attention_mask": mask_BT.to(device), "use_cache": False}
        if takes_positions:
            logits_BPV = model(**inputs, logits_to_keep=positions_P.to(device)).logits
        else:
            logits_BPV = model(**inputs).logits[:, positions_P.to(device)]
        sums = _sum_log_probabilities(logits_BPV, targets_BP.to(device))
    return sums.cpu().numpy(), input_ids_BT.numel()


def _sum_log_probabilities(logits_BPV: Tensor, targets_BP: Tensor) -> Tensor:
    """float64 [B]; in pieces, so that the float32 copy of the logits stays small."""
    rows_N, columns_N = (targets_BP != IGNORE).nonzero(as_tuple=True)
    chosen = []
    for rows, columns in zip(rows_N.split(ROWS_AT_ONCE), columns_N.split(ROWS_AT_ONCE), strict=True):
        log_probabilities = torch.log_softmax(logits_BPV[rows, columns].float(), dim=-1)
        chosen.append(log_probabilities.gather(-1, targets_BP[rows, columns].unsqueeze(-1)).squeeze(-1))
    # On the CPU, which adds in a fixed order; fetched once, since a GPU is waited for each time.
    sums_B = torch.zeros(len(targets_BP), dtype=torch.float64)
    return sums_B.index_add_(0, rows_N.cpu(), torch.cat(chosen).cpu().double())
