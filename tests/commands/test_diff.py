"""`ftkit diff`: what it finds in runs that are changed in one respect, and that it finds nothing else."""

import json
import shutil

import pytest

from ftkit.commands.diff import diff
from ftkit.commands.train import train
from ftkit.errors import CheckFailedError, UserError
from tests.tiny_runs import write_recipe


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Directory of two runs of one recipe."""
    directory = tmp_path_factory.mktemp("runs")
    recipe = write_recipe(directory)
    for _ in range(2):
        train(recipe, [])
    return directory / "runs"


@pytest.fixture
def pair(runs, tmp_path):
    """Copies of both, to be changed."""
    shutil.copytree(runs, tmp_path / "runs")
    return tmp_path / "runs" / "recipe-1", tmp_path / "runs" / "recipe-2"


def found(capsys, *arguments, **options):
    """part -> what differs in it."""
    capsys.readouterr()
    try:
        diff(*arguments, json=True, **options)
    except CheckFailedError as error:
        (message,) = [problem.what for problem in error.problems]
    else:
        message = None
    parts = json.loads(capsys.readouterr().out)
    assert (message is not None) == any(parts.values())
    assert message is None or message.endswith(", ".join(part for part, rows in parts.items() if rows))
    return parts


def edit(file, change):
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def test_a_recipe_trained_twice_gives_the_same(runs, capsys):
    diff(runs / "recipe-1", runs / "recipe-2")
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for part in ("recipe", "data", "environment", "loss", "weights"):
        assert f"{part} the same" in shown


def test_another_rate_parts_recipe_losses_and_weights(runs, capsys):
    recipe = runs.parent / "recipe.yaml"
    train(recipe, ["training.learning_rate=2e-2"])
    parts = found(capsys, runs / "recipe-1", runs / "recipe-3")
    assert [row["what"] for row in parts["recipe"]] == ["training.learning_rate"]
    assert (parts["recipe"][0]["first"], parts["recipe"][0]["second"]) == (1e-2, 2e-2)
    assert parts["data"] == parts["environment"] == []
    # The first step is computed before the rate counts.
    assert "loss from step 2 on" in [row["what"] for row in parts["loss"]]
    assert parts["weights"]
    with pytest.raises(CheckFailedError, match=r"recipe-1 and .*recipe-3 part in recipe, loss, weights") as caught:
        diff(runs / "recipe-1", runs / "recipe-3")
    assert caught.value.exit_code == 6
    assert "training.learning_rate" in capsys.readouterr().out
    assert not any(found(capsys, runs / "recipe-1", runs / "recipe-3", tolerance=10.0, ignore=["recipe"]).values())


def test_other_rows_part_the_data(runs, capsys):
    recipe = runs.parent / "recipe.yaml"
    rows = (runs.parent / "rows.jsonl").read_text()
    (runs.parent / "others.jsonl").write_text(rows.replace("Say", "Tell"))
    train(recipe, [f"data.train.0.path={runs.parent / 'others.jsonl'}", f"output_dir={runs.parent / 'other'}"])
    parts = found(capsys, runs / "recipe-1", runs.parent / "other")
    assert "data_fingerprint" in [row["what"] for row in parts["data"]]


def test_each_part_is_looked_at(pair, capsys):
    one, other = pair
    assert not any(found(capsys, one, other).values())

    edit(other / "environment.json", lambda values: values["packages"].update(torch="0.0"))
    parts = found(capsys, one, other)
    assert [row["what"] for row in parts["environment"]] == ["packages.torch"]
    assert not any(found(capsys, one, other, ignore=["environment"]).values())

    edit(other / "environment.json", lambda values: values["base_model"].update(fingerprint="sha256:0"))
    assert [row["what"] for row in found(capsys, one, other)["data"]] == ["base_model.fingerprint"]

    edit(other / "validation.json", lambda values: next(iter(values.values())).pop())
    assert [row["what"] for row in found(capsys, one, other)["data"]][-1] == "rows held back"

    (other / "adapter" / "adapter_model.safetensors").write_bytes(b"other")
    assert found(capsys, one, other)["weights"]
    shutil.rmtree(other / "adapter")
    assert found(capsys, one, other)["weights"][0]["second"] is None


def test_losses_part_where_they_are_further_apart_than_allowed(pair, capsys):
    one, other = pair
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line.get("step") in (3, 4) and "loss" in line:
            line["loss"] += 1e-3 * line["step"]
    write = (other / "metrics.jsonl").write_text
    write("\n".join(map(json.dumps, lines)) + "\n")
    (row,) = found(capsys, one, other)["loss"]
    assert row["what"] == "loss from step 3 on"
    assert row["note"] == "2 of 6 steps, at most 0.004, at step 4"
    (row,) = found(capsys, one, other, tolerance=3.5e-3)["loss"]
    assert row["what"] == "loss from step 4 on"
    assert not any(found(capsys, one, other, tolerance=5e-3).values())

    lines[-1]["eval_loss"] = float("nan")
    write("\n".join(map(json.dumps, lines)) + "\n")
    assert "eval_loss from step 6 on" in [row["what"] for row in found(capsys, one, other, tolerance=1.0)["loss"]]
    write("\n".join(map(json.dumps, lines[:4])) + "\n")
    assert "steps with eval_loss" in [row["what"] for row in found(capsys, one, other, tolerance=1.0)["loss"]]


def test_what_is_no_run_and_no_part(runs, tmp_path):
    with pytest.raises(UserError, match=r"is not a run: it has no recipe\.yaml; name the directories of two runs"):
        diff(runs / "recipe-1", tmp_path)
    with pytest.raises(UserError, match="--ignore wieghts: there is no such part; choose one of recipe, data"):
        diff(runs / "recipe-1", runs / "recipe-2", ignore=["wieghts"])


def test_how_micro_batches_are_cut_and_run_counts(pair, capsys):
    edit(pair[1] / "environment.json", lambda values: values["micro_batch"].update(max_tokens=64))
    edit(pair[1] / "environment.json", lambda values: values.update(packing="another way"))
    rows = found(capsys, *pair)["environment"]
    assert [row["what"] for row in rows] == ["packing", "micro_batch.max_tokens"] or [row["what"] for row in rows] == [
        "micro_batch.max_tokens",
        "packing",
    ]


def test_what_has_nothing_to_compare_is_not_the_same(pair, capsys):
    for run in pair:
        shutil.rmtree(run / "adapter", ignore_errors=True)
        shutil.rmtree(run / "model", ignore_errors=True)
    diff(*pair)
    assert "neither run has a result" in capsys.readouterr().out
    for run in pair:
        (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has recorded no loss, so there is nothing to compare"):
        diff(*pair)
