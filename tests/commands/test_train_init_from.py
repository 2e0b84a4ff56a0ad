"""Runs that begin with the weights of another one."""

import json

import pytest

from ftkit.commands.eval import evaluate
from ftkit.commands.plan import plan
from ftkit.commands.train import train
from ftkit.errors import UserError
from ftkit.recipe.load import load_recipe
from tests.tiny_models import save_tiny
from tests.tiny_runs import read_metrics, result_hash, write_recipe


def evaluations(run) -> list[float]:
    return [line["eval_loss"] for line in read_metrics(run) if "eval_loss" in line]


@pytest.mark.parametrize("place", ["runs/recipe-1", "runs/recipe-1/adapter", "runs/recipe-1/checkpoints/step-00000006"])
@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_a_run_goes_on_where_another_ended(method, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, method=method, final="last")
    train(recipe, [])
    train(recipe, [f"method.init_from={place}", "training.eval_on_start=true"])
    first, second = (tmp_path / "runs" / f"recipe-{number}" for number in (1, 2))
    assert evaluations(second)[0] == evaluations(first)[-1]
    assert evaluations(second)[-1] < evaluations(second)[0]
    assert load_recipe(second / "recipe.yaml").recipe.method.init_from == str(tmp_path / place)
    # What is handed over stands by itself.
    assert "init_from" not in (second / "adapter" / "adapter_config.json").read_text()


def test_a_checkpoint_needs_its_start_no_more_than_the_weights_differ(tmp_path, monkeypatch):
    """Going on from a checkpoint takes that one's weights, not those of `init_from`, and ends in the same bits."""
    monkeypatch.chdir(tmp_path)
    recipe, start = write_recipe(tmp_path), ["method.init_from=runs/recipe-1"]
    train(recipe, [])
    train(recipe, start)
    run = tmp_path / "runs" / "recipe-2"
    before = result_hash(run)
    (tmp_path / "runs" / "recipe-1").rename(tmp_path / "elsewhere")
    train(recipe, start, checkpoint=run / "checkpoints" / "step-00000003")
    assert result_hash(run) == before
    train(recipe, [*start, "training.max_steps=8"], resume=True)
    assert read_metrics(run)[-1]["step"] == 8
    evaluate(str(run), limit=1)
    with pytest.raises(UserError, match="runs/recipe-1 is neither a run nor an adapter"):
        train(recipe, start)


def test_another_base_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path)
    train(recipe, [])
    save_tiny(tmp_path / "other", seed=3)
    with pytest.raises(UserError, match=r"adapter was trained on .*base-llama \(sha256:\w+\), and .* are others"):
        train(recipe, ["base_model=other", "method.init_from=runs/recipe-1"])


@pytest.mark.parametrize("verb", [train, plan])
def test_what_does_not_agree_is_a_line_of_the_recipe(verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path)
    train(recipe, [])
    with pytest.raises(UserError) as caught:
        verb(recipe, ["method.init_from=runs/recipe-1", "method.rank=8"])
    assert str(caught.value.problems[0]) == (
        f"command line: method.rank: 8, and {tmp_path}/runs/recipe-1/adapter was trained with 4; set that here too, or "
        "leave method.init_from out"
    )
    with pytest.raises(UserError, match=r"method\.init_from: runs/recipe-7 is neither a run nor an adapter"):
        verb(recipe, ["method.init_from=runs/recipe-7"])


def test_a_pissa_hands_on_no_path_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path)
    train(recipe, ["method.init=pissa"])
    train(recipe, ["method.init=pissa", "method.init_from=runs/recipe-1"])
    assert "init_from" not in json.loads((tmp_path / "runs/recipe-2/adapter/ftkit.json").read_text())["method"]
