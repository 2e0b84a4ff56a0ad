"""Merging what was trained on a quantised base: onto its dequantised weights, or onto those that are stored."""

import json
from pathlib import Path

import pytest
import torch

from ftkit.artifacts import merge as merge_module
from ftkit.artifacts.adapters import WeightedAdapter
from ftkit.artifacts.merge import merge
from ftkit.errors import CheckFailedError, UserError
from ftkit.methods import lora
from ftkit.methods.files import identify
from ftkit.models.load import BaseModel, load_weights
from ftkit.recipe.schema import LoraMethod
from ftkit.runs import find_target
from tests.methods.cases import logits, perturb
from tests.tiny_models import save_tiny

KINDS = ("nf4", "int8")
SECTION = LoraMethod(type="lora", rank=4, alpha=7.0)
TOLERANCE = 1e-5
"""Of the largest logit, float32."""


@pytest.fixture
def base(tmp_path: Path) -> BaseModel:
    return BaseModel("base", path=save_tiny(tmp_path / "base"))


def write(directory: Path, base: BaseModel, kind: str | None, *, seed: int = 3, **changes) -> torch.Tensor:
    """An adapter as if it had trained on `base` in `kind`; returns the logits that it had there."""
    section = SECTION.model_copy(update=changes)
    model = load_weights(BaseModel("base", path=base.path, quantization=kind), dtype=torch.float32)
    lora.apply(model, section, seed=1)
    perturb(model, seed=seed)
    lora.save(model, section, directory, identify(base))
    return logits(model)


def named(directory: Path, weight: float = 1.0, base: Path | None = None) -> WeightedAdapter:
    return WeightedAdapter(find_target(str(directory), base=str(base) if base else None), weight)


def apart(directory: Path, expected: torch.Tensor) -> float:
    """Largest difference of a model's logits from those expected, as a share of the largest."""
    computed = logits(load_weights(BaseModel("merged", path=directory), dtype=torch.float32))
    return float((computed - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("proof", ["full", "modules"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_is_the_trained_one(kind: str, proof: str, base: BaseModel, tmp_path: Path) -> None:
    trained = write(tmp_path / "a", base, kind)
    report = merge([named(tmp_path / "a")], tmp_path / "merged", proof=proof)
    assert apart(tmp_path / "merged", trained) <= TOLERANCE
    assert report.quantization is not None
    assert (report.quantization.trained_on, report.quantization.merged_onto) == (kind, "dequantized")
    assert report.tensors_changed == 14


@pytest.mark.parametrize("kind", KINDS)
def test_onto_the_stored_base_the_merged_model_is_another_and_says_by_how_much(
    kind: str, base: BaseModel, tmp_path: Path
) -> None:
    trained = write(tmp_path / "a", base, kind)
    report = merge([named(tmp_path / "a")], tmp_path / "stored", onto_stored=True)
    assert report.quantization is not None
    assert report.quantization.merged_onto == "stored"
    assert report.quantization.max_abs_logit_difference is not None
    assert report.quantization.max_abs_logit_difference > 100 * TOLERANCE
    assert apart(tmp_path / "stored", trained) > 10 * TOLERANCE
    # It is what the same update makes of the base that is stored.
    assert apart(tmp_path / "stored", write(tmp_path / "plain", base, None)) <= TOLERANCE


def test_a_merge_that_leaves_the_quantisation_out_fails_its_proof(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a", base, "nf4")
    monkeypatch.setattr(merge_module, "on_dequantized", lambda held, updates: updates)
    with pytest.raises(CheckFailedError, match="is not the merged weight"):
        merge([named(tmp_path / "a")], tmp_path / "merged")
    assert (tmp_path / "merged.rejected").is_dir()
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("proof", ["full", "modules"])
def test_a_dora_is_measured_from_the_dequantised_weight(proof: str, base: BaseModel, tmp_path: Path) -> None:
    trained = write(tmp_path / "a", base, "nf4", dora=True)
    merge([named(tmp_path / "a")], tmp_path / "merged", proof=proof)
    assert apart(tmp_path / "merged", trained) <= TOLERANCE


def test_an_update_of_zero_is_told_though_its_weight_is_dequantised(base: BaseModel, tmp_path: Path) -> None:
    model = load_weights(BaseModel("base", path=base.path, quantization="nf4"), dtype=torch.float32)
    lora.apply(model, SECTION, seed=1)
    lora.save(model, SECTION, tmp_path / "a", identify(base))
    report = merge([named(tmp_path / "a")], tmp_path / "merged")
    assert (report.tensors_changed, len(report.zero)) == (0, 14)
    assert apart(tmp_path / "merged", logits(model)) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_taking_it_off_again_gives_the_dequantised_base(kind: str, base: BaseModel, tmp_path: Path) -> None:
    write(tmp_path / "a", base, kind)
    merge([named(tmp_path / "a")], tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "merge_report.json").read_text())["contents"]["quantization"] == kind
    report = merge([named(tmp_path / "a", -1.0, tmp_path / "merged")], tmp_path / "undone")
    assert report.restored is not None
    assert report.restored.distance is not None
    assert report.restored.distance.beyond_rounding == 0
    quantized = load_weights(BaseModel("base", path=base.path, quantization=kind), dtype=torch.float32)
    assert apart(tmp_path / "undone", logits(quantized)) <= TOLERANCE


def test_switching_gives_the_other_trained_model(base: BaseModel, tmp_path: Path) -> None:
    write(tmp_path / "a", base, "nf4")
    trained = write(tmp_path / "b", base, "nf4", seed=5)
    merge([named(tmp_path / "a")], tmp_path / "with-a")
    merge([named(tmp_path / one, weight, tmp_path / "with-a") for one, weight in (("a", -1.0), ("b", 1.0))],
          tmp_path / "with-b")  # fmt: skip
    assert apart(tmp_path / "with-b", trained) <= TOLERANCE


def test_adapters_of_two_forms_of_a_base_do_not_mix(base: BaseModel, tmp_path: Path) -> None:
    write(tmp_path / "a", base, "nf4")
    write(tmp_path / "b", base, None)
    with pytest.raises(UserError, match=r"a was trained on the base in nf4, .*b in its own precision"):
        merge([named(tmp_path / "a"), named(tmp_path / "b")], tmp_path / "merged")
