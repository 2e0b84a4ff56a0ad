"""The losses of a run, from its metrics.jsonl: as numbers, and as small pictures for the terminal."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from ftkit.console import make_table, sparkline

WIDTH = 40
"""Characters of a curve, at most."""
MOST_ROWS = 12
"""Of the table of evaluations."""
LOWEST = 0.05
"""Height of the smallest value's bar, beside 1 for the largest: a value of a curve is never blank."""


def loss_figures(file: Path) -> dict[str, dict[int, float]]:
    """Name of a loss -> step -> value; of a step that was run twice, after a resume, the last."""
    found: dict[str, dict[int, float]] = {}
    for text in file.read_text("utf-8").splitlines():
        line = json.loads(text)
        for name, value in losses_in(line).items():
            found.setdefault(name, {})[line["step"]] = value
    return found


def losses_in(line: Mapping[str, Any]) -> dict[str, float]:
    """Name of a loss -> value, in a line of metrics.jsonl."""
    names = [name for name in line if name == "loss" or name.startswith("eval_loss")]
    return {name: math.nan if line[name] is None else float(line[name]) for name in names}


def curves(file: Path) -> list[str]:
    """A line for the training loss, and one for each evaluation that says something of its own."""
    return curves_of(loss_figures(file))


def curves_of(found: Mapping[str, dict[int, float]], *, width: int = WIDTH) -> list[str]:
    """`curves`, of what `loss_figures` found, `width` characters each at most."""
    names = [name for name in found if name == "loss"] + [name for name in found if name == "eval_loss"]
    parts = [name for name in found if name.startswith("eval_loss_")]
    # Of one data set the loss of all of them is its own.
    names += parts if len(parts) > 1 else []
    longest = max(map(len, names), default=0)
    return [f"{name:<{longest}}  {_curve(found[name], width)}" for name in names if len(found[name]) > 1]


def evaluation_table(
    found: Mapping[str, dict[int, float]], *, metric: str, best: int | None, published: int
) -> Table | None:
    """What the evaluations of a run gave, thinned out to MOST_ROWS; None where there were none.

    Args:
        found: of `loss_figures`.
        metric: that decides which is the best.
        best: step of the best checkpoint.
        published: step of the weights that the run hands over.
    """
    steps = sorted(found.get("eval_loss", {}))
    if not steps:
        return None
    parts = [name for name in found if name.startswith("eval_loss_")]
    # Of one data set the loss of all of them is its own.
    names = ["eval_loss", *(parts if len(parts) > 1 else [])]
    known = [step for step in steps if math.isfinite(found[metric].get(step, math.nan))]
    lowest = min(known, key=lambda step: found[metric][step], default=None)
    marks: dict[int | None, list[str]] = {}
    if best is not None and lowest != best:
        marks[lowest] = ["lowest, before training" if lowest == 0 else "lowest, no checkpoint"]
    for step, mark in ((best, "best"), (published, "published"), (steps[-1], "last")):
        marks.setdefault(step, []).append(mark)
    kept = _thinned(steps, {step for step in marks if step is not None})
    title = f"evaluations ({len(kept)} of {len(steps)})" if len(kept) < len(steps) else "evaluations"
    table = make_table(title, [("step", "right"), *((name, "right") for name in names), ("", "left")])
    for step in kept:
        values = [f"{found[name][step]:.4f}" if step in found[name] else "-" for name in names]
        table.add_row(str(step), *values, ", ".join(marks.get(step, [])))
    return table


def _thinned(steps: Sequence[int], needed: set[int]) -> list[int]:
    """The first step, those that are needed, and others evenly in between, MOST_ROWS in all."""
    needed = needed & set(steps) | {steps[0]}
    others = [step for step in steps if step not in needed]
    room = min(MOST_ROWS - len(needed), len(others))
    even = {others[(2 * number + 1) * len(others) // (2 * room)] for number in range(room)}
    return sorted(needed | even)


def _curve(values: dict[int, float], width: int) -> str:
    steps = sorted(values)
    series = [values[step] for step in steps]
    known = [step for step in steps if math.isfinite(values[step])]
    if not known:
        return "never finite"
    best = min(known, key=lambda step: values[step])
    shown = sparkline(_heights(_binned([values[step] for step in known], width)))
    return f"{shown}  {series[0]:.4f} to {series[-1]:.4f}, lowest {values[best]:.4f} at step {best}"


def _binned(series: Sequence[float], width: int) -> list[float]:
    """Means of at most `width` stretches of nearly equal length."""
    count = min(width, len(series))
    bounds = [round(number * len(series) / count) for number in range(count + 1)]
    return [fmean(series[start:end]) for start, end in pairwise(bounds)]


def _heights(series: Sequence[float]) -> list[float]:
    low, high = min(series), max(series)
    if high == low:
        return [LOWEST] * len(series)
    return [LOWEST + (1 - LOWEST) * (value - low) / (high - low) for value in series]
