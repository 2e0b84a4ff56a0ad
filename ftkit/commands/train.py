"""`ftkit train`: numbered steps from the recipe to the run's result."""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ftkit.console import Console, human_count, human_seconds
from ftkit.errors import FtkitError, UserError
from ftkit.launch import (
    LaunchPlan,
    end_with_parent,
    launched_by_another,
    read_launch_config,
    run_processes,
    visible_gpus,
)
from ftkit.recipe.load import LoadedRecipe, dump_recipe, load_recipe, resolve
from ftkit.slurm import step_environment

if TYPE_CHECKING:
    from ftkit.distributed import World
    from ftkit.lock import RunLock
    from ftkit.runs import MetricsFile
    from ftkit.training.build import Built
    from ftkit.training.prepare import Prepared

    Watch = Callable[[Prepared, Built], None]


@dataclass(frozen=True)
class Options:
    """What the command line adds to the recipe."""

    resume: bool = False
    checkpoint: Path | None = None
    overwrite: bool = False
    offline: bool = False
    trust_remote_code: bool = False
    first_rows: int | None = None
    """Of each data set, where no more are to be read."""
    on_cpu: bool = False
    """Compute there, whatever else the machine has."""


def train(
    recipe: Path,
    overrides: list[str],
    *,
    resume: bool = False,
    checkpoint: Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    offline: bool = False,
    num_processes: int | None = None,
    launch_config: Path | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Train RECIPE, or only plan it (`dry_run`)."""
    if dry_run:
        from ftkit.commands.plan import plan

        if resume or checkpoint or launch_config:
            given = "--resume" if resume else "--from" if checkpoint else "--launch-config"
            raise UserError(
                f"--dry-run plans a run from its first step, and {given} says otherwise", how="leave one out"
            )
        plan(recipe, overrides, num_processes=num_processes, offline=offline, trust_remote_code=trust_remote_code)
        return
    from ftkit.training.trackers import check_installed

    end_with_parent()
    os.environ.update(step_environment(os.environ))
    options = Options(resume, checkpoint, overwrite, offline, trust_remote_code)
    if options.overwrite and (options.resume or options.checkpoint):
        raise UserError("--overwrite starts anew and --resume goes on", how="choose one of them")
    loaded = load_recipe(recipe, overrides)
    check_installed(loaded)
    launch = _processes(num_processes, launch_config)
    if launch is not None:
        run_processes(_arguments(recipe, overrides, options), launch)
        return
    try:
        train_here(loaded, options, Console(quiet=int(os.environ.get("RANK", "0")) > 0))
    except FtkitError as error:
        raise error.located(loaded.marks) from error


def _processes(num_processes: int | None, launch_config: Path | None) -> LaunchPlan | None:
    """Which processes to start; None where this one trains by itself."""
    if launched_by_another():
        return None
    if launch_config is not None:
        if num_processes is not None:
            raise UserError("--num-processes and --launch-config both say how many", how="leave one out")
        return read_launch_config(launch_config)
    count = num_processes if num_processes is not None else max(1, visible_gpus())
    return LaunchPlan(processes=count) if count > 1 else None


def _arguments(recipe: Path, overrides: list[str], options: Options) -> list[str]:
    """The command line of each process."""
    arguments = ["train", str(recipe), *overrides]
    arguments += ["--resume"] if options.resume else []
    arguments += ["--from", str(options.checkpoint)] if options.checkpoint else []
    arguments += ["--overwrite"] if options.overwrite else []
    arguments += ["--offline"] if options.offline else []
    arguments += ["--trust-remote-code"] if options.trust_remote_code else []
    return arguments


def train_here(loaded: LoadedRecipe, options: Options, console: Console, watch: "Watch | None" = None) -> None:
    """Train in this process, one of `World.size`.

    Args:
        watch: called with the run when it is about to take its first step.
    """
    from ftkit.distributed import World
    from ftkit.lock import RunLock
    from ftkit.training.prepare import prepare

    # 1. Everything that needs no weights, before any process group exists: it would time out meanwhile.
    prepared = prepare(
        loaded,
        console,
        offline=options.offline,
        trust_remote_code=options.trust_remote_code,
        begins=not (options.resume or options.checkpoint),
        first_rows=options.first_rows,
    )
    prepared.print(console)

    world, lock = World(on_cpu=options.on_cpu), RunLock()
    try:
        _train_as(world, loaded, options, prepared, console, lock, watch)
        # Nobody leaves while another still needs it.
        world.barrier()
    finally:
        console.close_log()
        lock.release()
        world.close()


def _train_as(
    world: "World",
    loaded: LoadedRecipe,
    options: Options,
    prepared: "Prepared",
    console: Console,
    lock: "RunLock",
    watch: "Watch | None",
) -> None:
    """Train a planned run. Its own function, so that everything that uses the process group ends before it does."""
    from ftkit.fit import choose_layout, settle_by_trial
    from ftkit.runs import LOG, METRICS, MetricsFile
    from ftkit.training.budget import read_budget
    from ftkit.training.build import build, isolate
    from ftkit.training.start import Start, begin, find_start, give_up
    from ftkit.training.trackers import tracking

    started = time.perf_counter()

    # 2. The run's directory, which nobody else may write to from here on, and the checkpoint to go on from.
    def enter() -> Start:
        """Called by the main process alone."""
        found = find_start(
            loaded,
            prepared,
            world,
            console,
            resume=options.resume,
            checkpoint=options.checkpoint,
            overwrite=options.overwrite,
        )
        if not found.finished:
            lock.take(found.run / LOG, console.warning)
        return found

    start: Start = world.on_main(enter)
    if start.finished:
        return
    console.open_log(start.run / LOG, rank=world.rank)

    # 3. How micro-batches are cut so that they fit; weights, method, optimizer; on a GPU a trial of the fullest batch.
    metrics = MetricsFile(start.run / METRICS)
    try:
        before = read_budget(start.run) if start.checkpoint is not None else None
        layout = choose_layout(prepared, world, isolate(prepared, world.device), before)
        built = build(
            prepared, world, console, layout=layout, metrics=metrics, run=start.run, checkpoint=start.checkpoint
        )
        built = settle_by_trial(built, prepared, world)
    except BaseException:
        # Also Ctrl-C and bugs: an empty directory would be in the way of the next try.
        console.close_log()
        if world.is_main:
            give_up(start)
        raise
    built.print(console)
    world.on_main(lambda: begin(start))
    world.on_main(lambda: _write_records(loaded, prepared, built, start.run, metrics))

    # 4. The loop, followed by the recipe's trackers.
    if watch is not None:
        watch(prepared, built)
    with tracking(metrics, loaded.recipe.training, start.run, console, main=world.is_main, step=built.state.step):
        built.loop.run(built.state)

    # 5. The result: the weights of the best or the last checkpoint.
    tokens = built.loop.feed.total_tokens_run()
    since = f" since step {start.checkpoint.step}" if start.checkpoint is not None else ""
    console.line(
        f"ran {human_count(tokens['training'])} tokens in training and {human_count(tokens['evaluation'])} in "
        f"evaluation{since}, padding included"
    )

    world.on_main(lambda: _publish(prepared, built, start.run, console, started))


def _publish(prepared: "Prepared", built: "Built", run: Path, console: Console, started: float) -> None:
    """Write the result; show how the losses went, which checkpoint it is, and what to do with it."""
    from ftkit.figures import curves_of, evaluation_table, loss_figures
    from ftkit.runs import METRICS
    from ftkit.training.result import publish_result

    result = publish_result(run, built.state, prepared=prepared, method=built.method, model=built.model)
    console.line()
    found = loss_figures(run / METRICS)
    metric = prepared.recipe.training.metric_for_best_model
    evaluations = evaluation_table(found, metric=metric, best=built.state.best_step, published=result.step)
    if evaluations is not None:
        console.table(evaluations)
    for curve in curves_of(found):
        console.line(curve)
    console.line(f"done in {human_seconds(time.perf_counter() - started)}: {result.text}", style="bold")
    for command in result.next_commands:
        console.line(f"  {command}")


def _write_records(
    loaded: LoadedRecipe, prepared: "Prepared", built: "Built", run: Path, metrics: "MetricsFile"
) -> None:
    """recipe.yaml, environment.json and validation.json; metrics.jsonl cut back to what the checkpoint had seen."""
    from ftkit.runs import (
        BASE,
        BUDGET,
        DATA,
        ENVIRONMENT,
        RECIPE,
        STEPS,
        VALIDATION,
        describe_environment,
        write_json,
        write_whole,
    )

    metrics.truncate(built.state.metrics_lines)
    recipe = resolve(loaded)
    # A hub model is pinned, so that this file repeats the run after the branch has moved on.
    pinned = recipe.model.model_copy(update={"revision": prepared.base.revision})
    # So is how micro-batches are cut: sums in another order differ in their last bits.
    budget = built.layout.budget
    cut = {"max_tokens_per_device": budget.max_tokens, "gradient_checkpointing": budget.checkpointing}
    recipe = recipe.model_copy(update={"model": pinned, "training": recipe.training.model_copy(update=cut)})
    write_whole(run / RECIPE, dump_recipe(recipe))
    write_json(run / VALIDATION, prepared.plan.validation_rows)
    write_json(
        run / ENVIRONMENT,
        describe_environment(built.loop.world.device, built.loop.world.size)
        | {"seed": prepared.recipe.seed, DATA: prepared.plan.fingerprint}
        | {STEPS: len(prepared.plan.steps)}
        | {BASE: asdict(built.identity), "precision": built.precision, "packing": built.layout.isolation.reason}
        | {BUDGET: asdict(budget)},
    )
