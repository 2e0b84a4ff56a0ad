"""A trial step: run as often as gradients lie beside activations in the run, and leaving nothing behind."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ftkit.distributed import World
from ftkit.training.trial import step_fits


class Counting(nn.Module):
    """An objective whose run number `fails` has no memory; it notes which runs find gradients."""

    def __init__(self, fails: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.fails = fails
        self.found: list[bool] = []

    def forward(self, batch: torch.Tensor) -> SimpleNamespace:
        self.found.append(self.weight.grad is not None)
        if len(self.found) == self.fails:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return SimpleNamespace(loss=(self.weight * batch * torch.rand(())).sum())


@pytest.mark.parametrize(
    ("accumulates", "fails", "fits", "found"),
    [
        (False, 0, True, [False]),
        (True, 0, True, [False, True]),
        (True, 2, False, [False, True]),
        (False, 2, True, [False]),
        (False, 1, False, [False]),
    ],
)
def test_gradients_lie_beside_activations_where_they_do_in_the_run(accumulates, fails, fits, found):
    world, root = World(on_cpu=True), Counting(fails)
    before = torch.get_rng_state()
    assert step_fits(root, torch.ones(3), root.parameters(), world, accumulates=accumulates) == fits
    assert root.found == found
    assert root.weight.grad is None
    assert torch.equal(torch.get_rng_state(), before)
