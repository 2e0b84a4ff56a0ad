"""`ftkit plan --model-only`: counted from the configuration alone, whatever lies beside it."""

import json
from pathlib import Path

import pytest

from ftkit.commands.plan import plan
from ftkit.errors import UserError
from tests.tiny_models import save_tiny
from tests.tiny_runs import write_recipe

GPT3 = Path(__file__).parents[2] / "benchmarks" / "gpt3_175b" / "lora.yaml"

STATE = ("weights", "gradients", "optimizer")


def counted(capsys, recipe, *overrides):
    plan(recipe, list(overrides), model_only=True, json=True)
    return json.loads(capsys.readouterr().out)


def test_the_papers_figures_of_gpt3(capsys):
    """Hu et al. 2021, section 4.2 and table 4: r = 4 on queries and values of 96 layers of width 12,288."""
    found = counted(capsys, GPT3)
    assert found["trainable_parameters"] == 96 * 2 * 4 * (12288 + 12288) == 18_874_368
    # Table 2.1 of Brown et al. 2020, which rounds: 175.0B.
    assert found["parameters"] - 18_874_368 == pytest.approx(175.0e9, rel=0.003)
    plan(GPT3, [], model_only=True)
    text = capsys.readouterr().out
    assert "18,874,368 of 174,623,158,272 parameters (0.0108%)" in text
    memory = found["memory_bytes"]
    assert memory["weights"] == 2 * (found["parameters"] - 18_874_368) + 4 * 18_874_368
    assert (memory["gradients"], memory["optimizer"]) == (4 * 18_874_368, 8 * 18_874_368)
    whole = counted(capsys, GPT3, "method={type: full}")["memory_bytes"]
    assert sum(whole[part] for part in STATE) == 16 * (found["parameters"] - 18_874_368)


@pytest.mark.parametrize("method", ["lora", "full", "soft_prompt", "prefix"])
def test_it_counts_what_the_whole_plan_counts_without_weights_and_data(method, tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    section = f"method={{type: {method}}}"
    plan(recipe, [section], json=True)
    whole = json.loads(capsys.readouterr().out.splitlines()[-1])
    (tmp_path / "rows.jsonl").unlink()
    for weights in (tmp_path / "base-llama").glob("*.safetensors"):
        weights.unlink()
    found = counted(capsys, recipe, section)
    # What depends on the batch is that of the plan's fullest one, or of documents of data.max_length.
    same = found.keys() - {"memory_bytes", "micro_batch_tokens", "available_bytes"}
    assert {key: found[key] for key in same} == {key: whole[key] for key in same}
    for part in STATE:
        assert found["memory_bytes"][part] == whole["memory_bytes"][part]
    assert found["micro_batch_tokens"] == 256
    # A prompt comes before each of the plan's documents, of which more share a micro-batch.
    more = whole["memory_bytes"]["activations"] if method != "soft_prompt" else 0
    assert found["memory_bytes"]["activations"] > more
    with pytest.raises(UserError, match="holds no weights"):
        plan(recipe, [section], json=True)


def test_new_tokens_count_too(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    plain, more = counted(capsys, recipe), counted(capsys, recipe, "model.add_tokens=[zyx, wvu]")
    assert more["trainable_parameters"] > plain["trainable_parameters"]


def test_what_is_wrong_is_said_with_its_place(tmp_path):
    save_tiny(tmp_path / "base")
    (tmp_path / "base" / "config.json").unlink()
    recipe = write_recipe(tmp_path)
    with pytest.raises(UserError, match=r"^command line: base_model: .*it has no config\.json"):
        plan(recipe, [f"base_model={tmp_path / 'base'}"], model_only=True)
