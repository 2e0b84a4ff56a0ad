"""What a run says while it trains."""

import io
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from ftkit.console import Console, ProgressBar
from ftkit.training.progress import Progress
from ftkit.training.state import LoopState


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"]])
def test_the_loss_of_each_data_set_is_printed_where_there_are_several(names: list[str]) -> None:
    plan: Any = SimpleNamespace(steps=range(4), dataset_names=names, epoch_of_step=[0.25, 0.5, 0.75, 1.0])
    world: Any = SimpleNamespace(is_main=False, device=torch.device("cpu"))
    printed = io.StringIO()
    console = Console(stream=printed)
    progress = Progress(plan, world, cast(Any, None), console, ProgressBar(None, None), first_step=0)
    state = LoopState.fresh(len(names))
    state.record_step(torch.tensor([6.0, 3.0, 0.0][: len(names)]), [4, 1, 0][: len(names)], tokens=9)
    progress.steps(state, learning_rate=0.1, grad_norm=1.0)
    first, *rest = printed.getvalue().splitlines()
    assert first.startswith(f"step 1/4  loss {1.5 if len(names) == 1 else 1.8:.4f}  lr 1.00e-01")
    # `c` was in none of the batches.
    assert rest == ([] if len(names) == 1 else ["step 1/4  loss of a 1.5000  b 3.0000"])
