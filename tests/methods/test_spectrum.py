"""The measures of an update, against dense decompositions, the papers' formulas and matrices of known structure."""

import math

import pytest
import torch
from torch import Tensor

from ftkit.methods.spectrum import (
    Spectrum,
    amplification,
    chance_similarity,
    decompose,
    decompose_product,
    directions,
    spectrum_of,
    subspace_similarity,
)

OUT, IN = 24, 40


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(width: int, count: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(random(width, count, seed=seed)).Q


# --- singular values


@pytest.mark.parametrize("rank", [1, 4, OUT, 50])
def test_a_product_is_decomposed_as_torch_decomposes_it_dense(rank: int) -> None:
    """Also where the rank is as large as the weight's sides, or larger."""
    a_RI, b_OR = random(rank, IN), random(OUT, rank, seed=1)
    dense = 1.5 * (b_OR @ a_RI)
    found = decompose_product(a_RI.float(), b_OR.float(), 1.5)
    assert len(found.values_K) == min(rank, OUT)
    torch.testing.assert_close(found.values_K, torch.linalg.svdvals(dense)[:rank], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.u_OK * found.values_K @ found.v_IK.t(), dense, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.u_OK.t() @ found.u_OK, torch.eye(min(rank, OUT)).double())


def test_components_that_are_rounding_alone_are_left_out() -> None:
    a_RI, b_OR = random(2, IN), random(OUT, 2, seed=1)
    # Rank 2, written with factors of rank 4 that cancel as those of a PiSSA that has learned little.
    found = decompose_product(torch.cat([a_RI, a_RI]), torch.cat([b_OR, 2 * b_OR], dim=1), 1.0)
    assert len(found.values_K) == 2
    assert 1 <= found.spectrum.effective_rank <= 2
    nothing = decompose_product(a_RI, torch.zeros(OUT, 2), 1.0)
    assert len(nothing.values_K) == 0
    assert (nothing.spectrum.norm, nothing.spectrum.effective_rank, nothing.spectrum.rank_holding(0.9)) == (0, 0, 0)


def test_the_leading_components_of_a_matrix_of_full_rank() -> None:
    matrix = random(OUT, IN)
    found = decompose(matrix, 3)
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(found.values_K, values[:3])
    torch.testing.assert_close(found.u_OK @ found.v_IK.t(), u[:, :3] @ v[:3])


# --- ranks


def test_effective_rank_is_the_exponential_of_the_entropy() -> None:
    assert Spectrum(torch.full((5,), 3.0)).effective_rank == pytest.approx(5)
    assert Spectrum(torch.tensor([7.0, 0.0, 0.0])).effective_rank == pytest.approx(1)
    shares = [9 / 14, 4 / 14, 1 / 14]
    entropy = -sum(p * math.log(p) for p in shares)
    assert Spectrum(torch.tensor([3.0, 2.0, 1.0])).effective_rank == pytest.approx(math.exp(entropy))


def test_the_rank_that_holds_a_share_of_the_squared_norm() -> None:
    spectrum = Spectrum(torch.tensor([8.0, 5.0, 3.0, 1.0]).sqrt())
    assert [spectrum.rank_holding(share) for share in (0.4, 0.5, 0.75, 0.9, 0.95, 0.99)] == [1, 2, 2, 3, 4, 4]


def test_the_norm_is_that_of_the_matrix() -> None:
    matrix = random(OUT, IN).float()
    assert spectrum_of(matrix).norm == pytest.approx(float(torch.linalg.matrix_norm(matrix)), rel=1e-6)


# --- amplification


def test_amplification_is_the_papers_ratio() -> None:
    a_RI, b_OR, weight_OI = random(4, IN), random(OUT, 4, seed=1), random(OUT, IN, seed=2)
    update = 0.5 * (b_OR @ a_RI)
    u, _, v = torch.linalg.svd(update)
    projected = u[:, :4].T @ weight_OI @ v[:4].T
    expected = torch.linalg.matrix_norm(update) / torch.linalg.matrix_norm(projected)
    assert amplification(decompose_product(a_RI, b_OR, 0.5), weight_OI) == pytest.approx(float(expected))
    assert amplification(decompose(update, 4), weight_OI) == pytest.approx(float(expected))


def test_amplification_of_the_weights_own_directions_and_of_foreign_ones() -> None:
    u_OK, v_IK = orthonormal(OUT, 4), orthonormal(IN, 4, seed=1)
    weight_OI = u_OK[:, :2] @ v_IK[:, :2].t()
    own = decompose_product(v_IK[:, :2].t(), 3 * u_OK[:, :2], 1.0)
    assert amplification(own, weight_OI) == pytest.approx(3)
    nothing = decompose_product(v_IK[:, :2].t(), 0 * u_OK[:, :2], 1.0)
    assert amplification(nothing, weight_OI) is None
    assert amplification(own, torch.zeros(OUT, IN)) is None


# --- similarity


def test_similarity_is_the_papers_formula() -> None:
    one, other = random(8, IN), random(16, IN, seed=1)
    phi = subspace_similarity(directions(one.t()), directions(other.t()))
    v_1, v_2 = (torch.linalg.svd(a, full_matrices=False).Vh for a in (one, other))
    assert phi.shape == (8, 16)
    for i, j in ((1, 1), (2, 7), (8, 3), (8, 16)):
        expected = torch.linalg.matrix_norm(v_1[:i] @ v_2[:j].T) ** 2 / min(i, j)
        assert float(phi[i - 1, j - 1]) == pytest.approx(float(expected))


def test_a_shared_subspace_has_similarity_1_and_orthogonal_ones_0() -> None:
    basis = orthonormal(IN, 12)
    inside, outside = basis[:, :4], basis[:, 6:]
    mixed = inside @ random(4, 4, seed=3)
    torch.testing.assert_close(
        subspace_similarity(directions(inside), directions(mixed))[3, 3], torch.ones(()).double()
    )
    # The smaller subspace lies in the larger one.
    larger = torch.cat([mixed, outside], dim=1)
    torch.testing.assert_close(
        subspace_similarity(directions(mixed), directions(larger))[3, -1], torch.ones(()).double()
    )
    assert subspace_similarity(directions(inside), directions(outside)).abs().max() < 1e-12


def test_directions_of_nothing_are_none() -> None:
    assert directions(torch.zeros(OUT, 3)).shape == (OUT, 0)
    assert subspace_similarity(directions(torch.zeros(OUT, 3)), orthonormal(OUT, 2)).shape == (0, 2)


def test_chance_is_what_random_subspaces_have_on_average() -> None:
    pairs = [(orthonormal(IN, 4, seed=2 * n), orthonormal(IN, 10, seed=2 * n + 1)) for n in range(200)]
    mean = sum(float(subspace_similarity(one, other)[3, 9]) for one, other in pairs) / len(pairs)
    assert mean == pytest.approx(chance_similarity(4, 10, IN), rel=0.03)
