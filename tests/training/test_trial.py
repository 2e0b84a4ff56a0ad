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


class Failing(Counting):
    """Fails in words."""

    def __init__(self, message: str) -> None:
        super().__init__(0)
        self.message = message

    def forward(self, batch: torch.Tensor) -> SimpleNamespace:
        raise RuntimeError(self.message)


def test_libraries_have_their_own_words_for_memory():
    for message in ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"):
        root = Failing(message)
        assert not step_fits(root, torch.ones(3), root.parameters(), World(on_cpu=True), accumulates=False)
    root = Failing("expected a matrix")
    with pytest.raises(RuntimeError, match="expected a matrix"):
        step_fits(root, torch.ones(3), root.parameters(), World(on_cpu=True), accumulates=False)


def test_the_optimizers_state_is_made_where_there_is_none(monkeypatch):
    made = []
    monkeypatch.setattr(torch, "empty_like", lambda parameter, **_: made.append(parameter))
    root, world = Counting(0), World(on_cpu=True)
    assert step_fits(root, torch.ones(3), root.parameters(), world, accumulates=False)
    assert len(made) == 2
    made.clear()
    moments = list(root.parameters())
    assert step_fits(root, torch.ones(3), root.parameters(), world, accumulates=False, with_moments=moments)
    assert made == []
