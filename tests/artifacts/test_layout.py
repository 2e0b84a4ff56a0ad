"""Names of weights in the running model and in the files; mixtures of experts, which transformers fuses in memory."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ftkit.artifacts.adapters import WeightedAdapter
from ftkit.artifacts.layout import lay_out
from ftkit.artifacts.merge import merge
from ftkit.artifacts.updates import build_skeleton
from ftkit.artifacts.weights import TensorFiles
from ftkit.errors import CheckFailedError, UserError
from ftkit.methods.base import Replacement
from ftkit.recipe.schema import LoraMethod
from ftkit.runs import Target
from tests.artifacts.adapters import Pair, logits, tensors, write_lora, write_pair
from tests.tiny_models import tiny_model

EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
DOWN = "model.layers.0.mlp.experts.down_proj"
TARGETS = ("q_proj", "o_proj")


def write_mixtral(directory: Path) -> Pair:
    """A mixture of experts in two shards, laid out as on the hub, and a LoRA of its attention."""
    pair = write_pair(directory, "mixtral", targets=TARGETS, max_shard_size="420KB")
    assert len(list(pair.base_directory.glob("*.safetensors"))) == 2
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in tensors(pair.base_directory)
    return pair


def test_a_mixture_of_experts_keeps_the_names_of_its_files(tmp_path: Path) -> None:
    pair = write_mixtral(tmp_path)
    report = merge([WeightedAdapter(pair.target)], tmp_path / "merged")
    before, after = tensors(pair.base_directory), tensors(tmp_path / "merged")
    assert before.keys() == after.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert len(changed) == report.tensors_changed == 4
    index = "model.safetensors.index.json"
    maps = [
        json.loads((where / index).read_text())["weight_map"] for where in (pair.base_directory, tmp_path / "merged")
    ]
    assert maps[0] == maps[1]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for ours, theirs in zip(logits(merged), logits(pair.adapted()), strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_experts_that_trained_in_full_are_cut_up_again(tmp_path: Path) -> None:
    pair = write_mixtral(tmp_path)
    section = LoraMethod(type="lora", rank=2, alpha=4.0, targets=TARGETS, modules_to_save=("experts", "gate"))
    write_lora(pair.base, section, tmp_path / "tuned")
    target = Target("tuned", pair.base, tmp_path / "tuned", tmp_path / "tuned", None, pair.base)
    for proof in ("full", "modules"):
        merge([WeightedAdapter(target)], tmp_path / proof, proof=proof)
        before, after = tensors(pair.base_directory), tensors(tmp_path / proof)
        tuned = load_file(tmp_path / "tuned" / "adapter_model.safetensors")
        assert before.keys() == after.keys()
        width = tuned[f"base_model.model.{EXPERTS}"].shape[1] // 2
        for expert in range(8):
            for name, rows in (("w1", slice(None, width)), ("w3", slice(width, None))):
                written = after[f"model.layers.0.block_sparse_moe.experts.{expert}.{name}.weight"]
                assert torch.equal(written, tuned[f"base_model.model.{EXPERTS}"][expert, rows])
        gate = "model.layers.1.{}.gate.weight"
        assert torch.equal(after[gate.format("block_sparse_moe")], tuned["base_model.model." + gate.format("mlp")])


def test_a_cut_weight_is_put_together_as_transformers_does(tmp_path: Path) -> None:
    pair = write_mixtral(tmp_path)
    names = [name for name, _ in tiny_model("mixtral").named_parameters()]
    layout = lay_out(build_skeleton(pair.base), pair.base_directory, names)
    loaded = dict(AutoModelForCausalLM.from_pretrained(pair.base_directory).named_parameters())
    with TensorFiles(pair.base_directory) as files:
        assert sorted(files.names) == sorted(piece for pieces in layout.pieces.values() for piece in pieces)
        for name in names:
            assert torch.equal(layout.read(files, name), loaded[name]), name


class Dependent:
    """A `ComputeDelta` that looks at the weight, as DoRA's does."""

    depends_on_weight = True

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


class Counting:
    """A `ComputeDelta` that counts how often it is computed."""

    depends_on_weight = False

    def __init__(self) -> None:
        self.computed = 0

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        self.computed += 1
        return torch.arange(weight.numel(), dtype=torch.float32).reshape(weight.shape)


def test_the_pieces_of_an_update_are_computed_at_once(tmp_path: Path) -> None:
    pair = write_mixtral(tmp_path)
    layout = lay_out(build_skeleton(pair.base), pair.base_directory, [EXPERTS, DOWN])
    delta, other = Counting(), Counting()
    found = layout.in_files({EXPERTS: delta, DOWN: other})
    assert len(found) == 24
    # Files hold what belongs to an expert together.
    computed = {name: found[name](torch.empty(0)) for name in sorted(found)}
    assert (delta.computed, other.computed) == (1, 1)
    whole = delta(torch.empty(8, 128, 32))
    assert torch.equal(computed["model.layers.0.block_sparse_moe.experts.3.w3.weight"], whole[3, 64:])
    assert computed["model.layers.0.block_sparse_moe.experts.7.w2.weight"].shape == (32, 64)
    with pytest.raises(UserError, match=r"hold .*gate_up_proj in pieces, and its update needs all of it at once"):
        layout.in_files({EXPERTS: Dependent()})
    assert isinstance(next(iter(layout.in_files({EXPERTS: Replacement(whole)}).values())), Replacement)


def test_files_with_the_running_models_own_names_are_merged_too(tmp_path: Path) -> None:
    """As a state dict saved without transformers has them."""
    pair = write_pair(tmp_path, "mixtral", targets=TARGETS)
    state = tiny_model("mixtral").state_dict()
    save_file(state, pair.base_directory / "model.safetensors", {"format": "pt"})
    layout = lay_out(build_skeleton(pair.base), pair.base_directory, state)
    assert all(pieces == (name,) for name, pieces in layout.pieces.items())


def test_a_weight_that_no_file_holds_or_holds_otherwise_is_not_skipped(tmp_path: Path) -> None:
    pair = write_mixtral(tmp_path)
    model = build_skeleton(pair.base)
    for file in pair.base_directory.glob("*.safetensors"):
        state = load_file(file)
        state = {n: t[:, :16].contiguous() if "experts.0.w1" in n else t for n, t in state.items() if "q_proj" not in n}
        save_file(state, file, {"format": "pt"})
    for name in (EXPERTS, "model.layers.0.self_attn.q_proj.weight"):
        with pytest.raises(CheckFailedError, match=r"is adapted, but no weight file of .* holds it") as caught:
            lay_out(model, pair.base_directory, [name])
        assert caught.value.exit_code == 6
    (pair.adapter / "ftkit.json").unlink()
    with pytest.raises(CheckFailedError, match="q_proj"):
        merge([WeightedAdapter(replace(pair.target))], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
