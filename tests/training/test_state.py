import json

import torch

from ftkit.training.state import LoopState


def test_the_window_is_token_weighted_and_starts_again():
    state = LoopState.fresh(2)
    state.record_step(torch.tensor([4.0, 0.0]), [2, 0], tokens=10)
    state.record_step(torch.tensor([2.0, 3.0]), [1, 1], tokens=12)
    assert state.take_window(["a", "b"]) == {
        "loss": 9.0 / 4,
        "loss_by_dataset": {"a": 2.0, "b": 3.0},
        "tokens": 22,
        "target_tokens": 4,
    }
    state.record_step(torch.tensor([1.0, 0.0]), [1, 0], tokens=3)
    assert state.take_window(["a", "b"])["loss_by_dataset"] == {"a": 1.0}


def test_json_keeps_every_bit():
    state = LoopState.fresh(1)
    state.record_step(torch.tensor([0.1]), [3], tokens=7)
    state.record_evaluation(1 / 3, saved=True)
    assert LoopState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_best_is_among_the_saved_and_patience_among_all():
    state = LoopState.fresh(1)
    for step, (metric, saved) in enumerate([(1.0, False), (2.0, True), (1.5, True), (1.7, True)]):
        state.step = step
        state.record_evaluation(metric, saved=saved)
    assert (state.best_step, state.best_metric) == (2, 1.5)
    assert (state.lowest_metric, state.evaluations_without_gain) == (1.0, 3)
