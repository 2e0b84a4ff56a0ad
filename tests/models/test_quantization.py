"""Quantised linear layers: what they compute with, the bytes that they keep, and other tools' checkpoints."""

import importlib.util
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ftkit.errors import UserError
from ftkit.models import quantization
from ftkit.models.load import BaseModel, find_base, load_weights
from ftkit.models.quantization import (
    QuantizedLinear,
    dequantize,
    quantization_of,
    quantize,
    quantized_layers,
    round_trip,
    storage_bytes,
)
from ftkit.recipe.schema import ModelSection
from tests.methods.cases import logits
from tests.tiny_models import save_tiny, tiny_model

KINDS = ("nf4", "int8")
LARGEST_ERROR = {"nf4": 0.16, "int8": 0.51 / 127}
"""Half the widest gap between two codes, as a share of the largest magnitude of a block (nf4) or row (int8)."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_comes_back_as_near_as_its_codes_lie(kind: str) -> None:
    weight_OI = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    # One row is one block.
    largest_O1 = weight_OI.abs().amax(1, keepdim=True)
    error = ((round_trip(weight_OI, kind) - weight_OI) / largest_O1).abs()
    assert 0 < error.max() <= LARGEST_ERROR[kind]


def test_nf4_is_that_of_bitsandbytes() -> None:
    weight_OI = torch.randn(48, 80, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight_OI, quant_type="nf4", compress_statistics=True, blocksize=64)
    assert torch.equal(round_trip(weight_OI, "nf4"), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero", ["row", "all"])
def test_rows_of_zeros_stay_zero(kind: str, zero: str) -> None:
    weight_OI = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    weight_OI[slice(3, 4) if zero == "row" else slice(None)] = 0.0
    assert torch.equal(round_trip(weight_OI, kind)[3], torch.zeros(64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_with_its_dequantised_weight_alone(kind: str, dtype: torch.dtype) -> None:
    linear = _quantized(kind)
    linear.bias = nn.Parameter(torch.randn(48), requires_grad=False)
    x = torch.randn(2, 5, 64).to(dtype).requires_grad_()
    weight_OI = linear.dequantized(dtype)
    assert torch.equal(linear(x), nn.functional.linear(x, weight_OI, linear.bias.to(dtype)))
    grad_y = torch.randn(2, 5, 48).to(dtype)
    (grad_x,) = torch.autograd.grad(linear(x), x, grad_y)
    assert torch.equal(grad_x, grad_y @ weight_OI)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_the_codes_is_kept_for_the_backward_pass(kind: str) -> None:
    linear, saved = _quantized(kind), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(torch.randn(3, 64, requires_grad=True))
    assert [tensor.data_ptr() for tensor in saved] == [linear.weight.data_ptr()]


def test_the_bytes_are_those_of_the_paper() -> None:
    """4 bits a weight, 8 bits a block of 64, 32 bits 256 blocks; besides two tables of codes, 1 KiB a layer."""
    weights = 512 * 512
    assert storage_bytes(_quantized("nf4", 512, 512)) == weights / 2 + weights / 64 + weights / 64 / 256 * 4 + 4 * 273
    assert storage_bytes(_quantized("int8", 512, 512)) == weights + 4 * 512


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_linear_layers_of_the_blocks_are_quantised(kind: str) -> None:
    model = tiny_model("mixtral")
    quantize(model, kind)
    paths = [path for path, _ in quantized_layers(model)]
    assert len(paths) == 2 * 4
    assert all(".self_attn." in path for path in paths)
    assert quantization_of(model) == kind
    assert model.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "mistral", "phi3", "gpt_neox", "opt", "qwen3_5"])
def test_a_model_computes_what_its_dequantised_copy_does(kind: str, architecture: str) -> None:
    model = tiny_model(architecture)
    plain = logits(model)
    quantize(model, kind)
    quantized = logits(model)
    dequantize(model)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    assert torch.equal(quantized, logits(model))
    assert not torch.equal(quantized, plain)


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(UserError, match="GPT2LMHeadModel has no linear layers"):
        quantize(tiny_model("gpt2"), "nf4")


@pytest.mark.parametrize("kind", KINDS)
def test_the_codes_do_not_depend_on_the_compute_dtype(kind: str, tmp_path: Path) -> None:
    """They are made from the values in the files, not from their cast."""
    base = find_base(str(save_tiny(tmp_path)), ModelSection(quantization=kind), base=tmp_path)
    in_float32, in_bfloat16 = (load_weights(base, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    others = dict(quantized_layers(in_bfloat16))
    for path, layer in quantized_layers(in_float32):
        assert torch.equal(layer.weight, others[path].weight)
        assert torch.equal(layer.dequantized(), others[path].dequantized())
    assert in_bfloat16.lm_head.weight.dtype == in_bfloat16.model.norm.weight.dtype == torch.bfloat16
    # As loading without quantisation does, so that rotary angles keep their precision.
    assert in_bfloat16.model.rotary_emb.inv_freq.dtype == torch.float32


def save_quantized(directory: Path, kind: str, source: Path) -> Path:
    """A checkpoint as transformers and bitsandbytes write it."""
    if kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}
    )
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(("kind", "apart"), [("nf4", 0.0), ("int8", 1e-2)])
def test_a_checkpoint_that_is_stored_quantised_is_the_base_quantised_here(
    kind: str, apart: float, tmp_path: Path
) -> None:
    """bitsandbytes makes its 8-bit codes of float16 values, which may round to a neighbouring code."""
    plain = save_tiny(tmp_path / "plain")
    stored = save_quantized(tmp_path / kind, kind, plain)
    model = load_weights(BaseModel(kind, path=stored), dtype=torch.float32)
    assert quantization_of(model) == kind
    ours = load_weights(BaseModel("plain", path=plain, quantization=kind), dtype=torch.float32)
    largest = logits(ours).abs().max()
    assert (logits(model) - logits(ours)).abs().max() <= apart * largest


def test_kinds_that_ftkit_lacks_are_refused(tmp_path: Path) -> None:
    plain = save_tiny(tmp_path / "plain")
    stored = save_quantized(tmp_path / "fp4", "fp4", plain)
    with pytest.raises(UserError, match="weights of the kind fp4 in blocks of 64; choose one in nf4"):
        load_weights(BaseModel("fp4", path=stored), dtype=torch.float32)
    stored = save_quantized(tmp_path / "nf4", "nf4", plain)
    with pytest.raises(UserError, match="nf4 is stored in nf4, which int8 cannot be made of"):
        load_weights(BaseModel("nf4", path=stored, quantization="int8"), dtype=torch.float32)


def test_without_bitsandbytes_the_pip_line_is_told_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(quantization, "find_spec", lambda name: None if name == "bitsandbytes" else real(name))
    with pytest.raises(UserError, match=r"nf4 needs the bitsandbytes package; pip install 'ftkit\[gpu\]'") as error:
        find_base("nowhere", ModelSection(quantization="nf4"), base=tmp_path)
    assert error.value.exit_code == 2
    assert error.value.problems[0].key == ("model", "quantization")
    base = find_base(str(save_tiny(tmp_path)), ModelSection(quantization="int8"), base=tmp_path)
    assert quantization_of(load_weights(base, dtype=torch.float32)) == "int8"


def _quantized(kind: str, out_features: int = 48, in_features: int = 64) -> QuantizedLinear:
    """One layer, quantised inside a model's block."""
    model = tiny_model("llama")
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features, bias=False)
    model.model.layers[0].self_attn.q_proj = linear
    quantize(model, kind)
    assert isinstance(linear, QuantizedLinear)
    return linear
