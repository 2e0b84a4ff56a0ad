"""What a run says while it trains: lines of metrics.jsonl, and a progress bar or plain lines."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ftkit.console import Console, ProgressBar, human_bytes, human_seconds
from ftkit.data.plan import Plan
from ftkit.distributed import World
from ftkit.runs import MetricsFile
from ftkit.training.state import LoopState


class Progress:
    """Reports finished steps and evaluations; only the main process writes."""

    def __init__(
        self, plan: Plan, world: World, metrics: MetricsFile, console: Console, bar: ProgressBar, first_step: int
    ) -> None:
        """`first_step`: steps that were done before this process started."""
        self._plan, self._world, self._metrics, self._console, self._bar = plan, world, metrics, console, bar
        self._clock = _Clock(first_step)

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
        remaining = human_seconds(self._clock.seconds_per_step(state.step) * (total - state.step))
        status = f"loss {line['loss']:.4f}  lr {learning_rate:.2e}  grad {grad_norm:.2f}  {speed:,.0f} tok/s"
        status += f"  {human_bytes(memory)}"
        self._bar.update(state.step, status)
        text = f"step {state.step}/{total}  {status}  {remaining} left"
        say = self._console.debug if self._console.is_terminal else self._console.line
        say(text)
        if len(self._plan.dataset_names) > 1:
            losses = "  ".join(f"{name} {loss:.4f}" for name, loss in by_dataset.items())
            say(f"step {state.step}/{total}  loss of {losses}")

    def evaluation(self, state: LoopState, losses: dict[str, float], *, seconds: float, best: bool) -> None:
        """Report an evaluation that was recorded in `state`."""
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

    def _write(self, line: dict[str, object]) -> None:
        if self._world.is_main:
            self._metrics.append(line)

    def _epoch(self, state: LoopState) -> float:
        return round(self._plan.epoch_of_step[state.step - 1], 6) if state.step else 0.0


class _Clock:
    """Seconds since the line before, and per step in this process; the first line, with its warm-up, does not count."""

    def __init__(self, step: int) -> None:
        self._lap = time.perf_counter()
        self._from_step, self._from_time = step, self._lap
        self._warm = False

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self._lap = now - self._lap, now
        return seconds

    def skip(self, seconds: float) -> None:
        self._lap += seconds
        self._from_time += seconds

    def seconds_per_step(self, step: int) -> float:
        mean = (self._lap - self._from_time) / (step - self._from_step)
        if not self._warm:
            self._from_step, self._from_time, self._warm = step, self._lap, True
        return mean


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's peak resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
