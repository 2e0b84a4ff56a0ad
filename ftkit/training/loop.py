"""The training loop: fetch, forward, backward, clip, step, log, evaluate, save."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from ftkit.console import Console
from ftkit.data.plan import Plan
from ftkit.distributed import SignalWatch, World
from ftkit.errors import Interrupted, NonFiniteError
from ftkit.recipe.schema import TrainingSection
from ftkit.runs import MetricsFile
from ftkit.training.cadence import Cadence
from ftkit.training.feed import Feed
from ftkit.training.optim import learning_rate, set_learning_rate
from ftkit.training.progress import Progress
from ftkit.training.state import LoopState
from ftkit.training.validation import validation_losses


@dataclass(frozen=True)
class Loop:
    """What the loop works on; built by the train command."""

    section: TrainingSection
    plan: Plan
    world: World
    feed: Feed
    objective: nn.Module
    """The prepared root module: Batch -> LossSums."""
    parameters: dict[str, nn.Parameter]
    """Name -> trained parameter."""
    optimizer: torch.optim.Optimizer
    metrics: MetricsFile
    console: Console
    save: Callable[[LoopState], None]
    """Write a checkpoint; a collective."""

    def run(self, state: LoopState) -> None:
        """Train from `state` to the end of the plan, or until early stopping; the last step is always saved.

        Raises:
            NonFiniteError: before the optimizer step that would have used a loss or gradient that is not finite.
            Interrupted: SIGINT or SIGTERM came; the step was finished and saved. An evaluation is not waited for: it is
                made anew when the run goes on, so that this run ends as one without interruptions.
        """
        total, section, validated = len(self.plan.steps), self.section, bool(self.plan.validation)
        cadence = Cadence.of(section, total, validated=validated)
        with (
            self.console.progress("training", total=total, completed=state.step) as bar,
            SignalWatch(self._notice) as signals,
        ):
            progress = Progress(self.plan, cadence, self.world, self.metrics, self.console, bar, state.step)
            with progress.paused():
                if state.awaits_evaluation or (validated and section.eval_on_start and state.step == 0):
                    self._evaluate(state, signals, progress, saved=cadence.saves_after(state.step))
                if state.awaits_evaluation:
                    self._interrupt(state, signals)
            while state.step < total and not self._stops_early(state):
                rate = learning_rate(state.step, total, section)
                set_learning_rate(self.optimizer, rate)
                loss_sums = self._forward_backward(state.step)
                grad_norm = self.world.clip_grad_norm(self.parameters.values(), section.max_grad_norm)
                self._check_finite(state.step, loss_sums, grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)

                self._record(state, loss_sums)
                progress.step(state)
                if cadence.logs_after(state.step):
                    progress.steps(state, learning_rate=rate, grad_norm=grad_norm)
                saves = cadence.saves_after(state.step)
                with progress.paused():
                    if cadence.evaluates_after(state.step):
                        self._evaluate(state, signals, progress, saved=saves)
                    interrupted = self._interrupted(signals)
                    if saves or interrupted or self._stops_early(state):
                        self.save(state)
                if interrupted:
                    self._interrupt(state, signals)
        if state.step < total:
            self.console.line(f"stopped early: {state.evaluations_without_gain} evaluations without a better metric")

    def _forward_backward(self, step: int) -> Tensor:
        """Add the step's gradient to `.grad`; returns the sums of losses by data set over all ranks, float32 on CPU."""
        self.objective.train()
        num_targets = self.plan.targets_per_step[step]
        sums = torch.zeros(len(self.plan.dataset_names), device=self.world.device)
        for batch, is_last in self.feed.training(step):
            with self.world.gradient_sync(self.objective, sync=is_last):
                losses = self.objective(batch)
                # DDP and FSDP average over ranks; N is that of the whole global batch.
                self.world.backward(losses.loss * (self.world.size / num_targets))
            sums += losses.by_dataset
        return self.world.sum(sums).cpu()

    def _record(self, state: LoopState, loss_sums: Tensor) -> None:
        """Count the step that `state` was about to do as done."""
        store, examples = self.plan.examples, self.plan.steps[state.step]
        targets = np.bincount(store.dataset[examples], store.num_targets[examples], len(self.plan.dataset_names))
        tokens = int(store.num_tokens[examples].sum(dtype=np.int64))
        state.record_step(loss_sums, [int(count) for count in targets], tokens)

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

    def _evaluate(self, state: LoopState, signals: SignalWatch, progress: Progress, *, saved: bool) -> None:
        """Measure, record and show it, or leave the state waiting for it where a signal comes."""
        started = time.perf_counter()
        losses = validation_losses(self.objective, self.feed, lambda: self._interrupted(signals))
        if losses is None:
            state.awaits_evaluation = True
            return
        if not all(map(math.isfinite, losses.values())):
            raise NonFiniteError(
                f"the validation loss after step {state.step} is not finite",
                how="lower training.learning_rate, then go on with --resume",
            )
        metric = losses[self.section.metric_for_best_model]
        state.record_evaluation(metric, saved=saved)
        best = state.lowest_metric == metric
        progress.evaluation(state, losses, seconds=time.perf_counter() - started, best=best)

    def _stops_early(self, state: LoopState) -> bool:
        patience = self.section.early_stopping_patience
        return patience is not None and state.evaluations_without_gain >= patience

    def _notice(self) -> None:
        self.console.line("a signal came: the step is finished and saved first; a second one ends at once")

    def _interrupted(self, signals: SignalWatch) -> bool:
        """Whether a signal came to any process. A collective."""
        return self.world.any(signals.received is not None)

    def _interrupt(self, state: LoopState, signals: SignalWatch) -> NoReturn:
        # Another rank may have got the signal; all of them report the same one.
        number = max(received or 0 for received in self.world.gather(signals.received))
        done = f"step {state.step} is finished and saved" if state.step else "before the first step"
        raise Interrupted(f"interrupted; {done}", signal_number=number, how="go on with --resume")
