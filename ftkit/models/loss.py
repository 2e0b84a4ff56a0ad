"""Cross-entropy through a head with many outputs, without the logits of all targets in memory at once."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ftkit.models.token_rows import with_columns

CHUNK_BYTES = 128 * 2**20
"""Size of one chunk's float32 logits.

Measured with SmolLM2's head (49,152 x 576) and 2,048 targets on one core of an AMD EPYC: chunks of 128 to 1,024 targets
took the same time within noise (4.5 s in float32 and 1.8 s in bfloat16; all logits at once 5.4 s and 2.3 s), chunks of
64 took 1.2 times as long and, with the weight's gradient in bfloat16, 1.7 times.
"""


def chunk_size(vocab_size: int) -> int:
    """Targets a chunk, so that its float32 logits take about `CHUNK_BYTES`; a multiple of 64, at least 128."""
    return max(128, CHUNK_BYTES // (4 * vocab_size) // 64 * 64)


def chunked_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    datasets_N: Tensor,
    num_datasets: int,
    chunk: int | None = None,
    *,
    rows_KD: Tensor | None = None,
    ids_K: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over targets of log(sum_v exp(z_v)) - z_target, where z = hidden W^T + b.

    The product is computed in the dtype of `hidden_ND`, everything after it in float32. The gradient is formed in the
    forward pass, a chunk of targets at a time, where the logits are at hand anyway; without gradients it is not.

    Args:
        hidden_ND: hidden states at the target positions; N may be 0.
        weight_VD: the head's weight, cast where its dtype is another. No cast copy outlives the call.
        targets_N: ids of the targets, int64.
        datasets_N: which data set each target belongs to, int64.
        num_datasets: length of the second result.
        chunk: targets at once; default `chunk_size(V)`.
        rows_KD: with `ids_K` rows that take the place of the weight's or follow them, see `models/token_rows.py`; not
            with a bias.

    Returns:
        The loss's sum (float32 scalar, with gradients), and its sums by data set (float32 [num_datasets], without).
    """
    needs_grad = torch.is_grad_enabled()
    chunk = chunk_size(weight_VD.shape[0]) if chunk is None else chunk
    loss, by_dataset = _ChunkedCrossEntropy.apply(
        hidden_ND, weight_VD, bias_V, targets_N, datasets_N, num_datasets, chunk, needs_grad, rows_KD, ids_K
    )
    return loss, by_dataset


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The loss of `chunked_cross_entropy`; backward only scales the gradients that forward formed."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        datasets_N: Tensor,
        num_datasets: int,
        chunk: int,
        needs_grad: bool,
        rows_KD: Tensor | None,
        ids_K: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The loss, and its sums by data set; arguments as `chunked_cross_entropy` has them."""
        needs_hidden, needs_weight, needs_bias = (needs_grad and needs for needs in ctx.needs_input_grad[:3])
        dtype = hidden_ND.dtype
        cast_VD, cast_V = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if needs_bias and bias_V is not None else None
        rows = None if rows_KD is None else rows_KD.to(dtype)
        needs_rows = rows_KD is not None and needs_grad and ctx.needs_input_grad[8]
        grad_rows = torch.zeros_like(rows_KD, dtype=torch.float32) if needs_rows and rows_KD is not None else None
        losses_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)

        for start in range(0, len(hidden_ND), chunk):
            part = slice(start, start + chunk)
            h_CD, targets_C1 = hidden_ND[part], targets_N[part, None]
            # From here to the gradient one buffer: logits, exp(logits - max), softmax, softmax - one-hot.
            z_CV = F.linear(h_CD, cast_VD, cast_V).float()
            if rows is not None and ids_K is not None:
                z_CV = with_columns(z_CV, F.linear(h_CD, rows).float(), ids_K)
            target_C1, max_C1 = z_CV.gather(1, targets_C1), z_CV.amax(1, keepdim=True)
            sum_C1 = z_CV.sub_(max_C1).exp_().sum(1, keepdim=True)
            losses_N[part] = (sum_C1.log() + max_C1 - target_C1).squeeze(1)
            if not (needs_hidden or needs_weight or needs_bias or needs_rows):
                continue
            grad_CV = z_CV.div_(sum_C1)
            grad_CV.scatter_add_(1, targets_C1, torch.full_like(sum_C1, -1.0))
            if grad_bias is not None:
                grad_bias += grad_CV.sum(0)
            grad_CV = grad_CV.to(dtype)
            grad_CK = None
            if rows is not None and ids_K is not None:
                # Their columns are the rows' own: the weight has no part in them.
                grad_CK = grad_CV[:, ids_K]
                grad_CV = grad_CV.index_fill(1, ids_K, 0.0)[:, : len(cast_VD)]
                if grad_rows is not None:
                    _add_product(grad_rows, grad_CK.t(), h_CD)
            if grad_hidden is not None:
                torch.mm(grad_CV, cast_VD, out=grad_hidden[part])
                if grad_CK is not None and rows is not None:
                    grad_hidden[part].addmm_(grad_CK, rows)
            if grad_weight is not None:
                _add_product(grad_weight, grad_CV.t(), h_CD)

        ctx.gradients, ctx.gradient_of_rows = (grad_hidden, grad_weight, grad_bias), grad_rows
        by_dataset = torch.zeros(num_datasets, dtype=torch.float32, device=hidden_ND.device)
        by_dataset.index_add_(0, datasets_N, losses_N)
        ctx.mark_non_differentiable(by_dataset)
        return losses_N.sum(), by_dataset

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "the gradients are scaled in place: only one backward pass"
        gradients, ctx.gradients = (*ctx.gradients, ctx.gradient_of_rows), None
        scaled = [None if gradient is None else gradient.mul_(grad_loss) for gradient in gradients]
        return *scaled[:3], *[None] * 5, scaled[3], None


def _add_product(total_VD: Tensor, a_VC: Tensor, b_CD: Tensor) -> None:
    """Add the product to the float32 total."""
    if a_VC.dtype == torch.float32:
        total_VD.addmm_(a_VC, b_CD)
    else:
        total_VD += a_VC @ b_CD
