import json
import os

import pytest

from ftkit.errors import UserError
from ftkit.runs import RECIPE, MetricsFile, find_runs, find_target, new_run_directory


def make(pattern, *, name="r", overwrite=False):
    return new_run_directory(str(pattern), name=name, method="lora", overwrite=overwrite)[0]


def test_a_number_is_always_free(tmp_path):
    names = [make(tmp_path / "{name}-{n}").name for _ in range(3)]
    assert names == ["r-1", "r-2", "r-3"]
    assert make(tmp_path / "{method}" / "x").parts[-2:] == ("lora", "x")
    # As the resolved recipe has it.
    assert make(tmp_path / "{name}-{n}", name="a{n}").name == "a_n_-1"


def test_an_empty_directory_is_taken_and_another_is_not(tmp_path):
    (tmp_path / "mine").mkdir()
    assert make(tmp_path / "mine") == tmp_path / "mine"
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        make(tmp_path / "mine")
    assert new_run_directory(str(tmp_path / "mine"), name="r", method="lora", overwrite=True)[1].name == "mine.old-1"
    assert (tmp_path / "mine.old-1" / "notes.txt").read_text() == "mine"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        make(tmp_path / "file", overwrite=True)


@pytest.mark.parametrize("name", ["file/x", "file/x-{n}", "x" * 300, "{n}/" + "x" * 300])
def test_what_no_directory_can_be_called_is_the_users_mistake(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot create .*; choose another output_dir") as caught:
        make(tmp_path / name)
    assert caught.value.problems[0].key == ("output_dir",)


def test_home_is_not_a_directory_called_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert make("~/r-{n}") == tmp_path / "r-1"


def test_metrics_are_cut_back_to_what_a_checkpoint_saw(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(4):
        metrics.append({"step": step})
    metrics.truncate(2)
    metrics.append({"step": 9})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 9]
    assert MetricsFile(tmp_path / "metrics.jsonl").lines == 3


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("runs/{name}-{n}", "r"),
        ("runs/{n}/x", "r"),
        ("{time}/{name}/{method}", "r"),
        ("./runs//{name}", "r"),
        ("runs[1]/*/{name}-{n}", "a[b]*?"),
        ("{name}-{n}", "a{n}"),
    ],
)
def test_runs_are_found_wherever_the_placeholder_and_whatever_the_name(tmp_path, monkeypatch, pattern, name):
    monkeypatch.chdir(tmp_path)
    made = make(pattern, name=name)
    assert find_runs(pattern, name=name, method="lora") == []
    (made / RECIPE).touch()
    assert find_runs(pattern, name=name, method="lora") == [made]
    assert find_runs(pattern, name="other", method="full") == ([made] if pattern == "runs/{n}/x" else [])


def test_runs_are_found_newest_first_and_none_that_was_moved_aside(tmp_path):
    for second, name in enumerate(["r-1", "r-3", "r-2", "r-1.old-1", "r-more-1", "r-"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / RECIPE).touch()
        os.utime(tmp_path / name / RECIPE, (second, second))
    found = find_runs(str(tmp_path / "{name}-{n}"), name="r", method="lora")
    assert [path.name for path in found] == ["r-2", "r-3", "r-1"]


def test_a_misspelt_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "recipe-1").mkdir(parents=True)
    with pytest.raises(UserError, match="no such run or directory: runs/recipe-l; did you mean runs/recipe-1"):
        find_target("runs/recipe-l")
    with pytest.raises(UserError, match="no such run or directory: runs/x; there is recipe-1"):
        find_target("runs/x")


def test_a_target_that_is_nothing_says_what_it_could_be(tmp_path):
    with pytest.raises(UserError, match="neither a run, a checkpoint, an adapter nor a model"):
        find_target(str(tmp_path))
