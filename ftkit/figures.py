"""The losses of a run, from its metrics.jsonl: as numbers, and as small pictures for the terminal."""

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from ftkit.console import sparkline

WIDTH = 40
"""Characters of a curve, at most."""
LOWEST = 0.05
"""Height of the smallest value's bar, beside 1 for the largest: a value of a curve is never blank."""


def loss_figures(file: Path) -> dict[str, dict[int, float]]:
    """Name of a loss -> step -> value; of a step that was run twice, after a resume, the last."""
    found: dict[str, dict[int, float]] = {}
    for text in file.read_text("utf-8").splitlines():
        line = json.loads(text)
        for name, value in line.items():
            if name == "loss" or name.startswith("eval_loss"):
                found.setdefault(name, {})[line["step"]] = math.nan if value is None else float(value)
    return found


def curves(file: Path) -> list[str]:
    """A line for the training loss, and one for each evaluation that says something of its own."""
    found = loss_figures(file)
    names = [name for name in found if name == "loss"] + [name for name in found if name == "eval_loss"]
    parts = [name for name in found if name.startswith("eval_loss_")]
    # Of one data set the loss of all of them is its own.
    names += parts if len(parts) > 1 else []
    width = max(map(len, names), default=0)
    return [f"{name:<{width}}  {_curve(found[name])}" for name in names if len(found[name]) > 1]


def _curve(values: dict[int, float]) -> str:
    steps = sorted(values)
    series = [values[step] for step in steps]
    known = [step for step in steps if math.isfinite(values[step])]
    if not known:
        return "never finite"
    best = min(known, key=lambda step: values[step])
    shown = sparkline(_heights(_binned([values[step] for step in known])))
    return f"{shown}  {series[0]:.4f} to {series[-1]:.4f}, lowest {values[best]:.4f} at step {best}"


def _binned(series: Sequence[float]) -> list[float]:
    """Means of at most WIDTH stretches of nearly equal length."""
    count = min(WIDTH, len(series))
    bounds = [round(number * len(series) / count) for number in range(count + 1)]
    return [fmean(series[start:end]) for start, end in pairwise(bounds)]


def _heights(series: Sequence[float]) -> list[float]:
    low, high = min(series), max(series)
    if high == low:
        return [LOWEST] * len(series)
    return [LOWEST + (1 - LOWEST) * (value - low) / (high - low) for value in series]
