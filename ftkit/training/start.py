"""Where a run begins: in a new directory, or after a checkpoint of one that is there."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftkit.console import Console
from ftkit.distributed import World
from ftkit.errors import UserError
from ftkit.recipe.load import LoadedRecipe, load_recipe, resolve
from ftkit.recipe.schema import Recipe, TrainingSection
from ftkit.runs import (
    CHECKPOINTS,
    RECIPE,
    discard_unstarted,
    find_runs,
    has_result,
    new_run_directory,
    planned_steps,
    set_aside_results,
)
from ftkit.training.checkpoint import Checkpoint, check_world, newest_verified, read_checkpoint, set_aside_later
from ftkit.training.optim import every, learning_rate, warmup_steps
from ftkit.training.prepare import Prepared
from ftkit.training.state import LoopState

CUT = ("max_tokens_per_device", "gradient_checkpointing")
"""Keys of `training` that a run settles where they are `auto`."""


@dataclass(frozen=True)
class Start:
    """A run's directory and the checkpoint to go on from."""

    run: Path
    checkpoint: Checkpoint | None = None
    finished: bool = False
    """Nothing is left to do."""
    replaced: Path | None = None
    """Where the run that was in the way was moved to."""


def find_start(
    loaded: LoadedRecipe,
    prepared: Prepared,
    world: World,
    console: Console,
    *,
    resume: bool,
    checkpoint: Path | None,
    overwrite: bool,
) -> Start:
    """A new directory, or the one to go on in, in which nothing is touched yet: see `begin` and `give_up`.

    Args:
        resume: go on with the newest run of this recipe, where there is one.
        checkpoint: go on from this one.
        overwrite: move a run that is in the way aside.

    Raises:
        UserError: the directory is taken; the checkpoint is none of this recipe and data.
    """
    recipe, name, steps = resolve(loaded), loaded.path.stem, len(prepared.plan.steps)
    output_dir, method = prepared.recipe.output_dir, recipe.method.type
    if checkpoint is not None:
        found = read_checkpoint(checkpoint)
        run = found.path.resolve().parent.parent
        if found.path.resolve().parent.name != CHECKPOINTS or not (run / RECIPE).is_file():
            raise UserError(f"{checkpoint} lies in no run", how="name RUN/checkpoints/step-...")
        if not agrees(run, recipe, steps=steps):
            raise UserError(
                f"the recipe is not the one that {checkpoint} was written with, nor a longer run of it",
                how=f"name {run / RECIPE}, or train anew without --from",
            )
        return _after(found, run, prepared, world, console)
    if resume:
        for run in find_runs(output_dir, name=name, method=method):
            if agrees(run, recipe, steps=steps):
                return _go_on(run, prepared, world, console)
        console.line("no run of this recipe to go on with: starting at step 0")
    run, replaced = new_run_directory(output_dir, name=name, method=method, overwrite=overwrite)
    return Start(run, replaced=replaced)


def begin(start: Start) -> None:
    """Set aside what no longer follows from the run once it goes on: later checkpoints, and what was made of it."""
    if start.checkpoint is not None:
        set_aside_later(start.checkpoint)
    set_aside_results(start.run)


def give_up(start: Start) -> None:
    """Leave things as `find_start` found them, after a failure before the first step."""
    discard_unstarted(start.run)
    if start.replaced is not None and not start.run.exists():
        start.replaced.rename(start.run)


def agrees(run: Path, recipe: Recipe, *, steps: int) -> bool:
    """Whether a run of `recipe` (resolved) may go on in `run`: the same, longer, or with other logging.

    Args:
        steps: optimizer steps that `recipe` comes to.
    """
    try:
        theirs = resolve(load_recipe(run / RECIPE))
    except UserError:
        return False
    if recipe.model.revision is None:
        # A run's own recipe is pinned to the commit that it found.
        theirs = theirs.model_copy(update={"model": theirs.model.model_copy(update={"revision": None})})
    # Likewise to how its micro-batches were cut.
    left_open = [name for name in CUT if getattr(recipe.training, name) == "auto"]
    training = theirs.training.model_copy(update=dict.fromkeys(left_open, "auto"))
    theirs = theirs.model_copy(update={"training": training})
    if _without_length(theirs) != _without_length(recipe):
        return False
    before = planned_steps(run)
    return _length(theirs) == _length(recipe) or (before is not None and steps >= before)


def _without_length(recipe: Recipe) -> dict[str, Any]:
    """What must be the same for a run to go on."""
    values = recipe.model_dump(exclude={"output_dir"})
    for name in ("logging_steps", "report_to", "run_name", "project", "max_steps", "num_train_epochs"):
        del values["training"][name]
    return values


def _length(recipe: Recipe) -> tuple[str, int]:
    steps, epochs = recipe.training.max_steps, recipe.training.num_train_epochs
    return ("epochs", epochs) if steps is None else ("steps", steps)


def _go_on(run: Path, prepared: Prepared, world: World, console: Console) -> Start:
    """In `run`, from its newest whole checkpoint."""
    finished, before = has_result(run), planned_steps(run)
    if finished and (before is None or len(prepared.plan.steps) <= before):
        console.line(f"{run} is finished already: nothing to do")
        return Start(run, finished=True)
    checkpoint = newest_verified(run / CHECKPOINTS, console.warning)
    if checkpoint is None:
        console.line(f"{run} holds no whole checkpoint: starting at step 0")
        return Start(run)
    patience = prepared.recipe.training.early_stopping_patience
    if finished and patience is not None:
        state = LoopState.from_json(checkpoint.state)
        if state.evaluations_without_gain >= patience:
            console.line(f"{run} stopped early after step {state.step}, as a longer run does: nothing to do")
            return Start(run, finished=True)
    return _after(checkpoint, run, prepared, world, console)


def _after(checkpoint: Checkpoint, run: Path, prepared: Prepared, world: World, console: Console) -> Start:
    plan, before = prepared.plan, planned_steps(run)
    # What the steps after it train on may differ, as it does in a longer run.
    if checkpoint.state["plan"] != plan.fingerprint_until(checkpoint.step):
        raise UserError(
            f"the recipe or its data is not the one that {checkpoint.path} was written with",
            how="train anew, without --resume and --from",
        )
    check_world(checkpoint, world)
    console.line(f"going on with {run} after step {checkpoint.step}")
    if before is not None and before != len(plan.steps):
        for text in lengthened(prepared.recipe.training, checkpoint.step, before, len(plan.steps)):
            console.line(text)
    return Start(run, checkpoint)


def lengthened(section: TrainingSection, step: int, before: int, now: int) -> list[str]:
    """What becomes of the schedule where a run of `before` steps goes on after step `step` as one of `now`, in lines.

    The rate follows from the step and the length of the run alone: from here on it is that of a run of the new length.
    """

    def rate(number: int, total: int) -> str:
        return f"{learning_rate(number - 1, total, section):.2e}"

    lines, longer = [], f"the run has {now} steps in place of {before}"
    if section.lr_scheduler_type == "constant" and warmup_steps(section, now) <= step:
        lines.append(f"{longer}: its learning rate stays {rate(now, now)}")
    elif step < now:
        # Beyond its end the shorter run has no rate.
        was = f"step {before} did at {rate(before, before)}"
        if step < before:
            was = f"in the run of {before} steps it does at {rate(step + 1, before)}"
        lines.append(
            f"{longer}, and its schedule is stretched: step {step + 1} learns at {rate(step + 1, now)}, {was}; "
            f"step {now} will at {rate(now, now)}"
        )
    old, new = every(section.eval_steps, before), every(section.eval_steps, now)
    if old != new:
        lines.append(
            f"training.eval_steps: {section.eval_steps} of the run is every {new} steps now, it was every {old}"
        )
    return lines
