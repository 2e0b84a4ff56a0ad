"""Whole runs with LoRA's variants: they learn, go on from a checkpoint in the same bits, and merge."""

import json

import pytest

from ftkit.commands.merge import merge
from ftkit.commands.train import train
from tests.tiny_runs import losses, result_hash, run_cli, write_recipe

VARIANTS = {
    "lora+": ["method.learning_rate_ratio=4"],
    "dora": ["method.dora=true", "method.dropout=0.1"],
    "modules": ["method.modules_to_save=[embed_tokens]", "method.targets=[q_proj]", "training.learning_rate=0.003"],
    "pissa": ["method.init=pissa", "method.dropout=0.1"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_learns_goes_on_in_the_same_bits_and_merges(variant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe, run = (
        write_recipe(tmp_path, max_steps=12, eval_steps=6, global_batch_size=8),
        tmp_path / "runs" / "recipe-1",
    )
    train(recipe, VARIANTS[variant])
    values, before = losses(run), result_hash(run)
    assert sum(values[-3:]) < 0.95 * sum(values[:3])
    train(recipe, VARIANTS[variant], checkpoint=run / "checkpoints" / "step-00000006")
    assert losses(run) == values
    assert result_hash(run) == before
    # The proof fails with an error.
    merge([str(run)])
    assert json.loads((run / "merged" / "merge_report.json").read_text())["tensors_changed"] > 0


EXPERTS = ["method.targets=[q_proj]", "method.target_parameters=[experts.gate_up_proj, experts.down_proj]"]


def test_experts_learn_go_on_in_the_same_bits_and_merge(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe, run = write_recipe(tmp_path, architecture="mixtral"), tmp_path / "runs" / "recipe-1"
    train(recipe, EXPERTS)
    values, before = losses(run), result_hash(run)
    assert sum(values[-2:]) < 0.95 * sum(values[:2])
    train(recipe, EXPERTS, checkpoint=run / "checkpoints" / "step-00000003")
    assert losses(run) == values
    assert result_hash(run) == before
    merge([str(run)])
    report = json.loads((run / "merged" / "merge_report.json").read_text())
    # Two layers of q_proj and 8 experts' three projections; those that no token was sent to still have a B of zero.
    assert report["tensors_changed"] + len(report["zero"]) == 2 * (1 + 8 * 3)
    assert all(".experts." in name for name in report["zero"])


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_experts_are_trained_by_two_processes_as_by_one(parallel, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, architecture="mixtral")
    train(recipe, EXPERTS)
    two = run_cli(
        "train", recipe, *EXPERTS, f"training.parallel={parallel}", "--num-processes", "2", cwd=tmp_path, timeout=120
    )
    assert two.returncode == 0, two.stderr
    runs = tmp_path / "runs"
    assert losses(runs / "recipe-2") == pytest.approx(losses(runs / "recipe-1"), abs=1e-4)


def test_a_ratio_changes_what_is_learned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path)
    train(recipe, [])
    train(recipe, VARIANTS["lora+"])
    plain, faster = (losses(tmp_path / "runs" / f"recipe-{number}") for number in (1, 2))
    assert plain[0] == faster[0]
    assert plain[-1] != faster[-1]
