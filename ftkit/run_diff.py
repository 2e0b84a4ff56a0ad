"""Where two runs part: recipe, data, environment, losses, weights. What `ftkit diff` prints."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftkit.errors import UserError
from ftkit.figures import loss_figures
from ftkit.models.files import hash_files
from ftkit.recipe.marked_yaml import read_yaml
from ftkit.runs import BUDGET, ENVIRONMENT, METRICS, RECIPE, VALIDATION, result_of

PARTS = ("recipe", "data", "environment", "loss", "weights")
_PLACES = ("output_dir", "training.report_to", "training.run_name", "training.project")
"""Keys of a recipe that say where, not what."""
_ENVIRONMENT = ("python", "packages", "platform", "processor", "device", "processes", "threads", "precision")
_CUT = ("packing", BUDGET)
"""How micro-batches are cut and run: it changes the order of sums."""
_DATA = ("data_fingerprint", "base_model.fingerprint")


@dataclass(frozen=True)
class Difference:
    """One thing in which two runs differ."""

    part: str
    """One of PARTS."""
    what: str
    first: Any
    second: Any
    note: str = ""


def differences(first: Path, second: Path, *, tolerance: float = 0.0) -> list[Difference]:
    """All that two runs differ in, part by part.

    Args:
        tolerance: how far losses of the same step may be apart; above 0 the weights are not compared.

    Raises:
        UserError: one of them is no run.
    """
    for run in (first, second):
        if missing := [name for name in (RECIPE, ENVIRONMENT, METRICS) if not (run / name).is_file()]:
            raise UserError(f"{run} is not a run: it has no {missing[0]}", how="name the directories of two runs")
        if not loss_figures(run / METRICS):
            raise UserError(f"{run} has recorded no loss, so there is nothing to compare", how="train it first")
    found = [*_recipes(first, second), *_environments(first, second), *_losses(first, second, tolerance)]
    if tolerance == 0:
        found += _weights(first, second)
    return sorted(found, key=lambda one: PARTS.index(one.part))


def _recipes(first: Path, second: Path) -> Iterator[Difference]:
    mine, other = (dict(flat(read_yaml(run / RECIPE)[0])) for run in (first, second))
    kept = [{key: value for key, value in all_.items() if not _is_of(key, _PLACES)} for all_ in (mine, other)]
    yield from _between("recipe", *kept)


def _environments(first: Path, second: Path) -> Iterator[Difference]:
    mine, other = (dict(flat(_described(run))) for run in (first, second))
    for part, names in (("data", _DATA), ("environment", (*_ENVIRONMENT, *_CUT))):
        kept = [{key: value for key, value in all_.items() if _is_of(key, names)} for all_ in (mine, other)]
        yield from _between(part, *kept)
    rows = [_held_back(run) for run in (first, second)]
    if rows[0] != rows[1]:
        counts = [sum(map(len, part.values())) for part in rows]
        yield Difference("data", "rows held back", counts[0], counts[1])


def _described(run: Path) -> dict[str, Any]:
    """environment.json, of its precision what is computed in: how much trains is the recipe's doing."""
    values: dict[str, Any] = json.loads((run / ENVIRONMENT).read_text("utf-8"))
    return values | {"precision": str(values.get("precision", "")).rpartition("; ")[2]}


def _held_back(run: Path) -> dict[str, list[Any]]:
    path = run / VALIDATION
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _losses(first: Path, second: Path, tolerance: float) -> Iterator[Difference]:
    """The first step at which a figure differs, for each figure, and by how much it does at most."""
    mine, other = (loss_figures(run / METRICS) for run in (first, second))
    for name in dict.fromkeys([*mine, *other]):
        left, right = mine.get(name, {}), other.get(name, {})
        apart = {step: abs(left[step] - right[step]) for step in sorted(left.keys() & right.keys())}
        # A loss that is not a number is not within any tolerance of one that is.
        parted = [
            step
            for step, by in apart.items()
            if not by <= tolerance and not (math.isnan(left[step]) and math.isnan(right[step]))
        ]
        if parted:
            worst = max(parted, key=lambda step: apart[step])
            note = f"{len(parted)} of {len(apart)} steps, at most {apart[worst]:.3g}, at step {worst}"
            yield Difference("loss", f"{name} from step {parted[0]} on", left[parted[0]], right[parted[0]], note)
        if lone := sorted(left.keys() ^ right.keys()):
            counts = (len(left), len(right))
            yield Difference("loss", f"steps with {name}", *counts, f"the first of one alone is {lone[0]}")


def _weights(first: Path, second: Path) -> Iterator[Difference]:
    mine, other = (_hash_of_result(run) for run in (first, second))
    if mine != other:
        yield Difference("weights", result_of(first).name, mine, other)


def has_weights(run: Path) -> bool:
    """Whether a run has handed over weights that could be compared."""
    return _hash_of_result(run) is not None


def _hash_of_result(run: Path) -> str | None:
    """Of the weights that a run handed over, short; None before it has."""
    files = sorted(result_of(run).glob("*.safetensors")) if result_of(run) != run else []
    return hash_files(files)[:19] if files else None


def _between(part: str, mine: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[Difference]:
    for key in dict.fromkeys([*mine, *other]):
        if mine.get(key) != other.get(key):
            yield Difference(part, key, mine.get(key), other.get(key))


def _is_of(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The plain values inside, by dotted path: {"a": {"b": [1]}} -> ("a.b.0", 1)."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from flat(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
