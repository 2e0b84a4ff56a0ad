"""The examples of a global batch, dealt to devices and micro-batches, and put into tensors."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from ftkit.data.types import IGNORE, EncodedExample

EVEN = 1.01
"""Ranks count as even where the fullest has at most so many times the mean, or a single document."""


@dataclass(slots=True)
class Batch:
    """One micro-batch on one device. B: rows, T: tokens a row, D: documents, N: targets."""

    input_ids: Tensor
    """int64 [B, T]; packed: B == 1."""
    position_ids: Tensor
    """int64 [B, T]; restarts at 0 with each document."""
    attention_mask: Tensor | None
    """int64 [B, T], 1 = real; None when packed."""
    cu_seq_lens: Tensor | None
    """int32 [D + 1], document bounds in the packed row, always on the CPU; None when padded."""
    max_seq_len: int
    """Tokens of the longest document."""
    target_positions: Tensor
    """int64 [N]; index into the flattened [B*T] hidden states from which the target is predicted."""
    target_ids: Tensor
    """int64 [N]."""
    target_datasets: Tensor
    """int64 [N]; index of the data set of each target."""
    num_tokens: int
    """Real tokens: neither padding, a soft prompt, nor the stand-in of an empty micro-batch."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`, but for the bounds: every layer reads their values, and would wait for a GPU."""
        device = torch.device(device)
        return Batch(
            input_ids=_moved(self.input_ids, device),
            position_ids=_moved(self.position_ids, device),
            attention_mask=None if self.attention_mask is None else _moved(self.attention_mask, device),
            cu_seq_lens=self.cu_seq_lens,
            max_seq_len=self.max_seq_len,
            target_positions=_moved(self.target_positions, device),
            target_ids=_moved(self.target_ids, device),
            target_datasets=_moved(self.target_datasets, device),
            num_tokens=self.num_tokens,
        )


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. A copy to a GPU does not wait for the work before it, which it would from other memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# ----------------------------------------------------------------------------------------------------- dealing


def deal(lengths: Sequence[int], *, world_size: int, max_tokens: int, padded: bool = False) -> list[list[list[int]]]:
    """Deal documents to ranks so that tokens balance, and to micro-batches that keep the budget.

    First to ranks, then into each rank's micro-batches, longest first. A document longer than `max_tokens` gets a
    micro-batch of its own. Deterministic, so that every rank can work it out alone.

    Args:
        lengths: tokens of each document.
        world_size: number of ranks.
        max_tokens: tokens a micro-batch may hold: their sum, or with `padded` documents times the longest.
        padded: whether documents are padded to the longest of their micro-batch.

    Returns:
        [rank][micro-batch] -> positions in `lengths`, ascending. Every rank has the same number of micro-batches, at
        least one; empty ones fill up.
    """
    fill = _fill_padded if padded else _fill_packed
    dealt = []
    for positions in _deal_to_ranks(lengths, world_size):
        longest_first = sorted(positions, key=lambda position: (-lengths[position], position))
        dealt.append([sorted(bin_) for bin_ in fill(longest_first, lengths, max_tokens)])
    most = max(1, *(len(bins) for bins in dealt))
    return [bins + [[] for _ in range(most - len(bins))] for bins in dealt]


def _deal_to_ranks(lengths: Sequence[int], world_size: int) -> list[list[int]]:
    """Longest first to the rank with the fewest tokens so far (Graham 1969, https://doi.org/10.1137/0117039).

    With a few documents a rank that leaves the fullest up to a third above the best possible; so exchanges follow.
    """
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    loads = [(0, rank) for rank in range(world_size)]
    for position in sorted(range(len(lengths)), key=lambda position: (-lengths[position], position)):
        load, rank = heapq.heappop(loads)
        ranks[rank].append(position)
        heapq.heappush(loads, (load + lengths[position], rank))
    even = max(EVEN * sum(lengths) / world_size, max(lengths, default=0))
    while _exchange(ranks, lengths, even):
        pass
    return ranks


def _exchange(ranks: list[list[int]], lengths: Sequence[int], even: float) -> bool:
    """Take a document from the fullest rank, for a shorter one or none; False where that does not help, or need not.

    Of all such exchanges the one that leaves the fuller of its two ranks with the fewest tokens.
    """
    loads = [sum(lengths[position] for position in positions) for positions in ranks]
    fullest = max(range(len(ranks)), key=loads.__getitem__)
    if loads[fullest] <= even:
        return False
    best_load, best = loads[fullest], None
    for rank, load in enumerate(loads):
        for given in ranks[fullest]:
            for taken in (None, *ranks[rank]):
                moved = lengths[given] - (0 if taken is None else lengths[taken])
                fuller = max(loads[fullest] - moved, load + moved)
                if rank != fullest and fuller < best_load:
                    best_load, best = fuller, (rank, given, taken)
    if best is None:
        return False
    rank, given, taken = best
    ranks[fullest].remove(given)
    ranks[rank].append(given)
    if taken is not None:
        ranks[rank].remove(taken)
        ranks[fullest].append(taken)
    return True


def _fill_packed(longest_first: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """First-fit decreasing: at most 11/9 of the fewest micro-batches possible, plus 6/9."""
    bins: list[list[int]] = []
    free: list[int] = []
    for position in longest_first:
        length = lengths[position]
        index = next((index for index, room in enumerate(free) if room >= length), None)
        if index is None:
            bins.append([position])
            free.append(max_tokens - length)
        else:
            bins[index].append(position)
            free[index] -= length
    return bins


def _fill_padded(longest_first: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Neighbours in length together: a micro-batch's first document is its longest and sets the padded length."""
    bins: list[list[int]] = []
    for position in longest_first:
        if bins and (len(bins[-1]) + 1) * lengths[bins[-1][0]] <= max_tokens:
            bins[-1].append(position)
        else:
            bins.append([position])
    return bins


# --------------------------------------------------------------------------------------------------- collating


def collate(examples: Sequence[EncodedExample], *, packed: bool, pad_id: int, prompt_ids: Sequence[int] = ()) -> Batch:
    """Put the examples of one micro-batch into tensors.

    Args:
        examples: what `deal` put together. None (a rank without documents) gives one padding token without targets,
            so that the rank still runs its forward and backward.
        packed: one after another in a single row, or padded on the right to the longest.
        pad_id: id that fills up. Real tokens are told apart by lengths, so it may be a token that documents contain.
        prompt_ids: put before the first token of every document; they have positions, and no targets.
    """
    before = np.array(prompt_ids, np.int64)
    lengths = [len(before) + example.example.num_tokens for example in examples] or [1]
    row_length = max(lengths)
    starts = [0, *accumulate(lengths)] if packed else [row_length * row for row in range(len(lengths))]
    shape = (1, sum(lengths)) if packed else (len(lengths), row_length)
    input_ids = np.full(shape[0] * shape[1], pad_id, dtype=np.int64)
    positions, ids, datasets = [], [], []
    for example, start in zip(examples, starts, strict=False):
        labels = example.example.labels
        assert labels[0] == IGNORE, "nothing comes before a document's first token, so nothing predicts it"
        input_ids[start : start + len(before)] = before
        start += len(before)
        input_ids[start : start + len(labels)] = example.example.input_ids
        targets = np.flatnonzero(labels != IGNORE)
        positions.append(start + targets - 1)
        ids.append(labels[targets])
        datasets.append(np.full(len(targets), example.dataset))
    if packed:
        position_ids = np.concatenate([np.arange(length) for length in lengths])
    else:
        position_ids = np.tile(np.arange(row_length), len(lengths))
    mask = np.arange(row_length) < np.asarray(lengths)[:, None]
    return Batch(
        input_ids=torch.from_numpy(input_ids.reshape(shape)),
        position_ids=torch.from_numpy(position_ids.reshape(shape)),
        attention_mask=None if packed else torch.from_numpy(mask.astype(np.int64)),
        cu_seq_lens=torch.tensor(starts, dtype=torch.int32) if packed else None,
        max_seq_len=row_length,
        target_positions=_int64(positions),
        target_ids=_int64(ids),
        target_datasets=_int64(datasets),
        num_tokens=sum(example.example.num_tokens for example in examples),
    )


def _int64(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *arrays]).astype(np.int64))
