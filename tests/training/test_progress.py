"""What a run says while it trains."""

import io
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from ftkit.console import Console, ProgressBar, human_seconds
from ftkit.runs import MetricsFile
from ftkit.training import progress as module
from ftkit.training.cadence import Cadence
from ftkit.training.progress import Progress
from ftkit.training.state import LoopState


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets time pass; nothing else does."""
    now = [100.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def passes(seconds: float) -> None:
        now[0] += seconds

    return passes


def a_run(stream: io.StringIO, steps: int, names: list[str], *, eval_every: int | None = None, **more: Any) -> Progress:
    epochs = [(number + 1) / steps for number in range(steps)]
    plan: Any = SimpleNamespace(steps=range(steps), dataset_names=names, epoch_of_step=epochs)
    world: Any = SimpleNamespace(is_main="metrics" in more, device=torch.device("cpu"))
    cadence = Cadence(steps, steps, eval_every, steps)
    metrics, bar = more.get("metrics", cast(Any, None)), more.get("bar", ProgressBar(None, None))
    return Progress(plan, cadence, world, metrics, Console(stream=stream), bar, first_step=0)


def done(progress: Progress, state: LoopState) -> None:
    state.record_step(torch.tensor([6.0]), [4], tokens=9)
    progress.step(state)


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"]])
def test_the_loss_of_each_data_set_is_printed_where_there_are_several(names: list[str]) -> None:
    printed = io.StringIO()
    progress = a_run(printed, 4, names)
    state = LoopState.fresh(len(names))
    state.record_step(torch.tensor([6.0, 3.0, 0.0][: len(names)]), [4, 1, 0][: len(names)], tokens=9)
    progress.step(state)
    progress.steps(state, learning_rate=0.1, grad_norm=1.0)
    first, *rest = printed.getvalue().splitlines()
    assert first.startswith(f"step 1/4  loss {1.5 if len(names) == 1 else 1.8:.4f}  lr 1.00e-01")
    # `c` was in none of the batches.
    assert rest == ([] if len(names) == 1 else ["step 1/4  loss of a 1.5000  b 3.0000"])


@pytest.mark.parametrize("seconds", [0.5, 7.0, 29.0, 31.0, 55.0])
def test_the_time_that_is_left_is_said_within_the_first_minute(clock: Callable[[float], None], seconds: float) -> None:
    """However rarely the run logs."""
    printed = io.StringIO()
    progress, state, elapsed = a_run(printed, 1000, ["a"]), LoopState.fresh(1), 0.0
    while not printed.getvalue():
        clock(seconds)
        elapsed += seconds
        done(progress, state)
    assert elapsed < 60
    left = human_seconds(seconds * (1000 - state.step))
    assert printed.getvalue() == f"step {state.step}/1000  {seconds:.1f} s a step  {left} left\n"
    clock(seconds)
    done(progress, state)
    assert printed.getvalue().count("\n") == 1


def test_evaluations_count_and_the_first_step_does_not(clock: Callable[[float], None]) -> None:
    printed = io.StringIO()
    progress, state = a_run(printed, 10, ["a"], eval_every=4), LoopState.fresh(1)
    with progress.paused():
        clock(20)
        progress._clock.evaluations += 1
    for seconds in (9, 1, 1):
        clock(seconds)
        done(progress, state)
    progress.steps(state, learning_rate=0.1, grad_norm=1.0)
    # Seven steps of a second, and evaluations after steps 4, 8 and 10.
    assert printed.getvalue().endswith("67s left\n")


def test_a_terminal_shows_the_curves_below_the_bar(tmp_path: Any, clock: Callable[[float], None]) -> None:
    """Those of a run that goes on begin where it began."""
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append({"event": "eval", "step": 0, "eval_loss": 4.0, "eval_loss_a": 4.0})
    stream = Terminal()
    with Console(stream=stream).progress("training", total=3) as bar:
        progress, state = a_run(stream, 3, ["a"], metrics=metrics, bar=bar), LoopState.fresh(1)
        for number in (1, 2):
            clock(2)
            done(progress, state)
            progress.steps(state, learning_rate=0.1, grad_norm=1.0)
            losses = {"eval_loss": 4.0 - number, "eval_loss_a": 4.0 - number}
            progress.evaluation(state, losses, seconds=1.0, best=True)
        assert bar._bar is not None
        bar._bar.refresh()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "2/3 2s left" in shown
    assert "\nloss 1.5000  lr 1.00e-01  grad 1.00" in shown
    assert "\neval_loss  █▅▁  4.0000 to 2.0000, lowest 2.0000 at step 2" in shown
    assert "step 1/3  eval_loss 3.0000  eval_loss_a 3.0000 (best)" in shown
    # The bar says it: as a line of its own it is in train.log alone.
    assert "step 1/3  loss" not in shown
