"""Is the loss curve the same however the batch is split? One recipe, run in every way that may not matter.

    python benchmarks/one_curve.py RECIPE [key=value ...]

trains RECIPE, computed in float32, with two values of training.max_tokens_per_device, with documents packed into rows
and padded, by one process and by two, and prints the loss of every step of each. Exits with 1 where one is further than
TOLERANCE from the first.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ftkit.recipe.load import load_recipe

TOLERANCE = 1e-4
"""In float32 the order of additions differs, and the steps carry the difference on."""


@dataclass(frozen=True)
class Variant:
    """A way to split global batches into micro-batches and over processes."""

    max_tokens: int
    packing: str
    processes: int

    def __str__(self) -> str:
        packed = "packed" if self.packing == "required" else "padded"
        return f"{self.processes}x{self.max_tokens} {packed}"


def variants(max_length: int) -> list[Variant]:
    """Micro-batches of one long example and of four, packed and padded, in one process and in two."""
    return [
        Variant(max_tokens, packing, processes)
        for processes in (1, 2)
        for packing in ("required", "off")
        for max_tokens in (4 * max_length, max_length)
    ]


def curve(recipe: Path, overrides: list[str], variant: Variant) -> list[float]:
    """The loss of every step of a run, by the command line."""
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        arguments = [
            *overrides,
            "model.dtype=float32",
            "training.logging_steps=1",
            f"training.max_tokens_per_device={variant.max_tokens}",
            f"data.packing={variant.packing}",
            f"output_dir={run}",
            f"--num-processes={variant.processes}",
        ]
        command = [sys.executable, "-m", "ftkit", "train", str(recipe), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def largest_difference(curves: list[list[float]]) -> float:
    """Of any step of any curve from the same step of the first."""
    return max(abs(a - b) for curve in curves for a, b in zip(curve, curves[0], strict=True))


def table(curves: dict[Variant, list[float]]) -> str:
    """A column a variant (processes x tokens of a micro-batch) and a line a step; last the largest differences."""
    first = next(iter(curves.values()))
    lines = [f"{'step':>10}" + "".join(f"{variant!s:>16}" for variant in curves)]
    for step, losses in enumerate(zip(*curves.values(), strict=True), start=1):
        lines.append(f"{step:10d}" + "".join(f"{loss:16.6f}" for loss in losses))
    lines.append(f"{'off by':>10}" + "".join(f"{largest_difference([first, c]):16.1e}" for c in curves.values()))
    return "\n".join(lines)


def main() -> int:
    """Print the table; returns the exit code."""
    recipe, overrides = Path(sys.argv[1]), sys.argv[2:]
    max_length = load_recipe(recipe, overrides).recipe.data.max_length
    curves = {}
    for variant in variants(max_length):
        print(variant, file=sys.stderr, flush=True)
        curves[variant] = curve(recipe, overrides, variant)
    largest = largest_difference([*curves.values()])
    print(table(curves))
    print(f"largest difference {largest:.1e}, allowed are {TOLERANCE:.0e}")
    return int(not largest <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
