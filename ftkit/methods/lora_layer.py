"""The LoRA layer (Hu et al. 2021, https://arxiv.org/abs/2106.09685, equation 3).

    y = x W^T + b + scale * dropout(x) A^T B^T        scale = alpha / rank

Shape suffixes: N tokens, I input width, O output width, R rank.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ftkit.models.architecture import linear_shape


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
        keep: Tensor | None,
        scale: float,
        transposed: bool,
    ) -> Tensor:
        """x [..., I] -> [..., O].

        Args:
            weight: frozen, [O, I], or [I, O] if `transposed`.
            keep: bool, the shape of x: the elements that dropout keeps; `scale` already holds 1 / (1 - p).
        """
        y_NO = base_product(x.reshape(-1, x.shape[-1]), weight, bias, transposed)
        h_NR = F.linear(_dropped(x, keep), a_RI.to(x.dtype))
        y_NO.addmm_(h_NR, b_OR.to(x.dtype).t(), alpha=scale)
        # x itself, not its two-dimensional form: that is a copy where x is not contiguous.
        ctx.save_for_backward(x, weight, a_RI, b_OR, h_NR, keep)
        ctx.scale, ctx.transposed = scale, transposed
        return y_NO.view(*x.shape[:-1], y_NO.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients with respect to x (only where it needs one), A and B."""
        x, weight, a_RI, b_OR, h_NR, keep = ctx.saved_tensors
        grad_NO = grad_y.reshape(-1, grad_y.shape[-1])
        scaled_NR = (grad_NO @ b_OR.to(x.dtype)).mul_(ctx.scale)
        grad_a_RI = scaled_NR.t() @ _dropped(x, keep)
        grad_b_OR = (grad_NO.t() @ h_NR).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            weight_OI = (weight.t() if ctx.transposed else weight).to(x.dtype)
            grad_NI = grad_NO @ weight_OI
            if keep is None:
                grad_NI.addmm_(scaled_NR, a_RI.to(x.dtype))
            else:
                grad_NI.addcmul_(scaled_NR @ a_RI.to(x.dtype), keep.reshape(grad_NI.shape))
            grad_x = grad_NI.view(x.shape)
        return grad_x, None, None, grad_a_RI.to(a_RI.dtype), grad_b_OR.to(b_OR.dtype), None, None, None


def base_product(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """x W^T + b in the dtype of x."""
    return F.linear(x, (weight.t() if transposed else weight).to(x.dtype), None if bias is None else bias.to(x.dtype))


def _dropped(x: Tensor, keep: Tensor | None) -> Tensor:
    x_NI = x.reshape(-1, x.shape[-1])
    return x_NI if keep is None else x_NI * keep.reshape(x_NI.shape)


class LoraLinear(nn.Linear):
    """An `nn.Linear` whose frozen weight keeps its name, with `lora_A` [R, I] and `lora_B` [O, R] beside it."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scale: float
    """What B A is multiplied by."""
    lora_dropout: float
    lora_enabled: bool

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] -> [..., O]"""
        return _forward(self, input, transposed=False)


class LoraConv1D(Conv1D):
    """GPT-2's `Conv1D`, whose weight is [I, O], with the same `lora_A` and `lora_B` as `LoraLinear`."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scale: float
    lora_dropout: float
    lora_enabled: bool

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]"""
        return _forward(self, x, transposed=True)


LoraLayer = LoraLinear | LoraConv1D


def _forward(layer: LoraLayer, x: Tensor, *, transposed: bool) -> Tensor:
    if not layer.lora_enabled:
        return base_product(x, layer.weight, layer.bias, transposed)
    keep, scale = None, layer.lora_scale
    if layer.training and layer.lora_dropout > 0.0:
        # A draw in bool: bfloat16 random numbers are multiples of 1/256 and would miss the probability.
        keep = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1.0 - layer.lora_dropout)
        scale /= 1.0 - layer.lora_dropout
    output: Tensor = LowRankLinear.apply(
        x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, keep, scale, transposed
    )
    return output


def insert_lora(module: nn.Module, *, rank: int, scale: float, dropout: float, generator: torch.Generator) -> LoraLayer:
    """Turn a linear layer into a LoRA layer that computes the same: A Kaiming-uniform, B zero (as in the paper's code,
    https://github.com/microsoft/LoRA/blob/4c0333854cb905966f8cc4e9a74068c1e507c7b7/loralib/layers.py#L119).

    The object changes its class in place rather than being wrapped: names in the state dict, references from
    elsewhere in the model, hooks and shared modules stay valid. A class that only casts its weight where it is used
    is replaced by one that does the same.
    """
    in_features, out_features = linear_shape(module)
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    assert sorted(weight.shape) == sorted((in_features, out_features)), "a packed (quantized) weight"
    a_RI = torch.empty(rank, in_features)
    nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5), generator=generator)
    weight.requires_grad_(False)
    if module.bias is not None:
        module.bias.requires_grad_(False)
    module.__class__ = LoraConv1D if isinstance(module, Conv1D) else LoraLinear
    assert isinstance(module, LoraLayer)
    module.lora_A = nn.Parameter(a_RI.to(weight.device))
    module.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=weight.device))
    module.lora_scale, module.lora_dropout, module.lora_enabled = scale, dropout, True
    return module
