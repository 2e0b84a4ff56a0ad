"""`ftkit plan`: what a run will do and take, without loading weights."""

import json as json_module
import sys
from pathlib import Path

from ftkit.console import Console, human_bytes, human_count
from ftkit.errors import FtkitError
from ftkit.recipe.load import LoadedRecipe, load_recipe


def plan(
    recipe: Path,
    overrides: list[str],
    *,
    json: bool = False,
    offline: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Plan RECIPE to the last step and print what it comes to; `json` prints one object instead."""
    loaded = load_recipe(recipe, overrides)
    try:
        _plan(loaded, json=json, offline=offline, trust_remote_code=trust_remote_code)
    except FtkitError as error:
        raise error.located(loaded.marks) from error


def _plan(loaded: LoadedRecipe, *, json: bool, offline: bool, trust_remote_code: bool) -> None:
    import torch

    from ftkit.estimate import estimate
    from ftkit.training.prepare import prepare

    console = Console(quiet=json)
    prepared = prepare(loaded, console, offline=offline, trust_remote_code=trust_remote_code)
    prepared.print(console)
    result = estimate(prepared, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if json:
        planned = prepared.plan
        values = result.to_json() | {
            "mixture": [counts.to_json() for counts in planned.counts],
            "validation": [counts.to_json() for counts in planned.validation_counts],
            "warnings": prepared.warnings,
        }
        sys.stdout.write(json_module.dumps(values, ensure_ascii=False) + "\n")
        return
    share = 100 * result.trainable_parameters / result.parameters
    memory = result.memory_bytes
    console.line(
        f"method     {prepared.recipe.method.type}: trains {human_count(result.trainable_parameters)} of "
        f"{human_count(result.parameters)} parameters ({share:.2f}%)"
    )
    if result.places:
        console.line(f"places     {', '.join(result.places)}")
    console.line(
        f"memory     weights {human_bytes(memory.weights)}, gradients {human_bytes(memory.gradients)}, "
        f"optimizer {human_bytes(memory.optimizer)}; activations come on top"
    )
    console.line(f"disk       {human_bytes(result.disk_bytes)} for the result and its checkpoints")
