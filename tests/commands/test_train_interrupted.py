"""SIGTERM and Ctrl-C at any moment: the run that goes on ends as one that was never interrupted."""

import signal
import subprocess
import time
from contextlib import contextmanager

import pytest
import torch

from ftkit.commands.train import train
from ftkit.errors import Interrupted
from ftkit.models.objective import Objective
from ftkit.training.checkpoint import list_checkpoints
from tests.tiny_runs import cli_command, cli_environment, read_metrics, result_hash, run_cli, write_recipe

TRAINING = {"eval_steps": 1, "save_steps": 3, "max_tokens_per_device": 64}
# A rate that grows until it hurts: the evaluation of step 2 is the best, and its step is none that is saved.
TRAINING |= {"learning_rate": 0.3, "lr_scheduler_type": "constant", "warmup_steps": 6}


@contextmanager
def forward_passes(signal_at=None):
    """Counts the forward passes of each phase: 0 is the evaluation before step 1, 2s - 1 step s, 2s its evaluation.

    SIGTERM comes in the pass `signal_at`: (phase, number of the pass in it).
    """
    counts, kinds, forward = [], [], Objective.forward

    def counting(objective, batch):
        if batch.input_ids.is_meta:
            # The step that is traced before the run.
            return forward(objective, batch)
        if not kinds or kinds[-1] != torch.is_grad_enabled():
            kinds.append(torch.is_grad_enabled())
            counts.append(0)
        if signal_at == (len(counts) - 1, counts[-1]):
            signal.raise_signal(signal.SIGTERM)
        counts[-1] += 1
        return forward(objective, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "forward", counting)
        yield counts


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(recipe, run, forward passes by phase)"""
    directory = tmp_path_factory.mktemp("uninterrupted")
    recipe = write_recipe(directory, **TRAINING)
    with forward_passes() as counts:
        train(recipe, [])
    return recipe, directory / "runs" / "recipe-1", counts


def evaluations(run):
    return {line["step"]: line["eval_loss"] for line in read_metrics(run) if "eval_loss" in line}


@pytest.mark.parametrize(
    ("phase", "number"),
    [(0, 1), (3, 0), (4, 1), (4, -1), (6, 1), (12, 0)],
    ids=["before the first step", "step", "evaluation", "end of evaluation", "evaluation to save", "last evaluation"],
)
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(uninterrupted, tmp_path, phase, number):
    recipe, expected, counts = uninterrupted
    losses = evaluations(expected)
    assert min(losses, key=losses.get) == 2
    overrides = [f"output_dir={tmp_path / 'run'}"]
    number = number % counts[phase]
    with forward_passes(signal_at=(phase, number)) as done, pytest.raises(Interrupted, match="interrupted") as caught:
        train(recipe, overrides)
    assert caught.value.exit_code == 143
    # A step is finished, an evaluation is left.
    assert len(done) == phase + 1
    assert done[-1] == (counts[phase] if phase % 2 else number + 1)
    step = (phase + 1) // 2
    saved = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [int(path.name.removeprefix("step-")) for path in saved[-1:]] == ([step] if step else [])

    train(recipe, overrides, resume=True)
    assert read_metrics(tmp_path / "run") == read_metrics(expected)
    assert result_hash(tmp_path / "run") == result_hash(expected)


def test_a_second_interruption_in_the_evaluation_that_is_made_anew(uninterrupted, tmp_path):
    recipe, expected, _ = uninterrupted
    overrides = [f"output_dir={tmp_path / 'run'}"]
    with forward_passes(signal_at=(6, 1)), pytest.raises(Interrupted):
        train(recipe, overrides)
    with forward_passes(signal_at=(0, 1)), pytest.raises(Interrupted, match="step 3 is finished and saved"):
        train(recipe, overrides, resume=True)
    train(recipe, overrides, resume=True)
    assert read_metrics(tmp_path / "run") == read_metrics(expected)
    assert result_hash(tmp_path / "run") == result_hash(expected)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "number", "code"), [(1, signal.SIGINT, 130), (2, signal.SIGTERM, 143)])
def test_a_signal_ends_a_long_evaluation_of_every_process(tmp_path, processes, number, code):
    # 200 validation rows, one or two in a batch: nearly all of the time goes into evaluations.
    recipe = write_recipe(tmp_path, rows=240, max_steps=3, eval_steps=1, max_tokens_per_device=64)
    recipe.write_text(recipe.read_text().replace("val_size: 4", "val_size: 200"))
    arguments = ["train", recipe, "--num-processes", str(processes)]
    assert run_cli(*arguments, cwd=tmp_path).returncode == 0
    run = tmp_path / "runs" / "recipe-2"
    with subprocess.Popen(
        cli_command(*arguments), cwd=tmp_path, env=cli_environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        # The fourth line is that of step 2, written before its evaluation begins.
        while not (run / "metrics.jsonl").exists() or len(read_metrics(run)) < 4:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert stderr == "ftkit: error: interrupted; step 2 is finished and saved; go on with --resume\n"
    assert "eval_loss" not in read_metrics(run)[-1]
    again = run_cli(*arguments, "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert read_metrics(run) == read_metrics(tmp_path / "runs" / "recipe-1")
    assert result_hash(run) == result_hash(tmp_path / "runs" / "recipe-1")
