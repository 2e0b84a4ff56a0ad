"""A budget that fits: which one is chosen, what is proposed where none is, and that the gradient stays the same."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ftkit.cli import run as ftkit
from ftkit.commands.train import train
from ftkit.console import Console
from ftkit.estimate import Estimator, Place
from ftkit.fit import changes_that_fit, find_fit, free_memory
from ftkit.models.objective import Objective
from ftkit.recipe.load import load_recipe
from ftkit.training.budget import Budget, accumulates, first_budget, fullest_batch, longest_document, smaller_budgets
from ftkit.training.prepare import prepare
from tests.tiny_runs import losses, read_metrics, result_hash, write_recipe

AUTO = ["training.max_tokens_per_device=auto", "training.gradient_checkpointing=auto"]
CPU = torch.device("cpu")


def estimator_of(recipe: Path, *overrides: str) -> Estimator:
    prepared = prepare(load_recipe(recipe, list(overrides)), Console(quiet=True), offline=True, trust_remote_code=False)
    return Estimator(prepared, Place(CPU, torch.float32))


def least(estimator: Estimator) -> int:
    """Bytes of the smallest budget."""
    return find_fit(estimator, estimator.estimate().memory_bytes.state).needed


@pytest.fixture
def estimator(tmp_path) -> Estimator:
    """Many layers, so that recomputing them pays."""
    recipe = write_recipe(tmp_path, global_batch_size=32, rows=80)
    config = tmp_path / "base-llama" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 12}))
    return estimator_of(recipe, *AUTO, "training.max_tokens_per_device=auto")


def test_the_order_of_trying(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path), AUTO).recipe
    first = first_budget(recipe, "cpu")
    assert first == Budget(2048, False)
    assert first_budget(recipe, "cuda") == Budget(8192, False)
    sizes = [2048, 1024, 512, 300]
    assert list(smaller_budgets(recipe, first, longest=300)) == [
        *(Budget(tokens, False) for tokens in sizes[1:]),
        *(Budget(tokens, True) for tokens in sizes),
    ]
    fixed = load_recipe(write_recipe(tmp_path), ["training.gradient_checkpointing=false"]).recipe
    assert list(smaller_budgets(fixed, first_budget(fixed, "cpu"), longest=30)) == []


def test_less_tokens_come_first_then_recomputed_activations(estimator):
    def needed(tokens: int, checkpointing: bool) -> int:
        return estimator.estimate(Budget(tokens, checkpointing)).memory_bytes.total

    assert find_fit(estimator, 10**12).estimate.micro_batch == Budget(2048, False)
    halved = find_fit(estimator, needed(2048, False) - 1).estimate.micro_batch
    assert not halved.checkpointing
    assert needed(halved.max_tokens, False) < needed(2048, False) <= needed(2 * halved.max_tokens, False)
    longest = longest_document(estimator.prepared.plan)
    recomputed = find_fit(estimator, needed(longest, False) - 1)
    assert recomputed.fits
    assert recomputed.estimate.micro_batch.checkpointing
    assert least(estimator) == needed(longest, True)
    assert find_fit(estimator, needed(longest, True)).fits
    assert not find_fit(estimator, needed(longest, True) - 1).fits


def test_what_is_proposed_would_fit(tmp_path):
    recipe = write_recipe(tmp_path, method="full", global_batch_size=32, rows=80)
    fixed = estimator_of(recipe, "training.max_tokens_per_device=2048", "training.gradient_checkpointing=false")
    enough = estimator_of(recipe, *AUTO)
    available = least(enough)
    assert not find_fit(fixed, available).fits
    kept = least(estimator_of(recipe, AUTO[0], "training.gradient_checkpointing=false"))
    assert "training.max_tokens_per_device=auto" in changes_that_fit(fixed, kept)
    found = changes_that_fit(enough, available - 1)
    assert "method.type=lora" in found
    as_lora = estimator_of(recipe, *AUTO, "method={type: lora}")
    assert find_fit(as_lora, available - 1).fits
    assert changes_that_fit(enough, 1000) == []


def test_a_run_is_cut_to_the_memory_and_its_losses_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, global_batch_size=16)
    estimator = estimator_of(recipe, *AUTO)
    short = estimator.estimate(Budget(longest_document(estimator.prepared.plan), True)).memory_bytes.total
    train(recipe, AUTO)
    monkeypatch.setattr("ftkit.fit.free_memory", lambda device, processes: short)
    train(recipe, AUTO)
    plenty, little = tmp_path / "runs" / "recipe-1", tmp_path / "runs" / "recipe-2"
    # float32: the order of additions differs, and the steps carry the difference on.
    assert losses(plenty) == pytest.approx(losses(little), abs=1e-4)
    assert "2,048 tokens a micro-batch\n" in (plenty / "train.log").read_text()
    assert "tokens a micro-batch, activations recomputed" in (little / "train.log").read_text()


def test_a_run_goes_on_as_it_began(tmp_path, monkeypatch):
    """With other memory on the second day: the bits of an uninterrupted run."""
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, global_batch_size=16)
    train(recipe, AUTO)
    estimator = estimator_of(recipe, *AUTO)
    halved = find_fit(estimator, estimator.estimate().memory_bytes.total - 1)
    with monkeypatch.context() as patch:
        patch.setattr("ftkit.fit.free_memory", lambda device, processes: halved.needed)
        train(recipe, AUTO)
        train(recipe, [*AUTO, "training.max_steps=3", "training.lr_scheduler_type=constant"])
    # The memory is back; a budget of the run's own is kept.
    train(recipe, [*AUTO, "training.max_steps=6", "training.lr_scheduler_type=constant"], resume=True)
    run = tmp_path / "runs" / "recipe-3"
    assert json.loads((run / "environment.json").read_text())["micro_batch"] == vars(halved.estimate.micro_batch)
    train(recipe, ["training.max_steps=6", "training.lr_scheduler_type=constant", *AUTO])
    assert len(losses(run)) == 6


def test_what_cannot_fit_ends_with_4_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, method="full")
    estimator = estimator_of(recipe, *AUTO)
    monkeypatch.setattr("ftkit.fit.free_memory", lambda device, processes: least(estimator) - 1)
    assert ftkit(["train", str(recipe), *AUTO]) == 4
    error = capsys.readouterr().err
    assert error.startswith("ftkit: error: a step of ")
    assert "it fits with method.type=lora" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


class _SmallGpu:
    """An objective on a device that runs out of memory above a number of tokens, or without recomputation."""

    def __init__(self, monkeypatch, *, tokens: int, kept: bool) -> None:
        self.tried: list[tuple[int, bool]] = []
        forward = Objective.forward

        def limited(objective: Objective, batch):
            recomputes = objective.model.is_gradient_checkpointing
            self.tried.append((batch.input_ids.numel(), recomputes))
            if batch.input_ids.numel() > tokens or not (kept or recomputes):
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return forward(objective, batch)

        monkeypatch.setattr(Objective, "forward", limited)
        monkeypatch.setattr("ftkit.fit._can_try", lambda prepared, world: True)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_gpu_is_tried_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, global_batch_size=16)
    train(recipe, AUTO)
    longest = longest_document(estimator_of(recipe, *AUTO).prepared.plan)
    with monkeypatch.context() as patch:
        gpu = _SmallGpu(patch, tokens=2 * longest, kept=True)
        train(recipe, AUTO)
        assert gpu.tried[0][0] > 2 * longest
    with monkeypatch.context() as patch:
        _SmallGpu(patch, tokens=2 * longest, kept=False)
        train(recipe, AUTO)
    whole, smaller, recomputed = (tmp_path / "runs" / f"recipe-{n}" for n in (1, 2, 3))
    assert "activations recomputed" not in (smaller / "train.log").read_text()
    assert "activations recomputed" in (recomputed / "train.log").read_text()
    for run in (smaller, recomputed):
        assert losses(run) == pytest.approx(losses(whole), abs=1e-4)


def test_a_trial_changes_nothing(tmp_path, monkeypatch):
    """Dropout draws after it as before: the run is the same to the last bit."""
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, global_batch_size=8)
    train(recipe, ["method.dropout=0.1"])
    monkeypatch.setattr("ftkit.fit._can_try", lambda prepared, world: True)
    train(recipe, ["method.dropout=0.1"])
    assert result_hash(tmp_path / "runs" / "recipe-1") == result_hash(tmp_path / "runs" / "recipe-2")
    assert read_metrics(tmp_path / "runs" / "recipe-1") == read_metrics(tmp_path / "runs" / "recipe-2")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_gpu_on_which_nothing_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path)
    _SmallGpu(monkeypatch, tokens=1, kept=True)
    assert ftkit(["train", str(recipe), *AUTO]) == 4
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match("ftkit: error: a trial step of .* does not fit into the memory of .*; it fits with ", error)


def test_the_fullest_micro_batch_is_one_of_the_plans(tmp_path):
    plan = estimator_of(write_recipe(tmp_path, rows=80)).prepared.plan
    for packed in (True, False):
        found = fullest_batch(plan, world_size=1, max_tokens=100, packed=packed)
        every = [
            batch
            for step in range(len(plan.steps))
            for batch in plan.micro_batches(step, rank=0, world_size=1, max_tokens=100, packed=packed)
        ]
        lengths = [[example.example.num_tokens for example in batch] for batch in every]
        most = max(sum(part) if packed else max(part) * len(part) for part in lengths)
        own = [example.example.num_tokens for example in found]
        assert (sum(own) if packed else max(own) * len(own)) == most


@pytest.mark.parametrize("packed", [True, False])
def test_whether_a_step_has_several_micro_batches(tmp_path, packed):
    plan = estimator_of(write_recipe(tmp_path, rows=80)).prepared.plan
    for max_tokens in (30, 100, 100_000):
        counts = [
            len(plan.micro_batches(step, rank=0, world_size=1, max_tokens=max_tokens, packed=packed))
            for step in range(len(plan.steps))
        ]
        assert accumulates(plan, world_size=1, max_tokens=max_tokens, packed=packed) == (max(counts) > 1)
    assert max(counts) == 1


def test_a_containers_limit_counts(monkeypatch):
    monkeypatch.setattr("ftkit.fit.free_in_containers", lambda: [3_000_000, 2_000_000])
    assert free_memory(CPU) == 0.9 * 2_000_000
    assert free_memory(CPU, processes=2) == 0.9 * 1_000_000
    monkeypatch.setattr("ftkit.fit.free_in_containers", list)
    assert free_memory(CPU) > 2_000_000


def test_shards_take_less(estimator):
    prepared = estimator.prepared
    fsdp = prepared.recipe.training.model_copy(update={"parallel": "fsdp"})
    sharded = replace(prepared, recipe=prepared.recipe.model_copy(update={"training": fsdp}))
    alone = estimator.estimate().memory_bytes
    place = replace(estimator.place, processes=4)
    assert Estimator(sharded, place).estimate().memory_bytes.weights < alone.weights
    assert Estimator(sharded, place).estimate().memory_bytes.optimizer == alone.optimizer // 4
    assert Estimator(prepared, place).estimate().memory_bytes.optimizer == alone.optimizer
