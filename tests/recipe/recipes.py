"""Recipes as text, for the tests of this folder."""

from pathlib import Path

from ftkit.errors import FtkitError
from ftkit.recipe.load import LoadedRecipe, load_recipe

BASE = """\
base_model: org/model
data:
  train:
    - path: train.jsonl
method:
  type: lora
"""


def write(directory: Path, text: str = BASE, name: str = "recipe.yaml") -> Path:
    """The recipe's file."""
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return path


def load(directory: Path, text: str = BASE, *overrides: str) -> LoadedRecipe:
    """The recipe, read from a file in `directory`."""
    return load_recipe(write(directory, text), overrides)


def problems(directory: Path, text: str = BASE, *overrides: str) -> list[str]:
    """What is wrong with it, a line each, the directory left out."""
    error: FtkitError | None = None
    try:
        load(directory, text, *overrides)
    except FtkitError as caught:
        error = caught
    if error is None:
        return []
    assert error.exit_code == 2
    return [str(problem).replace(f"{directory}/", "") for problem in error.problems]
