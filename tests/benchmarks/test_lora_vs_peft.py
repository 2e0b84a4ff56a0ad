import pytest
import torch

from benchmarks.lora_vs_peft import OURS, THEIRS, Sizes, measure_all, show
from ftkit.console import Console

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SMALL = Sizes(width=64, layers=2, rank=4, vocabulary=128, documents=2, length=32)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_agree_and_no_more_memory_is_taken(checkpointing, capsys):
    figures = list(measure_all(SMALL, dtype=torch.float32, rounds=2, checkpointing=checkpointing))
    assert [one.variant for one in figures] == ["LoRA", "DoRA"]
    for one in figures:
        assert one.gradient_difference <= 1e-5
        # Float32 against float64: rounding, and nothing worse than peft's by more than that.
        assert one.gradient_error[OURS] <= max(2 * one.gradient_error[THEIRS], 1e-5)
        assert one.memory_ratio <= 1.001
        assert [len(seconds) for seconds in one.seconds.values()] == [2, 2]
    assert figures[1].memory_ratio < 0.95
    show(Console(), figures, "tiny")
    printed = capsys.readouterr().out
    assert "DoRA" in printed
    assert f"{figures[0].memory_ratio:.2f}" in printed


def test_in_bfloat16_the_input_is_not_kept_in_float32_too():
    lora, _ = measure_all(SMALL, dtype=torch.bfloat16, rounds=1)
    assert lora.memory_ratio < 0.9
    assert lora.gradient_error[OURS] <= 2 * lora.gradient_error[THEIRS]
