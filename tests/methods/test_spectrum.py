"""The measures of an update, against dense decompositions, the papers' formulas and matrices of known structure."""

import math

import pytest
import torch
from torch import Tensor

from ftkit.methods import spectrum as module
from ftkit.methods.spectrum import (
    Spectrum,
    amplification,
    chance_amplification,
    chance_similarity,
    decompose,
    decompose_product,
    directions,
    spectrum_of_difference,
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
    found = decompose_product(a_RI, b_OR, 1.5)
    assert len(found.values_K) == min(rank, OUT)
    torch.testing.assert_close(found.values_K, torch.linalg.svdvals(dense)[:rank], rtol=1e-10, atol=0)
    torch.testing.assert_close(found.u_OK * found.values_K @ found.v_IK.t(), dense, rtol=0, atol=1e-11)
    torch.testing.assert_close(found.u_OK.t() @ found.u_OK, torch.eye(min(rank, OUT)).double())


def test_the_factors_are_decomposed_in_float64_whatever_they_are_stored_in() -> None:
    a_RI, b_OR = random(4, IN).bfloat16(), random(OUT, 4, seed=1).bfloat16()
    expected = torch.linalg.svdvals(b_OR.double() @ a_RI.double())[:4]
    torch.testing.assert_close(decompose_product(a_RI, b_OR, 1.0).values_K, expected, rtol=1e-10, atol=0)


def test_components_that_are_rounding_alone_are_left_out() -> None:
    a_RI, b_OR = random(2, IN), random(OUT, 2, seed=1)
    # Rank 2, written with factors of rank 4.
    found = decompose_product(torch.cat([a_RI, a_RI]), torch.cat([b_OR, 2 * b_OR], dim=1), 1.0)
    assert len(found.values_K) == 2
    assert 1 <= found.spectrum.effective_rank <= 2
    # Factors that cancel, as those of a PiSSA do before it has learned anything.
    cancelled = decompose_product(torch.cat([a_RI, a_RI]), torch.cat([b_OR, -b_OR], dim=1), 1.0)
    nothing = decompose_product(a_RI, torch.zeros(OUT, 2), 1.0)
    for zero in (cancelled, nothing):
        assert len(zero.values_K) == 0
        spectrum = zero.spectrum
        assert (spectrum.norm, spectrum.effective_rank) == (0, 0)
        assert (spectrum.rank_holding(0.9), spectrum.share_held(3)) == (0, 0)


@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT), (OUT, OUT)])
def test_a_matrix_of_full_rank(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tall, wide and square, in pieces of its rows."""
    monkeypatch.setattr(module, "ROWS", 7)
    matrix = random(*shape)
    found = decompose(matrix)
    torch.testing.assert_close(found.values_K, torch.linalg.svdvals(matrix), rtol=1e-10, atol=0)
    torch.testing.assert_close(found.u_OK * found.values_K @ found.v_IK.t(), matrix, rtol=0, atol=1e-12)
    leading = found.leading(3)
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(leading.values_K, values[:3])
    torch.testing.assert_close(leading.u_OK @ leading.v_IK.t(), u[:, :3] @ v[:3])


@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT)])
def test_the_spectrum_of_a_difference(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 7)
    one, other = random(*shape), random(*shape, seed=1)
    expected = torch.linalg.svdvals(one - other)
    torch.testing.assert_close(spectrum_of_difference(one, other).values_K, expected, rtol=1e-10, atol=0)
    # Low precision is widened before it is subtracted: the difference of two bfloat16 numbers is mostly no such number.
    rough = spectrum_of_difference(one.bfloat16(), other.bfloat16()).values_K
    expected = torch.linalg.svdvals(one.bfloat16().double() - other.bfloat16().double())
    torch.testing.assert_close(rough, expected, rtol=1e-10, atol=0)
    assert spectrum_of_difference(one, one).values_K.tolist() == [0] * OUT


def test_the_spectrum_of_a_difference_of_low_rank_ends_where_its_rank_does() -> None:
    base = random(OUT, IN)
    values = spectrum_of_difference(base + random(OUT, 3, seed=1) @ random(3, IN, seed=2), base).values_K
    assert int((values > 0).sum()) == 3
    assert len(values) == OUT


# --- ranks


def test_effective_rank_is_the_exponential_of_the_entropy() -> None:
    assert Spectrum(torch.full((5,), 3.0)).effective_rank == pytest.approx(5)
    assert Spectrum(torch.tensor([7.0, 0.0, 0.0])).effective_rank == pytest.approx(1)
    entropy = -sum(p * math.log(p) for p in (3 / 6, 2 / 6, 1 / 6))
    assert Spectrum(torch.tensor([3.0, 2.0, 1.0])).effective_rank == pytest.approx(math.exp(entropy))


def test_the_rank_that_holds_a_share_of_the_squared_norm() -> None:
    spectrum = Spectrum(torch.tensor([8.0, 5.0, 3.0, 1.0]).double().sqrt())
    assert [spectrum.rank_holding(share) for share in (0.4, 0.5, 0.75, 0.9, 0.95, 0.99)] == [1, 2, 2, 3, 4, 4]
    assert [spectrum.share_held(rank) for rank in (1, 2, 4, 9)] == pytest.approx([8 / 17, 13 / 17, 1, 1])


def test_the_norm_is_that_of_the_matrix() -> None:
    matrix = random(OUT, IN)
    assert decompose(matrix).spectrum.norm == pytest.approx(float(torch.linalg.matrix_norm(matrix)), rel=1e-12)


# --- amplification


def test_amplification_is_the_papers_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 7)
    a_RI, b_OR, weight_OI = random(4, IN), random(OUT, 4, seed=1), random(OUT, IN, seed=2)
    update = 0.5 * (b_OR @ a_RI)
    u, _, v = torch.linalg.svd(update)
    norm = torch.linalg.matrix_norm(update)
    expected = float(norm / torch.linalg.matrix_norm(u[:, :4].T @ weight_OI @ v[:4].T))
    product = decompose_product(a_RI, b_OR, 0.5)
    assert amplification(product, product.spectrum.norm, weight_OI) == pytest.approx(expected, rel=1e-10)
    # An update of full rank: the whole of it over what W has in its first directions.
    full = random(OUT, IN, seed=3)
    u, _, v = torch.linalg.svd(full)
    expected = float(torch.linalg.matrix_norm(full) / torch.linalg.matrix_norm(u[:, :4].T @ weight_OI @ v[:4].T))
    found = decompose(full)
    assert amplification(found.leading(4), found.spectrum.norm, weight_OI) == pytest.approx(expected, rel=1e-10)


def test_amplification_of_the_weights_own_directions_and_of_foreign_ones() -> None:
    u_OK, v_IK = orthonormal(OUT, 4), orthonormal(IN, 4, seed=1)
    weight_OI = u_OK[:, :2] @ v_IK[:, :2].t()
    own = decompose_product(v_IK[:, :2].t(), 3 * u_OK[:, :2], 1.0)
    assert amplification(own, own.spectrum.norm, weight_OI) == pytest.approx(3)
    nothing = decompose_product(v_IK[:, :2].t(), 0 * u_OK[:, :2], 1.0)
    assert amplification(nothing, 0.0, weight_OI) is None
    assert amplification(own, own.spectrum.norm, torch.zeros(OUT, IN)) is None


def test_chance_is_what_random_directions_amplify() -> None:
    """In the paper's table 7 as well: 12,288 wide, |W| = 61.95, of which 4 random directions hold 0.02, and 64 0.33."""
    weight_OI, found = random(OUT, IN), []
    for seed in range(1, 300):
        update = decompose_product(orthonormal(IN, 4, seed=2 * seed).t(), orthonormal(OUT, 4, seed=2 * seed + 1), 1.0)
        ratio = amplification(update, update.spectrum.norm, weight_OI)
        assert ratio is not None
        found.append(1 / ratio**2)
    relative_norm = 2 / float(torch.linalg.matrix_norm(weight_OI))
    mean = (sum(found) / len(found)) ** -0.5
    assert mean == pytest.approx(chance_amplification(relative_norm, 4, (OUT, IN)), rel=0.03)
    for count, inside in ((4, 0.02), (64, 0.33)):
        assert 1 / chance_amplification(1 / 61.95, count, (12288, 12288)) == pytest.approx(inside, rel=0.03)


# --- similarity


def test_similarity_is_the_papers_formula() -> None:
    one, other = random(8, IN), random(16, IN, seed=1)
    phi = subspace_similarity(directions(one.t()), directions(other.t()))
    v_1, v_2 = (torch.linalg.svd(a, full_matrices=False).Vh for a in (one, other))
    assert phi.shape == (8, 16)
    for i, j in ((1, 1), (2, 7), (8, 3), (8, 16)):
        expected = torch.linalg.matrix_norm(v_1[:i] @ v_2[:j].T) ** 2 / min(i, j)
        assert float(phi[i - 1, j - 1]) == pytest.approx(float(expected), rel=1e-10)


def test_a_shared_subspace_has_similarity_1_and_orthogonal_ones_0() -> None:
    basis = orthonormal(IN, 12)
    inside, outside = basis[:, :4], basis[:, 6:]
    mixed = inside @ random(4, 4, seed=3)
    itself = subspace_similarity(directions(mixed), directions(mixed))
    torch.testing.assert_close(itself.diagonal(), torch.ones(4).double())
    assert float(subspace_similarity(directions(inside), directions(mixed))[3, 3]) == pytest.approx(1)
    # The smaller subspace lies in the larger one.
    larger = torch.cat([mixed, outside], dim=1)
    assert float(subspace_similarity(directions(mixed), directions(larger))[3, -1]) == pytest.approx(1)
    assert subspace_similarity(directions(inside), directions(outside)).abs().max() < 1e-12


def test_directions_of_nothing_are_none() -> None:
    assert directions(torch.zeros(OUT, 3)).shape == (OUT, 0)
    assert subspace_similarity(directions(torch.zeros(OUT, 3)), orthonormal(OUT, 2)).shape == (0, 2)


def test_chance_is_what_random_subspaces_have_on_average() -> None:
    pairs = [(orthonormal(IN, 4, seed=2 * n), orthonormal(IN, 10, seed=2 * n + 1)) for n in range(200)]
    mean = sum(float(subspace_similarity(one, other)[3, 9]) for one, other in pairs) / len(pairs)
    assert mean == pytest.approx(chance_similarity(4, 10, IN), rel=0.03)
