"""What breaks a run from outside, through the command line: a full disk, damage, numbers that are not finite."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ftkit.cli import run as ftkit
from ftkit.console import Console
from ftkit.recipe.load import load_recipe
from ftkit.training.checkpoint import find_damage, list_checkpoints
from ftkit.training.prepare import prepare
from tests.models.fake_hub import COMMIT, serve
from tests.tiny_models import save_tiny, tiny_tokenizer
from tests.tiny_runs import cli_command, cli_environment, read_metrics, result_hash, run_cli, write_recipe

LIMITED = """
import os, resource, signal, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
os.execv(sys.argv[2], sys.argv[2:])
"""
"""A program that runs another one, whose files may not grow beyond so many bytes."""


WRITTEN = ["adapter/adapter_model.safetensors", "adapter/tokenizer.json", "optimizer.safetensors"]
"""Large files of a checkpoint in the order in which they are written."""


def run_limited(limit, *arguments, cwd):
    """`run_cli` on a disk that is as good as full."""
    command = [sys.executable, "-c", LIMITED, str(limit), *cli_command(*arguments)]
    return subprocess.run(command, cwd=cwd, env=cli_environment(), capture_output=True, text=True, timeout=300)


def content(directory):
    """Every file below `directory` with its bytes."""
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def one_line(capsys, what):
    """The one line on standard error that says `what`."""
    stderr = capsys.readouterr().err
    assert stderr.startswith("ftkit: error: "), stderr
    assert stderr.count("\n") == 1, stderr
    assert what in stderr
    return stderr


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """(recipe, directory of its first run), with the working directory moved away from the project."""
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path), tmp_path / "runs" / "recipe-1"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "limit", "targets"),
    [
        ("adapter/adapter_model.safetensors", 10_000, "all-linear"),
        ("adapter/tokenizer.json", 5_500, "[q_proj]"),
        ("optimizer.safetensors", 30_000, "all-linear"),
        ("the result", 10_000, "all-linear"),
    ],
)
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(tmp_path, file, limit, targets):
    recipe = write_recipe(tmp_path, logging_steps=3)
    arguments = ["train", recipe, f"method.targets={targets}"]
    assert run_cli(*arguments, cwd=tmp_path).returncode == 0
    run = tmp_path / "runs" / "recipe-1"
    expected, metrics = result_hash(run), read_metrics(run)

    # As a run that was killed: after its first checkpoint, or before its result.
    shutil.rmtree(run / "adapter")
    checkpoint = run / "checkpoints" / "step-00000006"
    too_large = [name for name in WRITTEN if (checkpoint / name).stat().st_size > limit]
    what = "the run's result" if file == "the result" else "the checkpoint of step 6"
    if file != "the result":
        assert too_large[0] == file
        shutil.rmtree(checkpoint)
    before = content(run / "checkpoints")
    failed = run_limited(limit, *arguments, "--resume", cwd=tmp_path)
    assert failed.returncode == 5, failed.stderr
    assert failed.stderr.startswith("ftkit: error: ")
    assert failed.stderr.count("\n") == 1
    assert f"cannot write {what}: File too large; free some space" in failed.stderr
    assert content(run / "checkpoints") == before
    assert find_damage(list_checkpoints(run / "checkpoints")[-1]) is None
    assert not {"adapter", ".staging-adapter"} & {path.name for path in run.iterdir()}

    again = run_cli(*arguments, "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"after step {6 if file == 'the result' else 3}" in again.stdout
    assert result_hash(run) == expected
    assert read_metrics(run) == metrics


def test_a_damaged_best_checkpoint_is_not_published(tiny, capsys):
    recipe, run = tiny
    # A rate that makes the last evaluation worse than the first.
    arguments = ["train", str(recipe), "training.learning_rate=0.3", "training.lr_scheduler_type=constant"]
    arguments += ["training.eval_steps=1", "training.warmup_steps=6"]
    assert ftkit(arguments) == 0
    steps = {line["step"]: line["eval_loss"] for line in read_metrics(run) if "eval_loss" in line and line["step"]}
    best = min(steps, key=steps.get)
    assert best < 6
    # As a run that was killed before its result was written, and whose disk then lost a bit.
    shutil.rmtree(run / "adapter")
    weights = run / "checkpoints" / f"step-{best:08d}" / "adapter" / "adapter_model.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    before = content(run / "checkpoints")
    capsys.readouterr()
    assert ftkit([*arguments, "--resume"]) == 5
    stderr = one_line(capsys, "damaged: adapter/adapter_model.safetensors has changed")
    assert "go on from another with --from" in stderr
    assert not (run / "adapter").exists()
    assert content(run / "checkpoints") == before
    weights.write_bytes(sound)
    assert ftkit([*arguments, "--resume"]) == 0
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == sound


def test_a_validation_loss_that_is_not_finite_stops(tiny, capsys):
    recipe, run = tiny
    arguments = ["train", str(recipe), "training.learning_rate=1e30", "training.max_grad_norm=null"]
    assert ftkit([*arguments, "training.eval_steps=1"]) == 3
    one_line(capsys, "the validation loss after step 1 is not finite; lower training.learning_rate")
    assert list_checkpoints(run / "checkpoints") == []
    assert [line["step"] for line in read_metrics(run)] == [0, 1]


def test_a_gradient_that_is_not_finite_stops_before_the_step_although_the_loss_is(tmp_path, monkeypatch, capsys):
    """A token whose embedding is zero, under a norm that adds next to nothing: 0 forward, 0 x infinity backward."""
    monkeypatch.chdir(tmp_path)
    base = save_tiny(tmp_path / "base-llama", tie_word_embeddings=False, rms_norm_eps=2e-38)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.get_input_embeddings().weight.data[tiny_tokenizer().convert_tokens_to_ids("Z")] = 0.0
    model.save_pretrained(base)
    recipe = write_recipe(tmp_path, method="full", eval_steps=1)
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    plan = prepare(load_recipe(recipe), Console(quiet=True), offline=True, trust_remote_code=False).plan
    bad = plan.examples[plan.steps[3][0]].row
    rows[bad] = rows[bad].replace("Say", "Z")
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    assert ftkit(["train", str(recipe)]) == 3
    stderr = one_line(capsys, "is not finite")
    step = int(re.search(rf"the gradient of step (\d+) is not finite \(rows .*rows:{bad}[,)]", stderr)[1])
    assert step == 4
    run = tmp_path / "runs" / "recipe-1"
    saved = list_checkpoints(run / "checkpoints")
    assert saved[-1].name == f"step-{step - 1:08d}"
    for path in saved:
        assert find_damage(path) is None
        for file in (path / "model" / "model.safetensors", path / "optimizer.safetensors"):
            assert all(tensor.isfinite().all() for tensor in load_file(file).values())
    assert not (run / "model").exists()


@pytest.mark.slow
def test_another_number_of_processes_is_refused_before_anything_is_set_aside(tmp_path):
    recipe = write_recipe(tmp_path)
    assert run_cli("train", recipe, cwd=tmp_path).returncode == 0
    run = tmp_path / "runs" / "recipe-1"
    checkpoint, before = run / "checkpoints" / "step-00000003", content(run)
    resumed = run_cli("train", recipe, "--from", checkpoint, "--num-processes", "2", cwd=tmp_path)
    assert resumed.returncode == 2, resumed.stderr
    assert resumed.stderr.count("\n") == 1
    assert "was written by 1 process(es) on CPU, and this run has 2 on cpu" in resumed.stderr
    assert "go on with --num-processes 1" in resumed.stderr
    assert content(run) == before


@pytest.mark.slow
def test_a_model_of_the_hub_is_pinned_to_its_commit(tmp_path):
    recipe = write_recipe(tmp_path)
    with serve(tmp_path / "base-llama") as hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
        result = run_cli("train", recipe, "base_model=org/good", cwd=tmp_path, **environment)
        assert result.returncode == 0, result.stderr
        run = tmp_path / "runs" / "recipe-1"
        resolved = load_recipe(run / "recipe.yaml").recipe
        assert (resolved.base_model, resolved.model.revision) == ("org/good", COMMIT)
        assert json.loads((run / "environment.json").read_text())["base_model"]["revision"] == COMMIT
        assert json.loads((run / "adapter" / "adapter_config.json").read_text())["revision"] == COMMIT
        assert f"org/good at {COMMIT[:12]}" in result.stdout
        # The recipe as it was written, with a branch, is still that of this run.
        again = run_cli("train", recipe, "base_model=org/good", "--resume", cwd=tmp_path, **environment)
        assert "finished already" in again.stdout, again.stderr
    # Its own recipe repeats it, from the cache, wherever the branch has moved to.
    repeated = run_cli("train", run / "recipe.yaml", "--offline", cwd=tmp_path, HF_HOME=str(tmp_path / "cache"))
    assert repeated.returncode == 0, repeated.stderr
    assert result_hash(tmp_path / "runs" / "recipe-2") == result_hash(run)


def test_flash_attention_that_is_not_there_is_told_before_anything_is_read(tmp_path):
    recipe = write_recipe(tmp_path)
    result = run_cli("plan", str(recipe), "model.attn_implementation=flash_attention_2", cwd=tmp_path)
    assert result.returncode == 2
    assert "model.attn_implementation: flash_attention_2 needs an NVIDIA GPU" in result.stderr
    assert result.stdout == ""
    smoked = run_cli("train", str(recipe), "--smoke", "model.attn_implementation=flash_attention_2", cwd=tmp_path)
    assert smoked.returncode == 0, smoked.stderr
    assert "changed    model.attn_implementation auto for flash_attention_2" in smoked.stdout
