"""The commands of docs/watching.md, one after another, on a tiny model in place of the one that they name."""

import re
from pathlib import Path

import pytest
import yaml

from ftkit.cli import run
from ftkit.recipe.load import load_recipe
from tests.tiny_runs import read_metrics, result_hash, write_recipe

PAGE = (Path(__file__).parent.parent / "docs" / "watching.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ ftkit (.+)$", PAGE, flags=re.MULTILINE)


@pytest.fixture
def reviews(tmp_path, monkeypatch):
    """The working directory, with the page's recipe in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    (recipe,) = re.findall(r"```yaml\n(.+?)```", PAGE, flags=re.DOTALL)
    values = yaml.safe_load(recipe)
    tiny = yaml.safe_load(write_recipe(tmp_path).read_text())
    values["base_model"] = tiny["base_model"]
    values["training"] |= {"max_tokens_per_device": 256}
    texts = [f'{{"task": "sst2", "inputs": {{"text": "it is {word}"}}, "target": "positive"}}' for word in "abcdefgh"]
    (tmp_path / "reviews.jsonl").write_text("\n".join(texts * 5) + "\n")
    (tmp_path / "reviews.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return tmp_path


def without_numbers(line: str) -> str:
    """A line as it is for any model on any day."""
    line = re.sub(r"offline-run-\S+", "offline-run", line.replace(f"{Path.cwd()}/", ""))
    line = re.sub(r"^done in [^:]+", "done in N", line)
    return re.sub(r"[\d.]+(e-\d+)?", "N", line).replace("KiB", "MiB").rstrip()


@pytest.mark.slow
def test_the_commands_work_as_they_are_printed(reviews, capsys):
    assert len(COMMANDS) == 3
    for command in COMMANDS:
        assert run(command.split()) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert [path.name for path in (reviews / "runs").iterdir()] == ["reviews-1"]
    first = reviews / "runs" / "reviews-1"
    assert {"tensorboard", "wandb"} < {path.name for path in first.iterdir()}
    assert read_metrics(first)[-1]["step"] == 24
    shows = re.findall(r"^(?:tracking|going on|the run has|done in).*|^evaluations$", PAGE, flags=re.MULTILINE)
    assert len(shows) == 6
    assert {without_numbers(line) for line in shows} <= {without_numbers(line) for line in shown.splitlines()}
    # The last paragraph: repeated, and begun with the weights.
    assert run(["train", "runs/reviews-1/recipe.yaml"]) == 0
    assert run(["train", "reviews.yaml", "method.init_from=runs/reviews-1"]) == 0
    assert load_recipe(reviews / "runs" / "reviews-2" / "recipe.yaml").recipe.training.max_steps == 24
    assert len({result_hash(path) for path in (reviews / "runs").iterdir()}) == 3
