"""Whole runs that add tokens: they train, are measured, and merge into larger tables, with their tokenizer."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftkit.commands.eval import evaluate
from ftkit.commands.merge import merge
from ftkit.commands.train import train
from ftkit.errors import UserError
from ftkit.methods import lora
from ftkit.models.load import BaseModel, load_weights
from tests.methods.test_new_rows import logits
from tests.tiny_models import save_tiny
from tests.tiny_runs import losses, read_metrics, result_hash, run_cli, write_recipe

TOKENS = "model.add_tokens=[Say, <tool>]"
SPECIAL = "model.add_special_tokens=[<|end_of_tool|>]"
SIZES = {"in reserve": 320, "after the last": 260, "both": 261}
"""Rows of the base; its tokenizer has 260 tokens."""
IDS = [260, 261, 262]


def prepare(directory, rows, architecture="llama", **training):
    """A recipe whose base has so many rows."""
    save_tiny(directory / f"base-{architecture}", architecture, vocab_size=rows)
    return write_recipe(directory, architecture=architecture, **training)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", SIZES)
def test_a_run_trains_goes_on_in_the_same_bits_is_measured_and_merges(
    kind, architecture, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    recipe, run = prepare(tmp_path, SIZES[kind], architecture), tmp_path / "runs" / "recipe-1"
    train(recipe, [TOKENS, SPECIAL])
    assert "3 new tokens: their rows of model.embed_tokens" in capsys.readouterr().out
    values, before = losses(run), result_hash(run)
    assert sum(values[-2:]) < sum(values[:2])
    train(recipe, [TOKENS, SPECIAL], checkpoint=run / "checkpoints" / "step-00000003")
    assert (losses(run), result_hash(run)) == (values, before)

    # Loaded anew it has the loss that its best evaluation had, and the base alone that of the start.
    evaluate(str(run), output=tmp_path / "results.json", no_compare=True)
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    (perplexity,) = (result["score"] for result in results if result["metric"] == "perplexity")
    evaluations = [line["eval_loss"] for line in read_metrics(run) if line.get("event") == "eval"]
    assert torch.tensor(perplexity).log().item() == pytest.approx(min(evaluations), abs=1e-4)

    # The proof fails with an error.
    merge([str(run)])
    tuned = load_weights(BaseModel("base", path=tmp_path / f"base-{architecture}"), dtype=torch.float32)
    lora.load(tuned, run / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)
    assert merged.config.vocab_size == len(merged.get_input_embeddings().weight) == max(SIZES[kind], 263)
    expected = logits(tuned, IDS)
    assert (logits(merged, IDS) - expected).abs().max() <= 1e-5 * expected.abs().max()
    tied = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert tied == (architecture == "llama")
    tokenizer = AutoTokenizer.from_pretrained(run / "merged")
    assert tokenizer.convert_tokens_to_ids(["Say", "<tool>", "<|end_of_tool|>"]) == IDS
    ids = tokenizer("Say <tool><|end_of_tool|>", add_special_tokens=False).input_ids
    assert [token for token in ids if token in IDS] == IDS
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Say <tool>"


def test_only_the_rows_of_new_tokens_change_in_the_merged_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(prepare(tmp_path, SIZES["both"]), [TOKENS, SPECIAL])
    merge([str(tmp_path / "runs" / "recipe-1")])
    before = load_weights(BaseModel("base", path=tmp_path / "base-llama"), dtype=torch.float32)
    after = load_weights(BaseModel("merged", path=tmp_path / "runs/recipe-1/merged"), dtype=torch.float32)
    assert torch.equal(after.lm_head.weight[:260], before.lm_head.weight[:260])
    assert not torch.equal(after.lm_head.weight[260], before.lm_head.weight[260])
    # "Say" is in every row of the data; the others only ever were wrong answers.
    mean = before.lm_head.weight[:260].mean(0)
    moved = (after.lm_head.weight[260:] - mean).norm(dim=1)
    assert (moved > 1e-3).all()


@pytest.mark.parametrize("proof", ["full", "modules", "none"])
def test_on_a_quantised_base(proof, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(prepare(tmp_path, SIZES["after the last"]), [TOKENS, SPECIAL, "model.quantization=nf4"])
    run = tmp_path / "runs" / "recipe-1"
    merge([str(run)], proof=proof)
    base = BaseModel("base", path=tmp_path / "base-llama", quantization="nf4")
    tuned = load_weights(base, dtype=torch.float32)
    lora.load(tuned, run / "adapter")
    merged = load_weights(BaseModel("merged", path=run / "merged"), dtype=torch.float32)
    expected = logits(tuned, IDS)
    assert (logits(merged, IDS) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_merge_in_another_precision_grows_the_tables_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(prepare(tmp_path, SIZES["after the last"]), [TOKENS, SPECIAL])
    merge([str(tmp_path / "runs" / "recipe-1")], dtype="bfloat16")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "runs/recipe-1/merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    assert len(merged.lm_head.weight) == 263


def test_rows_cannot_be_scaled_or_taken_off(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(prepare(tmp_path, SIZES["after the last"]), [TOKENS])
    run = tmp_path / "runs" / "recipe-1"
    with pytest.raises(UserError, match=r"trained rows of new tokens in model.embed_tokens; merge it at weight 1"):
        merge([f"{run}:0.5"])
    merge([str(run)])
    with pytest.raises(UserError, match=r"trained rows of new tokens in model\.embed_tokens: what it replaced is gone"):
        merge([f"{run}:-1"], base=str(run / "merged"), output=tmp_path / "undone")


REFUSED = {
    ("model.add_tokens=[a]",): "model.add_tokens: a is a token of the base already (id ",
    ("model.add_tokens=[new, new]",): "model.add_tokens: 'new' is named twice",
    ("model.add_tokens=[' new']",): "model.add_tokens: ' new' begins or ends in white space",
    ("model.add_tokens=[new]", "method={type: full}"): "model.add_tokens: method.type: full trains no rows",
    ("model.add_tokens=[new]", "method.modules_to_save=[embed_tokens]"): "trains all of model.embed_tokens",
}


@pytest.mark.parametrize("overrides", REFUSED, ids=" ".join)
def test_what_is_refused(overrides, tmp_path):
    method = "full" if "method={type: full}" in overrides else "lora"
    recipe = write_recipe(tmp_path, method=method)
    refused = run_cli("train", recipe, *(one for one in overrides if one != "method={type: full}"), cwd=tmp_path)
    assert refused.returncode == 2, refused.stderr
    assert REFUSED[overrides] in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_two_processes_train_as_one(architecture, parallel, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = prepare(tmp_path, SIZES["both"], architecture)
    train(recipe, [TOKENS, SPECIAL])
    two = run_cli(
        "train", recipe, TOKENS, SPECIAL, f"training.parallel={parallel}", "--num-processes", "2", cwd=tmp_path
    )
    assert two.returncode == 0, two.stderr
    runs = tmp_path / "runs"
    assert losses(runs / "recipe-2") == pytest.approx(losses(runs / "recipe-1"), abs=1e-4)
