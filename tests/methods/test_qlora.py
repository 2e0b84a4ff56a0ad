"""LoRA on a quantised base against LoRA on the dequantised weight, and against peft on bitsandbytes' own layers."""

import json

import bitsandbytes
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ftkit.errors import UserError
from ftkit.methods import lora
from ftkit.methods.base import report
from ftkit.methods.files import BaseIdentity, read_quantization
from ftkit.methods.table import METHODS
from ftkit.models.load import BaseModel, load_weights
from ftkit.models.quantization import dequantize, quantize
from ftkit.recipe.schema import LoraMethod
from tests.methods.cases import SECTIONS, inputs, logits, loss, perturb, section_of, trained
from tests.tiny_models import save_tiny, tiny_model

KINDS = ("nf4", "int8")
CASES = ("lora", "lora-pissa", "lora-dora", "lora-modules", "adapter", "soft_prompt", "prefix", "llama_adapter")
IDENTITY = BaseIdentity("somewhere/base")


def pair(kind, case, *, architecture="llama"):
    """A model on the quantised base, and one on the same weights dequantised; both as if they had trained."""
    models = []
    for plain in (False, True):
        model = tiny_model(architecture)
        quantize(model, kind)
        if plain:
            dequantize(model)
        section = section_of(architecture, case)
        METHODS[section.type].apply(model, section, seed=1)
        perturb(model)
        models.append(model)
    return models


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_on_the_dequantised_weight(kind, case):
    quantized, plain = pair(kind, case)
    assert torch.equal(logits(quantized), logits(plain))
    for model in (quantized, plain):
        loss(model.train()).backward()
    theirs = trained(plain)
    assert trained(quantized).keys() == theirs.keys()
    for name, parameter in trained(quantized).items():
        reference = theirs[name].grad
        assert (parameter.grad - reference).abs().max() <= 1e-6 * reference.abs().max(), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["mixtral", "phi3", "gpt_neox", "opt", "qwen3_5", "gemma3"])
def test_on_other_architectures(kind, architecture):
    quantized, plain = pair(kind, "lora", architecture=architecture)
    assert torch.equal(logits(quantized), logits(plain))
    loss(quantized.train()).backward()
    assert all(parameter.grad is not None for parameter in trained(quantized).values())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_and_b_are_those_of_their_formula(kind):
    """A float64 reference that plain autograd makes of x (D + s B A)^T, with D the dequantised weight."""
    (layer, *_) = _layers(pair(kind, "lora")[0])
    x = torch.randn(7, layer.in_features, generator=torch.Generator().manual_seed(2))
    grad_y = torch.randn(7, layer.out_features, generator=torch.Generator().manual_seed(3))
    x_ours, x_reference = x.clone().requires_grad_(), x.double().requires_grad_()
    ours = torch.autograd.grad(layer(x_ours), (x_ours, layer.lora_A, layer.lora_B), grad_y)
    a, b = (factor.detach().double().requires_grad_() for factor in (layer.lora_A, layer.lora_B))
    y = x_reference @ (layer.dequantized().double() + layer.lora_scale * b @ a).t()
    for one, other in zip(ours, torch.autograd.grad(y, (x_reference, a, b), grad_y.double()), strict=True):
        assert (one - other).abs().max() <= 1e-6 * other.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_no_float_copy_of_the_weight_is_kept(kind):
    (layer, *_) = _layers(pair(kind, "lora")[0])
    saved = []
    x = torch.randn(5, layer.in_features, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    known = {tensor.data_ptr() for tensor in (x, layer.weight, layer.lora_A, layer.lora_B)}
    others = [tensor for tensor in saved if tensor.data_ptr() not in known]
    assert [tuple(tensor.shape) for tensor in others] == [(5, layer.lora_A.shape[0])]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_with_checkpointing(kind):
    gradients = []
    for checkpointing in (False, True):
        model = pair(kind, "lora")[0].train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        loss(model).backward()
        gradients.append([parameter.grad for parameter in trained(model).values()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_without_its_adapter_the_base_is_the_quantised_one(kind):
    base, (model, _) = tiny_model("llama"), pair(kind, "lora")
    quantize(base, kind)
    with lora.disabled(model):
        assert torch.equal(logits(model), logits(base))
    assert not torch.equal(logits(model), logits(base))


@pytest.mark.parametrize("case", ["lora", "adapter"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_files_say_what_the_base_was_kept_in(kind, case, tmp_path):
    model, _ = pair(kind, case)
    method, section = METHODS[SECTIONS[case].type], SECTIONS[case]
    method.save(model, section, tmp_path, IDENTITY)
    assert read_quantization(tmp_path) == kind
    assert json.loads((tmp_path / "ftkit.json").read_text())["base_dtype"] == "float32"
    again = tiny_model("llama")
    quantize(again, kind)
    method.load(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_an_unknown_quantisation_is_refused(tmp_path):
    (tmp_path / "ftkit.json").write_text('{"base_quantization": "gptq"}')
    with pytest.raises(UserError, match="base_quantization: 'gptq' is unknown"):
        read_quantization(tmp_path)


# peft asks transformers under an old name whether a quantised model is checkpointed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_on_bitsandbytes_layers_computes_the_same(tmp_path):
    """The same NF4 codes, double quantisation and adapter; logits within 1e-5 in float32."""
    base = save_tiny(tmp_path / "base")
    ours = load_weights(BaseModel("base", path=base, quantization="nf4"), dtype=torch.float32)
    METHODS["lora"].apply(ours, SECTIONS["lora"], seed=1)
    perturb(ours)
    lora.save(ours, SECTIONS["lora"], tmp_path / "adapter", IDENTITY)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    plain = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}
    )
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    for module in theirs.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # CPUs with AVX512-BF16 would compute in bfloat16 while nothing trains, and only at widths of 64 and up.
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        difference = (theirs(input_ids=inputs()).logits - logits(ours)).abs().max()
    assert difference <= 1e-5


def test_a_quantised_module_cannot_train_in_full():
    model = tiny_model("llama")
    quantize(model, "nf4")
    section = LoraMethod(type="lora", targets=("v_proj",), modules_to_save=("q_proj",))
    with pytest.raises(UserError, match=r"q_proj is quantized \(nf4\), and a quantized weight cannot train in full"):
        METHODS["lora"].apply(model, section, seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_counts_weights_not_bytes(kind):
    plain, quantized = tiny_model("llama"), tiny_model("llama")
    quantize(quantized, kind)
    for model in (plain, quantized):
        METHODS["lora"].apply(model, SECTIONS["lora"], seed=0)
    counted, expected = report(quantized, METHODS["lora"]), report(plain, METHODS["lora"])
    assert counted.total_parameters == expected.total_parameters
    assert counted.trainable_parameters == expected.trainable_parameters
    (part,) = (part for part in counted.precision if part.quantization is not None)
    assert part.name == kind
    # Two layers of four projections of 32 x 32 or 16 x 32, and three of 32 x 64.
    assert part.parameters == 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64)
    assert part.bytes < {"nf4": 1.9, "int8": 1.2}[kind] * part.parameters


def _layers(model):
    return [module for module in model.modules() if hasattr(module, "lora_A")]
