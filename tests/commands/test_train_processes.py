import os
import signal
import subprocess
import time

import psutil
import pytest
from safetensors.torch import load_file

from tests.commands.test_train import sha, weights
from tests.tiny_runs import cli_command, cli_environment, losses, read_metrics, run_cli, wait_until_ended, write_recipe


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "parallel"),
    [("lora", "ddp"), ("full", "ddp"), ("full", "fsdp"), ("lora", "fsdp"), ("adapter", "ddp"), ("adapter", "fsdp")]
    + [
        (method, parallel) for method in ("lora_soft_prompt", "prefix", "llama_adapter") for parallel in ("ddp", "fsdp")
    ],
)
def test_two_processes_train_like_one(tmp_path, method, parallel):
    recipe = write_recipe(tmp_path, method=method, rows=30)
    one = run_cli("train", recipe, cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    two = run_cli("train", recipe, f"training.parallel={parallel}", "--num-processes", "2", cwd=tmp_path)
    assert two.returncode == 0, two.stderr
    assert "2 processes" in two.stdout
    runs = tmp_path / "runs"
    # float32: only the order of additions differs.
    assert losses(runs / "recipe-2") == pytest.approx(losses(runs / "recipe-1"), abs=1e-4)
    # Adam hardly sees the scale of a gradient: its norm does.
    norms = [[line["grad_norm"] for line in read_metrics(run) if "grad_norm" in line] for run in sorted(runs.iterdir())]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    assert norms[1][0] == pytest.approx(norms[0][0], rel=1e-5)
    assert two.stdout.count("step 6/6  loss") == 1
    log = (runs / "recipe-2" / "train.log").read_text()
    for rank in (0, 1):
        assert f"[rank {rank}] base       base-llama (llama)\n" in log
        assert f"[rank {rank}] step 6/6  loss" in log
    name = "model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"
    mine, theirs = load_file(runs / "recipe-1" / name), load_file(runs / "recipe-2" / name)
    assert set(mine) == set(theirs)
    for key, value in mine.items():
        # Adam's first steps turn tiny differences of tiny gradients into steps of the learning rate: compare loosely.
        assert (value - theirs[key]).abs().mean() < 1e-3, key


@pytest.mark.slow
def test_an_error_of_every_rank_is_printed_once(tmp_path):
    recipe = write_recipe(tmp_path)
    result = run_cli("train", recipe, "method.targets=[nothing]", "--num-processes", "2", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("ftkit: error:") == 1, result.stderr


def start_two(recipe, *arguments):
    """A run of two processes that is under way."""
    command = cli_command("train", recipe, "--num-processes", "2", *arguments)
    return subprocess.Popen(
        command, cwd=recipe.parent, env=cli_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)


def ranks_of(process):
    """The processes of a run by rank."""
    return {int(child.environ()["RANK"]): child for child in psutil.Process(process.pid).children()}


@pytest.mark.slow
def test_a_run_that_lost_a_rank_resumes_bit_for_bit(tmp_path):
    recipe = write_recipe(tmp_path, eval_steps=1)
    recipe.write_text(recipe.read_text().replace("rank: 4", "rank: 4\n  dropout: 0.1"))
    whole = run_cli("train", recipe, "--num-processes", "2", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    first, second = tmp_path / "runs" / "recipe-1", tmp_path / "runs" / "recipe-2"
    process = start_two(recipe)
    wait_for(second / "checkpoints" / "step-00000003", process)
    ranks_of(process)[1].send_signal(signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 8
    assert "process 1 was killed by SIGKILL" in stderr
    assert not weights(second, "lora").exists()
    again = run_cli("train", recipe, "--resume", "--num-processes", "2", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "going on with" in again.stdout
    assert sha(weights(second, "lora")) == sha(weights(first, "lora"))
    assert read_metrics(second) == read_metrics(first)


@pytest.mark.slow
def test_a_second_writer_is_refused_and_the_ranks_end_with_their_parent(tmp_path):
    recipe = write_recipe(tmp_path, max_steps=100000, eval_steps=50000, save_steps=50000)
    process = start_two(recipe)
    wait_for(tmp_path / "runs" / "recipe-1" / "metrics.jsonl", process)
    second = run_cli("train", recipe, "--resume", "--num-processes", "2", cwd=tmp_path)
    assert second.returncode == 2
    assert second.stderr.count("\n") == 1, second.stderr
    assert "recipe-1 is being trained by another process" in second.stderr
    ranks = list(ranks_of(process).values())
    assert len(ranks) == 2
    process.kill()
    # Their standard output is that of the parent, and closes when the last of them ends.
    process.communicate(timeout=20)
    wait_until_ended([rank.pid for rank in ranks])


@pytest.mark.slow
def test_tasks_of_an_srun_step_are_the_processes_of_one_run(tmp_path):
    recipe = write_recipe(tmp_path)
    assert run_cli("train", recipe, "--num-processes", "2", cwd=tmp_path).returncode == 0
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "0"}
    step |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2"}
    tasks = []
    for rank in ("0", "1"):
        environment = cli_environment() | step | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
        tasks.append(
            subprocess.Popen(
                cli_command("train", recipe),
                cwd=tmp_path,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [task.communicate(timeout=120) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert ", 2 processes, " in outputs[0][0]
    assert outputs[1] == ("", "")
    first, second = tmp_path / "runs" / "recipe-1", tmp_path / "runs" / "recipe-2"
    assert sha(weights(second, "lora")) == sha(weights(first, "lora"))
    assert not (tmp_path / "runs" / "recipe-3").exists()
