"""What follows training: plan, merge, eval and export, from the command line's functions, on tiny models."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftkit import cli
from ftkit.commands.eval import evaluate
from ftkit.commands.export import export
from ftkit.commands.merge import merge
from ftkit.commands.plan import plan
from ftkit.commands.train import train
from ftkit.errors import UserError
from tests.tiny_models import save_tiny, tiny_tokenizer
from tests.tiny_runs import write_recipe

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished LoRA run."""
    directory = tmp_path_factory.mktemp("lora")
    train(write_recipe(directory, max_steps=30, eval_steps=10), [])
    return directory / "runs" / "recipe-1"


@pytest.fixture(scope="module")
def merged(run):
    merge([str(run)])
    return run / "merged"


def logits(model, text="<|im_start|>user\nSay abc.<|im_end|>\n<|im_start|>assistant\n"):
    ids = AutoTokenizer.from_pretrained(model.name_or_path)(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return model.eval()(ids).logits


def test_the_merged_model_is_the_adapted_one_and_stops(run, merged):
    base = AutoModelForCausalLM.from_pretrained(run.parent.parent / "base-llama")
    adapted = logits(PeftModel.from_pretrained(base, run / "adapter"))
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert (logits(model) - adapted).abs().max() <= 1e-5 * adapted.abs().max()
    assert model.generation_config.eos_token_id == [258]
    report = json.loads((merged / "merge_report.json").read_text())
    assert report["max_abs_logit_difference"] <= 1e-5 * report["max_abs_logit"]
    assert report["tensors_changed"] == 14


def test_a_merged_directory_is_not_overwritten_unasked(run, merged):
    with pytest.raises(UserError, match="exists"):
        merge([str(run)])
    merge([str(run)], overwrite=True)
    assert (run / "merged.old-1").is_dir()


def test_eval_compares_with_the_base_on_the_rows_held_back(run, merged, tmp_path, capsys):
    evaluate(str(run), output=tmp_path / "run.json")
    evaluate(str(merged), output=tmp_path / "merged.json")
    reports = [json.loads((tmp_path / name).read_text()) for name in ("run.json", "merged.json")]
    pairs = [{pair["metric"]: pair for pair in report["comparisons"]} for report in reports]
    assert set(pairs[0]) == {"perplexity", "exact_match", "token_f1"}
    assert pairs[0]["perplexity"]["tuned"] < pairs[0]["perplexity"]["base"]
    # The adapter switched off, and the base loaded by itself, are the same model.
    assert pairs[0]["perplexity"]["base"] == pytest.approx(pairs[1]["perplexity"]["base"], rel=1e-5)
    assert pairs[0]["perplexity"]["tuned"] == pytest.approx(pairs[1]["perplexity"]["tuned"], rel=1e-5)
    out = capsys.readouterr().out
    assert "generated" in out
    assert out.count(f"\n  ftkit merge {run}\n") == 1


def test_what_cannot_be_merged_is_not_told_to_be(tmp_path, capsys):
    recipe = write_recipe(tmp_path, method="adapter", max_steps=1)
    train(recipe, [f"output_dir={tmp_path / 'run'}"])
    evaluate(str(tmp_path / "run"), limit=1)
    out = capsys.readouterr().out
    assert "ftkit merge" not in out
    assert out.endswith(f"  ftkit export --format adapter {tmp_path / 'run'}\n")


def test_eval_runs_a_suite_on_any_model(run, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "fine", "target": "yes"}\n{"text": "bad", "target": "no"}\n')
    (tmp_path / "suite.yaml").write_text(
        "tasks:\n  - {name: t, path: rows.jsonl, template: 'Good? {text}', options: [yes, no], metric: rank_accuracy}\n"
    )
    base = run.parent.parent / "base-llama"
    evaluate(str(base), suite=tmp_path / "suite.yaml", compare=[str(run)], output=tmp_path / "out.json")
    report = json.loads((tmp_path / "out.json").read_text())
    assert {result["model"] for result in report["results"]} == {"/".join(base.parts[-2:]), "runs/recipe-1"}
    with pytest.raises(UserError, match="--suite"):
        evaluate(str(base))


def test_where_eval_cannot_write_it_says_so_first(tmp_path, capsys):
    (tmp_path / "file").touch()
    for name in ("file/x.json", "file/a/x.json"):
        assert cli.run(["eval", str(tmp_path / "no-model"), "--output", str(tmp_path / name)]) == 2
        assert capsys.readouterr().err.startswith(f"ftkit: error: {tmp_path}/file")


def test_export_writes_what_others_load(run, tmp_path):
    export(str(run), format="hf", output=tmp_path / "hf")
    export(str(run), format="adapter", output=tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(run.parent.parent / "base-llama")
    adapted = logits(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    assert (
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "hf")) - adapted
    ).abs().max() <= 1e-5 * adapted.abs().max()
    with pytest.raises(UserError, match="not in this version"):
        export(str(run), format="onnx")


@pytest.mark.parametrize("method", ["full", "adapter"])
def test_what_cannot_be_merged_says_so_and_is_evaluated(tmp_path, method):
    train(write_recipe(tmp_path, method=method), [])
    run = tmp_path / "runs" / "recipe-1"
    with pytest.raises(UserError):
        merge([str(run)])
    assert not (run / "merged").exists()
    evaluate(str(run), output=tmp_path / "out.json")
    report = json.loads((tmp_path / "out.json").read_text())
    assert len(report["comparisons"]) == 3


def test_plan_counts_without_weights(tmp_path, capsys, monkeypatch):
    recipe = write_recipe(tmp_path)
    (tmp_path / "base-llama" / "model.safetensors").write_bytes(b"not weights")
    plan(recipe, [], json=True)
    figures = json.loads(capsys.readouterr().out)
    # 14 linear layers of 2 blocks, rank 4: 4 * (in + out) each.
    shapes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
    assert figures["trainable_parameters"] == 2 * sum(4 * (a + b) for a, b in shapes)
    assert figures["optimizer_steps"] == 6
    assert figures["memory_bytes"]["optimizer"] == 8 * figures["trainable_parameters"]
    (counts,) = figures["mixture"]
    assert (counts["name"], counts["share"], counts["dropped"]) == ("rows", 1.0, {})
    assert counts["tokens"] == figures["tokens"]
    assert [part["name"] for part in figures["validation"]] == ["rows"]
    assert figures["warnings"] == []
    train(recipe, [], dry_run=True)
    assert "6 steps of 4 examples" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    planned = {}
    monkeypatch.setattr("ftkit.commands.plan.plan", lambda *_, **options: planned.update(options))
    train(recipe, [], dry_run=True, num_processes=2)
    assert planned["num_processes"] == 2
    for option in ({"resume": True}, {"checkpoint": tmp_path}, {"launch_config": tmp_path}):
        with pytest.raises(UserError, match="--dry-run plans a run from its first step"):
            train(recipe, [], dry_run=True, **option)


def test_plan_builds_a_model_from_its_own_code_where_it_may(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    recipe = write_recipe(tmp_path)
    base = tmp_path / "base-llama"
    (base / "hovercraft.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class Config(LlamaConfig):\n    model_type = 'hovercraft'\n\n\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    config = json.loads((base / "config.json").read_text())
    config |= {
        "model_type": "hovercraft",
        "auto_map": {"AutoConfig": "hovercraft.Config", "AutoModelForCausalLM": "hovercraft.Model"},
    }
    (base / "config.json").write_text(json.dumps(config))
    plan(recipe, [], json=True, trust_remote_code=True)
    assert json.loads(capsys.readouterr().out)["optimizer_steps"] == 6
    with pytest.raises(UserError, match="--trust-remote-code"):
        plan(recipe, [])


def test_eval_refuses_rows_that_it_cannot_tell_from_trained_ones(tmp_path):
    train(write_recipe(tmp_path), [])
    run = tmp_path / "runs" / "recipe-1"
    held_back = json.loads((run / "validation.json").read_text())["rows"]
    evaluate(str(run), output=tmp_path / "eval.json")
    assert json.loads((tmp_path / "eval.json").read_text())["results"][0]["n"] == len(held_back)
    rows = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(reversed(rows)))
    with pytest.raises(UserError, match="is not what it was trained on"):
        evaluate(str(run))


def test_a_full_run_is_compared_with_the_base_that_it_was_tuned_from(tmp_path):
    train(write_recipe(tmp_path, method="full"), [])
    save_tiny(tmp_path / "base-llama", seed=9)
    with pytest.raises(UserError, match="was trained on"):
        evaluate(str(tmp_path / "runs" / "recipe-1"))


def test_an_output_that_cannot_be(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot create"):
        merge([str(run)], output=tmp_path / "file" / "merged")


def test_a_template_that_was_chosen_for_the_base_is_told(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    plan(recipe, [])
    assert "no chat template" not in capsys.readouterr().out
    tiny_tokenizer(chat_template=None).save_pretrained(tmp_path / "base-llama")
    (tmp_path / "base-llama" / "chat_template.jinja").unlink(missing_ok=True)
    plan(recipe, [])
    assert "warning: the base model has no chat template: it gets a plain one" in capsys.readouterr().out
