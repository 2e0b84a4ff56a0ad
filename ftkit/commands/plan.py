"""`ftkit plan`: what a run will do and take, without loading weights."""

import json as json_module
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.console import Console, human_bytes, human_count, human_share
from ftkit.errors import FtkitError
from ftkit.recipe.load import LoadedRecipe, load_recipe

if TYPE_CHECKING:
    import torch

    from ftkit.estimate import ModelEstimate


def plan(
    recipe: Path,
    overrides: list[str],
    *,
    model_only: bool = False,
    json: bool = False,
    offline: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Plan RECIPE to the last step and print what it comes to.

    Args:
        model_only: look at model and method alone; neither data nor weights need be there.
        json: print one object instead.
    """
    loaded = load_recipe(recipe, overrides)
    plan_it = _plan_model if model_only else _plan_run
    try:
        plan_it(loaded, json=json, offline=offline, trust_remote_code=trust_remote_code)
    except FtkitError as error:
        raise error.located(loaded.marks) from error


def _plan_run(loaded: LoadedRecipe, *, json: bool, offline: bool, trust_remote_code: bool) -> None:
    from ftkit.estimate import estimate
    from ftkit.training.prepare import prepare

    console = Console(quiet=json)
    prepared = prepare(loaded, console, offline=offline, trust_remote_code=trust_remote_code)
    prepared.print(console)
    result = estimate(prepared, _device())
    if json:
        planned = prepared.plan
        mixture = [counts.to_json() for counts in planned.counts]
        validation = [counts.to_json() for counts in planned.validation_counts]
        _print_json(result.to_json() | {"mixture": mixture, "validation": validation, "warnings": prepared.warnings})
        return
    _print_model(console, prepared.recipe.method.type, result)
    console.line(f"disk       {human_bytes(result.disk_bytes)} for the result and its checkpoints")


def _plan_model(loaded: LoadedRecipe, *, json: bool, offline: bool, trust_remote_code: bool) -> None:
    from ftkit.estimate import estimate_model
    from ftkit.training.prepare import prepare_model

    console = Console(quiet=json)
    prepared = prepare_model(loaded, offline=offline, trust_remote_code=trust_remote_code)
    result = estimate_model(prepared, _device())
    if json:
        _print_json(result.to_json())
        return
    console.line(f"base       {prepared.title}")
    _print_model(console, prepared.recipe.method.type, result)
    console.line(f"disk       {human_bytes(result.result_bytes)} for the result")


def _print_model(console: Console, method: str, result: "ModelEstimate") -> None:
    share, memory = human_share(result.trainable_parameters / result.parameters), result.memory_bytes
    trains = f"{human_count(result.trainable_parameters)} of {human_count(result.parameters)} parameters ({share})"
    console.line(f"method     {method}: trains {trains}")
    if result.places:
        console.line(f"places     {', '.join(result.places)}")
    for note in result.notes:
        console.line(f"note       {note}")
    console.line(
        f"memory     weights {human_bytes(memory.weights)}, gradients {human_bytes(memory.gradients)}, optimizer "
        f"{human_bytes(memory.optimizer)}: {human_bytes(memory.total)}; activations come on top"
    )


def _device() -> "torch.device":
    """What the run would compute on."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _print_json(values: dict[str, Any]) -> None:
    sys.stdout.write(json_module.dumps(values, ensure_ascii=False) + "\n")
