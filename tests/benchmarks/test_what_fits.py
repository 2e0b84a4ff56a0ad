"""The table of docs/choosing_a_method.md."""

from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.what_fits import GIBIBYTE, SHAPES, caption, configuration, measure, smallest_card, table

DOCUMENT = (Path(__file__).parents[2] / "docs" / "choosing_a_method.md").read_text(encoding="utf-8").splitlines()


row_of = cache(measure)


@pytest.mark.parametrize(
    "model", [name if "0.5B" in name else pytest.param(name, marks=pytest.mark.slow) for name in SHAPES]
)
def test_the_document_has_the_row_that_is_measured_now(model: str) -> None:
    heading, rule, row = table([row_of(model)])
    start = DOCUMENT.index(caption())
    assert [heading, rule] == DOCUMENT[start + 2 : start + 4]
    assert row in DOCUMENT[start + 4 :]


def test_the_document_has_a_row_for_every_model() -> None:
    start = DOCUMENT.index(caption()) + 4
    assert [line.split(" | ")[0].removeprefix("| ") for line in DOCUMENT[start : start + len(SHAPES)]] == [*SHAPES]
    assert DOCUMENT[start + len(SHAPES)] == ""


def test_parameters_are_those_of_the_model_cards() -> None:
    """0.49B, 1.54B, 3.09B, 7.61B, 14.7B, 32.5B (Qwen 2.5), 8.03B and 70.6B (Llama 3.1)."""
    assert row_of("Qwen 2.5 0.5B").parameters == 494_032_768
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configuration("Llama 3.1 8B"))
    assert model.num_parameters() == 8_030_261_248
    assert configuration("Llama 3.1 70B").num_hidden_layers == 80


def test_a_card_is_not_filled_to_the_brim() -> None:
    assert smallest_card(7 * GIBIBYTE) == "8"
    assert smallest_card(8 * GIBIBYTE) == "16"
    assert smallest_card(80 * GIBIBYTE) == "—"
