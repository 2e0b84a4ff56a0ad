"""Merging LoRA of experts that the model stacks and the files hold one by one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ftkit.artifacts import updates as updating
from ftkit.artifacts.adapters import WeightedAdapter
from ftkit.artifacts.merge import merge
from ftkit.errors import CheckFailedError
from ftkit.evaluation.contestants import load_contestants
from ftkit.methods.lora_experts import ExpertsDelta
from ftkit.models.load import load_weights
from ftkit.recipe.schema import LoraMethod
from ftkit.runs import Target
from tests.artifacts.adapters import Pair, logits, open_base, tensors, write_lora, write_pair

BOTH = ("experts.gate_up_proj", "experts.down_proj")


def write_experts(directory: Path, *, dtype: torch.dtype = torch.float32) -> tuple[Pair, Target]:
    """A base in two files with a LoRA of attention and all experts, and one of the experts' second projection."""
    shard = "420KB" if dtype == torch.float32 else "210KB"
    pair = write_pair(directory, "mixtral", dtype=dtype, targets=("q_proj",), max_shard_size=shard)
    assert len(list(pair.base_directory.glob("*.safetensors"))) == 2
    sections = {
        "adapter": LoraMethod(type="lora", rank=4, alpha=6.0, targets=("q_proj",), target_parameters=BOTH),
        "second": LoraMethod(type="lora", rank=2, alpha=4.0, targets=("o_proj",), target_parameters=BOTH[1:]),
    }
    for seed, (name, section) in enumerate(sections.items(), start=1):
        write_lora(pair.base, section, directory / name, seed=seed)
    second = directory / "second"
    return pair, Target(str(second), pair.base, second, second, None, pair.base)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("proof", ["full", "modules"])
def test_every_expert_of_the_files_gets_its_own_update(proof: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pair, _ = write_experts(tmp_path, dtype=dtype)
    report = merge([WeightedAdapter(pair.target)], tmp_path / "merged", proof=proof)
    before, after = tensors(pair.base_directory), tensors(tmp_path / "merged")
    assert before.keys() == after.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    experts = {name for name in after if ".experts." in name}
    assert len(experts) == 2 * 8 * 3
    assert changed == experts | {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}
    assert report.tensors_changed == len(changed)
    if proof == "modules":
        assert report.modules is not None
        assert report.modules.modules == 2 * 3
        assert report.modules.max_relative_difference < 3e-6
    else:
        assert report.max_abs_logit_difference <= 1e-5 * report.max_abs_logit
    if dtype == torch.float32:
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        theirs = PeftModel.from_pretrained(load_weights(pair.base, dtype=dtype), pair.adapter)
        for ours, peft in zip(logits(merged), logits(theirs), strict=True):
            assert (ours - peft).abs().max() <= 1e-5 * peft.abs().max()


@pytest.mark.parametrize("proof", ["full", "modules"])
def test_experts_of_several_adapters_add_up_with_their_weights(proof: str, tmp_path: Path) -> None:
    pair, second = write_experts(tmp_path)
    report = merge([WeightedAdapter(pair.target, 0.7), WeightedAdapter(second, -0.3)], tmp_path / "merged", proof=proof)
    assert report.tensors_changed == 2 * (8 * 3 + 2)
    state = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "second")]
    name = "base_model.model.model.layers.1.mlp.experts.lora_{}.weight"
    # peft's own formula.
    update = torch.zeros(8, 32, 64)
    for weight, scale, one in ((0.7, 1.5, state[0]), (-0.3, 2.0, state[1])):
        a = one[name.format("A")].reshape(8, -1, 64)
        b = one[name.format("B")].reshape(32, -1, 8)
        update += weight * scale * torch.einsum("o r e, e r i -> e o i", b, a)
    for expert in range(8):
        key = f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"
        expected = tensors(pair.base_directory)[key] + update[expert]
        assert (tensors(tmp_path / "merged")[key] - expected).abs().max() <= 1e-6


def test_experts_are_switched_and_undone(tmp_path: Path) -> None:
    pair, second = write_experts(tmp_path, dtype=torch.bfloat16)
    merge([WeightedAdapter(pair.target)], tmp_path / "merged", proof="none")
    merged = open_base(tmp_path / "merged")
    off = WeightedAdapter(replace(pair.target, model=merged), -1.0)
    report = merge([off, WeightedAdapter(replace(second, model=merged))], tmp_path / "switched")
    assert [one.path for one in report.contents.adapters] == [str(tmp_path / "second")]
    restored = merge([off], tmp_path / "undone", proof="none").restored
    assert restored is not None
    assert restored.distance is not None
    assert restored.distance.beyond_rounding == 0


@pytest.mark.parametrize("proof", ["full", "modules"])
def test_experts_that_are_mixed_up_are_found(proof: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, _ = write_experts(tmp_path)
    monkeypatch.setattr(
        ExpertsDelta, "__call__", lambda self, weight: (torch.bmm(self.b_EOR, self.a_ERI) * self.scale).flip(0)
    )
    with pytest.raises(CheckFailedError, match=r"differs? from the adapted"):
        merge([WeightedAdapter(pair.target)], tmp_path / "merged", proof=proof)


def test_a_wrong_weight_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, _ = write_experts(tmp_path)
    monkeypatch.setattr(updating.Update, "__call__", lambda self, weight: sum(p.delta(weight) for p in self.parts))
    with pytest.raises(CheckFailedError, match="logits differ from the adapted model's by"):
        merge([WeightedAdapter(pair.target, 0.5)], tmp_path / "merged")


def test_adapters_of_experts_share_a_base_when_compared(tmp_path: Path) -> None:
    pair, second = write_experts(tmp_path)
    found = load_contestants([pair.target, second], mode="raw", dtype=torch.float32, device=torch.device("cpu"))
    for contestant, target in zip(found, (pair.target, second), strict=True):
        alone = load_contestants([target], mode="raw", dtype=torch.float32, device=torch.device("cpu"))[0]
        assert all(torch.equal(*pair) for pair in zip(logits(contestant.model), logits(alone.model), strict=True))
    experts = [contestant.model.model.layers[0].mlp.experts.gate_up_proj for contestant in found]
    assert experts[0] is experts[1]


def test_files_with_the_stacks_whole_are_merged_whole(tmp_path: Path) -> None:
    pair, _ = write_experts(tmp_path)
    model = load_weights(pair.base, dtype=torch.float32)
    for path in pair.base_directory.glob("*.safetensors*"):
        path.unlink()
    save_file(model.state_dict(), pair.base_directory / "model.safetensors", {"format": "pt"})
    (pair.adapter / "ftkit.json").unlink()
    report = merge([WeightedAdapter(pair.target)], tmp_path / "merged")
    assert report.tensors_changed == 2 * 3
    assert report.max_abs_logit_difference <= 1e-5 * report.max_abs_logit
