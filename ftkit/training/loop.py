"""The training loop: fetch, forward, backward, clip, step, log, evaluate, save."""

import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from ftkit.console import Console, ProgressBar, human_bytes, human_seconds
from ftkit.data.batches import collate
from ftkit.data.plan import Plan
from ftkit.data.types import EncodedExample
from ftkit.distributed import SignalWatch, World
from ftkit.errors import Interrupted, NonFiniteError
from ftkit.recipe.schema import TrainingSection
from ftkit.runs import MetricsFile
from ftkit.training.optim import every, learning_rate
from ftkit.training.state import LoopState


@dataclass(frozen=True)
class Loop:
    """What the loop works on; built by the train command."""

    section: TrainingSection
    plan: Plan
    world: World
    objective: nn.Module
    """The prepared root module: Batch -> LossSums."""
    parameters: dict[str, nn.Parameter]
    """Name -> trained parameter."""
    optimizer: torch.optim.Optimizer
    max_tokens: int
    """Tokens of a micro-batch on one device."""
    packed: bool
    pad_id: int
    metrics: MetricsFile
    console: Console
    save: Callable[[LoopState], None]
    """Write a checkpoint; a collective."""
    tokens_run: Counter[str] = field(default_factory=Counter)
    """Tokens that went through the model in this process, padding included: `training` and `evaluation`."""

    def run(self, state: LoopState) -> None:
        """Train from `state` to the end of the plan, or until early stopping; the last step is always saved.

        Raises:
            NonFiniteError: before the optimizer step that would have used a loss or gradient that is not finite.
            Interrupted: SIGINT or SIGTERM came; the step was finished and saved. An evaluation is not waited for: it is
                made anew when the run goes on, so that this run ends as one without interruptions.
        """
        total, section = len(self.plan.steps), self.section
        log_every, eval_every, save_every = cadence(section, total, validated=bool(self.plan.validation))
        with (
            self.console.progress("training", total=total, completed=state.step) as bar,
            SignalWatch(self._notice) as signals,
        ):
            starts_measured = state.step == 0 and section.eval_on_start and bool(self.plan.validation)
            if starts_measured or state.awaits_evaluation:
                self._evaluate(state, signals, saved=self._is_due(state.step, save_every))
                if state.awaits_evaluation:
                    self._interrupt(state, signals)
            clock = _Clock(state.step)
            while state.step < total and not self._stops_early(state):
                rate = learning_rate(state.step, total, section)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                loss_sums = self._forward_backward(state.step)
                grad_norm = self.world.clip_grad_norm(self.parameters.values(), section.max_grad_norm)
                self._check_finite(state.step, loss_sums, grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)

                examples = self.plan.steps[state.step]
                state.record_step(loss_sums, self._targets(examples), self._tokens(examples))
                if self._is_due(state.step, log_every):
                    self._log(state, rate, grad_norm, clock, bar)
                saves = self._is_due(state.step, save_every)
                with clock.paused():
                    if self.plan.validation and self._is_due(state.step, eval_every):
                        self._evaluate(state, signals, saved=saves)
                    interrupted = self._interrupted(signals)
                    if saves or interrupted or self._stops_early(state):
                        self.save(state)
                if interrupted:
                    self._interrupt(state, signals)
        if state.step < total:
            self.console.line(f"stopped early: {state.evaluations_without_gain} evaluations without a better metric")

    def _is_due(self, step: int, every_steps: int) -> bool:
        """Whether something done every so many steps, and after the last one, is done after `step`."""
        return step == len(self.plan.steps) or (step > 0 and step % every_steps == 0)

    def _notice(self) -> None:
        self.console.line("a signal came: the step is finished and saved first; a second one ends at once")

    def _stops_early(self, state: LoopState) -> bool:
        patience = self.section.early_stopping_patience
        return patience is not None and state.evaluations_without_gain >= patience

    def total_tokens_run(self) -> dict[str, int]:
        """`tokens_run` of all processes together. A collective."""
        parts = self.world.gather(dict(self.tokens_run))
        return {kind: sum(part.get(kind, 0) for part in parts) for kind in ("training", "evaluation")}

    def _forward_backward(self, step: int) -> Tensor:
        """Add the step's gradient to `.grad`; returns the sums of losses by data set over all ranks, float32 on CPU."""
        self.objective.train()
        micro_batches = self._micro_batches(step)
        num_targets = self.plan.targets_per_step[step]
        sums = torch.zeros(len(self.plan.dataset_names), device=self.world.device)
        for index, examples in enumerate(micro_batches):
            batch = collate(examples, packed=self.packed, pad_id=self.pad_id).to(self.world.device)
            self.tokens_run["training"] += batch.input_ids.numel()
            with self.world.gradient_sync(self.objective, sync=index == len(micro_batches) - 1):
                losses = self.objective(batch)
                # DDP and FSDP average over ranks; N is that of the whole global batch.
                self.world.backward(losses.loss * (self.world.size / num_targets))
            sums += losses.by_dataset
        return self.world.sum(sums).cpu()

    def _micro_batches(self, step: int) -> list[list[EncodedExample]]:
        return self.plan.micro_batches(
            step, rank=self.world.rank, world_size=self.world.size, max_tokens=self.max_tokens, packed=self.packed
        )

    def _check_finite(self, step: int, loss_sums: Tensor, grad_norm: float) -> None:
        if math.isfinite(grad_norm) and bool(loss_sums.isfinite().all()):
            return
        what = "gradient" if bool(loss_sums.isfinite().all()) else "loss"
        examples = [self.plan.examples[index] for index in self.plan.steps[step]]
        rows = ", ".join(f"{self.plan.dataset_names[e.dataset]}:{e.row}" for e in examples[:8])
        raise NonFiniteError(
            f"the {what} of step {step + 1} is not finite (rows {rows}{', ...' if len(examples) > 8 else ''})",
            how="nothing of it was saved: lower training.learning_rate or look at these rows, then go on with --resume",
        )

    def _evaluate(self, state: LoopState, signals: SignalWatch, *, saved: bool) -> None:
        """Measure, record and show it, or leave the state waiting for it where a signal comes."""
        started = time.perf_counter()
        values = self.evaluate(lambda: self._interrupted(signals))
        if values is None:
            state.awaits_evaluation = True
            return
        if not all(map(math.isfinite, values.values())):
            raise NonFiniteError(
                f"the validation loss after step {state.step} is not finite",
                how="lower training.learning_rate, then go on with --resume",
            )
        state.record_evaluation(values[self.section.metric_for_best_model], saved=saved)
        line = {"event": "eval", "step": state.step, "epoch": self._epoch(state), **values}
        self._write(line | {"timing": {"seconds": time.perf_counter() - started}})
        best = " (best)" if state.lowest_metric == values[self.section.metric_for_best_model] else ""
        parts = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        self.console.line(f"step {state.step}/{len(self.plan.steps)}  {parts}{best}")

    @torch.no_grad()
    def evaluate(self, interrupted: Callable[[], bool]) -> dict[str, float] | None:
        """`eval_loss`, the token-weighted mean over all validation rows, and `eval_loss_NAME` for each data set.

        `interrupted` is asked before every batch, by all processes alike; None once it says so.
        """
        self.objective.eval()
        losses: dict[str, float] = {}
        total_loss = total_targets = 0.0
        for name, examples in self.plan.validation.items():
            batches = self.plan.validation_batches(
                name,
                rank=self.world.rank,
                world_size=self.world.size,
                max_tokens=self.max_tokens,
                packed=self.packed,
            )
            loss = torch.zeros((), device=self.world.device)
            for batch_examples in batches:
                if interrupted():
                    return None
                batch = collate(batch_examples, packed=self.packed, pad_id=self.pad_id).to(self.world.device)
                self.tokens_run["evaluation"] += batch.input_ids.numel()
                loss += self.objective(batch).loss
            loss_sum, targets = float(self.world.sum(loss)), int(examples.num_targets.sum())
            losses[f"eval_loss_{name}"] = loss_sum / targets
            total_loss, total_targets = total_loss + loss_sum, total_targets + targets
        return {"eval_loss": total_loss / total_targets, **losses}

    def _log(self, state: LoopState, rate: float, grad_norm: float, clock: "_Clock", bar: ProgressBar) -> None:
        total = len(self.plan.steps)
        window = state.take_window(self.plan.dataset_names)
        seconds = clock.lap()
        speed, memory = window["tokens"] / seconds, peak_memory(self.world.device)
        line = {"step": state.step, "epoch": self._epoch(state), "loss": window.pop("loss")}
        line |= {"loss_by_dataset": window.pop("loss_by_dataset"), "learning_rate": rate, "grad_norm": grad_norm}
        timing = {"seconds": seconds, "tokens_per_second": speed, "peak_memory_bytes": memory}
        self._write(line | window | {"timing": timing})
        remaining = human_seconds(clock.seconds_per_step(state.step) * (total - state.step))
        status = (
            f"loss {line['loss']:.4f}  lr {rate:.2e}  grad {grad_norm:.2f}  {speed:,.0f} tok/s  {human_bytes(memory)}"
        )
        bar.update(state.step, status)
        text = f"step {state.step}/{total}  {status}  {remaining} left"
        (self.console.debug if self.console.is_terminal else self.console.line)(text)

    def _write(self, line: dict[str, object]) -> None:
        if self.world.is_main:
            self.metrics.append(line)

    def _epoch(self, state: LoopState) -> float:
        return round(self.plan.epoch_of_step[state.step - 1], 6) if state.step else 0.0

    def _targets(self, examples: list[int]) -> list[int]:
        store = self.plan.examples
        datasets, targets = store.dataset[examples], store.num_targets[examples]
        counts = np.bincount(datasets, weights=targets, minlength=len(self.plan.dataset_names))
        return [int(count) for count in counts]

    def _tokens(self, examples: list[int]) -> int:
        return int(self.plan.examples.num_tokens[examples].sum(dtype=np.int64))

    def _interrupted(self, signals: SignalWatch) -> bool:
        """Whether a signal came to any process. A collective."""
        return self.world.any(signals.received is not None)

    def _interrupt(self, state: LoopState, signals: SignalWatch) -> NoReturn:
        # Another rank may have got the signal; all of them report the same one.
        number = max(received or 0 for received in self.world.gather(signals.received))
        done = f"step {state.step} is finished and saved" if state.step else "before the first step"
        raise Interrupted(f"interrupted; {done}", signal_number=number, how="go on with --resume")


def cadence(section: TrainingSection, total_steps: int, *, validated: bool) -> tuple[int, int, int]:
    """Steps between log lines, evaluations and checkpoints; checkpoints fall on evaluations where there are any."""
    asked = section.logging_steps
    log_every = min(10, max(1, total_steps // 100)) if asked == "auto" else every(asked, total_steps)
    eval_every = every(section.eval_steps, total_steps)
    save_every = eval_every if section.save_steps is None else every(section.save_steps, total_steps)
    if validated:
        # A share may round to a number of steps that is no multiple.
        save_every = max(1, round(save_every / eval_every)) * eval_every
    return log_every, eval_every, save_every


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's peak resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Evaluations and saves are no training time: they would falsify tokens per second."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self._lap += seconds
        self._from_time += seconds

    def seconds_per_step(self, step: int) -> float:
        mean = (self._lap - self._from_time) / (step - self._from_step)
        if not self._warm:
            self._from_step, self._from_time, self._warm = step, self._lap, True
        return mean
