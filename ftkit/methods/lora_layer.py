"""The LoRA layer (Hu et al. 2021, https://arxiv.org/abs/2106.09685, equation 3).

    y = x W^T + b + scale * dropout(x) A^T B^T        scale = alpha / rank

PiSSA trains A and B from the weight's principal part scale * B0 A0 and freezes the rest, W - scale * B0 A0. Here that
rest is never formed: W stays as it is, and scale * x A0^T B0^T is taken off beside it. So nothing is lost where W is
bfloat16, whose rounding would hit the rest; the base is still there to be compared with and merged into; and what is
saved, [A; A0] and [B, -B0], is exactly what was trained. It costs two more products of rank R.

DoRA multiplies every output by a trained gain before the bias is added, see `methods/dora.py`; dropout stays on the
update's input alone.

Shape suffixes: N tokens, I input width, O output width, R rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ftkit.methods.dora import gains, row_norms
from ftkit.methods.lora_init import Factors
from ftkit.models.architecture import linear_shape
from ftkit.models.quantization import QuantizedLinear

Unpack = Callable[[Tensor, torch.dtype], Tensor]
"""Makes the weight [O, I] of what is stored."""


class LowRankLinear(torch.autograd.Function):
    """A frozen linear layer with a low-rank update, in the dtype of its input.

    Plain autograd would keep the dropped-out input and the casts of A and B for the backward pass, and form the
    gradient with respect to the input in two tensors of the input's size. Here the input is kept once, A and B as the
    parameters they are, and the base weight by reference; no product is larger than tokens x width or rank x width.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        start_a_RI: Tensor | None,
        start_b_OR: Tensor | None,
        keep: Tensor | None,
        scale: float,
        kept_share: float,
        transposed: bool,
        unpack: Unpack | None,
    ) -> Tensor:
        """x [..., I] -> [..., O].

        Args:
            weight: frozen, [O, I], or [I, O] if `transposed`, or whatever `unpack` takes.
            start_a_RI: frozen; with `start_b_OR` the low-rank product that is taken off the weight, or None.
            keep: bool, the shape of x: the elements that dropout keeps.
            kept_share: share of the elements that it keeps on average.
            unpack: of a quantised weight, which is saved as it is stored and unpacked once more in the backward pass.
        """
        x_NI = x.reshape(-1, x.shape[-1])
        y_NO = base_product(x_NI, weight, bias, transposed, unpack)
        if start_a_RI is not None and start_b_OR is not None:
            y_NO.addmm_(F.linear(x_NI, start_a_RI.to(x.dtype)), start_b_OR.to(x.dtype).t(), alpha=-scale)
        scale_kept = scale / kept_share
        h_NR = F.linear(_dropped(x, keep), a_RI.to(x.dtype))
        y_NO.addmm_(h_NR, b_OR.to(x.dtype).t(), alpha=scale_kept)
        # x itself, not its two-dimensional form: that is a copy where x is not contiguous.
        ctx.save_for_backward(x, weight, a_RI, b_OR, start_a_RI, start_b_OR, h_NR, keep)
        ctx.scale, ctx.scale_kept, ctx.transposed, ctx.unpack = scale, scale_kept, transposed, unpack
        return y_NO.view(*x.shape[:-1], y_NO.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients with respect to x (only where it needs one), A and B."""
        x, weight, a_RI, b_OR, start_a_RI, start_b_OR, h_NR, keep = ctx.saved_tensors
        grad_NO = grad_y.reshape(-1, grad_y.shape[-1])
        scaled_NR = (grad_NO @ b_OR.to(x.dtype)).mul_(ctx.scale_kept)
        grad_a_RI = scaled_NR.t() @ _dropped(x, keep)
        grad_b_OR = (grad_NO.t() @ h_NR).mul_(ctx.scale_kept)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_NI = grad_NO @ _whole_weight(weight, x.dtype, ctx.transposed, ctx.unpack)
            if keep is None:
                grad_NI.addmm_(scaled_NR, a_RI.to(x.dtype))
            else:
                grad_NI.addcmul_(scaled_NR @ a_RI.to(x.dtype), keep.reshape(grad_NI.shape))
            if start_a_RI is not None:
                grad_NI.addmm_(grad_NO @ start_b_OR.to(x.dtype), start_a_RI.to(x.dtype), alpha=-ctx.scale)
            grad_x = grad_NI.view(x.shape)
        return grad_x, None, None, grad_a_RI.to(a_RI.dtype), grad_b_OR.to(b_OR.dtype), *[None] * 7


def base_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, unpack: Unpack | None = None
) -> Tensor:
    """x W^T + b in the dtype of x."""
    weight_OI = _whole_weight(weight, x.dtype, transposed, unpack)
    return F.linear(x, weight_OI, None if bias is None else bias.to(x.dtype))


def _whole_weight(weight: Tensor, dtype: torch.dtype, transposed: bool, unpack: Unpack | None) -> Tensor:
    """[O, I]"""
    return (weight.t() if transposed else weight).to(dtype) if unpack is None else unpack(weight, dtype)


def _dropped(x: Tensor, keep: Tensor | None) -> Tensor:
    x_NI = x.reshape(-1, x.shape[-1])
    return x_NI if keep is None else x_NI * keep.reshape(x_NI.shape)


class LoraFactors:
    """What all layers with a LoRA have beside their frozen weight [O, I], which keeps its name."""

    lora_A: nn.Parameter
    """[R, I]"""
    lora_B: nn.Parameter
    """[O, R]"""
    lora_A0: nn.Parameter | None
    """Frozen copy of what A was at the start, where B0 A0 is taken off the weight (PiSSA); else None."""
    lora_B0: nn.Parameter | None
    lora_magnitude: nn.Parameter | None
    """Length of every row of the weight (DoRA), [O]; else None."""
    lora_scale: float
    """What B A is multiplied by."""
    lora_dropout: float
    lora_enabled: bool


class LoraLinear(LoraFactors, nn.Linear):
    """An `nn.Linear` with a LoRA."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] -> [..., O]"""
        return _forward(self, input, transposed=False)


class LoraConv1D(LoraFactors, Conv1D):
    """GPT-2's `Conv1D`, whose weight is [I, O], with a LoRA."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]"""
        return _forward(self, x, transposed=True)


class LoraQuantizedLinear(LoraFactors, QuantizedLinear):
    """A linear layer whose frozen weight is quantised, with a LoRA."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] -> [..., O]"""
        return _forward(self, input, transposed=False)


LoraLayer = LoraLinear | LoraConv1D | LoraQuantizedLinear


def _forward(layer: LoraLayer, x: Tensor, *, transposed: bool) -> Tensor:
    if not layer.lora_enabled:
        if isinstance(layer, QuantizedLinear):
            return QuantizedLinear.forward(layer, x)
        return base_product(x, layer.weight, layer.bias, transposed)
    keep, kept_share = None, 1.0
    if layer.training and layer.lora_dropout > 0.0:
        kept_share -= layer.lora_dropout
        # A draw in bool: bfloat16 random numbers are multiples of 1/256 and would miss the probability.
        keep = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(kept_share)
    factors = layer.lora_A, layer.lora_B, layer.lora_A0, layer.lora_B0
    magnitude = layer.lora_magnitude
    bias = layer.bias if magnitude is None else None
    unpack = layer.unpack if isinstance(layer, QuantizedLinear) else None
    output: Tensor = LowRankLinear.apply(
        x, layer.weight, bias, *factors, keep, layer.lora_scale, kept_share, transposed, unpack
    )
    if magnitude is None:
        return output
    norms = row_norms(weight_OI(layer), *stacked(*factors), layer.lora_scale)
    output = output * gains(magnitude, norms).to(x.dtype)
    return output if layer.bias is None else output + layer.bias.to(x.dtype)


def stacked(a_RI: Tensor, b_OR: Tensor, start_a_RI: Tensor | None, start_b_OR: Tensor | None) -> Factors:
    """The update as a product of two factors: B A as it is, and B A - B0 A0 as [B, -B0] [A; A0]."""
    if start_a_RI is None or start_b_OR is None:
        return a_RI, b_OR
    # A process that does not write a checkpoint has empty tensors without dimensions here.
    return torch.cat([a_RI, start_a_RI]), torch.cat([b_OR, -start_b_OR], dim=b_OR.ndim - 1)


def weight_OI(module: nn.Module) -> Tensor:
    """The weight of a linear layer as [O, I], also where it is kept transposed or quantised."""
    if isinstance(module, QuantizedLinear):
        return module.dequantized()
    assert isinstance(module.weight, Tensor)
    return module.weight.t() if isinstance(module, Conv1D) else module.weight


def insert_lora(
    module: nn.Module,
    factors: Factors,
    *,
    scale: float,
    dropout: float,
    start: Factors | None = None,
    magnitude: Tensor | None = None,
) -> LoraLayer:
    """Turn a linear layer into a LoRA layer.

    The object changes its class in place rather than being wrapped: names in the state dict, references from
    elsewhere in the model, hooks and shared modules stay valid. A class that only casts its weight where it is used
    is replaced by one that does the same.

    Args:
        factors: what A and B start from.
        start: A0 and B0, where scale * B0 A0 is to be taken off the weight.
        magnitude: lengths of the weight's rows [O], where they are to train by themselves.
    """
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    quantized = isinstance(module, QuantizedLinear)
    assert quantized or sorted(weight.shape) == sorted(linear_shape(module)), "a packed (quantized) weight"
    weight.requires_grad_(False)
    if module.bias is not None:
        module.bias.requires_grad_(False)
    plain = LoraConv1D if isinstance(module, Conv1D) else LoraLinear
    module.__class__ = LoraQuantizedLinear if quantized else plain
    assert isinstance(module, LoraLayer)
    module.lora_A, module.lora_B = (nn.Parameter(factor.to(weight.device)) for factor in factors)
    for name, frozen in zip(("lora_A0", "lora_B0"), start or (None, None), strict=True):
        kept = None if frozen is None else nn.Parameter(frozen.to(weight.device), requires_grad=False)
        module.register_parameter(name, kept)
    lengths = None if magnitude is None else nn.Parameter(magnitude.to(weight.device))
    module.register_parameter("lora_magnitude", lengths)
    module.lora_scale, module.lora_dropout, module.lora_enabled = scale, dropout, True
    return module
