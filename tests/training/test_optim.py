import math

import pytest
import torch
from torch import nn

from ftkit.methods import lora
from ftkit.methods.table import METHODS
from ftkit.recipe.method_schema import AdapterMethod, FullMethod, LoraMethod
from ftkit.recipe.schema import TrainingSection
from ftkit.training.optim import every, learning_rate, make_optimizer, set_learning_rate, warmup_steps


def section(**values):
    return TrainingSection.model_validate({"learning_rate": 1.0, **values})


def alike(name):
    return 1.0


def rates(total, **values):
    return [learning_rate(step, total, section(**values)) for step in range(total)]


def test_warmup_is_linear_and_reaches_the_peak():
    assert rates(10, warmup_steps=4, lr_scheduler_type="constant") == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]


def test_linear_falls_in_equal_steps_and_never_to_zero():
    assert rates(5, warmup_steps=0, lr_scheduler_type="linear") == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine_is_half_way_at_half_time_and_ends_at_its_floor():
    values = rates(100, warmup_steps=0, lr_scheduler_type="cosine", min_lr_ratio=0.1)
    assert values[0] == 1.0
    assert values[50] == pytest.approx(0.55)
    assert values[99] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.99)))
    assert values == sorted(values, reverse=True)


def test_wsd_is_flat_then_falls_over_the_last_fifth():
    values = rates(100, warmup_steps=0, lr_scheduler_type="wsd")
    assert values[:81] == pytest.approx([1.0] * 81)
    assert values[90] == pytest.approx(0.5)
    assert values[99] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("asked", "total", "expected"),
    [(None, 1000, 30), (None, 100, 5), (None, 40, 4), (None, 5, 0), (7, 100, 7), (0.1, 55, 6), (0, 100, 0)],
)
def test_warmup_default_is_three_percent_between_five_steps_and_a_tenth(asked, total, expected):
    assert warmup_steps(section(warmup_steps=asked), total) == expected


def test_cadence_takes_steps_or_a_share():
    assert every(7, 100) == 7
    assert every(0.1, 55) == 6
    assert every(0.001, 55) == 1


def test_only_matrices_decay():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    named = dict(model.named_parameters())
    optimizer = make_optimizer(named, section(weight_decay=0.1), alike)
    decayed, others = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1
    assert {id(p) for p in decayed["params"]} == {id(named["0.weight"])}
    assert others["weight_decay"] == 0.0
    assert {id(p) for p in others["params"]} == {id(named[n]) for n in ("0.bias", "1.weight", "1.bias")}


def test_optimizer_follows_the_section():
    optimizer = make_optimizer(
        {"w": nn.Parameter(torch.ones(2, 2))}, section(adam_beta1=0.5, adam_beta2=0.6, adam_epsilon=1e-4), alike
    )
    assert optimizer.defaults["betas"] == (0.5, 0.6)
    assert optimizer.defaults["eps"] == 1e-4
    assert len(optimizer.param_groups) == 1


def test_groups_learn_at_their_own_multiple_of_the_rate():
    """LoRA+ on one A and one B of ones with a gradient of ones: AdamW's first step is the rate itself."""
    named = {name: nn.Parameter(torch.ones(2, 2)) for name in ("q.lora_A", "q.lora_B")}
    method = LoraMethod(type="lora", learning_rate_ratio=16.0)
    optimizer = make_optimizer(named, section(), lambda name: lora.learning_rate_factor(name, method))
    set_learning_rate(optimizer, 1e-3)
    for parameter in named.values():
        parameter.grad = torch.ones(2, 2)
    optimizer.step()
    torch.testing.assert_close(1.0 - named["q.lora_A"].detach(), torch.full((2, 2), 1e-3), rtol=1e-3, atol=0)
    torch.testing.assert_close(1.0 - named["q.lora_B"].detach(), torch.full((2, 2), 16e-3), rtol=1e-3, atol=0)


def test_only_b_learns_faster():
    for method, part in (
        (METHODS["full"], FullMethod(type="full")),
        (METHODS["adapter"], AdapterMethod(type="adapter")),
    ):
        assert method.learning_rate_factor("q.lora_B", part) == 1.0
    assert lora.learning_rate_factor("q.lora_B", LoraMethod(type="lora")) == 1.0
