"""`ftkit train RECIPE --smoke`: the whole way of a recipe in a minute, on a tiny random model; numbered steps."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ftkit.commands.train import Options, train_here
from ftkit.console import Console, human_count
from ftkit.errors import FtkitError, UserError
from ftkit.launch import launched_by_another
from ftkit.recipe.load import LoadedRecipe, load_recipe

if TYPE_CHECKING:
    from ftkit.smoke.report import SmokeReport

PARTS, COPY = "parts", "copy"
"""Directories of the temporary one: the base's configuration and tokenizer, and the small model."""
OWN = "--smoke is a whole run of its own, in one process and a temporary directory"


def smoke(
    recipe: Path,
    overrides: list[str],
    *,
    model: Path | None,
    others: Mapping[str, object],
    offline: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Try RECIPE from its data to the merged result, and print what was checked; the last line is JSON.

    Args:
        model: a directory to take configuration and tokenizer from, without any network.
        others: options of the command line that do not go with this one -> whether they were given.
    """
    if given := [name for name, value in others.items() if value]:
        if "--smoke" in given:
            raise UserError("--smoke-model says what --smoke is tried on", how="add --smoke")
        raise UserError(OWN, how=f"leave out {', '.join(given)}")
    if launched_by_another():
        raise UserError(OWN, how="start it without a launcher")
    if model is not None:
        # Before huggingface_hub and datasets, which read it when they are imported.
        os.environ["HF_HUB_OFFLINE"] = "1"
    from ftkit.failures import known_failure
    from ftkit.smoke.report import SmokeReport

    report, console = SmokeReport(), Console()
    options = Options(offline=offline or model is not None, trust_remote_code=trust_remote_code)
    try:
        loaded = load_recipe(recipe, overrides)
        with _workplace() as work:
            try:
                _try(loaded, options, model, work, report, console)
            except FtkitError as error:
                raise _named_as_written(error, work, loaded) from error
    except FtkitError as error:
        console.table(report.table())
        error.last_line = report.line(error)
        raise
    except BaseException as error:
        known = known_failure(error, ()) if isinstance(error, OSError | MemoryError | RuntimeError) else None
        console.table(report.table())
        if known is not None:
            known.last_line = report.line(known)
            raise known from error
        sys.stdout.write(report.line(error) + "\n")
        raise
    console.table(report.table())
    sys.stdout.write(report.line() + "\n")


@contextmanager
def _workplace() -> Iterator[Path]:
    """A temporary directory that all files of the run go to, prepared data too; nothing of it stays."""
    work, before = Path(tempfile.mkdtemp(prefix="ftkit-smoke-")), os.environ.get("FTKIT_CACHE")
    os.environ["FTKIT_CACHE"] = str(work / "cache")
    try:
        yield work
    finally:
        del os.environ["FTKIT_CACHE"]
        if before is not None:
            os.environ["FTKIT_CACHE"] = before
        shutil.rmtree(work, ignore_errors=True)


def _try(
    loaded: LoadedRecipe, options: Options, model: Path | None, work: Path, report: "SmokeReport", console: Console
) -> None:
    """Every step, in the order in which a run takes them."""
    from ftkit.runs import CHECKPOINTS
    from ftkit.smoke.checks import check_merge, check_reload, check_resumed, check_saved, read_finished
    from ftkit.smoke.recipe import FIRST_ROWS, STEPS, check_output
    from ftkit.smoke.watch import Watch
    from ftkit.training.checkpoint import checkpoint_name

    # 1. Where the real run would write.
    with report.check("output_dir") as check:
        recipe = loaded.recipe
        place = check_output(recipe.output_dir, name=loaded.path.stem, method=recipe.method.type)
        check.detail = f"{place} can be written to"

    # 2. The base, the method on the whole of it, the small copy, and the data.
    small, stored = _small_run(loaded, options, model, work, report)
    options = replace(options, offline=True, first_rows=FIRST_ROWS, on_cpu=True)
    _read_data(small, options, report, console)

    # 3. Training, evaluation, checkpoints, result: the real way.
    run, watch = Path(small.recipe.output_dir), Watch()
    with report.check("train") as check:
        train_here(small, options, Console(quiet=True), watch)
        finished = read_finished(run)
        report.figures |= {"steps": finished.steps, "evaluations": finished.evaluations}
        check.detail = f"{STEPS} steps, loss " + ", ".join(f"{step['loss']:.4f}" for step in finished.steps)
    with report.check("gradients") as check:
        check.detail = watch.check_gradients()
    with report.check("evaluation") as check:
        check.detail = ", ".join(f"{line['eval_loss']:.4f} after step {line['step']}" for line in finished.evaluations)
        if not finished.evaluations:
            check.outcome, check.detail = "none", "the recipe has no validation rows"
    with report.check("save") as check:
        check.detail = check_saved(run, STEPS)

    # 4. The same from the first step's checkpoint on.
    resumed = Watch()
    with report.check("resume") as check:
        go_on = replace(options, checkpoint=run / CHECKPOINTS / checkpoint_name(1))
        train_here(small, go_on, Console(quiet=True), resumed)
        check.detail = check_resumed(finished, watch, read_finished(run), resumed, since=1)

    # 5. What becomes of the result.
    with report.check("merge") as check:
        check.outcome, check.detail = check_merge(run, resumed, stored_quantization=stored)
    with report.check("reload") as check:
        check.detail = check_reload(run, resumed)


def _small_run(
    loaded: LoadedRecipe, options: Options, model: Path | None, work: Path, report: "SmokeReport"
) -> tuple[LoadedRecipe, str | None]:
    """The recipe on a small copy of its base, and what the base is stored in where that is quantized."""
    from ftkit.estimate import count_parameters
    from ftkit.models.isolation import FLASH
    from ftkit.runs import describe_environment
    from ftkit.smoke.base import CPU, gather_parts, runnable_quantization, write_base
    from ftkit.smoke.recipe import copy_size, fitting_method, shortened, with_base
    from ftkit.training.prepare import prepare_model

    recipe, code = loaded.recipe, options.trust_remote_code
    report.figures |= {"recipe": str(loaded.path), "method": recipe.method.type, "base_model": recipe.base_model}
    report.figures["versions"] = describe_environment(CPU, 1)["packages"]
    with report.check("base") as check:
        parts = gather_parts(loaded, work / PARTS, model=model, offline=options.offline, trust_remote_code=code)
        wanted = parts.stored_quantization or recipe.model.quantization
        whole = prepare_model(with_base(loaded, parts.directory, wanted), offline=True, trust_remote_code=code)
        report.figures["architecture"] = whole.config.model_type
        copy = write_base(whole.config, parts, work / COPY, trust_remote_code=code)
        size = copy_size(copy)
        report.figures["copy"] = size
        layers = f"{size['layers']} layer{'s' if size['layers'] > 1 else ''}"
        check.detail = f"{whole.config.model_type}, random weights in {layers} of width {size['hidden_size']}"
    with report.check("method") as check:
        counts = count_parameters(whole)
        section, changed = fitting_method(recipe, whole.config, copy)
        quantization, other = runnable_quantization(wanted)
        trains = human_count(counts.trainable_parameters)
        check.detail = f"trains {trains} of {human_count(counts.total_parameters)} parameters of the whole model"
        report.figures |= {"parameters": counts.total_parameters, "trainable_parameters": counts.trainable_parameters}
        report.figures["changed"] = [*changed, *([other] if other else [])]
        if recipe.model.attn_implementation == FLASH:
            report.figures["changed"].append(f"model.attn_implementation auto for {FLASH}, which needs a GPU")
    small = with_base(loaded, work / COPY, quantization)
    return shortened(small, work / "runs" / loaded.path.stem, section), parts.stored_quantization


def _read_data(small: LoadedRecipe, options: Options, report: "SmokeReport", console: Console) -> None:
    """Read, phrase and encode the rows once by themselves, so that what is wrong with them is told as such."""
    from ftkit.smoke.recipe import check_vocabulary
    from ftkit.training.prepare import mixture_table, prepare

    code, first_rows = options.trust_remote_code, options.first_rows
    with report.check("data") as check:
        prepared = prepare(small, Console(quiet=True), offline=True, trust_remote_code=code, first_rows=first_rows)
        plan = prepared.plan
        check_vocabulary(prepared)
        report.figures["mixture"] = [count.to_json() for count in plan.counts]
        used, sets = sum(count.rows_used for count in plan.counts), len(plan.counts)
        check.detail = f"{used} rows of {sets} data set{'s' if sets > 1 else ''}, {human_count(plan.num_tokens)} tokens"
        check.detail += f", {human_count(sum(plan.targets_per_step))} of them trained on"
    console.table(mixture_table(plan))
    for count in plan.counts:
        for why, rows in count.dropped.items():
            console.line(f"dropped    {count.name}: {len(rows)} of the rows that were read, {why}")
    if prepared.template.warning:
        console.warning(prepared.template.warning)
    for line in report.figures["changed"]:
        console.line(f"changed    {line}")


def _named_as_written(error: FtkitError, work: Path, loaded: LoadedRecipe) -> FtkitError:
    """The error with places, and with the base's name in the place of the directories that stand for it."""

    def mended(text: str) -> str:
        for name in (PARTS, COPY):
            text = text.replace(str(work / name), loaded.recipe.base_model)
        return text

    error = error.located(loaded.marks)
    error.problems = tuple(
        replace(problem, what=mended(problem.what), how=problem.how and mended(problem.how))
        for problem in error.problems
    )
    error.args = ("\n".join(map(str, error.problems)),)
    return error
