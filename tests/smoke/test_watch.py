"""Which gradients a smoke run takes for right."""

from types import SimpleNamespace
from typing import Any

import pytest

from ftkit.errors import CheckFailedError
from ftkit.smoke.watch import Watch


def watch_of(gradients: dict[str, tuple[float | None, float | None]], **prepared: Any) -> Watch:
    """A watch that has seen these magnitudes in two steps; None where a tensor got no gradient."""
    watch = Watch()
    watch.built = SimpleNamespace(loop=SimpleNamespace(parameters=dict.fromkeys(gradients)))  # type: ignore[assignment]
    watch.prepared = SimpleNamespace(new_token_ids=(), **prepared)  # type: ignore[assignment]
    for name, values in gradients.items():
        for step, value in enumerate(values, 1):
            if value is not None:
                watch.gradients[step][name] = value
    return watch


def test_zero_at_first_is_right_and_zero_for_good_is_not() -> None:
    assert watch_of({"a": (1.0, 1.0), "b": (1.0, 0.0)}).check_gradients() == "2 tensors"
    found = watch_of({"a": (0.0, 1.0), "b": (1.0, 1.0)}).check_gradients()
    assert found == "2 tensors, 1 from the second step on, since what they are multiplied by starts at zero"
    with pytest.raises(CheckFailedError, match="1 of 2 trained tensors get no gradient: a; train only"):
        watch_of({"a": (0.0, 0.0), "b": (1.0, 1.0)}).check_gradients()
    with pytest.raises(CheckFailedError, match="5 of 6 trained tensors get no gradient: a0, a1, a2 and 2 more"):
        watch_of({**{f"a{n}": (None, None) for n in range(5)}, "b": (1.0, 1.0)}).check_gradients()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_wrong(value: float) -> None:
    with pytest.raises(CheckFailedError, match="the gradient of b is not finite"):
        watch_of({"a": (1.0, 1.0), "b": (1.0, value)}).check_gradients()


def test_experts_that_no_token_chose() -> None:
    layer = "layers.0.mlp.experts"
    some = {f"{layer}.0.up_proj.weight": (1.0, 1.0), f"{layer}.1.up_proj.weight": (None, 0.0)}
    assert watch_of(some).check_gradients() == "2 tensors, 1 experts without tokens"
    # None of a layer's experts: no router works like that.
    none = {"layers.1.mlp.experts.0.up_proj.weight": (0.0, 0.0)}
    with pytest.raises(CheckFailedError, match="get no gradient"):
        watch_of(some | none).check_gradients()


def test_rows_of_new_tokens_that_no_row_has() -> None:
    gradients = {"embed_tokens.token_rows": (0.0, 0.0), "b": (1.0, 1.0)}
    watch = watch_of(gradients)
    watch.prepared.new_token_ids = (300, 301)  # type: ignore[misc]
    watch.seen = {1, 2}
    assert watch.check_gradients() == "2 tensors, no row has one of the new tokens"
    watch.seen = {1, 301}
    with pytest.raises(CheckFailedError, match=r"embed_tokens\.token_rows"):
        watch.check_gradients()
