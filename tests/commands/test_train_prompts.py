"""Whole runs of prompts and prefixes, alone and beside a LoRA or bottleneck adapters."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from ftkit.commands.eval import evaluate
from ftkit.commands.export import export
from ftkit.commands.inspect import inspect
from ftkit.commands.merge import merge
from ftkit.commands.plan import plan
from ftkit.commands.train import train
from ftkit.errors import UserError
from tests.tiny_runs import losses, read_metrics, result_hash, write_recipe

ALONE = {
    "soft_prompt": "method={type: soft_prompt, num_virtual_tokens: 6, init_text: Say what begins it}",
    "prefix": "method={type: prefix, num_virtual_tokens: 6}",
    "llama_adapter": "method={type: llama_adapter, num_virtual_tokens: 6, num_layers: 2}",
}
BESIDE = {
    "lora": "method={type: lora, rank: 4, alpha: 8, soft_prompt: 6, soft_prompt_learning_rate_ratio: 5}",
    "adapter": "method={type: adapter, bottleneck: 8, soft_prompt: 6, soft_prompt_learning_rate_ratio: 5}",
}
every_method = pytest.mark.parametrize("method", [*ALONE, *BESIDE])


def section(method: str) -> str:
    return (ALONE | BESIDE)[method]


def evaluations(run) -> list[float]:
    return [line["eval_loss"] for line in read_metrics(run) if line.get("event") == "eval"]


def measured(target, output, **options) -> float:
    """Mean loss of the validation rows, as `eval` finds it."""
    evaluate(str(target), output=output, no_compare=True, **options)
    results = json.loads(output.read_text())["results"]
    (perplexity,) = (result["score"] for result in results if result["metric"] == "perplexity")
    return math.log(perplexity)


@every_method
def test_a_run_learns_goes_on_in_the_same_bits_and_is_measured(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe, run = write_recipe(tmp_path, learning_rate=3e-2), tmp_path / "runs" / "recipe-1"
    train(recipe, [section(method)])
    values, before, found = losses(run), result_hash(run), evaluations(run)
    assert found[-1] < found[0]
    train(recipe, [section(method)], checkpoint=run / "checkpoints" / "step-00000003")
    assert (losses(run), result_hash(run), evaluations(run)) == (values, before, found)
    assert measured(run, tmp_path / "results.json") == pytest.approx(min(found), abs=1e-4)


@every_method
def test_budget_packing_and_checkpointing_do_not_change_the_losses(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path)
    for overrides in ([], ["data.packing=off", "training.max_tokens_per_device=128"]):
        train(recipe, [section(method), *overrides])
    train(recipe, [section(method), "training.gradient_checkpointing=true"])
    expected, *others = [losses(tmp_path / "runs" / f"recipe-{number}") for number in (1, 2, 3)]
    for values in others:
        assert values == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("method", BESIDE)
def test_adapter_and_prompt_are_loaded_together_and_alone(method, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe, run = write_recipe(tmp_path, learning_rate=3e-2), tmp_path / "runs" / "recipe-1"
    train(recipe, [section(method)])
    printed = capsys.readouterr().out
    assert "a soft prompt of 6 vectors trains besides, at 5 times the learning rate" in printed
    (rows,) = load_file(run / "prompt" / "adapter_model.safetensors").values()
    assert rows.shape == (6, 32)
    together = measured(run, tmp_path / "both.json")
    alone = [measured(run / part, tmp_path / f"{part}.json") for part in ("adapter", "prompt")]
    checkpoint = run / "checkpoints" / "step-00000006"
    assert measured(checkpoint, tmp_path / "checkpoint.json") == pytest.approx(together, abs=1e-6)
    assert len({round(loss, 3) for loss in (together, *alone)}) == 3

    export(str(run), format="adapter")
    for part in ("", "prompt"):
        assert (run / "export" / part / "adapter_config.json").is_file()
    # An export has both too, and is measured, merged and begun with as the run is.
    assert measured(run / "export", tmp_path / "export.json", suite=_suite(tmp_path)) == pytest.approx(
        measured(run, tmp_path / "run.json", suite=_suite(tmp_path)), abs=1e-6
    )
    with pytest.raises(UserError, match=r"trained with a soft prompt|non-linearity"):
        merge([str(run / "export")])
    # What begins with it takes both, and says so where the recipe asks for one alone.
    train(recipe, [section(method), "method.init_from=runs/recipe-1", "training.eval_on_start=true"])
    assert evaluations(tmp_path / "runs" / "recipe-2")[0] == pytest.approx(together, abs=1e-4)
    for other in ("null", "5"):
        with pytest.raises(UserError, match="prompt"):
            train(recipe, [section(method), f"method.soft_prompt={other}", "method.init_from=runs/recipe-1"])


def test_the_prompts_beside_learn_at_a_rate_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe, rows = write_recipe(tmp_path, max_steps=1, eval_steps=1), []
    for ratio in ("1e-9", "10"):
        train(recipe, [BESIDE["lora"], f"method.soft_prompt_learning_rate_ratio={ratio}"])
        run = tmp_path / "runs" / f"recipe-{len(rows) + 1}"
        (prompt,) = load_file(run / "checkpoints" / "step-00000001" / "prompt" / "adapter_model.safetensors").values()
        rows.append(prompt)
    # AdamW's first step is the learning rate, 1e-2, in every number.
    assert torch.allclose((rows[1] - rows[0]).abs(), torch.full_like(rows[0], 0.1), rtol=1e-2)


@pytest.mark.parametrize("method", ALONE)
def test_prompts_are_not_merged_but_handed_over(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe, run = write_recipe(tmp_path), tmp_path / "runs" / "recipe-1"
    train(recipe, [section(method)])
    with pytest.raises(UserError, match="cannot be merged"):
        merge([str(run)])
    export(str(run), format="adapter")
    assert measured(run / "export", tmp_path / "e.json", suite=_suite(tmp_path)) > 0


def test_a_lora_is_not_merged_without_the_prompt_that_it_trained_with_unless_it_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe, run = write_recipe(tmp_path), tmp_path / "runs" / "recipe-1"
    train(recipe, [section("lora")])
    assert "ftkit merge" not in capsys.readouterr().out
    with pytest.raises(UserError, match="trained with a soft prompt") as caught:
        merge([str(run)])
    assert str(run / "adapter") in str(caught.value)
    merge([str(run / "adapter")])
    assert (run / "merged" / "merge_report.json").is_file()


@pytest.mark.parametrize("method", ["soft_prompt", "prefix", "lora"])
def test_what_follows_the_virtual_tokens_fits_into_the_positions(method, tmp_path, monkeypatch, capsys):
    """GPT-2 has 512 positions, of which answers, questions and the rows that are rated get what the prompt leaves."""
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, architecture="gpt2", max_steps=1)
    words = " ".join(["word"] * 600)
    suite = tmp_path / "long.yaml"
    (tmp_path / "long.jsonl").write_text(json.dumps({"instruction": words, "output": "abc"}) + "\n")
    suite.write_text("tasks:\n  - {name: long, path: long.jsonl, format: alpaca, metric: [exact_match, perplexity]}\n")
    long = {"soft_prompt": "num_virtual_tokens: 440", "prefix": "num_virtual_tokens: 440"}
    train(recipe, [f"method={{type: {method}, {long.get(method, 'soft_prompt: 440')}}}"])
    evaluate("runs/recipe-1", suite=suite, no_compare=True)
    assert "long" in capsys.readouterr().out


def test_each_is_compared_as_it_is_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe, suite = write_recipe(tmp_path, learning_rate=3e-2), _suite(tmp_path)
    targets = []
    for number, method in enumerate([*ALONE, *BESIDE], start=1):
        train(recipe, [section(method)])
        targets.append(f"runs/recipe-{number}")
    alone = [measured(target, tmp_path / "one.json", suite=suite) for target in targets]
    evaluate(targets[0], compare=targets[1:], suite=suite, output=tmp_path / "all.json")
    results = json.loads((tmp_path / "all.json").read_text())["results"]
    scores = [math.log(result["score"]) for result in results]
    # The second is the base, which the first is compared with too.
    assert [scores[0], *scores[2:]] == pytest.approx(alone, abs=1e-6)
    assert len({round(score, 4) for score in scores}) == len(scores)


def test_prompts_begin_with_prompts_of_their_kind_and_length(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, max_steps=1)
    for method in (*ALONE, "lora"):
        train(recipe, [section(method)])
    train(recipe, ["method={type: full}"])

    def begin(method, number, change="seed=1"):
        train(recipe, [section(method), f"method.init_from=runs/recipe-{number}", change])

    begin("soft_prompt", 4)  # the prompt beside the LoRA
    with pytest.raises(UserError, match=r"was trained as prefix, and this is soft_prompt; set method\.type: prefix"):
        begin("soft_prompt", 2)
    with pytest.raises(UserError, match=r"method.num_virtual_tokens: 7, and .* was trained with 6; set that here too"):
        begin("prefix", 2, "method.num_virtual_tokens=7")
    with pytest.raises(UserError, match=r"method.num_layers: 1, and .* was trained with 2"):
        begin("llama_adapter", 3, "method.num_layers=1")
    with pytest.raises(UserError, match="trained in full: there is no adapter to begin with"):
        begin("prefix", 5)


def test_a_prompt_beside_new_tokens_loads_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path)
    train(recipe, [section("lora"), "model.add_tokens=[abc, def]"])
    assert measured("runs/recipe-1/prompt", tmp_path / "e.json", suite=_suite(tmp_path)) > 0


def test_what_servers_and_merges_cannot_take_is_not_proposed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, max_steps=1)
    for number, method in enumerate((*ALONE, *BESIDE), start=1):
        train(recipe, [section(method)])
        evaluate(f"runs/recipe-{number}", suite=_suite(tmp_path))
        export(f"runs/recipe-{number}", format="adapter")
        printed = capsys.readouterr().out
        assert "ftkit merge" not in printed
        assert "vllm serve" not in printed
        assert "note: vLLM does not load it: it" in printed
    train(recipe, [])
    export(f"runs/recipe-{number + 1}", format="adapter")
    assert "--enable-lora --max-lora-rank 8 --lora-modules" in capsys.readouterr().out


def test_of_a_lora_with_a_prompt_the_lora_is_inspected(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path)
    train(recipe, [section("lora")])
    train(recipe, [section("soft_prompt")])
    capsys.readouterr()
    inspect("runs/recipe-1", modules=["q_proj"])
    assert "model.layers.0.self_attn.q_proj" in capsys.readouterr().out
    with pytest.raises(UserError, match="runs/recipe-2 is a prompt, which changes no weight"):
        inspect("runs/recipe-2")


def _suite(directory):
    path = directory / "suite.yaml"
    path.write_text("tasks:\n  - {name: rows, path: rows.jsonl, format: alpaca, metric: perplexity, limit: 4}\n")
    return path


@every_method
def test_the_plan_counts_what_the_run_trains(method, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path)
    plan(recipe, [section(method)], json=True)
    planned = json.loads(capsys.readouterr().out.splitlines()[-1])
    train(recipe, [section(method)])
    line = next(text for text in capsys.readouterr().out.splitlines() if text.startswith("method "))
    assert f"trains {planned['trainable_parameters']:,} of {planned['parameters']:,} parameters" in line


def test_positions_that_there_are_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, architecture="gpt2")
    what = (
        r"500 virtual tokens and examples of up to \d+ tokens do not fit into the model's 512 positions; set it to \d+"
    )
    with pytest.raises(UserError, match=rf"^command line: method\.num_virtual_tokens: {what}$"):
        train(recipe, ["method={type: prefix, num_virtual_tokens: 500}"])


@pytest.mark.parametrize("model_only", [False, True])
def test_positions_are_counted_without_a_prompt_too(model_only, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, architecture="gpt2")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "a " * 600, "output": "abc"}) + "\n")
    overrides = ["data.max_length=4096", "data.val_size=0"]
    if model_only:
        plan(recipe, overrides, model_only=True)
        with pytest.raises(UserError, match="600 virtual tokens and examples of up to 1 tokens"):
            plan(recipe, ["method={type: prefix, num_virtual_tokens: 600}"], model_only=True)
        return
    with pytest.raises(UserError, match=r"max_length: examples of up to \d+ tokens do not fit into .* set it to 512$"):
        train(recipe, overrides)


def test_another_attention_knows_no_prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"sdpa knows nothing of the prompts that method\.type: prefix trains"):
        train(write_recipe(tmp_path), [ALONE["prefix"], "model.attn_implementation=sdpa"])
