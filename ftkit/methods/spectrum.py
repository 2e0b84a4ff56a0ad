"""What an update dW of a weight W consists of: singular values, what it amplifies, whose directions it shares.

The measures are those of section 7 of the LoRA paper (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

A product B A is decomposed through its factors. Any other matrix M through its Gram matrix, M^T M or M M^T, whichever
is smaller, in float64: its eigenvalues are the squared singular values, which is what shares of |M|^2 are made of. At
width 2048 that took a tenth of the time of torch.linalg.svdvals in float32, and was more exact; M itself is never held
in float64. Singular values below 1e-6 of the largest cannot be told from rounding this way, and count as 0.

Shape suffixes: I input width, O output width, R rank of the factors, K number of singular values, D any width.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 2048
"""Rows of a matrix that are cast to float64 at a time."""


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
        """exp(-sum of p_i log p_i) with p_i = s_i / sum of s_j; n for n equal singular values, 0 for a zero matrix.

        Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality" (EUSIPCO).
        """
        total = self.values_K.sum()
        return float(torch.special.entr(self.values_K / total).sum().exp()) if total > 0 else 0.0

    def share_held(self, rank: int) -> float:
        """Share of the squared Frobenius norm in the `rank` largest singular values; 0 for a zero matrix."""
        held_K = self._shares_held()
        return float(held_K[min(rank, len(held_K)) - 1]) if len(held_K) else 0.0

    def rank_holding(self, share: float) -> int:
        """The smallest k whose k largest singular values hold `share` (below 1) of the squared Frobenius norm."""
        held_K = self._shares_held()
        return int((held_K < share).sum()) + 1 if len(held_K) else 0

    def _shares_held(self) -> Tensor:
        """Share of the squared norm in the first 1, 2, ... K values; empty for a zero matrix."""
        energy_K = self.values_K.square()
        total = energy_K.sum()
        return (energy_K / total).cumsum(0) if total > 0 else energy_K[:0]


@dataclass(frozen=True, eq=False)
class Decomposition:
    """Singular values of a matrix [O, I] that are not zero, with the vectors u_k and v_k of each."""

    u_OK: Tensor
    values_K: Tensor
    v_IK: Tensor

    @property
    def spectrum(self) -> Spectrum:
        """The singular values alone."""
        return Spectrum(self.values_K)

    def leading(self, count: int) -> "Decomposition":
        """The largest `count` of them."""
        return Decomposition(self.u_OK[:, :count], self.values_K[:count], self.v_IK[:, :count])


def decompose_product(a_RI: Tensor, b_OR: Tensor, scale: float) -> Decomposition:
    """The singular value decomposition of scale * B A, exact and without the product [O, I].

    B = Q_B R_B and A^T = Q_A R_A, so B A = Q_B (R_B R_A^T) Q_A^T, of which only the bracket, at most [R, R], is
    decomposed. Q_B and Q_A have orthonormal columns. In float64, which costs next to nothing at this size.
    """
    q_b_OK, r_b = torch.linalg.qr(b_OR.double())
    q_a_IK, r_a = torch.linalg.qr(a_RI.double().t())
    u, values_K, v_transposed = torch.linalg.svd(scale * (r_b @ r_a.t()), full_matrices=False)
    # Factors may cancel, as those of a PiSSA do at its start: what is left then is rounding of their size, not its own.
    size = abs(scale) * float(torch.linalg.matrix_norm(r_b) * torch.linalg.matrix_norm(r_a))
    count = _above_rounding(values_K, size, len(values_K))
    return Decomposition(q_b_OK @ u, values_K, q_a_IK @ v_transposed.t()).leading(count)


def decompose(matrix_OI: Tensor) -> Decomposition:
    """The singular value decomposition of a matrix that is no low-rank product, through its Gram matrix."""
    wide = matrix_OI.shape[0] < matrix_OI.shape[1]
    tall = matrix_OI.t() if wide else matrix_OI
    squares, vectors = torch.linalg.eigh(_gram(_chunks(tall)))
    values_K = _roots(squares)
    count = int((values_K > 0).sum())
    short_DK = vectors.flip(1)[:, :count]
    long_DK = torch.cat([chunk @ short_DK for chunk in _chunks(tall)]) / values_K[:count]
    return Decomposition(*((short_DK, values_K[:count], long_DK) if wide else (long_DK, values_K[:count], short_DK)))


def spectrum_of_difference(one: Tensor, other: Tensor) -> Spectrum:
    """The singular values of `one - other`, matrices of any precision, without holding the difference."""
    if one.shape[0] < one.shape[1]:
        one, other = one.t(), other.t()
    pairs = zip(_chunks(one), _chunks(other), strict=True)
    return Spectrum(_roots(torch.linalg.eigvalsh(_gram(here - there for here, there in pairs))))


def amplification(update: Decomposition, norm: float, weight_OI: Tensor) -> float | None:
    """|dW| / |U^T W V|, Frobenius norms; U [O, r] and V [I, r] are the first r singular vectors of dW.

    How much stronger the update is than the weight was in the directions that it changes: section 7.3 and table 7 of
    the paper, where r is the rank of the adapter.

    Args:
        update: its first r components.
        norm: |dW|, which may have more components than these.

    Returns:
        None where dW is zero, or W has nothing in these directions.
    """
    projected = torch.zeros(len(update.values_K), len(update.values_K), dtype=torch.float64)
    for weight, u in zip(_chunks(weight_OI), update.u_OK.split(ROWS), strict=True):
        projected += (u.t() @ weight) @ update.v_IK
    there = float(torch.linalg.vector_norm(projected))
    return norm / there if there > 0 else None


def chance_amplification(relative_norm: float, count: int, shape: tuple[int, int]) -> float:
    """The amplification of an update with `count` random directions: |W| count / sqrt(O I) of W lies in these.

    Args:
        relative_norm: |dW| / |W|.
        shape: O and I.
    """
    return relative_norm * math.sqrt(shape[0] * shape[1]) / count


def directions(matrix_DR: Tensor) -> Tensor:
    """The left singular vectors [D, K] of a factor, those of singular values that are not zero.

    Those of A^T are the right singular vectors of A, which section 7.2 of the paper compares.
    """
    u, values_K, _ = torch.linalg.svd(matrix_DR.double(), full_matrices=False)
    largest = float(values_K[0]) if len(values_K) else 0.0
    return u[:, : _above_rounding(values_K, largest, max(matrix_DR.shape))]


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


def _gram(chunks: Iterator[Tensor]) -> Tensor:
    """M^T M of the rows of M."""
    total = None
    for chunk in chunks:
        total = chunk.t() @ chunk if total is None else total.addmm_(chunk.t(), chunk)
    assert total is not None, "a matrix has rows"
    return total


def _chunks(matrix: Tensor) -> Iterator[Tensor]:
    """Its rows in float64, some at a time."""
    return (rows.double() for rows in matrix.split(ROWS))


def _roots(squares: Tensor) -> Tensor:
    """Singular values in descending order, from the eigenvalues of a Gram matrix."""
    squares = squares.flip(0)
    count = _above_rounding(squares, float(squares[0]), len(squares))
    return torch.cat([squares[:count].sqrt(), torch.zeros_like(squares[count:])])


def _above_rounding(values_K: Tensor, size: float, side: int) -> int:
    """How many of the values (float64, descending) are more than the rounding of sums of `side` terms of this size."""
    return int((values_K > side * torch.finfo(torch.float64).eps * size).sum())
