import pytest
from safetensors.torch import load_file

from tests.tiny_runs import losses, run_cli, write_recipe


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "parallel"), [("lora", "ddp"), ("full", "ddp"), ("full", "fsdp"), ("lora", "fsdp"), ("adapter", "ddp")]
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
