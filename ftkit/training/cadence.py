"""After which steps a run logs, evaluates and saves."""

from dataclasses import dataclass

from ftkit.recipe.schema import TrainingSection
from ftkit.training.optim import every


@dataclass(frozen=True)
class Cadence:
    """Steps from one line, evaluation and checkpoint to the next; the last step has all of them."""

    total: int
    """Optimizer steps of the run."""
    log_every: int
    eval_every: int | None
    """None without validation rows."""
    save_every: int

    @classmethod
    def of(cls, section: TrainingSection, total: int, *, validated: bool) -> "Cadence":
        """As the recipe says; checkpoints fall on evaluations where there are any."""
        asked = section.logging_steps
        log_every = min(10, max(1, total // 100)) if asked == "auto" else every(asked, total)
        eval_every = every(section.eval_steps, total)
        save_every = eval_every if section.save_steps is None else every(section.save_steps, total)
        if not validated:
            return cls(total, log_every, None, save_every)
        # A share may round to a number of steps that is no multiple.
        return cls(total, log_every, eval_every, max(1, round(save_every / eval_every)) * eval_every)

    def logs_after(self, step: int) -> bool:
        """Whether step `step`, counted from 1, gets a line."""
        return self._falls_on(step, self.log_every)

    def evaluates_after(self, step: int) -> bool:
        """Whether the validation rows are measured after step `step`."""
        return self.eval_every is not None and self._falls_on(step, self.eval_every)

    def evaluations_left(self, step: int) -> int:
        """How many come after that of step `step`."""
        if self.eval_every is None:
            return 0
        last = self.total % self.eval_every > 0 and step < self.total
        return self.total // self.eval_every - step // self.eval_every + last

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is written after step `step`."""
        return self._falls_on(step, self.save_every)

    def _falls_on(self, step: int, every_steps: int) -> bool:
        return step == self.total or (step > 0 and step % every_steps == 0)
