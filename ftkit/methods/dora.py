"""DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353): length and direction of a weight's rows, trained apart.

    W' = m * V / |V|,    V = W + scale * B A,    equation 5

|V| holds the 2-norm of every row [O] and counts as a constant in the backward pass (section 4.3). m starts as |W|.

Shape suffixes: O output width, I input width, R rank, C rows of a part of the weight.
"""

import torch
from torch import Tensor

ROWS = 512
"""Rows of the weight that are cast to float32 at a time."""


@torch.no_grad()
def row_norms(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """|W + scale * B A| of every row [O], in the precision of A, without forming the product.

    For a row w and its row b of B: |w + s b A|^2 = |w|^2 + 2 s (w A^T) b^T + s^2 b (A A^T) b^T.
    """
    gram_RR = a_RI @ a_RI.t()
    squares = []
    for stored_CI, b_CR in zip(weight_OI.split(ROWS), b_OR.split(ROWS), strict=True):
        weight_CI = stored_CI.to(a_RI.dtype)
        crossed_C = ((weight_CI @ a_RI.t()) * b_CR).sum(1)
        update_C = ((b_CR @ gram_RR) * b_CR).sum(1)
        squares.append(
            torch.linalg.vector_norm(weight_CI, dim=1).square() + 2 * scale * crossed_C + scale**2 * update_C
        )
    return torch.cat(squares).clamp_min(0.0).sqrt()


def gains(magnitude_O: Tensor, norms_O: Tensor) -> Tensor:
    """m / |V|: what every output is multiplied by; 0 for a row of zeros, which has no direction."""
    return magnitude_O / norms_O.clamp_min(torch.finfo(norms_O.dtype).tiny)
