"""The section of bottleneck adapters: what its keys exclude, and what follows from them."""

from pathlib import Path

import pytest

from ftkit.recipe.load import dump_recipe
from ftkit.recipe.schema import AdapterMethod
from tests.recipe.recipes import BASE, load, problems

WRONG = {
    "bottleneck: 8, reduction_factor: 4": "reduction_factor: method.bottleneck says the width already;"
    " keep one of them",
    "placement: []": "placement: expected a list of names (at least one), got an empty list",
    "placement: attention": "placement: expected a list of names (at least one), got the text"
    " 'attention'; write it as a list: [...]",
    "placement: [atention]": "placement.0: expected one of attention, feed_forward, got the text"
    " 'atention'; did you mean attention?",
    "insertion: paralel": "insertion: expected one of sequential, parallel, got the text 'paralel'; did"
    " you mean parallel?",
    "dropout: 1.0": "dropout: expected a number of at least 0 and below 1, got the number 1.0",
}


def _recipe(keys: str) -> str:
    method = f"method: {{type: adapter{keys and ', '}{keys}}}\n"
    return BASE.replace("method:\n  type: lora\n", method)


@pytest.mark.parametrize(("keys", "message"), WRONG.items(), ids=WRONG)
def test_wrong_keys(tmp_path: Path, keys: str, message: str) -> None:
    assert problems(tmp_path, _recipe(keys)) == [f"recipe.yaml:5: method.{message}"]


def test_an_unknown_non_linearity_is_told_the_closest_and_all(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, _recipe("non_linearity: gleu"))
    assert found.startswith("recipe.yaml:5: method.non_linearity: expected one of gelu, relu, silu, tanh, ")
    assert found.endswith("linear, got the text 'gleu'; did you mean gelu?")


@pytest.mark.parametrize(
    ("keys", "bottleneck", "scale"),
    [
        ("", 64, 1.0),
        ("bottleneck: null", 64, 1.0),
        ("reduction_factor: 16", None, 1.0),
        ("insertion: parallel", 64, 4.0),
        ("insertion: parallel, scale: 1.5, reduction_factor: 2", None, 1.5),
    ],
)
def test_the_size_of_bottleneck_adapters(tmp_path: Path, keys: str, bottleneck: int | None, scale: float) -> None:
    """Defaults follow from other keys, and the resolved recipe says them."""
    recipe = load(tmp_path, _recipe(keys)).recipe
    assert isinstance(recipe.method, AdapterMethod)
    assert (recipe.method.bottleneck, recipe.method.scale) == (bottleneck, scale)
    assert load(tmp_path, dump_recipe(recipe)).recipe == recipe
    assert f"scale: {scale}" in dump_recipe(recipe)


def test_the_places_of_bottleneck_adapters_have_one_order(tmp_path: Path) -> None:
    method = load(tmp_path, _recipe("placement: [feed_forward, attention, attention]")).recipe.method
    assert isinstance(method, AdapterMethod)
    assert method.placement == ("attention", "feed_forward")
