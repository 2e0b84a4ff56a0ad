import pytest
import torch

from benchmarks.memory_of_layer import Sizes, measure_layers
from benchmarks.memory_of_model import FROZEN, METHOD_SECTIONS, ModelSizes, measure_model
from benchmarks.where_memory_goes import plot, show_layers, show_model
from ftkit.console import Console

LAYER = Sizes(tokens=96, inputs=64, outputs=80, rank=4)
MODEL = ModelSizes(width=64, layers=2, vocabulary=128, documents=2, length=32)
FLOAT = 4


def test_the_gradient_of_w_exists_where_it_is_formed_and_in_ours_never(capsys):
    full, formed, usual, ours = measure_layers(LAYER, torch.float32)
    assert [f.backward_matrices for f in (full, formed, usual, ours)] == [1, 2, 0, 0]
    assert [f.forward_matrices for f in (full, formed, usual, ours)] == [0, 3, 0, 0]
    assert full.gradients == FLOAT * 64 * 80
    assert ours.gradients == usual.gradients == FLOAT * 4 * (64 + 80)
    # x, and A x.
    assert ours.saved == FLOAT * 96 * (64 + 4)
    assert ours.backward_peak < usual.backward_peak
    assert ours.forward_peak < usual.forward_peak
    show_layers(Console(), [full, formed, usual, ours], "one layer")
    assert "LoRA, ftkit" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_parts_of_a_model_add_up(capsys):
    figures = [measure_model(name, MODEL, torch.float32) for name in METHOD_SECTIONS]
    for f in figures:
        step = f.steps[-1]
        before = step.moments()["before"]
        weights = step.series["frozen weights"][before] + step.series["trained weights"][before]
        assert weights == FLOAT * f.parameters
        assert step.series["trained weights"][before] == FLOAT * f.trained
        if f.name != FROZEN:
            # Two moments of each trained number, and a count of steps of each tensor.
            assert 2 * FLOAT * f.trained <= step.series["optimizer state"][before] <= 2 * FLOAT * f.trained + 4096
            assert step.series["gradients"][step.moments()["after backward"]] == FLOAT * f.trained
    before = [[step.total(step.moments()["before"]) for step in figures[index].steps] for index in (1, 3)]
    (full_first, full_second), (lora_first, lora_second) = before
    assert lora_first > full_first, "before the first step LoRA takes more"
    assert lora_second < full_second
    show_model(Console(), figures, "a model")
    assert plot(figures, "a model").startswith("<svg")
    assert "peak" in capsys.readouterr().out
