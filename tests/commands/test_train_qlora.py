"""Whole runs on a quantised base: they learn, go on in the same bits, are measured on it and merge into its weights."""

import json

import pytest
import torch
import yaml

from ftkit.commands.eval import evaluate
from ftkit.commands.merge import merge
from ftkit.commands.train import train
from ftkit.errors import UserError
from ftkit.models.load import BaseModel, load_weights
from ftkit.models.quantization import dequantize
from tests.methods.cases import logits
from tests.models.test_quantization import save_quantized
from tests.tiny_runs import losses, read_metrics, result_hash, run_cli, write_recipe

KINDS = ("nf4", "int8")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_goes_on_in_the_same_bits_and_merges(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe, run = write_recipe(tmp_path, max_steps=12, eval_steps=6, global_batch_size=8), tmp_path / "runs/recipe-1"
    wanted = [f"model.quantization={kind}"]
    train(recipe, wanted)
    assert f"18,432 frozen in {kind}, 10,400 frozen in float32" in capsys.readouterr().out
    values, before = losses(run), result_hash(run)
    assert sum(values[-3:]) < 0.95 * sum(values[:3])
    train(recipe, wanted, checkpoint=run / "checkpoints" / "step-00000006")
    assert (losses(run), result_hash(run)) == (values, before)
    assert json.loads((run / "adapter" / "ftkit.json").read_text())["base_quantization"] == kind
    # The proof fails with an error.
    merge([str(run)])
    output = capsys.readouterr().out
    assert f"base       as it was trained on: in {kind}, dequantized; the result is the trained model" in output
    report = json.loads((run / "merged" / "merge_report.json").read_text())
    assert report["quantization"]["merged_onto"] == "dequantized"
    assert report["quantization"]["max_abs_logit_difference"] <= 1e-5


def test_a_run_is_measured_on_the_base_that_it_was_trained_on(tmp_path, monkeypatch, capsys):
    """The base alone has the loss that the run began with, and the run the one that it ended with."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "recipe-1"
    train(write_recipe(tmp_path), ["model.quantization=nf4"])
    capsys.readouterr()
    evaluate(str(run), output=tmp_path / "results.json", compare=[str(tmp_path / "base-llama")])
    assert "base-llama in nf4" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    scores = {result["model"]: result["score"] for result in results if result["metric"] == "perplexity"}
    evaluations = [line["eval_loss"] for line in read_metrics(run) if line.get("event") == "eval"]
    (name,) = (name for name in scores if name.endswith(" in nf4"))
    (stored,) = (name for name in scores if name.endswith("base-llama"))
    assert torch.tensor(scores[name]).log().item() == pytest.approx(evaluations[0], abs=1e-4)
    assert torch.tensor(scores["runs/recipe-1"]).log().item() == pytest.approx(min(evaluations), abs=1e-4)
    assert abs(scores[stored] - scores[name]) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_is_stored_quantised_trains_and_is_measured(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path)
    stored = save_quantized(tmp_path / "stored", kind, tmp_path / "base-llama")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (stored / name).write_bytes((tmp_path / "base-llama" / name).read_bytes())
    train(recipe, ["base_model=stored"])
    assert f"frozen in {kind}" in capsys.readouterr().out
    run = tmp_path / "runs" / "recipe-1"
    values = losses(run)
    assert sum(values[-2:]) < sum(values[:2])
    evaluate(str(run), no_compare=True)
    with pytest.raises(UserError, match=f"is stored in {kind}: there are no weights that an update could be added to"):
        merge([str(run)])
    assert not (run / "merged").exists()


def test_the_plan_counts_the_bytes_of_quantised_weights(tmp_path):
    recipe = write_recipe(tmp_path)
    weights = {}
    for kind in ("null", *KINDS):
        planned = run_cli("plan", recipe, f"model.quantization={kind}", "--json", cwd=tmp_path)
        assert planned.returncode == 0, planned.stderr
        values = json.loads(planned.stdout)
        weights[kind] = values["memory_bytes"]["weights"]
        assert values["parameters"] == 32_928
    # 14 layers of 18,432 weights: half a byte each, a byte a block of 64, 4 a block of blocks, 1,092 of tables a layer.
    saved = 18_432 * 4 - (18_432 // 2 + 18_432 // 64 + 14 * (4 + 1_092))
    assert weights["null"] - weights["nf4"] == saved
    rows = 2 * (32 + 16 + 16 + 32 + 64 + 64 + 32)
    assert weights["null"] - weights["int8"] == 18_432 * 3 - 4 * rows


def test_every_weight_cannot_train_in_four_bits(tmp_path):
    recipe = write_recipe(tmp_path, method="full")
    refused = run_cli("train", recipe, "model.quantization=nf4", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.strip() == (
        "ftkit: error: command line: model.quantization: a quantized weight is frozen, and method.type: full trains "
        "every weight; set method.type: lora, or leave it out"
    )


@pytest.mark.parametrize(
    ("key", "kind"), [("load_in_4bit=true", "nf4"), ("load_in_8bit=true", "int8"), ("quantization_bit=4", "nf4")]
)
def test_other_tools_names(key, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(write_recipe(tmp_path, max_steps=1, eval_steps=1), [key])
    resolved = yaml.safe_load((tmp_path / "runs" / "recipe-1" / "recipe.yaml").read_text())
    assert resolved["model"]["quantization"] == kind


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one(kind, parallel, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe, wanted = write_recipe(tmp_path), f"model.quantization={kind}"
    train(recipe, [wanted])
    two = run_cli(
        "train", recipe, wanted, f"training.parallel={parallel}", "--num-processes", "2", cwd=tmp_path, timeout=120
    )
    assert two.returncode == 0, two.stderr
    runs = tmp_path / "runs"
    assert losses(runs / "recipe-2") == pytest.approx(losses(runs / "recipe-1"), abs=1e-4)


def test_the_merged_files_are_the_dequantised_base_and_the_update(tmp_path, monkeypatch):
    """Against weights that no merge has touched: those that the run's quantised base dequantises to."""
    monkeypatch.chdir(tmp_path)
    train(write_recipe(tmp_path), ["model.quantization=nf4", "method.targets=[q_proj]"])
    run, base = tmp_path / "runs" / "recipe-1", tmp_path / "base-llama"
    merge([str(run)])
    merged = load_weights(BaseModel("merged", path=run / "merged"), dtype=torch.float32)
    as_trained = load_weights(BaseModel("base", path=base, quantization="nf4"), dtype=torch.float32)
    dequantize(as_trained)
    changed = {
        name
        for name, parameter in merged.named_parameters()
        if not torch.equal(parameter, as_trained.get_parameter(name))
    }
    assert changed == {f"model.layers.{index}.self_attn.q_proj.weight" for index in (0, 1)}
    stored = load_weights(BaseModel("base", path=base), dtype=torch.float32)
    assert not torch.equal(logits(stored), logits(as_trained))
