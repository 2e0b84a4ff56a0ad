import json

import pytest

from ftkit.errors import UserError
from ftkit.recipe.load import dump_recipe, load_recipe, resolve
from ftkit.runs import RECIPE, MetricsFile, find_target, new_run_directory, newest_run_of
from tests.tiny_runs import write_recipe


def make(pattern, **keywords):
    return new_run_directory(str(pattern), name="r", method="lora", **{"overwrite": False, **keywords})


def test_a_number_is_always_free(tmp_path):
    names = [make(tmp_path / "{name}-{n}").name for _ in range(3)]
    assert names == ["r-1", "r-2", "r-3"]
    assert make(tmp_path / "{method}" / "x").parts[-2:] == ("lora", "x")


def test_an_empty_directory_is_taken_and_another_is_not(tmp_path):
    (tmp_path / "mine").mkdir()
    assert make(tmp_path / "mine") == tmp_path / "mine"
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        make(tmp_path / "mine")
    make(tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine.old-1" / "notes.txt").read_text() == "mine"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        make(tmp_path / "file", overwrite=True)


def test_metrics_are_cut_back_to_what_a_checkpoint_saw(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(4):
        metrics.append({"step": step})
    metrics.truncate(2)
    metrics.append({"step": 9})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 9]
    assert MetricsFile(tmp_path / "metrics.jsonl").lines == 3


def test_the_newest_run_of_a_recipe_is_the_one_that_agrees(tmp_path):
    path = write_recipe(tmp_path)

    def store(name, *overrides):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / RECIPE).write_text(dump_recipe(resolve(load_recipe(path, overrides))))

    recipe = resolve(load_recipe(path))
    assert newest_run_of(recipe, recipe.output_dir, name="recipe") is None
    store("recipe-1")
    store("recipe-2", "training.logging_steps=2")
    store("recipe-3", "seed=1")
    assert newest_run_of(recipe, recipe.output_dir, name="recipe") == tmp_path / "runs" / "recipe-2"


def test_a_target_that_is_nothing_says_what_it_could_be(tmp_path):
    with pytest.raises(UserError, match="neither a run, a checkpoint, an adapter nor a model"):
        find_target(str(tmp_path))
