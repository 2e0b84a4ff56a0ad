"""Where does the memory of training go, and does LoRA save some at every moment? Measured bytes of live tensors.

    python -m benchmarks.where_memory_goes [--dtype bfloat16] [--checkpointing] [--device cuda] [--plot FILE.svg]

First one linear layer: trained in full, and with LoRA where B A is formed, as it is usually written, and as ftkit has
it. What is kept for the backward pass, the most that each pass needs, and whether a matrix of the weight's size is
ever made: the gradient of W is dL/dh x^T. Then a random Llama, method by method: weights, gradients, optimizer state
and activations at each moment of an optimizer step.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.area_chart import draw, series_panel
from benchmarks.memory_of_layer import LayerFigures, Sizes, measure_layers
from benchmarks.memory_of_model import FROZEN, KINDS, METHOD_SECTIONS, ModelFigures, ModelSizes, measure_model
from ftkit.console import Console, human_bytes, human_count, make_table
from ftkit.models.quiet import quiet_transformers

MEBIBYTE = 2**20
BEFORE_BACKWARD = 3
"""Moments of a step in which the first differs from the others: the optimizer has no state yet."""


def show_layers(console: Console, figures: Sequence[LayerFigures], title: str) -> None:
    """Print a row for every way to write the layer."""
    headers = ("saved", "forward peak", "backward peak", "gradients", "d×d forward", "backward", "at its peak")
    columns = [("layer", "left"), *((header, "right") for header in headers), ("there at the backward peak", "left")]
    table = make_table(title, columns)
    for f in figures:
        sizes = map(human_bytes, (f.saved, f.forward_peak, f.backward_peak, f.gradients))
        matrices = map(str, (f.forward_matrices, f.backward_matrices, f.peak_matrices))
        table.add_row(f.name, *sizes, *matrices, f.at_peak)
    console.table(table)


def show_model(console: Console, figures: Sequence[ModelFigures], title: str) -> None:
    """Print a row for every method and moment."""
    headers = [*((kind, "right") for kind in KINDS), ("in all", "right"), ("of full", "right")]
    table = make_table(title, [("method", "left"), ("step", "right"), ("moment", "left"), *headers])
    full = next(f for f in figures if f.name == "full")
    for f in figures:
        for number, step in enumerate(f.steps, start=1):
            for moment, event in list(step.moments().items())[: None if number == 2 else BEFORE_BACKWARD]:
                of_kinds = [human_bytes(step.series[kind][event]) for kind in KINDS]
                reference = full.steps[number - 1]
                share = step.total(event) / reference.total(reference.moments()[moment])
                table.add_row(f.name, str(number), moment, *of_kinds, human_bytes(step.total(event)), f"{share:.2f}")
    console.table(table)
    for f in figures:
        peak = max(step.total(step.peak(phase)) for step in f.steps for phase in step.phases)
        trained = f"{human_count(f.trained)} of {human_count(f.parameters)} parameters train"
        allocated = max(step.allocator_peak or 0 for step in f.steps)
        beside = f"; by the GPU's allocator {human_bytes(allocated)}" if allocated else ""
        console.line(f"{f.name}: {trained}, peak {human_bytes(peak)}{beside}")


def plot(figures: Sequence[ModelFigures], title: str) -> str:
    """The second step of every method that trains, as an SVG."""
    panels = [series_panel(f.name, f.steps[-1].phases, f.steps[-1].series, MEBIBYTE) for f in figures if f.trained]
    highest = max(step.total(step.peak(phase)) for f in figures for step in f.steps for phase in step.phases)
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000) if highest / MEBIBYTE / step < 10)
    return draw(panels, KINDS, title=title, unit="MiB", step=step)


def main() -> None:
    """Print the tables, and write the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of what is frozen, and of activations"
    )
    parser.add_argument("--tokens", type=int, default=Sizes.tokens, help="of the layer")
    parser.add_argument("--dropout", type=float, default=0.1, help="of the layer's second table")
    parser.add_argument("--width", type=int, default=ModelSizes.width)
    parser.add_argument("--layers", type=int, default=ModelSizes.layers)
    parser.add_argument("--length", type=int, default=ModelSizes.length, help="tokens of each of two documents")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    quiet_transformers()
    console, dtype = Console(), getattr(torch, arguments.dtype)
    sizes = Sizes(tokens=arguments.tokens)
    what = f"{sizes.tokens} tokens, {sizes.inputs} -> {sizes.outputs}, rank {sizes.rank}, {arguments.dtype}"
    for dropout in (0.0, arguments.dropout):
        title = f"one layer: {what}, dropout {dropout:g}"
        show_layers(console, measure_layers(sizes, dtype, dropout=dropout), title)
    model = ModelSizes(width=arguments.width, layers=arguments.layers, length=arguments.length)
    figures = [
        measure_model(
            name, model, dtype, checkpointing=arguments.checkpointing and name != FROZEN, device=arguments.device
        )
        for name in METHOD_SECTIONS
    ]
    batch = f"{model.documents} x {model.length} tokens"
    what = f"Llama of {model.layers} layers, width {model.width}, {batch}, {arguments.dtype}"
    title = what + (", activations checkpointed" if arguments.checkpointing else "")
    show_model(console, figures, title)
    if arguments.plot is not None:
        arguments.plot.write_text(plot(figures, f"The second optimizer step: {title}"), encoding="utf-8")


if __name__ == "__main__":
    main()
