"""What an update dW of a weight W consists of: singular values, what it amplifies, whose directions it shares.

The measures are those of section 7 of the LoRA paper (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

Shape suffixes: I input width, O output width, R rank of the factors, K number of singular values, D any width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular values of a matrix, in descending order."""

    values_K: Tensor

    @property
    def norm(self) -> float:
        """The Frobenius norm of the matrix: sqrt(sum of s_i^2)."""
        return float(torch.linalg.vector_norm(self.values_K))

    @property
    def effective_rank(self) -> float:
        """exp(-sum of p_i log p_i) with p_i = s_i^2 / sum of s_j^2; n for n equal singular values, 0 for a zero matrix.

        Roy & Vetterli 2007 (EUSIPCO, "The effective rank"), of the squared values where they take p_i = s_i / sum of
        s_j: so it speaks of the same shares of |dW|^2 as `rank_holding`.
        """
        shares_K = self._shares()
        return float(torch.special.entr(shares_K).sum().exp()) if len(shares_K) else 0.0

    def rank_holding(self, share: float) -> int:
        """The smallest k whose k largest singular values hold `share` (below 1) of the squared norm."""
        held_K = self._shares().cumsum(0)
        return int((held_K < share).sum()) + 1 if len(held_K) else 0

    def _shares(self) -> Tensor:
        """Share of the squared norm that each value holds; empty for a zero matrix."""
        energy_K = self.values_K.double().square()
        total = energy_K.sum()
        return energy_K / total if total > 0 else energy_K[:0]


@dataclass(frozen=True, eq=False)
class Decomposition:
    """U diag(s) V^T of a matrix [O, I], of the singular values that are not zero."""

    u_OK: Tensor
    values_K: Tensor
    v_IK: Tensor

    @property
    def spectrum(self) -> Spectrum:
        """The singular values alone."""
        return Spectrum(self.values_K)


def decompose_product(a_RI: Tensor, b_OR: Tensor, scale: float) -> Decomposition:
    """The singular value decomposition of scale * B A, exact and without the product [O, I].

    B = Q_B R_B and A^T = Q_A R_A, so B A = Q_B (R_B R_A^T) Q_A^T, of which only the bracket, at most [R, R], is
    decomposed. Q_B and Q_A have orthonormal columns. In float64, which costs next to nothing at this size.
    """
    q_b_OK, r_b = torch.linalg.qr(b_OR.double())
    q_a_IK, r_a = torch.linalg.qr(a_RI.double().t())
    u, values_K, v_transposed = torch.linalg.svd(scale * (r_b @ r_a.t()), full_matrices=False)
    return _without_zeros(Decomposition(q_b_OK @ u, values_K, q_a_IK @ v_transposed.t()))


def decompose(matrix: Tensor, rank: int) -> Decomposition:
    """The first `rank` components of the singular value decomposition of a matrix that is no low-rank product."""
    u, values_K, v_transposed = torch.linalg.svd(matrix, full_matrices=False)
    return _without_zeros(Decomposition(u[:, :rank], values_K[:rank], v_transposed[:rank].t()))


def spectrum_of(matrix: Tensor) -> Spectrum:
    """All singular values of a matrix of any rank, on the CPU."""
    return Spectrum(torch.linalg.svdvals(matrix).cpu())


def amplification(update: Decomposition, weight_OI: Tensor) -> float | None:
    """|dW| / |U^T W V|, Frobenius norms; U [O, r] and V [I, r] are the first r singular vectors of dW.

    How much stronger the update is than the weight was in the directions that it changes: section 7.3 and table 7 of
    the paper, where r is the rank of the adapter. None where dW is zero, or W has nothing in these directions.
    """
    there = (update.u_OK.t().to(weight_OI) @ weight_OI) @ update.v_IK.to(weight_OI)
    norm = float(torch.linalg.matrix_norm(there)) if there.numel() else 0.0
    return update.spectrum.norm / norm if norm > 0 else None


def directions(matrix_DR: Tensor) -> Tensor:
    """The left singular vectors [D, K] of a factor, those of singular values that are not zero.

    Those of A^T are the right singular vectors of A, which section 7.2 of the paper compares.
    """
    u, values_K, v_transposed = torch.linalg.svd(matrix_DR.double(), full_matrices=False)
    return _without_zeros(Decomposition(u, values_K, v_transposed.t())).u_OK


def subspace_similarity(one_DK: Tensor, other_DK: Tensor) -> Tensor:
    """phi(i, j) = |U_1^iT U_2^j|_F^2 / min(i, j) for every i (rows) and j (columns), counted from 1.

    U^i holds the first i directions. 1 where the smaller of both subspaces lies in the larger one, 0 where they are
    orthogonal: equation 4 of the paper.
    """
    overlap = (one_DK.t() @ other_DK).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, count + 1) for count in overlap.shape)
    return overlap / torch.minimum(i[:, None], j[None, :])


def chance_similarity(i: int, j: int, width: int) -> float:
    """phi(i, j) of two random subspaces on average: each direction has i / width of its length in another's i."""
    return max(i, j) / width


def _without_zeros(full: Decomposition) -> Decomposition:
    """Without the components that are rounding alone, whose directions mean nothing."""
    values_K = full.values_K
    largest_side = max(len(full.u_OK), len(full.v_IK))
    smallest = largest_side * torch.finfo(values_K.dtype).eps * values_K.max() if len(values_K) else 0.0
    count = int((values_K > smallest).sum())
    return Decomposition(full.u_OK[:, :count], values_K[:count], full.v_IK[:, :count])
