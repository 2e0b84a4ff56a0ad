"""LoRA of experts that are kept as one tensor, against peft's `target_parameters`."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import ValidationError
from safetensors.torch import load_file

from ftkit.errors import UserError
from ftkit.methods import lora
from ftkit.methods.base import report
from ftkit.methods.files import BaseIdentity
from ftkit.methods.lora_experts import from_peft, select_experts, to_peft
from ftkit.models.precision import compute_in
from ftkit.recipe.schema import LoraMethod
from tests.methods.cases import inputs, logits, loss, perturb
from tests.tiny_models import tiny_model

BOTH = ("experts.gate_up_proj", "experts.down_proj")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call


QWEN = {"model_type": "qwen3_moe", "num_experts": 8, "moe_intermediate_size": 48, "head_dim": 8}


def section(*parameters, **keys):
    return LoraMethod(type="lora", rank=3, alpha=5.0, targets=("q_proj",), target_parameters=parameters or BOTH, **keys)


def applied(*parameters, **keys):
    """A tiny Mixtral with noise in all factors."""
    model = tiny_model("mixtral")
    lora.apply(model, section(*parameters, **keys), seed=1)
    perturb(model)
    return model


@pytest.mark.parametrize("overrides", [{}, QWEN], ids=["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("parameters", [BOTH, ("gate_up_proj",), ("experts.down_proj",)])
def test_pefts_files_compute_the_same_and_come_back(overrides, parameters, tmp_path):
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=list(parameters))
    theirs = get_peft_model(tiny_model("mixtral", **overrides), config)
    perturb(theirs)
    theirs.save_pretrained(tmp_path)
    ours = tiny_model("mixtral", **overrides)
    base = logits(ours)
    read = lora.load(ours, tmp_path)
    assert sorted(read.target_parameters) == sorted(parameters)
    assert (logits(ours) - logits(theirs)).abs().max() <= 1e-5
    assert (logits(ours) - base).abs().max() > 1e-2
    state, file = lora.trained_state(ours), load_file(tmp_path / "adapter_model.safetensors")
    assert state.keys() == file.keys()
    assert all(torch.equal(state[name], file[name]) for name in file)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")  # yet it takes them
@pytest.mark.parametrize("parameters", [BOTH, ("down_proj",)])
def test_peft_reads_ours(parameters, tmp_path):
    ours = applied(*parameters, rank_pattern={"down_proj": 2}, rank_stabilized=True)
    chosen = section(*parameters, rank_pattern={"down_proj": 2}, rank_stabilized=True)
    lora.save(ours, chosen, tmp_path, BaseIdentity("base"))
    theirs = PeftModel.from_pretrained(tiny_model("mixtral"), tmp_path)
    assert (logits(ours) - logits(theirs)).abs().max() <= 1e-5
    written = json.loads((tmp_path / "adapter_config.json").read_text())["target_parameters"]
    assert written == sorted(f"experts.{name.rpartition('.')[2]}" for name in parameters)
    again = tiny_model("mixtral")
    lora.load(again, tmp_path)
    assert torch.equal(logits(again), logits(ours))


def test_gradients_are_those_of_peft(tmp_path):
    ours = applied()
    lora.save(ours, section(), tmp_path, BaseIdentity("base"))
    theirs = PeftModel.from_pretrained(tiny_model("mixtral"), tmp_path, is_trainable=True)
    for model in (ours.train(), theirs.train()):
        loss(model).backward()
    experts = theirs.base_model.model.model.layers[1].mlp.experts
    own = ours.model.layers[1].mlp.experts.factors()
    for name, wrapper in (("down_proj", experts), ("gate_up_proj", experts.base_layer)):
        grads = [wrapper.lora_A["default"].weight.grad, wrapper.lora_B["default"].weight.grad]
        for mine, grad in zip((own[name].lora_A.grad, own[name].lora_B.grad), from_peft(*grads, 8), strict=True):
            assert grad.abs().max() > 0
            assert (mine - grad).abs().max() <= 1e-5 * grad.abs().max()


def test_nothing_but_the_factors_trains_and_the_router_is_left_alone():
    model = tiny_model("mixtral")
    before = logits(model)
    lora.apply(model, section(), seed=1)
    # The base's own code sums the experts in another order.
    assert (logits(model) - before).abs().max() <= 1e-6
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"lora_A", "lora_B"}
    assert not any("gate." in name for name in trained)
    # Of each layer: q_proj, and 8 experts' two projections.
    layer = 3 * (32 + 32) + 8 * 3 * (32 + 128) + 8 * 3 * (64 + 32)
    assert report(model, lora).trainable_parameters == 2 * layer
    perturb(model)
    with lora.disabled(model):
        assert torch.equal(logits(model), before)
    assert not torch.equal(logits(model), before)


def test_initial_values_depend_on_seed_and_path_alone():
    first, second, other = (tiny_model("mixtral") for _ in range(3))
    lora.apply(first, section(), seed=1)
    lora.apply(second, section("down_proj"), seed=1)
    lora.apply(other, section("down_proj"), seed=2)
    one, two, three = (model.model.layers[0].mlp.experts.factors()["down_proj"] for model in (first, second, other))
    assert torch.equal(one.lora_A, two.lora_A)
    assert not torch.equal(one.lora_A, three.lora_A)
    assert one.lora_A.abs().max() <= 64**-0.5 < 1.01 * one.lora_A.abs().max()
    assert not torch.equal(one.lora_A[0], one.lora_A[1])
    assert not one.lora_B.any()


def test_all_linear_takes_the_experts_along_where_they_are_named():
    model = tiny_model("mixtral")
    lora.apply(model, section().model_copy(update={"targets": "all-linear"}), seed=1)
    layers = {name.rpartition(".lora_A")[0] for name, _ in model.named_parameters() if name.endswith(".lora_A")}
    assert len(layers) == 2 * (4 + 2)


def test_it_computes_in_bfloat16():
    model = applied()
    exact = logits(model)
    rounded = tiny_model("mixtral").bfloat16()
    lora.apply(rounded, section(), seed=1)
    perturb(rounded)
    compute_in(rounded, torch.bfloat16)
    assert logits(rounded).dtype == torch.bfloat16
    assert (logits(rounded) - exact).abs().max() < 2**-4 * exact.abs().max()
    assert rounded.model.layers[0].mlp.experts.factors()["down_proj"].lora_A.dtype == torch.float32


def test_checkpointing_changes_nothing():
    plain, checkpointed = applied().train(), applied().train()
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    grads = []
    for model in (plain, checkpointed):
        loss(model, inputs()).backward()
        grads.append(model.model.layers[0].mlp.experts.factors()["gate_up_proj"].lora_A.grad)
    assert torch.equal(*grads)


def test_layouts_are_inverse():
    a_ERI, b_EOR = torch.randn(4, 3, 5), torch.randn(4, 7, 3)
    a, b = to_peft(a_ERI, b_EOR)
    assert (a.shape, b.shape) == ((12, 5), (7, 12))
    back = from_peft(a, b, 4)
    assert torch.equal(back[0], a_ERI)
    assert torch.equal(back[1], b_EOR)


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(
        UserError, match=r"experts\.up_proj matches no stack of experts; there are experts\.gate_up"
    ) as caught:
        select_experts(tiny_model("mixtral"), ("experts.up_proj",))
    assert caught.value.problems[0].key == ("method", "target_parameters")
    with pytest.raises(UserError, match="this model has none: choose linear layers"):
        select_experts(tiny_model("llama"), ("gate_up_proj",))
    with pytest.raises(UserError, match=r"mlp\.gate\.weight matches no stack of experts"):
        select_experts(tiny_model("mixtral"), ("mlp.gate.weight",))
    with pytest.raises(UserError, match=r"GptOssExperts.* cannot be adapted yet"):
        select_experts(tiny_model("gpt_oss"), ("gate_up_proj",))
    for keys in ({"dropout": 0.1}, {"dora": True}, {"init": "pissa"}):
        with pytest.raises(ValidationError, match="experts have plain updates only"):
            section(**keys)
