"""Runs on one CUDA GPU, beside the same runs on the CPU: what tests on a CPU cannot show."""

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest

from ftkit.commands.eval import evaluate
from ftkit.commands.merge import merge
from ftkit.commands.train import train
from tests.gpu import run_on_gpu
from tests.tiny_models import CONFIGS
from tests.tiny_runs import METHODS, losses, read_metrics, write_recipe

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

RELATIVE = {"float32": 1e-4, "bfloat16": 1e-2}
"""How far losses of 20 steps may be apart. On a CPU those of packed and padded batches were by 3e-7 and 1e-3."""
STEPS = {"max_steps": 20, "eval_steps": 10, "learning_rate": 2e-3}
DETERMINISTIC = "torch.use_deterministic_algorithms(True)"
"""Attention's backward pass adds in no fixed order on a GPU, unless it is told to."""


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the recipe and its runs lie."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train_on_gpu(recipe: Path, *arguments: str | Path, first: str = "") -> str:
    """The output of `ftkit train`, which went well and on the GPU."""
    result = run_on_gpu("train", recipe, *arguments, cwd=recipe.parent, first=first)
    assert result.returncode == 0, result.stderr
    assert "\ndevice     cuda" in result.stdout
    return result.stdout


def run_number(directory: Path, number: int) -> Path:
    return directory / "runs" / f"recipe-{number}"


def digests(directory: Path) -> dict[str, str]:
    """Name -> SHA-256 of the weight files."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.glob("*.safetensors")}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", RELATIVE)
def test_losses_on_a_quantized_base_are_those_of_the_cpu(directory: Path, dtype: str, kind: str) -> None:
    recipe, wanted = write_recipe(directory, **STEPS), [f"model.dtype={dtype}", f"model.quantization={kind}"]
    train(recipe, wanted)
    train_on_gpu(recipe, *wanted)
    cpu, gpu = (losses(run_number(directory, number)) for number in (1, 2))
    assert gpu == pytest.approx(cpu, rel=RELATIVE[dtype])
    merge([str(run_number(directory, 2))])


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("method", METHODS)
def test_losses_are_those_of_the_cpu(directory: Path, method: str, dtype: str) -> None:
    recipe = write_recipe(directory, method=method, **STEPS)
    train(recipe, [f"model.dtype={dtype}"])
    train_on_gpu(recipe, f"model.dtype={dtype}")
    cpu, gpu = (read_metrics(run_number(directory, number)) for number in (1, 2))
    assert len(gpu) == len(cpu) == 20 + 3
    for mine, theirs in zip(gpu, cpu, strict=True):
        key = "eval_loss" if "event" in mine else "loss"
        assert mine[key] == pytest.approx(theirs[key], rel=RELATIVE[dtype])
        assert mine.get("tokens") == theirs.get("tokens")
    values = losses(run_number(directory, 2))
    assert values[-1] < 0.95 * values[0]


@pytest.mark.parametrize("architecture", [name for name in CONFIGS if name != "llama"])
def test_losses_of_every_architecture(directory: Path, architecture: str) -> None:
    recipe = write_recipe(directory, architecture=architecture, **STEPS)
    train(recipe, [])
    train_on_gpu(recipe)
    cpu, gpu = (losses(run_number(directory, number)) for number in (1, 2))
    assert gpu == pytest.approx(cpu, rel=RELATIVE["float32"])


@pytest.mark.parametrize("method", METHODS)
def test_layout_and_checkpointing_do_not_change_the_losses(directory: Path, method: str) -> None:
    recipe = write_recipe(directory, method=method, **STEPS)
    layouts = [
        [],
        ["data.packing=off"],
        ["model.attn_implementation=sdpa"],
        ["training.gradient_checkpointing=true"],
        ["training.max_tokens_per_device=128"],
    ]
    for overrides in layouts:
        train_on_gpu(recipe, *overrides)
    expected, *others = [losses(run_number(directory, number + 1)) for number in range(len(layouts))]
    for values in others:
        assert values == pytest.approx(expected, rel=RELATIVE["float32"])


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs the package flash-attn")
# Mistral with its window; OPT, whose mask knows nothing of positions, where flash attention does.
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2", "opt"])
def test_flash_attention_packs_what_it_is_proven_on(directory: Path, architecture: str) -> None:
    recipe = write_recipe(directory, architecture=architecture, **STEPS)
    flash = ["model.dtype=bfloat16", "model.attn_implementation=flash_attention_2"]
    output = train_on_gpu(recipe, *flash, "data.packing=required")
    assert "packing    packed, kept apart by restarting position_ids (proven with flash_attention_2: off by" in output
    train_on_gpu(recipe, *flash, "data.packing=off")
    train_on_gpu(recipe, "model.dtype=bfloat16")
    packed, *others = (losses(run_number(directory, number)) for number in (1, 2, 3))
    for values in others:
        assert values == pytest.approx(packed, rel=RELATIVE["bfloat16"])


@pytest.mark.parametrize("architecture", ["opt", "phi3", "mixtral", "gpt_oss", "qwen3_5", "lfm2"])
def test_losses_of_the_other_architectures_whose_packing_is_proven(directory: Path, architecture: str) -> None:
    """On the first step, before rounding can send a token to another expert."""
    recipe = write_recipe(directory, architecture=architecture, max_steps=1, eval_steps=1)
    train(recipe, [])
    train_on_gpu(recipe)
    train_on_gpu(recipe, "data.packing=off")
    cpu, *gpu = (losses(run_number(directory, number)) for number in (1, 2, 3))
    for values in gpu:
        assert values == pytest.approx(cpu, rel=RELATIVE["float32"])


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(directory: Path, method: str) -> None:
    """Weights, optimizer and, by its dropout, the generator of the GPU."""
    recipe = write_recipe(directory, method=method, eval_steps=3)
    if method == "lora":
        recipe.write_text(recipe.read_text().replace("rank: 4", "rank: 4\n  dropout: 0.1"))
    train_on_gpu(recipe, first=DETERMINISTIC)
    run = run_number(directory, 1)
    result = run / ("model" if method == "full" else "adapter")
    before, metrics = digests(result), read_metrics(run)
    assert before
    train_on_gpu(recipe, "--from", run / "checkpoints" / "step-00000003", first=DETERMINISTIC)
    assert digests(result) == before
    assert read_metrics(run) == metrics


def test_a_run_says_what_the_gpu_is_and_what_it_took(directory: Path) -> None:
    train_on_gpu(write_recipe(directory))
    run = run_number(directory, 1)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["device"] != "cpu"
    peaks = [line["timing"]["peak_memory_bytes"] for line in read_metrics(run, timing=True) if "loss" in line]
    # The allocator's, not the process's, which holds torch itself.
    assert all(0 < peak < 2**28 for peak in peaks)


def test_plan_counts_what_train_uses(directory: Path) -> None:
    recipe = write_recipe(directory)
    planned = run_on_gpu("plan", recipe, "model.dtype=auto", "--json", cwd=directory)
    assert planned.returncode == 0, planned.stderr
    figures = json.loads(planned.stdout)
    trained = figures["trainable_parameters"]
    width = 2 if "computes in bfloat16" in train_on_gpu(recipe, "model.dtype=auto") else 4
    assert figures["memory_bytes"]["weights"] == width * (figures["parameters"] - trained) + 4 * trained


@pytest.mark.parametrize("method", METHODS)
def test_eval_scores_as_on_the_cpu(directory: Path, method: str) -> None:
    recipe = write_recipe(directory, method=method, **STEPS)
    train(recipe, [])
    run = run_number(directory, 1)
    evaluate(str(run), output=directory / "cpu.json")
    result = run_on_gpu("eval", run, "--output", "gpu.json", cwd=directory)
    assert result.returncode == 0, result.stderr
    cpu, gpu = (json.loads((directory / name).read_text())["comparisons"] for name in ("cpu.json", "gpu.json"))
    assert {pair["metric"] for pair in gpu} == {"perplexity", "exact_match", "token_f1"}
    of_cpu, of_gpu = (next(pair for pair in pairs if pair["metric"] == "perplexity") for pairs in (cpu, gpu))
    for side in ("base", "tuned"):
        assert of_gpu[side] == pytest.approx(of_cpu[side], rel=RELATIVE["float32"])


def test_merge_writes_the_same_bytes(directory: Path) -> None:
    train_on_gpu(write_recipe(directory, **STEPS))
    run = run_number(directory, 1)
    result = run_on_gpu("merge", run, "--output", "gpu", cwd=directory)
    assert result.returncode == 0, result.stderr
    merge([str(run)], output=directory / "cpu")
    assert digests(directory / "gpu") == digests(directory / "cpu")


def test_too_little_memory_is_one_line_and_leaves_nothing(directory: Path) -> None:
    result = run_on_gpu(
        "train", write_recipe(directory), cwd=directory, first="torch.cuda.set_per_process_memory_fraction(1e-7)"
    )
    assert result.returncode == 4, result.stderr
    assert result.stderr.splitlines()[-1].startswith("ftkit: error: out of memory; lower training.max_tokens")
    assert not any((directory / "runs").iterdir())
