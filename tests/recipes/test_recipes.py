import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ftkit.data.phrasings import library
from ftkit.launch import read_launch_config
from ftkit.models.load import choose_compute_dtype
from ftkit.recipe.load import load_recipe
from ftkit.training.checkpoint import checkpoint_name, list_checkpoints
from tests.tiny_models import save_tiny
from tests.tiny_runs import cli_environment, losses, write_rows

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.name != "suite.yaml")
STEPS = 60
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
"""Of logits, as a share of the largest; a recipe computes in what suits the machine."""
ON_ONE_CPU = [path for path in RECIPES if path.name not in ("fsdp.yaml", "flan_mixture.yaml")]
SMALLER = {"llama_adapter": ["method.num_layers=2"]}
"""What a recipe wants changed for a model of two layers."""


def test_recipes_were_found():
    assert {path.name for path in RECIPES} == {
        "lora.yaml",
        "full.yaml",
        "qlora.yaml",
        "bottleneck.yaml",
        "soft_prompt.yaml",
        "prefix.yaml",
        "llama_adapter.yaml",
        "lora_soft_prompt.yaml",
        "fsdp.yaml",
        "flan_mixture.yaml",
        "recipe.yaml",
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(path):
    assert load_recipe(path).recipe.data.train


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_launch_file_is_valid(path):
    plan = read_launch_config(path)
    assert plan.processes >= 4


def test_the_mixture_is_made_of_the_library():
    recipe = load_recipe(ROOT / "recipes" / "flan_mixture.yaml").recipe
    sets = recipe.data.train
    assert len(sets) >= 20
    for dataset in (*sets, *recipe.data.eval):
        section = library()[dataset.templates].section
        assert (dataset.path, dataset.subset) == (section.path, section.subset)
    for dataset in sets:
        assert dataset.split == library()[dataset.templates].section.split
    clusters = {library()[dataset.templates].section.cluster for dataset in sets}
    assert set(recipe.data.exclude_clusters) < clusters
    assert len(clusters) >= 10
    measured = {library()[dataset.templates].section.cluster for dataset in recipe.data.eval}
    assert set(recipe.data.exclude_clusters) <= measured


@pytest.mark.slow
@pytest.mark.parametrize("path", ON_ONE_CPU, ids=lambda path: path.stem)
def test_a_recipe_learns_and_its_last_step_loads_in_a_fresh_process(path, tmp_path):
    """With the recipe's own learning rate, batch, validation and precision: only model, data and length are others."""
    base = save_tiny(tmp_path / "base", hidden_size=96, intermediate_size=192)
    rows = write_rows(tmp_path / "rows.jsonl", 400)
    run = tmp_path / "run"
    overrides = [f"base_model={base}", f"data.train.0.path={rows}", f"training.max_steps={STEPS}", f"output_dir={run}"]
    overrides += SMALLER.get(path.stem, [])
    live = logits("live", tmp_path, "train", path, *overrides)
    values = losses(run)
    fifth = len(values) // 5
    assert sum(values[-fifth:]) < 0.95 * sum(values[:fifth])

    last = list_checkpoints(run / "checkpoints")[-1]
    assert last.name == checkpoint_name(STEPS)
    tolerance = ROUNDING[choose_compute_dtype("auto", torch.device("cpu"))[0]] * live.abs().max()
    assert (logits("loaded", tmp_path, last) - live).abs().max() <= tolerance
    # The tolerance is small against what training has changed.
    assert (logits("loaded", tmp_path, base) - live).abs().max() > 10 * tolerance


def logits(which, directory, *arguments):
    """What tests/recipes/logits.py writes in a process of its own: float32 [1, T, V]."""
    file = directory / f"{which}.safetensors"
    command = [sys.executable, "-m", "tests.recipes.logits", which, file, *arguments]
    result = subprocess.run(
        [*map(str, command)], cwd=directory, env=cli_environment(), capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr
    return load_file(file)["logits"]
