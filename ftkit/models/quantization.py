"""Frozen linear layers whose weight is kept in 4 or 8 bits: the base of a QLoRA (https://arxiv.org/abs/2305.14314).

nf4     bitsandbytes' NormalFloat of 4 bits: blocks of 64 values share a scale, and blocks of 256 scales one of their
        own (the paper's double quantisation); 4.13 bits a weight
int8    of each row the largest magnitude is 127, as in bitsandbytes' format: 8 bits a weight and 32 a row

The weight is quantised once, on the CPU, from the float32 value of what is stored: neither the device nor the compute
dtype changes the codes. A layer computes with that weight, dequantised, and with nothing else; bitsandbytes' own 8-bit
layer also rounds its input. So there is one float model that a quantised one equals, which a merge can write.

Shape suffixes: I input width, O output width, N tokens.
"""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel

from ftkit.errors import KeyPath, UserError
from ftkit.models.architecture import linear_modules

KEY: KeyPath = ("model", "quantization")
BLOCK, NESTED_BLOCK = 64, 256
"""nf4: weights that share a scale, and scales that share one."""
INT8_MAX = 127
_PARTS = {"nf4": ("absmax", "code", "offset", "nested_absmax", "nested_code"), "int8": ("scale",)}
"""Names of the tensors beside the codes; in a layer they are buffers called `quant_NAME`."""

Parts = Mapping[str, Tensor | None]


class QuantizedLinear(nn.Linear):
    """An `nn.Linear` with a quantised frozen weight: uint8 [O * I / 2, 1] (nf4) or int8 [O, I]."""

    quantization: str
    """A key of `_PARTS`."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] -> [..., O]"""
        output: Tensor = FrozenProduct.apply(input, self.weight, self.bias, self)
        return output

    def unpack(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """[O, I], a tensor of its own; `packed` is the weight, as it may be saved for a backward pass."""
        parts = {name: getattr(self, f"quant_{name}") for name in _PARTS[self.quantization]}
        return _unpack(packed, parts, torch.Size((self.out_features, self.in_features)), self.quantization, dtype)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[O, I], a tensor of its own."""
        return self.unpack(self.weight.detach(), dtype)


class FrozenProduct(torch.autograd.Function):
    """x W^T + b for a quantised W: backward dequantises it a second time, and keeps neither x nor a float copy of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None, layer: QuantizedLinear) -> Tensor:
        """x [..., I], bias [O] -> [..., O]"""
        ctx.save_for_backward(packed)
        ctx.layer = layer
        return F.linear(x, layer.unpack(packed, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient with respect to x."""
        (packed,) = ctx.saved_tensors
        return grad_y @ ctx.layer.unpack(packed, grad_y.dtype), None, None, None


def check_available(quantization: str | None, *, key: KeyPath = KEY) -> None:
    """Check that the package behind a quantisation is installed.

    Raises:
        UserError: bitsandbytes is missing; the message has the pip line.
    """
    if quantization == "nf4" and find_spec("bitsandbytes") is None:
        raise UserError("nf4 needs the bitsandbytes package", how="pip install 'ftkit[gpu]'", key=key)


def quantizable(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Path -> the linear layers of the decoder blocks that `quantize` takes, or has taken."""
    layers = linear_modules(model).items()
    return {path: layer for path, layer in layers if type(layer) is nn.Linear or isinstance(layer, QuantizedLinear)}


@torch.no_grad()
def quantize(model: PreTrainedModel, quantization: str) -> None:
    """Quantise the linear layers of the decoder blocks in place; on the meta device only their shapes change.

    Embeddings, head, norms, routers, experts that are kept as one tensor and towers that no text reaches stay as they
    are.

    Raises:
        UserError: the blocks have none, such as GPT-2's, which keeps its weights transposed.
    """
    layers = quantizable(model)
    if not layers:
        what = f"{type(model).__name__} has no linear layers that could be quantized"
        raise UserError(what, how="leave model.quantization out", key=KEY)
    for module in layers.values():
        if type(module) is nn.Linear:
            packed, parts = _pack(module.weight.detach(), quantization)
            _become_quantized(module, packed, parts, quantization)


@torch.no_grad()
def dequantize(model: nn.Module) -> None:
    """Turn every quantised layer back into an `nn.Linear` that computes the same, with a float32 weight."""
    for _, module in quantized_layers(model):
        weight_OI = module.dequantized()
        for name in _PARTS[module.quantization]:
            delattr(module, f"quant_{name}")
        module.weight = nn.Parameter(weight_OI, requires_grad=False)
        module.__class__ = nn.Linear  # type: ignore[assignment]


def round_trip(weight_OI: Tensor, quantization: str) -> Tensor:
    """What a stored weight is to a model that quantises it: float32 [O, I]."""
    packed, parts = _pack(weight_OI, quantization)
    return _unpack(packed, parts, weight_OI.shape, quantization, torch.float32)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """Path and layer."""
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield path, module


def quantization_of(model: nn.Module) -> str | None:
    """How a model's linear layers are quantised; None where they are not."""
    return next((layer.quantization for _, layer in quantized_layers(model)), None)


def storage_bytes(layer: QuantizedLinear) -> int:
    """Of the weight: codes and scales."""
    tensors = [layer.weight, *layer.buffers(recurse=False)]
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


@torch.no_grad()
def take_over(model: nn.Module) -> None:
    """Let the layers of a model that bitsandbytes quantised, as transformers loads it, compute as ftkit's do.

    Raises:
        UserError: they are of a kind that ftkit lacks (fp4).
    """
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            # Until the layer is called its weight has the scales.
            weight: Any = module.weight
            _become_quantized(module, weight.data, {"scale": weight.SCB.float() / INT8_MAX}, "int8")
        elif isinstance(module, Linear4bit):
            weight = module.weight
            state = weight.quant_state
            if state.quant_type != "nf4" or state.blocksize != BLOCK:
                what = f"the base holds weights of the kind {state.quant_type} in blocks of {state.blocksize}"
                raise UserError(what, how=f"choose one in nf4, in blocks of {BLOCK}", key=("base_model",))
            nested = state.state2
            parts: dict[str, Tensor | None] = {"absmax": state.absmax, "code": state.code, "offset": state.offset}
            parts |= {"nested_absmax": nested and nested.absmax, "nested_code": nested and nested.code}
            _become_quantized(module, weight.data, parts, "nf4")


def _become_quantized(module: nn.Linear, packed: Tensor, parts: Parts, quantization: str) -> None:
    """Change the object's class in place, as LoRA does: names, references and hooks stay valid."""
    del module.weight
    module.__class__ = QuantizedLinear
    assert isinstance(module, QuantizedLinear)
    module.weight = nn.Parameter(packed, requires_grad=False)
    for name in _PARTS[quantization]:
        module.register_buffer(f"quant_{name}", parts[name], persistent=False)
    module.quantization = quantization


def _pack(weight_OI: Tensor, quantization: str) -> tuple[Tensor, Parts]:
    """Codes and what is needed to read them; of a weight on the meta device only their shapes."""
    if quantization == "int8":
        weight_OI = weight_OI.float()
        # A row of zeros has any scale.
        scale_O = weight_OI.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / INT8_MAX
        return (weight_OI / scale_O[:, None]).round().to(torch.int8), {"scale": scale_O}
    if weight_OI.is_meta:
        blocks = -(-weight_OI.numel() // BLOCK)
        packed = torch.empty((weight_OI.numel() + 1) // 2, 1, dtype=torch.uint8, device="meta")
        sizes = {"code": 16, "nested_absmax": -(-blocks // NESTED_BLOCK), "nested_code": 256}
        parts: dict[str, Tensor | None] = {name: torch.empty(size, device="meta") for name, size in sizes.items()}
        parts["absmax"] = torch.empty(blocks, dtype=torch.uint8, device="meta")
        return packed, parts | {"offset": torch.empty((), device="meta")}
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        weight_OI.cpu().float().contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    nested = state.state2
    return packed, {
        "absmax": state.absmax,
        "code": state.code,
        "offset": state.offset,
        "nested_absmax": nested.absmax,
        "nested_code": nested.code,
    }


def _unpack(packed: Tensor, parts: Parts, shape: torch.Size, quantization: str, dtype: torch.dtype) -> Tensor:
    if packed.is_meta:
        return torch.empty(shape, dtype=dtype, device="meta")
    if quantization == "int8":
        scale_O = parts["scale"]
        assert scale_O is not None
        return (packed * scale_O[:, None]).to(dtype)
    from bitsandbytes import functional

    nested = None
    if parts["nested_absmax"] is not None:
        nested = functional.QuantState(
            absmax=parts["nested_absmax"], code=parts["nested_code"], blocksize=NESTED_BLOCK, dtype=torch.float32
        )
    state = functional.QuantState(
        absmax=parts["absmax"],
        shape=shape,
        code=parts["code"],
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=parts["offset"],
        state2=nested,
    )
    weight: Tensor = functional.dequantize_4bit(packed, state)
    return weight
