"""What two adapters share, from their files: planted subspaces, the paper's formula, what cannot be compared."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ftkit.artifacts.similarity import Comparison, compare_adapters
from ftkit.errors import UserError
from ftkit.methods.files import BaseIdentity, lora_config, write_adapter
from ftkit.recipe.schema import LoraMethod
from tests.artifacts.adapters import write_lora, write_pair

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
OUT, IN = 24, 64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def basis(count: int, *, width: int = IN, seed: int = 0) -> Tensor:
    """Orthonormal rows [count, width]."""
    return torch.linalg.qr(random(width, count, seed=seed)).Q.t()


def write(directory: Path, factors: dict[str, tuple[Tensor, Tensor]], *, fingerprint: str | None = "sha256:a") -> Path:
    """An adapter of these A and B."""
    rank = len(next(iter(factors.values()))[0])
    section = LoraMethod(type="lora", rank=rank, alpha=2.0 * rank, targets=tuple(factors))
    state = {}
    for path, (a_RI, b_OR) in factors.items():
        state[f"base_model.model.{path}.lora_A.weight"] = a_RI.float()
        state[f"base_model.model.{path}.lora_B.weight"] = b_OR.float()
    config = lora_config(section, list(factors), fan_in_fan_out=False)
    write_adapter(directory, config, state, BaseIdentity("base", None, fingerprint), base_dtype=torch.float32)
    return directory


def compare(one: Path, other: Path, *, left: bool = False, names: tuple[str, ...] = ()) -> Comparison:
    return compare_adapters((one.name, other.name), (one, other), left=left, names=names)


def phi(one: Path, other: Path, *, left: bool = False) -> Tensor:
    (module,) = compare(one, other, left=left).modules
    return module.phi


# --- planted subspaces


def test_an_adapter_and_itself(tmp_path: Path) -> None:
    one = write(tmp_path / "one", {Q: (random(6, IN), random(OUT, 6, seed=1))})
    (module,) = compare(one, one).modules
    torch.testing.assert_close(module.phi.diagonal(), torch.ones(6).double(), rtol=0, atol=1e-10)
    # Any i directions lie in the first j of the same ones for j >= i.
    assert (module.phi - 1).abs().max() < 1e-10
    assert (module.name, module.width) == (Q, IN)


def test_orthogonal_directions_share_nothing(tmp_path: Path) -> None:
    rows = basis(10)
    one = write(tmp_path / "one", {Q: (random(4, 4) @ rows[:4], random(OUT, 4, seed=1))})
    other = write(tmp_path / "other", {Q: (random(6, 6) @ rows[4:], random(OUT, 6, seed=2))})
    # The files hold float32.
    assert phi(one, other).abs().max() < 1e-10
    assert phi(one, other).shape == (4, 6)


def test_one_shared_direction_shows_where_it_is(tmp_path: Path) -> None:
    """The strongest of the one is the second of the other, all others are apart: as in the paper's figure 3."""
    rows = basis(7)
    strengths = torch.tensor([4.0, 3.0, 2.0, 1.0]).double()[:, None]
    one = write(tmp_path / "one", {Q: (strengths * rows[[0, 1, 2, 3]], random(OUT, 4, seed=1))})
    other = write(tmp_path / "other", {Q: (strengths * rows[[4, 0, 5, 6]], random(OUT, 4, seed=2))})
    shared = [[0.0 if j < 2 else 1 / min(i, j) for j in range(1, 5)] for i in range(1, 5)]
    torch.testing.assert_close(phi(one, other), torch.tensor(shared, dtype=torch.float64), rtol=0, atol=1e-10)


def test_the_rotation_of_factors_changes_nothing(tmp_path: Path) -> None:
    """B A = (B R^-1) (R A): with orthogonal R the singular vectors of A stay."""
    a_RI, b_OR, rotation = random(4, IN), random(OUT, 4, seed=1), basis(4, width=4, seed=2)
    one = write(tmp_path / "one", {Q: (a_RI, b_OR)})
    other = write(tmp_path / "other", {Q: (rotation @ a_RI, b_OR @ rotation.t())})
    for left in (False, True):
        torch.testing.assert_close(phi(one, other, left=left).diagonal(), torch.ones(4).double(), rtol=0, atol=1e-9)


def test_random_directions_share_what_chance_gives(tmp_path: Path) -> None:
    """On average over 30 layers; a share of 0.25 with a standard deviation of about 0.03 each."""
    paths = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(30)]
    one, other = (
        write(
            tmp_path / name,
            {path: (random(rank, IN, seed=seed + n), random(OUT, rank, seed=500 + n)) for n, path in enumerate(paths)},
        )
        for name, rank, seed in (("one", 8, 0), ("other", 16, 100))
    )
    modules = compare(one, other).modules
    assert [module.name for module in modules] == paths
    assert {module.chance for module in modules} == {16 / IN}
    mean = sum(float(module.phi[-1, -1]) for module in modules) / len(modules)
    assert mean == pytest.approx(16 / IN, abs=0.02)


def test_phi_is_the_formula_of_the_paper_on_either_side(tmp_path: Path) -> None:
    pairs = [(random(4, IN), random(OUT, 4, seed=1)), (random(9, IN, seed=2), random(OUT, 9, seed=3))]
    one, other = (write(tmp_path / str(n), {Q: pair}) for n, pair in enumerate(pairs))
    for left in (False, True):
        vectors = [
            torch.linalg.svd((b_OR.t() if left else a_RI).float().double(), full_matrices=False).Vh
            for a_RI, b_OR in pairs
        ]
        found = phi(one, other, left=left)
        assert found.shape == (4, 9)
        for i in range(1, 5):
            for j in range(1, 10):
                expected = torch.linalg.matrix_norm(vectors[0][:i] @ vectors[1][:j].t()) ** 2 / min(i, j)
                assert float(found[i - 1, j - 1]) == pytest.approx(float(expected), abs=1e-10)


# --- what is compared


def test_an_adapter_that_does_nothing_has_no_directions(tmp_path: Path) -> None:
    one = write(tmp_path / "one", {Q: (random(4, IN), torch.zeros(OUT, 4))})
    other = write(tmp_path / "other", {Q: (random(4, IN, seed=1), random(OUT, 4))})
    assert phi(one, other, left=True).shape == (0, 4)
    # Its A is there all the same, as it was drawn.
    assert phi(one, other).shape == (4, 4)


def test_of_a_pissa_the_update_is_compared(tmp_path: Path) -> None:
    """Its saved A holds the base's own directions, which two PiSSAs have in common before they learn anything."""
    pair = write_pair(tmp_path)
    for seed in (1, 2):
        section = LoraMethod(type="lora", rank=2, alpha=4.0, targets=("k_proj",), init="pissa")
        write_lora(pair.base, section, tmp_path / str(seed), seed=seed)
    comparison = compare(tmp_path / "1", tmp_path / "2")
    assert "a PiSSA's A and B hold what they began with too" in comparison.notes[0]
    # Noise of 2 x 2 directions on A and as many on B, all of them drawn apart.
    assert {(module.phi.shape, module.width) for module in comparison.modules} == {((4, 4), 32)}
    assert {module.width for module in compare(tmp_path / "1", tmp_path / "2", left=True).modules} == {16}
    assert not any(float(module.phi[0, 0]) > 0.9 for module in comparison.modules)
    assert "PiSSA" not in "".join(compare(pair.adapter, pair.adapter).notes)


def test_experts_are_compared_one_by_one(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "mixtral", targets=("q_proj",))
    both = ("experts.gate_up_proj", "experts.down_proj")
    for seed, names in ((1, both), (2, both), (3, ("experts.down_proj",))):
        section = LoraMethod(type="lora", rank=seed + 1, alpha=4.0, targets=("q_proj",), target_parameters=names)
        write_lora(pair.base, section, tmp_path / str(seed), seed=seed)
    comparison = compare(tmp_path / "1", tmp_path / "2")
    assert len(comparison.modules) == 2 * (8 + 8 + 1)
    widths = {"gate_up_proj": 32, "down_proj": 64, "q_proj": 32}
    for module in comparison.modules:
        own = module.name.rpartition(".")[2].partition("[")[0]
        assert (module.width, module.phi.shape) == (widths[own], (2, 3)), module.name
    itself = compare(tmp_path / "1", tmp_path / "1")
    assert all(float(module.phi[-1, -1]) == pytest.approx(1) for module in itself.modules)
    # Of an adapter of one stack alone, whose names in the file are those of the other one's second.
    names = [module.name for module in compare(tmp_path / "1", tmp_path / "3", names=("down_proj",)).modules]
    assert names == [f"model.layers.{layer}.mlp.experts.down_proj[{expert}]" for layer in (0, 1) for expert in range(8)]


def test_layers_that_one_adapts_alone_are_counted(tmp_path: Path) -> None:
    pair = random(4, IN), random(OUT, 4, seed=1)
    one, other = write(tmp_path / "one", {Q: pair, K: pair}), write(tmp_path / "other", {Q: pair})
    comparison = compare(one, other)
    assert [module.name for module in comparison.modules] == [Q]
    assert comparison.notes == ("1 more layers are adapted by one of them alone",)
    assert [module.name for module in compare(one, one, names=("k_proj",)).modules] == [K]


@pytest.mark.parametrize(("fingerprint", "told"), [("sha256:b", True), (None, False), ("sha256:a", False)])
def test_another_base_is_told_where_it_is_known(fingerprint: str | None, told: bool, tmp_path: Path) -> None:
    pair = random(4, IN), random(OUT, 4, seed=1)
    one = write(tmp_path / "one", {Q: pair})
    other = write(tmp_path / "other", {Q: pair}, fingerprint=fingerprint)
    notes = ("the adapters were trained on bases with different weights",) if told else ()
    assert compare(one, other).notes == notes


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    pair = random(4, IN), random(OUT, 4, seed=1)
    one = write(tmp_path / "one", {Q: pair})
    with pytest.raises(UserError, match=r"one and other adapt no layer in common; compare adapters of one model"):
        compare(one, write(tmp_path / "other", {K: pair}))
    wide = write(tmp_path / "wide", {Q: (random(4, 2 * IN), pair[1])})
    with pytest.raises(UserError, match=r"q_proj is 64 wide in one and 128 in wide; compare adapters of one model"):
        compare(one, wide)
    assert phi(one, wide, left=True).shape == (4, 4)
    torn = write(tmp_path / "torn", {Q: (random(5, IN), pair[1])})
    with pytest.raises(UserError, match=r"the saved A and B of .*q_proj do not belong together"):
        compare(one, torn)
