"""Multimodal checkpoints from the command line's functions: trained, gone on with, measured, merged, still whole."""

import json
import sys
from functools import partialmethod
from pathlib import Path
from subprocess import run as run_process

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from ftkit.commands.eval import evaluate
from ftkit.commands.export import export
from ftkit.commands.merge import merge
from ftkit.commands.plan import plan
from ftkit.commands.train import train
from ftkit.methods import lora
from ftkit.models.load import BaseModel, load_weights
from tests.artifacts.adapters import logits, tensors
from tests.tiny_multimodal import IGNORED, LANGUAGE, MULTIMODAL_CONFIGS, image_inputs, multimodal_model, save_multimodal
from tests.tiny_runs import cli_environment, losses, result_hash, run_cli, write_recipe

every_kind = pytest.mark.parametrize("kind", MULTIMODAL_CONFIGS)
SAVE = PreTrainedModel.save_pretrained
FRESH_LOGITS = """
import sys, torch
from safetensors.torch import save_file
from tests.artifacts.adapters import logits
from tests.commands.test_train_multimodal import open_result
rows = logits(open_result(*sys.argv[1:3]))
save_file({str(i): row.contiguous() for i, row in enumerate(rows)}, sys.argv[3])
"""


def trained_run(directory: Path, kind: str, method: str) -> Path:
    """A finished run of two steps on a base in two files, `directory/base-KIND`."""
    if not (directory / f"base-{kind}").exists():
        save_multimodal(directory / f"base-{kind}", kind, shards=2)
    recipe = write_recipe(directory, method=method, architecture=kind, max_steps=2, eval_steps=1)
    train(recipe, [])
    return directory / "runs" / "recipe-1"


def in_float32(base: Path) -> None:
    """Store the norms and biases of a base in float32, as some models have them."""
    for file in base.glob("*.safetensors"):
        state = load_file(file)
        save_file({n: t.float() if t.ndim == 1 else t for n, t in state.items()}, file, {"format": "pt"})


def open_result(base: str, run: str) -> PreTrainedModel:
    """The tuned model, float32."""
    if (Path(run) / "model").is_dir():
        return load_weights(BaseModel("tuned", path=Path(run) / "model"), dtype=torch.float32)
    model = load_weights(BaseModel("base", path=Path(base)), dtype=torch.float32)
    lora.load(model, Path(run) / "adapter")
    return model


def of_language(kind: str, name: str) -> bool:
    """Whether a weight in the files belongs to the language model or its head."""
    return name.startswith((LANGUAGE[kind], "lm_head.", "language_model.lm_head."))


def differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that are not the same bit for bit; both must have the same names and precisions."""
    assert {name: tensor.dtype for name, tensor in before.items()} == {n: tensor.dtype for n, tensor in after.items()}
    return {name for name in before if not before[name].equal(after[name])}


@torch.no_grad()
def logits_of_image(model: PreTrainedModel, kind: str) -> Tensor:
    """Logits of a text with an image."""
    return model.eval()(**image_inputs(kind)).logits


def check_files(base: Path, result: Path) -> None:
    """That a result has the configuration and the processor files of its base."""
    for name in ("config.json", "preprocessor_config.json", "processor_config.json"):
        assert json.loads((result / name).read_text()) == json.loads((base / name).read_text()), name
    assert (result / "tokenizer.json").is_file()
    assert (result / "chat_template.jinja").is_file()


@every_kind
def test_lora_is_merged_under_the_names_of_the_base(kind: str, tmp_path: Path) -> None:
    run, base = trained_run(tmp_path, kind, "lora"), tmp_path / f"base-{kind}"
    merge([str(run)])
    before, after = tensors(base), tensors(run / "merged")
    assert len(list((run / "merged").glob("*.safetensors"))) == 2
    changed = differing(before, after)
    assert len(changed) == len(load_file(run / "adapter" / "adapter_model.safetensors")) // 2
    assert all(".layers." in name and of_language(kind, name) for name in changed)
    check_files(base, run / "merged")

    tuned = open_result(str(base), str(run))
    merged = AutoModelForImageTextToText.from_pretrained(run / "merged", dtype=torch.float32)
    for ours, theirs in zip(logits(tuned), logits(merged), strict=True):
        # Recurrent layers make more of a rounding; the merge itself has compared the two.
        assert (ours - theirs).abs().max() <= (5e-5 if kind == "qwen3_5" else 1e-5)
    with_image = logits_of_image(merged, kind)
    assert (with_image - logits_of_image(tuned, kind)).abs().max() <= (5e-5 if kind == "qwen3_5" else 1e-5)
    assert (with_image - logits_of_image(multimodal_model(kind), kind)).abs().max() > 1e-3


@every_kind
def test_a_full_run_leaves_all_but_the_language_model_as_it_was(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_multimodal(tmp_path / f"base-{kind}", kind, dtype=torch.bfloat16, shards=2)
    in_float32(base)
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", partialmethod(SAVE, max_shard_size="60KB"))
    run = trained_run(tmp_path, kind, "full")
    assert len(list((run / "model").glob("*.safetensors"))) > 1
    before, after = tensors(base), tensors(run / "model")
    changed = differing(before, after)
    assert changed
    assert all(of_language(kind, name) for name in changed)
    assert IGNORED.get(kind, {}).keys() <= after.keys()
    index = json.loads((run / "model" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys()
    check_files(base, run / "model")
    model = AutoModelForImageTextToText.from_pretrained(run / "model", dtype=torch.float32)
    assert logits_of_image(model, kind).isfinite().all()
    export(str(run), format="hf", output=tmp_path / "exported")
    assert not differing(after, tensors(tmp_path / "exported"))
    check_files(base, tmp_path / "exported")


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5"])
@pytest.mark.parametrize("method", ["lora", "full", "adapter"])
def test_a_run_goes_on_in_the_same_bits(kind: str, method: str, tmp_path: Path) -> None:
    run = trained_run(tmp_path, kind, method)
    values, before = losses(run), result_hash(run, method)
    train(tmp_path / "recipe.yaml", [], checkpoint=run / "checkpoints" / "step-00000001")
    assert losses(run) == values
    assert result_hash(run, method) == before


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_fresh_process_computes_the_same_bits(method: str, tmp_path: Path) -> None:
    run, base = trained_run(tmp_path, "mistral3", method), tmp_path / "base-mistral3"
    command = [sys.executable, "-c", FRESH_LOGITS, str(base), str(run), str(tmp_path / "logits.safetensors")]
    run_process(command, check=True, env=cli_environment())
    elsewhere = load_file(tmp_path / "logits.safetensors")
    for index, row in enumerate(logits(open_result(str(base), str(run)))):
        assert torch.equal(row, elsewhere[str(index)])


@every_kind
def test_a_run_is_planned_and_measured(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained_run(tmp_path, kind, "lora")
    evaluate(str(run), limit=2, output=tmp_path / "eval.json")
    report = json.loads((tmp_path / "eval.json").read_text())
    assert {pair["metric"] for pair in report["comparisons"]} == {"perplexity", "exact_match", "token_f1"}
    capsys.readouterr()
    plan(tmp_path / "recipe.yaml", [], json=True)
    planned = json.loads(capsys.readouterr().out)
    added = sum(t.numel() for t in load_file(run / "adapter" / "adapter_model.safetensors").values())
    assert planned["trainable_parameters"] == added
    assert planned["parameters"] == multimodal_model(kind).num_parameters() + added


def test_a_full_run_says_what_it_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained_run(tmp_path, "gemma3", "full")
    assert "note the language model trains; no text reaches model.vision_tower (" in " ".join(
        capsys.readouterr().out.split()
    )


def test_tied_embeddings_that_trained_are_merged_once(tmp_path: Path) -> None:
    save_multimodal(tmp_path / "base-gemma3", "gemma3", shards=2)
    recipe = write_recipe(tmp_path, architecture="gemma3", max_steps=2, eval_steps=2)
    train(recipe, ["method.modules_to_save=[embed_tokens, lm_head]"])
    run = tmp_path / "runs" / "recipe-1"
    merge([str(run)])
    changed = differing(tensors(tmp_path / "base-gemma3"), tensors(run / "merged"))
    assert "language_model.model.embed_tokens.weight" in changed
    assert not [name for name in changed if not of_language("gemma3", name)]
    merged = AutoModelForImageTextToText.from_pretrained(run / "merged")
    assert merged.lm_head.weight is merged.model.language_model.embed_tokens.weight
    tuned = open_result(str(tmp_path / "base-gemma3"), str(run))
    for ours, theirs in zip(logits(tuned), logits(merged), strict=True):
        assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_processes_train_as_one_does(method: str, parallel: str, tmp_path: Path) -> None:
    run = trained_run(tmp_path, "gemma3", method)
    result = run_cli(
        "train", tmp_path / "recipe.yaml", "--num-processes", "2", f"training.parallel={parallel}", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    other = run.with_name("recipe-2")
    assert losses(other) == pytest.approx(losses(run), rel=1e-4)
    name = "model" if method == "full" else "adapter"
    assert tensors(other / name).keys() == tensors(run / name).keys()
