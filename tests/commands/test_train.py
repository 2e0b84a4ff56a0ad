import hashlib
import json
import shutil
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ftkit.commands.train import train
from ftkit.errors import NonFiniteError, UserError
from ftkit.lock import RunLock
from ftkit.recipe.load import load_recipe
from ftkit.runs import recorded_environment
from ftkit.training.optim import learning_rate
from tests.tiny_models import CHATML, save_tiny
from tests.tiny_runs import METHODS, cli_command, cli_environment, losses, read_metrics, run_cli, write_recipe


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weights(run, method):
    return run / ("model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """(recipe path, directory of its runs), with the working directory moved away from the project."""
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path), tmp_path / "runs"


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_and_leaves_its_directory(tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, method=method, max_steps=30, eval_steps=10)
    train(recipe, [])
    run = tmp_path / "runs" / "recipe-1"
    values = losses(run)
    assert sum(values[-5:]) < 0.9 * sum(values[:5])
    names = {path.name for path in run.iterdir()}
    result = "model" if method == "full" else "adapter"
    assert names == {
        "recipe.yaml", "environment.json", "metrics.jsonl", "train.log", "validation.json", "checkpoints", result,
    }  # fmt: skip
    log = (run / "train.log").read_text().splitlines()
    assert log[0] == "[rank 0] base       base-llama (llama)"
    assert log[1].startswith("[rank 0] mixture")
    line = read_metrics(run, timing=True)[1]
    assert set(line) == {
        "step", "epoch", "loss", "loss_by_dataset", "learning_rate", "grad_norm", "tokens", "target_tokens", "timing",
    }  # fmt: skip
    assert line["loss_by_dataset"] == {"rows": line["loss"]}
    evaluations = [line for line in read_metrics(run) if line.get("event") == "eval"]
    assert [line["step"] for line in evaluations] == [0, 10, 20, 30]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert (run / result / "chat_template.jinja").exists()
    assert json.loads((run / result / "generation_config.json").read_text())["eos_token_id"] == [258]


def test_the_same_recipe_gives_the_same_bytes_and_its_resolved_form_too(tiny):
    recipe, runs = tiny
    train(recipe, [])
    train(recipe, [])
    train(runs / "recipe-1" / "recipe.yaml", [])
    assert {path.name for path in runs.iterdir()} == {"recipe-1", "recipe-2", "recipe-3"}
    for other in ("recipe-2", "recipe-3"):
        assert sha(weights(runs / other, "lora")) == sha(weights(runs / "recipe-1", "lora"))
        assert read_metrics(runs / other) == read_metrics(runs / "recipe-1")


def test_the_resolved_form_cuts_micro_batches_as_the_run_did(tiny, monkeypatch):
    recipe, runs = tiny
    train(recipe, ["training.max_tokens_per_device=auto", "training.max_steps=2"])
    cut = recorded_environment(runs / "recipe-1")["micro_batch"]
    monkeypatch.setattr("ftkit.training.budget.TOKENS_ON_CPU", 512)
    train(runs / "recipe-1" / "recipe.yaml", [])
    assert recorded_environment(runs / "recipe-2")["micro_batch"] == cut
    assert sha(weights(runs / "recipe-2", "lora")) == sha(weights(runs / "recipe-1", "lora"))
    # The recipe that leaves it open goes on in such a run all the same.
    train(recipe, ["training.max_tokens_per_device=auto", "training.max_steps=4"], resume=True)
    assert {path.name for path in runs.iterdir()} == {"recipe-1", "recipe-2"}
    assert len(read_metrics(runs / "recipe-2")) > len(read_metrics(runs / "recipe-1"))


def test_rows_in_columns_that_only_phrasings_know_go_on_and_repeat(tiny):
    recipe, runs = tiny
    rows = [{"review": f"it is {word}", "label": ["negative", "positive"][word > "m"]} for word in "abcdwxyz" * 3]
    (recipe.parent / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [f"data.train.0.path={recipe.parent / 'reviews.jsonl'}", "data.train.0.templates=sst2"]
    overrides += ["data.train.0.columns={sentence: review, label: label}"]
    train(recipe, overrides)
    train(runs / "recipe-1" / "recipe.yaml", [])
    assert sha(weights(runs / "recipe-2", "lora")) == sha(weights(runs / "recipe-1", "lora"))
    train(recipe, [*overrides, "training.max_steps=8"], resume=True)
    assert {path.name for path in runs.iterdir()} == {"recipe-1", "recipe-2"}
    assert max(line["step"] for path in runs.iterdir() for line in read_metrics(path)) == 8


def test_paths_on_the_command_line_are_the_working_directorys(tiny, tmp_path, monkeypatch):
    recipe, _ = tiny
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "base-llama").rename(here / "m")
    (tmp_path / "rows.jsonl").rename(here / "my.jsonl")
    (here / "chat.jinja").write_text(CHATML)
    monkeypatch.chdir(here)
    train(recipe, ["base_model=m", "data.train.0.path=my.jsonl", "model.chat_template=chat.jinja", "output_dir=run"])
    # The resolved recipe repeats it from anywhere.
    monkeypatch.chdir(tmp_path)
    train(here / "run" / "recipe.yaml", [])
    assert read_metrics(here / "run-1") == read_metrics(here / "run")
    with pytest.raises(UserError, match=f"no such model: {tmp_path}/m; "):
        train(recipe, ["base_model=./m"])
    with pytest.raises(UserError, match=f"there is no {tmp_path}/org/m;"):
        train(recipe, ["base_model=org/m"])
    model = f"base_model={here / 'm'}"
    with pytest.raises(UserError, match=f"command line: data.train.0.path: no such file: {tmp_path}/my.jsonl;"):
        train(recipe, [model, "data.train.0.path=my.jsonl"])
    with pytest.raises(UserError, match=f"no such file: {tmp_path}/chat.jinja,"):
        train(recipe, [model, "model.chat_template=chat.jinja"])


def test_another_seed_gives_another_run(tiny):
    recipe, runs = tiny
    train(recipe, [])
    train(recipe, ["seed=1"])
    assert losses(runs / "recipe-1") != losses(runs / "recipe-2")


@pytest.mark.parametrize("method", METHODS)
def test_budget_and_packing_do_not_change_the_losses(tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, method=method)
    for overrides in (
        [],
        ["training.max_tokens_per_device=128"],
        ["data.packing=off"],
        ["training.gradient_checkpointing=true"],
    ):
        train(recipe, overrides)
    expected, *others = [losses(tmp_path / "runs" / f"recipe-{n}") for n in (1, 2, 3, 4)]
    for values in others:
        # float32: the order of additions differs, and six steps carry the difference on.
        assert values == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, "lora_soft_prompt"])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, method):
    recipe = write_recipe(tmp_path, method=method, eval_steps=1)
    if method == "lora":
        recipe.write_text(recipe.read_text().replace("rank: 4", "rank: 4\n  dropout: 0.1"))
    assert run_cli("train", recipe, cwd=tmp_path).returncode == 0
    runs = tmp_path / "runs"
    process = subprocess.Popen(
        cli_command("train", recipe), cwd=tmp_path, env=cli_environment(), stdout=subprocess.DEVNULL
    )
    while not (runs / "recipe-2" / "checkpoints" / "step-00000003").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not weights(runs / "recipe-2", method).exists()
    again = run_cli("train", recipe, "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "going on with" in again.stdout
    assert "in evaluation since step" in again.stdout
    assert sha(weights(runs / "recipe-2", method)) == sha(weights(runs / "recipe-1", method))
    assert read_metrics(runs / "recipe-2") == read_metrics(runs / "recipe-1")
    finished = run_cli("train", recipe, "--resume", cwd=tmp_path)
    assert finished.returncode == 0
    assert "finished already" in finished.stdout
    assert len(list(runs.iterdir())) == 2


def test_from_a_checkpoint_the_later_ones_are_set_aside(tiny):
    recipe, runs = tiny
    train(recipe, [])
    run = runs / "recipe-1"
    before, metrics = sha(weights(run, "lora")), read_metrics(run)
    train(recipe, [], checkpoint=run / "checkpoints" / "step-00000003")
    assert sha(weights(run, "lora")) == before
    assert read_metrics(run) == metrics
    log = (run / "train.log").read_text()
    # Appended, from its first line on.
    assert log.count("[rank 0] plan       6 steps") == 2
    assert log.index("done in") < log.rindex("[rank 0] base ") < log.index("going on with")
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "step-00000003", "step-00000006", "step-00000006.old-1",
    }  # fmt: skip


CONSTANT = ("training.lr_scheduler_type=constant", "training.warmup_steps=0", "training.eval_steps=2")


def test_a_finished_run_goes_on_as_a_longer_one(tiny, capsys):
    recipe, runs = tiny
    train(recipe, [*CONSTANT, "training.max_steps=4"])
    train(recipe, [*CONSTANT, "training.max_steps=6"])
    short, full = runs / "recipe-1", runs / "recipe-2"
    before = sha(weights(short, "lora"))
    for name in ("merged", "export"):
        (short / name).mkdir()
    full.rename(recipe.parent / "full")
    full = recipe.parent / "full"
    capsys.readouterr()

    train(recipe, [*CONSTANT, "training.max_steps=6"], resume=True)
    shown = capsys.readouterr().out
    assert f"going on with {short} after step 4" in shown
    assert "the run has 6 steps in place of 4: its learning rate stays 1.00e-02\n" in shown
    assert sha(weights(short, "lora")) == sha(weights(full, "lora"))
    assert read_metrics(short) == read_metrics(full)
    # The old result, and what was made of it, are kept, and no longer the run's.
    assert sha(short / "adapter.old-1" / "adapter_model.safetensors") == before
    assert {"merged.old-1", "export.old-1"} < {path.name for path in short.iterdir()}
    assert not (short / "merged").exists()
    assert load_recipe(short / "recipe.yaml").recipe.training.max_steps == 6
    assert json.loads((short / "environment.json").read_text())["optimizer_steps"] == 6

    # It is a run of 6 steps now: finished for whoever asks for 6, and none of 4.
    train(recipe, [*CONSTANT, "training.max_steps=6"], resume=True)
    assert "finished already" in capsys.readouterr().out
    assert {path.name for path in runs.iterdir()} == {"recipe-1"}
    train(recipe, [*CONSTANT, "training.max_steps=4"], resume=True)
    assert "no run of this recipe" in capsys.readouterr().out
    assert sha(weights(runs / "recipe-2", "lora")) == before


def test_a_longer_run_takes_its_own_learning_rates_from_the_checkpoint_on(tiny, capsys):
    recipe, runs = tiny
    train(recipe, ["training.num_train_epochs=1", "training.max_steps=null"])
    run = runs / "recipe-1"
    checkpoint = next(iter(sorted((run / "checkpoints").iterdir())))
    begun = int(checkpoint.name[-8:])
    train(recipe, ["training.num_train_epochs=2", "training.max_steps=null"], checkpoint=checkpoint)
    rates = {line["step"]: line["learning_rate"] for line in read_metrics(run) if "loss" in line}
    section, total = load_recipe(run / "recipe.yaml").recipe.training, max(rates)
    assert total == 2 * 9
    assert rates[begun] == learning_rate(begun - 1, 9, section)
    assert {step: rates[step] for step in rates if step > begun} == {
        step: learning_rate(step - 1, total, section) for step in range(begun + 1, total + 1)
    }
    # And says so, in the numbers of metrics.jsonl.
    next_, was, last = rates[begun + 1], learning_rate(begun, 9, section), rates[total]
    said = f"the run has {total} steps in place of 9, and its schedule is stretched: "
    said += f"step {begun + 1} learns at {next_:.2e}"
    said += f", in the run of 9 steps it does at {was:.2e}; step {total} will at {last:.2e}"
    assert f"\n{said}\n" in capsys.readouterr().out


def test_a_run_that_stopped_early_stops_as_early_when_it_is_longer(tiny, capsys):
    recipe, runs = tiny
    stops = ["training.learning_rate=0.5", "training.eval_steps=3", "training.early_stopping_patience=2"]
    train(recipe, [*stops, "training.max_steps=60"])
    before = read_metrics(runs / "recipe-1")
    train(recipe, [*stops, "training.max_steps=90"], resume=True)
    assert "stopped early after step" in capsys.readouterr().out
    assert read_metrics(runs / "recipe-1") == before
    assert weights(runs / "recipe-1", "lora").exists()


def test_what_fails_before_the_first_step_leaves_everything_as_it_was(tiny):
    recipe, runs = tiny
    overrides = [f"output_dir={runs / 'mine'}"]
    train(recipe, overrides)
    before = {path: sha(path) for path in runs.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"method\.targets"):
        train(recipe, [*overrides, "method.targets=[nothing]"], overwrite=True)
    assert {path: sha(path) for path in runs.rglob("*") if path.is_file()} == before
    # A checkpoint that cannot be gone on with: the result and the later checkpoint stay.
    random = runs / "mine" / "checkpoints" / "step-00000003" / "random.safetensors"
    save_file({"0.cpu": torch.get_rng_state(), "1.cpu": torch.get_rng_state()}, random)
    manifest = json.loads((random.parent / "manifest.json").read_text())
    manifest[random.name] = {"bytes": random.stat().st_size, "sha256": sha(random)}
    (random.parent / "manifest.json").write_text(json.dumps(manifest))
    names = {path for path in runs.rglob("*")}
    with pytest.raises(UserError, match="was written by 2 process"):
        train(recipe, overrides, checkpoint=random.parent)
    assert {path for path in runs.rglob("*")} == names


def test_a_run_that_another_process_trains_is_refused_and_untouched(tiny):
    recipe, runs = tiny
    train(recipe, [])
    run = runs / "recipe-1"
    (run / "adapter").rename(run / "gone")
    other, before = RunLock(), {path for path in run.rglob("*")}
    other.take(run / "train.log", pytest.fail)
    for options in ({"resume": True}, {"checkpoint": run / "checkpoints" / "step-00000003"}):
        with pytest.raises(UserError, match="recipe-1 is being trained by another process"):
            train(recipe, [], **options)
        assert {path for path in run.rglob("*")} == before
    other.release()
    train(recipe, [], resume=True)
    assert sha(weights(run, "lora")) == sha(run / "gone" / "adapter_model.safetensors")
    # An ended run holds no lock.
    train(recipe, [], checkpoint=run / "checkpoints" / "step-00000003")


def test_from_refuses_another_recipe_and_a_checkpoint_outside_a_run(tiny):
    recipe, runs = tiny
    train(recipe, [])
    checkpoint = runs / "recipe-1" / "checkpoints" / "step-00000003"
    before = sha(weights(runs / "recipe-1", "lora"))
    with pytest.raises(UserError, match="recipe is not the one"):
        train(recipe, ["method.alpha=800"], checkpoint=checkpoint)
    elsewhere = recipe.parent / "a" / "b" / checkpoint.name
    shutil.copytree(checkpoint, elsewhere)
    with pytest.raises(UserError, match="lies in no run"):
        train(recipe, [], checkpoint=elsewhere)
    assert sha(weights(runs / "recipe-1", "lora")) == before
    assert not (recipe.parent / "a" / "recipe.yaml").exists()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_generation_config_that_transformers_would_not_save_is_kept(tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, method=method)
    odd = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "eos_token_id": 256}
    (tmp_path / "base-llama" / "generation_config.json").write_text(json.dumps(odd))
    train(recipe, [])
    result = tmp_path / "runs" / "recipe-1" / ("model" if method == "full" else "adapter")
    kept = json.loads((result / "generation_config.json").read_text())
    assert kept == odd | {"eos_token_id": [258, 256]}


def test_changed_data_is_not_resumed(tiny):
    recipe, runs = tiny
    train(recipe, [])
    rows = recipe.parent / "rows.jsonl"
    rows.write_text(rows.read_text().replace("Say", "Tell"))
    with pytest.raises(UserError, match="not the one"):
        train(recipe, [], checkpoint=runs / "recipe-1" / "checkpoints" / "step-00000003")


def test_a_base_that_has_changed_is_not_gone_on_with(tiny):
    recipe, runs = tiny
    train(recipe, [])
    save_tiny(recipe.parent / "base-llama", seed=7)
    names = {path for path in runs.rglob("*")}
    with pytest.raises(UserError, match=r"step-00000003 was trained on .*base-llama \(sha256:\w+\), and the"):
        train(recipe, [], checkpoint=runs / "recipe-1" / "checkpoints" / "step-00000003")
    assert {path for path in runs.rglob("*")} == names


def test_a_taken_directory_is_refused_and_untouched_or_moved_aside(tiny):
    recipe, runs = tiny
    overrides = [f"output_dir={runs / 'mine'}"]
    train(recipe, overrides)
    before = sha(weights(runs / "mine", "lora"))
    with pytest.raises(UserError, match="already holds a run"):
        train(recipe, [*overrides, "seed=1"])
    assert sha(weights(runs / "mine", "lora")) == before
    train(recipe, [*overrides, "seed=1"], overwrite=True)
    assert sha(weights(runs / "mine.old-1", "lora")) == before
    assert sha(weights(runs / "mine", "lora")) != before


def test_a_loss_that_is_not_finite_stops_before_the_step(tiny):
    recipe, runs = tiny
    with pytest.raises(NonFiniteError, match=r"step \d+ is not finite \(rows rows:"):
        train(recipe, ["training.learning_rate=1e30", "training.max_grad_norm=null", "training.eval_steps=6"])
    saved = sorted((runs / "recipe-1" / "checkpoints").glob("step-*"))
    for path in saved:
        tensors = load_file(path / "adapter" / "adapter_model.safetensors")
        assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert not (runs / "recipe-1" / "adapter").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_saves_and_tells_in_the_exit_code(tmp_path, number, code):
    recipe = write_recipe(tmp_path, max_steps=100000, eval_steps=50000, save_steps=50000, rows=40)
    process = subprocess.Popen(
        cli_command("train", recipe),
        cwd=tmp_path,
        env=cli_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    run = tmp_path / "runs" / "recipe-1"
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert stderr.startswith("ftkit: error: interrupted; step")
    assert len(list((run / "checkpoints").iterdir())) == 1


def test_early_stopping_and_the_best_checkpoint(tiny):
    recipe, runs = tiny
    # A huge rate makes every evaluation worse than the first.
    overrides = ["training.learning_rate=0.5", "training.max_steps=60", "training.eval_steps=3"]
    overrides += ["training.early_stopping_patience=2"]
    train(recipe, overrides)
    run = runs / "recipe-1"
    steps = [line["step"] for line in read_metrics(run)]
    assert max(steps) < 60
    evaluations = {
        line["step"]: line["eval_loss"] for line in read_metrics(run) if "eval_loss" in line and line["step"]
    }
    best = min(evaluations, key=evaluations.get)
    # Killed after the last checkpoint, before the result: a resumed run does not train on.
    (run / "adapter").rename(run / "gone")
    train(recipe, overrides, resume=True)
    assert [line["step"] for line in read_metrics(run)] == steps
    assert sha(weights(run, "lora")) == sha(
        run / "checkpoints" / f"step-{best:08d}" / "adapter" / "adapter_model.safetensors"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.targets=[nothing]"], "method.targets"),
        (["base_model=./missing"], "no such model"),
        (["data.train.0.path=missing.jsonl"], "missing.jsonl"),
        (["data.train.0.path=empty.jsonl"], "empty"),
        (["training.learning_rate=fast"], "training.learning_rate"),
        (["method.type=magic"], "method"),
        (["training.metric_for_best_model=eval_loss_other"], "choose eval_loss or eval_loss_rows"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tiny, overrides, message):
    recipe, runs = tiny
    (recipe.parent / "empty.jsonl").touch()
    result = run_cli("train", recipe, *overrides, cwd=recipe.parent)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("ftkit: error: ")
    assert message in result.stderr
    assert not runs.exists() or not list(runs.iterdir())


def test_shards_of_one_process_are_worth_a_note(tiny, capsys):
    recipe, _ = tiny
    train(recipe, ["training.parallel=ddp"])
    assert "fsdp" not in capsys.readouterr().out
    train(recipe, ["training.parallel=fsdp"])
    assert "\nnote       training.parallel: fsdp shards over several processes" in capsys.readouterr().out


def test_a_full_model_is_stored_in_the_precision_of_its_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, method="full")
    base = tmp_path / "base-llama"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    train(recipe, [])
    run = tmp_path / "runs" / "recipe-1"
    assert {t.dtype for t in load_file(weights(run, "full")).values()} == {torch.bfloat16}
    masters = load_file(run / "checkpoints" / "step-00000006" / "model" / "model.safetensors")
    assert {t.dtype for t in masters.values()} == {torch.float32}
    loaded = AutoModelForCausalLM.from_pretrained(run / "model")
    assert loaded.dtype == torch.bfloat16


def test_the_resolved_recipe_is_complete(tiny):
    recipe, runs = tiny
    train(recipe, [])
    resolved = load_recipe(runs / "recipe-1" / "recipe.yaml").recipe
    assert resolved.training.adam_beta2 == 0.999
    assert resolved.base_model == str(recipe.parent / "base-llama")
    assert resolved.output_dir.endswith("recipe-{n}")
