"""`ftkit plan`: what a run will do and take, without loading weights."""

import json as json_module
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.console import Console, human_bytes, human_count, human_seconds, human_share, make_table
from ftkit.errors import FtkitError, UserError
from ftkit.recipe.load import LoadedRecipe, load_recipe

if TYPE_CHECKING:
    from ftkit.estimate import Estimator, ModelEstimate
    from ftkit.fit import Fit
    from ftkit.training.prepare import PreparedModel

MEMORY_PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "allocator")


def plan(
    recipe: Path,
    overrides: list[str],
    *,
    model_only: bool = False,
    memory: str | None = None,
    num_processes: int | None = None,
    json: bool = False,
    offline: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Plan RECIPE to the last step and print what it comes to.

    Args:
        model_only: look at model and method alone; neither data nor weights need be there.
        memory: of one GPU of another machine, e.g. 24GB; default what is free on this machine.
        num_processes: default one for each GPU that is visible.
        json: print one object instead.
    """
    loaded = load_recipe(recipe, overrides)
    elsewhere = None if memory is None else read_bytes(memory)
    try:
        if model_only:
            _plan_model(loaded, elsewhere, num_processes, json, offline=offline, trust_remote_code=trust_remote_code)
        else:
            _plan_run(loaded, elsewhere, num_processes, json, offline=offline, trust_remote_code=trust_remote_code)
    except FtkitError as error:
        raise error.located(loaded.marks) from error


def read_bytes(text: str) -> int:
    """ "24GB" -> 24,000,000,000; "24GiB" is 2^30 each, and so is "24".

    Raises:
        UserError: it is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|GiB|MB|MiB|G|M|)\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise UserError(f"--memory: {text!r} is no size", how="write it like 24GB")
    units = {"gb": 10**9, "mb": 10**6, "mib": 2**20, "m": 10**6, "g": 10**9}
    return int(float(found[1]) * units.get(found[2].lower(), 2**30))


def _plan_run(
    loaded: LoadedRecipe,
    elsewhere: int | None,
    num_processes: int | None,
    json: bool,
    *,
    offline: bool,
    trust_remote_code: bool,
) -> None:
    from ftkit.calibration import seconds_of
    from ftkit.estimate import estimate
    from ftkit.training.prepare import prepare

    console = Console(quiet=json)
    prepared = prepare(loaded, console, offline=offline, trust_remote_code=trust_remote_code)
    prepared.print(console)
    estimator, available = _place(prepared, elsewhere, num_processes)
    fit, changes = _fit(estimator, available)
    result = estimate(prepared, fit.estimate)
    seconds = None if elsewhere is not None else seconds_of(prepared, estimator, fit.estimate, result.flops)
    if json:
        planned = prepared.plan
        mixture = [counts.to_json() for counts in planned.counts]
        validation = [counts.to_json() for counts in planned.validation_counts]
        more = {"seconds": seconds, "mixture": mixture, "validation": validation, "warnings": prepared.warnings}
        _print_json(result.to_json() | _fit_json(fit, changes) | more)
        return
    _print_model(console, prepared.recipe.method.type, result)
    _print_fit(console, fit, changes, elsewhere is not None, estimator)
    if result.flops is not None:
        time = "" if seconds is None else f", about {human_seconds(seconds)} here"
        console.line(f"compute    {result.flops / 1e12:,.4g} TFLOP{time}")
    console.line(f"disk       {human_bytes(result.disk_bytes)} for the result and its checkpoints")


def _plan_model(
    loaded: LoadedRecipe,
    elsewhere: int | None,
    num_processes: int | None,
    json: bool,
    *,
    offline: bool,
    trust_remote_code: bool,
) -> None:
    from ftkit.training.prepare import prepare_model

    console = Console(quiet=json)
    prepared = prepare_model(loaded, offline=offline, trust_remote_code=trust_remote_code)
    estimator, available = _place(prepared, elsewhere, num_processes)
    fit, changes = _fit(estimator, available)
    if json:
        _print_json(fit.estimate.to_json() | _fit_json(fit, changes))
        return
    console.line(f"base       {prepared.title}")
    _print_model(console, prepared.recipe.method.type, fit.estimate)
    _print_fit(console, fit, changes, elsewhere is not None, estimator)
    console.line(f"disk       {human_bytes(fit.estimate.result_bytes)} for the result")


def _place(prepared: "PreparedModel", elsewhere: int | None, num_processes: int | None) -> tuple["Estimator", int]:
    """What the run would compute on, and the bytes that one device has for it."""
    from ftkit.estimate import Estimator, Place
    from ftkit.fit import USABLE, free_memory
    from ftkit.launch import visible_gpus

    processes = num_processes if num_processes is not None else max(1, visible_gpus())
    if elsewhere is None:
        place = Place.here(prepared, processes)
        return Estimator(prepared, place), free_memory(place.device, processes)
    return Estimator(prepared, Place.gpu(prepared, num_processes or 1)), int(USABLE["cuda"] * elsewhere)


def _fit(estimator: "Estimator", available: int) -> tuple["Fit", list[str]]:
    """Whether it fits, and if not, what would make it fit."""
    from ftkit.fit import changes_that_fit, find_fit

    fit = find_fit(estimator, available)
    return fit, ([] if fit.fits else changes_that_fit(estimator, available))


def _fit_json(fit: "Fit", changes: list[str]) -> dict[str, Any]:
    return {"fits": fit.fits, "available_bytes": fit.available, "fits_with": changes}


def _print_model(console: Console, method: str, result: "ModelEstimate") -> None:
    share = human_share(result.trainable_parameters / result.parameters)
    trains = f"{human_count(result.trainable_parameters)} of {human_count(result.parameters)} parameters ({share})"
    console.line(f"method     {method}: trains {trains}")
    table = make_table("parameters", [("kind", "left"), ("all", "right"), ("trained", "right"), ("share", "right")])
    for kind in result.kinds:
        of_kind = human_share(kind.trainable / kind.parameters) if kind.parameters else "-"
        table.add_row(kind.name, human_count(kind.parameters), human_count(kind.trainable), of_kind)
    console.table(table)
    if result.places:
        console.line(f"places     {', '.join(result.places)}")
    for note in result.notes:
        console.line(f"note       {note}")


def _print_fit(console: Console, fit: "Fit", changes: list[str], elsewhere: bool, estimator: "Estimator") -> None:
    result, place = fit.estimate, estimator.place
    memory = result.memory_bytes
    parts = {name: getattr(memory, name) for name in MEMORY_PARTS}
    listed = ", ".join(f"{name} {human_bytes(size)}" for name, size in parts.items() if size)
    each = f" on each of {place.processes} devices" if place.processes > 1 else ""
    console.line(f"memory     {human_bytes(memory.total)}{each}: {listed}")
    precision = str(place.compute_dtype).removeprefix("torch.")
    full = f"the fullest one has {human_count(result.micro_batch_tokens)}"
    console.line(f"step       {result.micro_batch}; {full}; computes in {precision}")
    where = "of such a GPU" if elsewhere else f"of this {'GPU' if place.device.type == 'cuda' else 'machine'}"
    if fit.fits:
        console.line(f"fits       yes: {human_bytes(fit.available)} {where} may be filled")
        return
    how = f"it would with {', or with '.join(changes)}" if changes else "a smaller base_model may"
    console.line(f"fits       no: {human_bytes(fit.available)} {where} may be filled; {how}")


def _print_json(values: dict[str, Any]) -> None:
    sys.stdout.write(json_module.dumps(values, ensure_ascii=False) + "\n")
