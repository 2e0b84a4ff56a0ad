"""What an adapter changed, and the ways to prove a merge."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftkit.artifacts import merge as merging
from ftkit.artifacts import proof_modules, proof_whole
from ftkit.artifacts import updates as updating
from ftkit.artifacts.adapters import WeightedAdapter
from ftkit.artifacts.merge import merge
from ftkit.commands.merge import merge as merge_command
from ftkit.errors import CheckFailedError, UserError
from ftkit.methods import lora
from ftkit.recipe.schema import LoraMethod
from ftkit.runs import Target
from tests.artifacts.adapters import Pair, write_lora, write_pair, write_second


def edit_b(pair: Pair, name: str, factor: float) -> None:
    """Multiply B of the layers whose path holds `name`."""
    file = pair.adapter / "adapter_model.safetensors"
    state = load_file(file)
    save_file({n: t * factor if name in n and "lora_B" in n else t for n, t in state.items()}, file, {"format": "pt"})


# --- what changed


def test_a_b_that_is_still_zero_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = write_pair(tmp_path)
    edit_b(pair, "q_proj", 0.0)
    report = merge([WeightedAdapter(pair.target)], tmp_path / "merged")
    assert report.tensors_changed == 12
    assert report.zero == tuple(f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
    assert report.rounded_away == ()
    edit_b(pair, "", 0.0)
    merge_command([str(pair.adapter)], output=tmp_path / "none")
    shown = " ".join(capsys.readouterr().out.split())
    assert "merged 0 weights" in shown
    assert "unchanged 14 more, since the update is zero: model.layers.0." in shown


def test_an_update_that_rounding_swallows_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = write_pair(tmp_path, dtype=torch.bfloat16)
    edit_b(pair, "o_proj", 1e-20)
    merge_command([str(pair.adapter)], output=tmp_path / "merged")
    assert "2 more, since the update is lost in rounding: model.layers.0.self_attn.o_proj" in " ".join(
        capsys.readouterr().out.split()
    )
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert (report["tensors_changed"], len(report["zero"]), len(report["rounded_away"])) == (12, 0, 2)


def test_a_merge_that_changes_nothing_is_a_failure(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, dtype=torch.bfloat16)
    edit_b(pair, "", 1e-20)
    with pytest.raises(CheckFailedError, match="nothing has changed: the updates of all 14 weights are lost in round"):
        merge([WeightedAdapter(pair.target)], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_tensor_that_no_weight_gets_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = write_pair(tmp_path)
    deltas = lora.deltas
    monkeypatch.setattr(lora, "deltas", lambda *arguments: list(deltas(*arguments))[1:])
    with pytest.raises(CheckFailedError, match=r"lora_[AB]\.weight of .* would go into no weight") as caught:
        merge([WeightedAdapter(pair.target)], tmp_path / "merged")
    assert caught.value.exit_code == 6
    assert not (tmp_path / "merged").exists()


def test_a_weight_that_was_left_as_it_was_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = write_pair(tmp_path)
    rewrite = merging.rewrite

    def leave_one_out(source: Path, target: Path, deltas: dict[str, Any], **keywords: Any) -> None:
        rewrite(source, target, {n: d for n, d in deltas.items() if n != "model.layers.1.mlp.up_proj.weight"})

    monkeypatch.setattr(merging, "rewrite", leave_one_out)
    with pytest.raises(CheckFailedError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not cast") as caught:
        merge([WeightedAdapter(pair.target)], tmp_path / "merged", proof="none")
    assert caught.value.exit_code == 6
    assert not (tmp_path / "merged").exists()
    assert (tmp_path / "merged.rejected").is_dir()


# --- proofs


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_module_by_module_no_whole_model_is_loaded(
    architecture: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = write_pair(tmp_path, architecture, dtype=dtype)
    targets = ("c_attn",) if architecture == "gpt2" else ("q_proj", "o_proj")
    second = write_second(pair, tmp_path / "second", targets=targets)

    def load(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("a whole model was loaded")

    monkeypatch.setattr(proof_whole, "load_weights", load)
    both = [WeightedAdapter(pair.target, 0.7), WeightedAdapter(second, -0.3)]
    report = merge(both, tmp_path / "merged", proof="modules")
    assert (report.max_abs_logit_difference, report.cast) == (None, None)
    proof = report.modules
    assert proof is not None
    assert proof.modules == (8 if architecture == "gpt2" else 14)
    assert proof.worst is not None
    assert 0 < proof.max_relative_difference < 3e-6
    if dtype == torch.bfloat16:
        # Rounding to 8 bits.
        assert 1e-4 < proof.stored_max_relative_difference < 1e-2
    else:
        assert proof.stored_max_relative_difference == proof.max_relative_difference
    written = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert written["proof"] == "modules"
    assert written["modules"]["worst"] == proof.worst


def test_module_by_module_with_dora(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "qwen3")
    write_lora(pair.base, LoraMethod(type="lora", rank=2, alpha=4.0, dora=True), tmp_path / "dora")
    dora = Target("dora", pair.base, tmp_path / "dora", tmp_path / "dora", None, pair.base)
    proof = merge([WeightedAdapter(dora)], tmp_path / "merged", proof="modules").modules
    assert proof is not None
    assert proof.max_relative_difference < 3e-6


def test_module_by_module_a_wrong_scale_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = write_pair(tmp_path)

    def without_weights(self: updating.Update, weight: torch.Tensor) -> torch.Tensor:
        return sum(part.delta(weight) for part in self.parts)

    monkeypatch.setattr(updating.Update, "__call__", without_weights)
    with pytest.raises(
        CheckFailedError, match=r"the merged model\.layers\S+\.weight differs from the adapted one by"
    ) as caught:
        merge([WeightedAdapter(pair.target, 0.7)], tmp_path / "merged", proof="modules")
    assert caught.value.exit_code == 6
    assert not (tmp_path / "merged").exists()


def test_none_computes_nothing_and_still_checks_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = write_pair(tmp_path)
    monkeypatch.setattr(merging, "prove_whole", None)
    monkeypatch.setattr(merging, "prove_modules", None)
    report = merge([WeightedAdapter(pair.target)], tmp_path / "merged", proof="none")
    assert (report.proof, report.modules, report.cast, report.tensors_changed) == ("none", None, None, 14)


def test_the_command_shows_the_proof_that_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = write_pair(tmp_path, dtype=torch.bfloat16)
    merge_command([str(pair.adapter)], output=tmp_path / "merged", proof="modules")
    shown = " ".join(capsys.readouterr().out.split())
    assert "proof float32 outputs of 14 modules differ by" in shown
    assert "precision as they are stored by" in shown
    with pytest.raises(UserError, match="unknown --proof logits; choose one of full, modules, none"):
        merge_command([str(pair.adapter)], output=tmp_path / "other", proof="logits")


def test_nan_in_a_module_is_a_failure() -> None:
    with pytest.raises(CheckFailedError, match="the merged a differs"):
        proof_modules.check_modules(proof_modules.ModulesProof(1, float("nan"), "a", 0.0))
