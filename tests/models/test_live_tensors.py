"""The tracker of live tensors, against sums worked out by hand and against torch's own profiler."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from ftkit.models.live_tensors import LiveTensors, describe_lives, saved_for_backward

FLOAT = 4


def test_bytes_come_and_go_with_the_tensors() -> None:
    x = torch.ones(10, 3)
    with LiveTensors([x]) as live:
        y = x + 1
        view = y[2:].t()
        z = y * 2
        live.mark("three")
        del y
        live.mark("a view keeps it")
        del view
        live.mark("gone")
        x.add_(1)
    assert live.live_bytes() == [120, 240, 360, 240]
    assert live.marks == [("three", 2), ("a view keeps it", 2), ("gone", 3)]
    assert [(life.operation, life.shape, life.born, life.died) for life in live.lives] == [
        ("", (10, 3), 0, None),
        ("add", (10, 3), 1, 3),
        ("mul", (10, 3), 2, None),
    ]
    assert live.peak(live.between("three", "gone")) == 2
    assert live.life_of(z) is live.lives[2]
    assert describe_lives(live.lives, minimum=1) == "1 x add [10, 3], 1 x mul [10, 3], 1 x there before [10, 3]"


def test_the_backward_pass_is_seen_and_gradients_stay() -> None:
    """relu(x W^T): relu's output is kept for the backward pass, which makes two tensors of its size on the way."""
    x, weight = torch.randn(50, 20), nn.Parameter(torch.randn(30, 20))
    with LiveTensors([x, weight]) as live:
        loss = F.relu(x @ weight.t()).sum()
        live.mark("forward")
        loss.backward()
        live.mark("backward")
    series, before = live.live_bytes(), (50 * 20 + 30 * 20) * FLOAT
    assert series[dict(live.marks)["forward"]] == before + 50 * 30 * FLOAT + FLOAT
    grad = live.life_of(weight.grad)
    assert grad is not None
    assert grad.bytes == 30 * 20 * FLOAT
    # What is left: weights, input, gradient, the loss.
    assert series[-1] == before + grad.bytes + FLOAT
    peak = live.peak(live.between("forward", "backward"))
    assert series[peak] >= before + 2 * 50 * 30 * FLOAT


def test_what_autograd_saves_counts_once_and_without_parameters() -> None:
    x, weight = torch.randn(50, 20, requires_grad=True), nn.Parameter(torch.randn(30, 20))
    with saved_for_backward(leaving_out=[weight]) as saved:
        h = x @ weight.t()
        _ = (h * h + h.exp()).sum() + x.sin().sum()
    # x for the product and for sin, h, exp(h).
    assert saved.bytes == (50 * 20 + 2 * 50 * 30) * FLOAT


@pytest.mark.parametrize("width", [64, 96])
def test_the_peak_is_that_of_the_allocator(width: int) -> None:
    """torch's profiler hears of every allocation; what operations use inside is all that may be missing."""
    model = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
    x = torch.randn(256, width)

    def step() -> None:
        model.zero_grad()
        F.mse_loss(model(x), x).backward()

    step()
    model.zero_grad()
    with LiveTensors([x, *model.parameters()]) as live:
        step()
    own = max(live.live_bytes()) - live.live_bytes()[0]
    model.zero_grad()
    allocated = _peak_of_allocator(step)
    assert own <= allocated <= own * 1.02


def _peak_of_allocator(run: Callable[[], None]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    total = peak = 0
    for _, change in changes:
        total += change
        peak = max(peak, total)
    assert peak > 0
    return peak
