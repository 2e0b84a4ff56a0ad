"""Float32 masters computing in bfloat16, against a copy of the model whose parameters are bfloat16."""

import copy

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ftkit.methods import adapter, lora
from ftkit.models.precision import CastConv1D, CastLinear, compute_in
from ftkit.recipe.schema import AdapterMethod, LoraMethod
from tests.tiny_models import CONFIGS, tiny_model

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
EXPERTS = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}


def bfloat16_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Parameters rounded to bfloat16; buffers (rotary frequencies) as they are."""
    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16()
    return rounded


def backward(model: PreTrainedModel) -> torch.Tensor:
    logits = model(input_ids=IDS, use_cache=False).logits
    nn.functional.cross_entropy(logits.float().flatten(0, 1), IDS.flatten()).backward()
    return logits.detach()


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs.float()).abs().max() / theirs.float().abs().max())


@pytest.mark.parametrize("architecture", CONFIGS)
def test_gradients_are_those_of_a_bfloat16_copy_and_arrive_in_float32(architecture: str) -> None:
    model = tiny_model(architecture)
    reference = bfloat16_copy(model)
    compute_in(model, torch.bfloat16)
    assert torch.equal(backward(model), backward(reference))
    owners = {id(p): type(m).__name__ for m in model.modules() for p in m.parameters(recurse=False)}
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert ours.dtype == ours.grad.dtype == torch.float32
        summed = owners[id(ours)] != "CastLinear" or ours is model.get_input_embeddings().weight
        if not summed and ours.ndim == 2:
            assert torch.equal(ours.grad, theirs.grad.float()), name
        # Sums over tokens (biases, norms, rows of the embedding) are kept in float32 here, in bfloat16 there.
        assert relative_difference(ours.grad, theirs.grad) < 1.5e-2, name


@pytest.mark.parametrize("architecture", CONFIGS)
def test_names_values_and_tying_stay(architecture: str) -> None:
    model = tiny_model(architecture)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    parameters = dict(model.named_parameters())
    compute_in(model, torch.bfloat16)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == torch.float32 for name in before)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    for name, buffer in model.named_buffers():
        assert buffer.dtype == buffers[name].dtype, name
        assert torch.equal(buffer, buffers[name])
    if model.config.tie_word_embeddings:
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    backward(model)
    assert [name for name, _ in model.named_parameters()] == list(parameters)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_activations_between_modules_have_the_compute_dtype(architecture: str) -> None:
    model = tiny_model(architecture)
    compute_in(model, torch.bfloat16)
    seen: dict[str, torch.dtype] = {}
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_hook(lambda _m, _a, output, name=name: seen.update({name: output.dtype}))
    model(input_ids=IDS, use_cache=False)
    assert len(seen) > 10
    assert set(seen.values()) == {torch.bfloat16}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_same_under_gradient_checkpointing(architecture: str) -> None:
    model = tiny_model(architecture)
    compute_in(model, torch.bfloat16)
    checkpointed = copy.deepcopy(model)
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(backward(model), backward(checkpointed.train()))
    for (name, ours), theirs in zip(model.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


def test_only_the_parameter_is_kept_for_the_backward_pass() -> None:
    layer = nn.Linear(64, 64)
    model = nn.Sequential(layer)
    model._keep_in_fp32_modules_strict = None
    compute_in(model, torch.bfloat16)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(8, 64, dtype=torch.bfloat16, requires_grad=True))
    weights = [tensor for tensor in saved if tensor.numel() == 64 * 64]
    assert [tensor.data_ptr() for tensor in weights] == [layer.weight.data_ptr()]


def test_nothing_changes_where_the_dtype_is_the_parameters_own_or_nothing_trains() -> None:
    for model, dtype in ((tiny_model(), torch.float32), (tiny_model().requires_grad_(False), torch.bfloat16)):
        classes = [type(module) for module in model.modules()]
        compute_in(model, dtype)
        assert [type(module) for module in model.modules()] == classes


def test_calling_it_again_changes_nothing() -> None:
    model = tiny_model("gpt2")
    compute_in(model, torch.bfloat16)
    classes = [type(module) for module in model.modules()]
    assert {CastConv1D} == {cls for cls in classes if issubclass(cls, Conv1D)}
    assert type(model.lm_head) is CastLinear
    compute_in(model, torch.bfloat16)
    assert [type(module) for module in model.modules()] == classes


def test_lora_on_a_bfloat16_base_is_left_alone() -> None:
    model = bfloat16_copy(tiny_model())
    lora.apply(model, LoraMethod(type="lora", rank=4), seed=0)
    classes = [type(module) for module in model.modules()]
    compute_in(model, torch.bfloat16)
    assert [type(module) for module in model.modules()] == classes
    assert backward(model).dtype == torch.bfloat16


@pytest.mark.parametrize("architecture", CONFIGS)
def test_float32_norms_and_bottleneck_adapters_train_inside_a_bfloat16_model(architecture: str) -> None:
    model = bfloat16_copy(tiny_model(architecture))
    untouched = copy.deepcopy(model)
    adapter.apply(model, AdapterMethod(type="adapter", bottleneck=4, train_norms=True), seed=0)
    compute_in(model, torch.bfloat16)
    # Adapters start as the identity, and the masters of the norms are the base's own bfloat16 values.
    assert torch.equal(backward(model), untouched(input_ids=IDS, use_cache=False).logits)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("norm" in name or ".ln_" in name for name in trained)
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.05)
    assert not torch.equal(backward(model), untouched(input_ids=IDS, use_cache=False).logits)


def test_stacked_experts_are_cast_too() -> None:
    model = tiny_model("llama", **EXPERTS)
    reference = bfloat16_copy(model)
    compute_in(model, torch.bfloat16)
    assert torch.equal(backward(model), backward(reference))
    for (name, ours), theirs in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert relative_difference(ours.grad, theirs[1].grad) < 1.5e-2, name


def test_weights_that_the_model_wants_in_float32_stay_so() -> None:
    model = tiny_model()
    model._keep_in_fp32_modules_strict = {"input_layernorm", "mlp.gate_proj"}
    layer = model.model.layers[0]
    kept = type(layer.input_layernorm)
    compute_in(model, torch.bfloat16)
    assert type(layer.input_layernorm) is kept
    assert type(layer.mlp.gate_proj) is nn.Linear
    assert type(layer.post_attention_layernorm) is not kept
    assert type(layer.mlp.up_proj) is CastLinear


def test_a_parameter_is_visible_again_after_a_forward_that_raised() -> None:
    model = tiny_model()
    compute_in(model, torch.bfloat16)
    norm = model.model.norm
    with pytest.raises(RuntimeError):
        norm(torch.zeros(2, 31))
    assert isinstance(norm.weight, nn.Parameter)


def test_an_update_too_small_for_bfloat16_is_not_lost() -> None:
    model = tiny_model()
    compute_in(model, torch.bfloat16)
    before = model.lm_head.weight.detach().clone()
    backward(model)
    torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0).step()
    moved = (model.lm_head.weight.detach() - before).abs()
    # A weight of 0.1 has neighbours at a distance of 5e-4 in bfloat16.
    assert 0 < float(moved.max()) < 2e-5
