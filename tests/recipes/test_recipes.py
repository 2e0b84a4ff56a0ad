import json
import math
from pathlib import Path

import pytest

from ftkit.launch import read_launch_config
from ftkit.recipe.load import load_recipe
from tests.tiny_models import save_tiny
from tests.tiny_runs import losses, read_metrics, run_cli, write_rows

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.name != "suite.yaml")
ON_ONE_CPU = [path for path in RECIPES if path.name != "fsdp.yaml"]


def test_recipes_were_found():
    assert {path.name for path in RECIPES} == {"lora.yaml", "full.yaml", "bottleneck.yaml", "fsdp.yaml", "recipe.yaml"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(path):
    assert load_recipe(path).recipe.data.train


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_launch_file_is_valid(path):
    plan = read_launch_config(path)
    assert plan.processes >= 4


@pytest.mark.slow
@pytest.mark.parametrize("path", ON_ONE_CPU, ids=lambda path: path.stem)
def test_a_recipe_learns_and_its_result_loads_in_a_fresh_process(path, tmp_path):
    base = save_tiny(tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl", 240)
    trained = run_cli(
        "train", path, f"base_model={base}", f"data.train.0.path={rows}", "training.max_steps=30",
        "training.learning_rate=1e-2", "training.logging_steps=1", "training.final=last", "data.val_size=20",
        "model.dtype=float32", f"output_dir={tmp_path / 'run'}", cwd=tmp_path,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    values = losses(tmp_path / "run")
    assert sum(values[-5:]) < 0.9 * sum(values[:5])

    # Perplexity on the validation rows, from the files alone, is that of the last step's weights.
    evaluated = run_cli("eval", tmp_path / "run", "--no-compare", "--output", tmp_path / "eval.json", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    results = json.loads((tmp_path / "eval.json").read_text())["results"]
    (perplexity,) = [result["score"] for result in results if result["metric"] == "perplexity"]
    last = [line["eval_loss"] for line in read_metrics(tmp_path / "run") if "eval_loss" in line][-1]
    # float32; packed rows in training, padded ones in evaluation.
    assert math.log(perplexity) == pytest.approx(last, abs=1e-4)
