"""What one linear layer keeps for its backward pass, and makes in it: in full, and with LoRA written three ways.

Shape suffixes: N tokens, I input width, O output width, R rank.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ftkit.methods.lora_layer import insert_lora
from ftkit.models.live_tensors import Life, LiveTensors, describe_lives, saved_for_backward
from ftkit.models.precision import CastProduct


@dataclass(frozen=True)
class Sizes:
    """Of the layer; all different, so that a shape tells what a tensor is."""

    tokens: int = 2048
    inputs: int = 1024
    outputs: int = 1536
    rank: int = 16


@dataclass(frozen=True)
class Layer:
    """A way to compute the layer, and what of it trains."""

    parameters: dict[str, Tensor]
    forward: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LayerFigures:
    """Bytes of one forward and backward pass, and what became of matrices as large as the weight."""

    name: str
    saved: int
    """Kept for the backward pass, the input included and parameters left out."""
    forward_peak: int
    """Most in the forward pass above input and parameters, the output included."""
    backward_peak: int
    """Most in the backward pass above what must be there: input, parameters, the output, and its gradient."""
    gradients: int
    """Of the parameters, once it is over; that of the input comes on top."""
    forward_matrices: int
    """Tensors [O, I] or [I, O] that the forward pass makes."""
    backward_matrices: int
    """Likewise the backward pass."""
    peak_matrices: int
    """Of all these, how many there are at the peak of the backward pass."""
    at_peak: str
    """What was made by then and is there at that peak, in words."""


def layers(sizes: Sizes, dtype: torch.dtype, *, dropout: float = 0.0) -> Iterator[tuple[str, Layer]]:
    """Every way, by name; each has parameters of its own, from the same seed.

    Args:
        dtype: of the frozen weight and of what is computed; A and B, and a weight that trains, are float32.
    """
    shape, scale = (sizes.outputs, sizes.inputs), 2.0

    def parameters(*, full: bool) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        w_OI = torch.randn(shape, generator=generator) / sizes.inputs**0.5
        a_RI = torch.randn((sizes.rank, sizes.inputs), generator=generator) / sizes.inputs**0.5
        b_OR = torch.randn((sizes.outputs, sizes.rank), generator=generator) / sizes.inputs**0.5
        weight = nn.Parameter(w_OI if full else w_OI.to(dtype), requires_grad=full)
        return weight, nn.Parameter(a_RI), nn.Parameter(b_OR)

    w_full, _, _ = parameters(full=True)
    # What `models/precision.py` makes of a layer that trains and computes in another precision.
    cast = dtype != torch.float32
    yield (
        "full",
        Layer(
            {"weight": w_full},
            lambda x: CastProduct.apply(x, w_full, None, False) if cast else F.linear(x, w_full),
        ),
    )

    w, a, b = parameters(full=False)
    yield (
        "LoRA, B A formed",
        Layer({"weight": w, "A": a, "B": b}, lambda x: F.linear(x, w + scale * (b.to(x.dtype) @ a.to(x.dtype)))),
    )

    w2, a2, b2 = parameters(full=False)

    def usual(x: Tensor) -> Tensor:
        dropped = F.dropout(x, dropout) if dropout else x
        update = F.linear(F.linear(dropped, a2.to(x.dtype)), b2.to(x.dtype))
        return F.linear(x, w2) + scale * update

    yield "LoRA, as usually written", Layer({"weight": w2, "A": a2, "B": b2}, usual)

    w3, a3, b3 = parameters(full=False)
    module = nn.Linear(sizes.inputs, sizes.outputs, bias=False, device="meta")
    module.weight = nn.Parameter(w3)
    ours = insert_lora(module, (a3.detach(), b3.detach()), scale=scale, dropout=dropout)
    yield "LoRA, ftkit", Layer({"weight": ours.weight, "A": ours.lora_A, "B": ours.lora_B}, ours)


def measure_layer(name: str, layer: Layer, sizes: Sizes, dtype: torch.dtype) -> LayerFigures:
    """Run the layer forward and backward, as one in the middle of a model: its input has a gradient too."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((sizes.tokens, sizes.inputs), generator=generator).to(dtype).requires_grad_()
    grad_y = torch.randn((sizes.tokens, sizes.outputs), generator=generator).to(dtype)
    with saved_for_backward(leaving_out=layer.parameters.values()) as saved:
        layer.forward(x)

    with LiveTensors([x, grad_y, *layer.parameters.values()]) as live:
        live.mark("start")
        y = layer.forward(x)
        live.mark("forward")
        y.backward(grad_y)
        live.mark("backward")
    series = live.live_bytes()
    forward, backward = live.between("start", "forward"), live.between("forward", "backward")
    peak = live.peak(backward)

    def matrix(life: Life) -> bool:
        return sorted(life.shape) == sorted((sizes.inputs, sizes.outputs)) and life.operation != ""

    made = [life for life in live.lives if life.operation and life.lives_at(peak)]
    output = live.life_of(y)
    assert output is not None
    return LayerFigures(
        name=name,
        saved=saved.bytes,
        forward_peak=max(series[event] for event in forward) - series[0],
        backward_peak=series[peak] - series[0] - y.nbytes,
        gradients=sum(p.grad.nbytes for p in layer.parameters.values() if p.grad is not None),
        forward_matrices=sum(matrix(life) and life.born in forward[1:] for life in live.lives),
        backward_matrices=sum(matrix(life) and life.born in backward[1:] for life in live.lives),
        peak_matrices=sum(map(matrix, made)),
        at_peak=describe_lives((life for life in made if life is not output), minimum=x.nbytes // 16),
    )


def measure_layers(sizes: Sizes, dtype: torch.dtype, *, dropout: float = 0.0) -> list[LayerFigures]:
    """The figures of every way."""
    return [measure_layer(name, layer, sizes, dtype) for name, layer in layers(sizes, dtype, dropout=dropout)]
