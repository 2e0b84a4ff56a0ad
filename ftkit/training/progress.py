"""What a run says while it trains: lines of metrics.jsonl, and a progress bar or plain lines."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ftkit.console import Console, ProgressBar, human_bytes, human_seconds
from ftkit.data.plan import Plan
from ftkit.distributed import World
from ftkit.figures import curves_of, loss_figures, losses_in
from ftkit.runs import MetricsFile
from ftkit.training.cadence import Cadence
from ftkit.training.state import LoopState

FIRST_WORD_SECONDS = 30.0
"""After so long a run that has logged nothing yet says how long it will take."""

LIVE_WIDTH = 20
"""Characters of a curve below the bar, so that its line fits into 80."""


class Progress:
    """Reports finished steps and evaluations; only the main process writes."""

    def __init__(
        self,
        plan: Plan,
        cadence: Cadence,
        world: World,
        metrics: MetricsFile,
        console: Console,
        bar: ProgressBar,
        first_step: int,
    ) -> None:
        """`first_step`: steps that were done before this process started."""
        self._plan, self._cadence, self._world, self._metrics = plan, cadence, world, metrics
        self._console, self._bar = console, bar
        self._clock = _Clock(first_step)
        self._has_spoken = False
        # What the curves are drawn of, at a terminal: of a run that goes on, from its beginning.
        self._losses = loss_figures(metrics.path) if console.is_terminal and metrics.lines else {}

    def step(self, state: LoopState) -> None:
        """A step is done: how far the run is, and how much time it needs yet."""
        self._clock.count(state.step)
        left = f"{human_seconds(self._seconds_left(state.step))} left"
        self._bar.update(state.step, remaining=left)
        if not self._has_spoken and self._clock.running >= FIRST_WORD_SECONDS:
            speed = f"{self._clock.seconds_per_step:.1f} s a step"
            self._say(f"step {state.step}/{len(self._plan.steps)}  {speed}  {left}")

    def steps(self, state: LoopState, *, learning_rate: float, grad_norm: float) -> None:
        """Report what was summed since the line before, and start the sums anew."""
        total = len(self._plan.steps)
        window = state.take_window(self._plan.dataset_names)
        seconds = self._clock.lap()
        speed, memory = window["tokens"] / seconds, peak_memory(self._world.device)
        line = {"step": state.step, "epoch": self._epoch(state), "loss": window.pop("loss")}
        by_dataset = window.pop("loss_by_dataset")
        line |= {"loss_by_dataset": by_dataset, "learning_rate": learning_rate}
        line |= {"grad_norm": grad_norm, **window}
        timing = {"seconds": seconds, "tokens_per_second": speed, "peak_memory_bytes": memory}
        self._write(line | {"timing": timing})
        remaining = human_seconds(self._seconds_left(state.step))
        status = f"loss {line['loss']:.4f}  lr {learning_rate:.2e}  grad {grad_norm:.2f}  {speed:,.0f} tok/s"
        status += f"  {human_bytes(memory)}"
        self._bar.update(state.step, status)
        self._say(f"step {state.step}/{total}  {status}  {remaining} left")
        if len(self._plan.dataset_names) > 1:
            losses = "  ".join(f"{name} {loss:.4f}" for name, loss in by_dataset.items())
            self._say(f"step {state.step}/{total}  loss of {losses}")

    def evaluation(self, state: LoopState, losses: dict[str, float], *, seconds: float, best: bool) -> None:
        """Report an evaluation that was recorded in `state`."""
        self._clock.evaluations += 1
        line = {"event": "eval", "step": state.step, "epoch": self._epoch(state), **losses}
        self._write(line | {"timing": {"seconds": seconds}})
        parts = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
        self._console.line(f"step {state.step}/{len(self._plan.steps)}  {parts}{' (best)' if best else ''}")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Evaluations and saves are no training time: they would falsify tokens per second."""
        started = time.perf_counter()
        yield
        self._clock.skip(time.perf_counter() - started)

    def _write(self, line: dict[str, Any]) -> None:
        if self._world.is_main:
            self._metrics.append(line)
        if self._console.is_terminal:
            for name, value in losses_in(line).items():
                self._losses.setdefault(name, {})[line["step"]] = value
            self._bar.draw(curves_of(self._losses, width=LIVE_WIDTH))

    def _say(self, text: str) -> None:
        """At a terminal the bar shows it: then it is for train.log alone."""
        self._has_spoken = True
        say = self._console.debug if self._console.is_terminal else self._console.line
        say(text)

    def _seconds_left(self, step: int) -> float:
        steps = self._clock.seconds_per_step * (self._cadence.total - step)
        return steps + self._clock.seconds_per_pause * self._cadence.evaluations_left(step)

    def _epoch(self, state: LoopState) -> float:
        return round(self._plan.epoch_of_step[state.step - 1], 6) if state.step else 0.0


class _Clock:
    """Seconds since the line before, of a step and of an evaluation in this process.

    The first step, with its warm-up, counts until there is a second one.
    """

    def __init__(self, step: int) -> None:
        self.evaluations = 0
        """Made in this process."""
        self.seconds_per_step = 0.0
        """Mean; evaluations and saves come on top."""
        self._began = self._lap = time.perf_counter()
        self._from_step, self._from_time = step, self._lap
        self._paused = 0.0
        self._warm = False

    @property
    def running(self) -> float:
        """Seconds since the beginning, all that happened in them."""
        return time.perf_counter() - self._began

    @property
    def seconds_per_pause(self) -> float:
        """Of an evaluation, with the checkpoint that is saved after it."""
        return self._paused / self.evaluations if self.evaluations else 0.0

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self._lap = now - self._lap, now
        return seconds

    def skip(self, seconds: float) -> None:
        self._lap += seconds
        self._from_time += seconds
        self._paused += seconds

    def count(self, step: int) -> None:
        """Step `step` is done."""
        now = time.perf_counter()
        self.seconds_per_step = (now - self._from_time) / (step - self._from_step)
        if not self._warm:
            self._from_step, self._from_time, self._warm = step, now, True


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's peak resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
