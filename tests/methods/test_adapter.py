import json
from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from ftkit.errors import UserError
from ftkit.methods import adapter
from ftkit.methods.adapter import BottleneckAdapter, non_linearity_named
from ftkit.methods.base import report
from ftkit.methods.files import BOTTLENECK, BaseIdentity, read_adapter
from ftkit.models.architecture import describe
from ftkit.models.precision import compute_in
from ftkit.recipe.method_schema import NonLinearity
from tests.methods.cases import SECTIONS, applied, inputs, logits, loss, perturb, trained
from tests.tiny_models import CONFIGS, tiny_model

every_architecture = pytest.mark.parametrize("architecture", CONFIGS)


def bottleneck(*, width: int = 4, size: int = 2, **keys) -> BottleneckAdapter:
    return BottleneckAdapter(width, size, torch.Generator().manual_seed(0), **keys)


def test_known_answer():
    """h = (1, 2), down = (1, 1) - 5 -> relu(-2) = 0, so only u is added; with + 1 in place of - 5: 4 * (10, 20) + u."""
    module = bottleneck(width=2, size=1, non_linearity="relu")
    module.down.weight.data, module.down.bias.data = torch.tensor([[1.0, 1.0]]), torch.tensor([-5.0])
    module.up.weight.data, module.up.bias.data = torch.tensor([[10.0], [20.0]]), torch.tensor([0.5, 0.25])
    assert module(torch.tensor([1.0, 2.0])).tolist() == [1.5, 2.25]
    module.down.bias.data.fill_(1.0)
    assert module(torch.tensor([1.0, 2.0])).tolist() == [41.5, 82.25]
    module.scale = 2.0
    assert module(torch.tensor([1.0, 2.0])).tolist() == [82.0, 162.5]
    # A parallel one reads something else than what it changes: (2, 0) gives 3 * (10, 20) + u.
    module.input = torch.tensor([2.0, 0.0])
    assert module(torch.tensor([1.0, 2.0])).tolist() == [62.0, 122.5]
    assert module.input is None


@pytest.mark.parametrize("name", get_args(NonLinearity))
def test_every_non_linearity_of_the_schema(name):
    module, h = bottleneck(non_linearity=name), torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    perturb(module)
    inner = non_linearity_named(name)(h @ module.down.weight.t() + module.down.bias)
    assert inner.shape == (3, 2)
    torch.testing.assert_close(module(h), h + inner @ module.up.weight.t() + module.up.bias)
    assert len(list(module.parameters())) == 4
    assert not list(module.buffers())


def test_the_names_are_those_of_transformers_and_torch():
    x = torch.linspace(-3, 3, 13)
    plain = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh, "elu": F.elu, "softplus": F.softplus}
    for name, function in plain.items():
        assert torch.equal(non_linearity_named(name)(x), function(x)), name
    trained = {"prelu", "xielu"}
    assert set(ACT2FN) - trained <= set(get_args(NonLinearity))


def test_dropout_drops_what_the_non_linearity_gives_in_training_alone():
    module, h = bottleneck(width=2, size=10_000, non_linearity="relu", dropout=0.5), torch.ones(2)
    module.up.weight.data.fill_(1.0)
    nn.init.zeros_(module.down.weight)
    nn.init.ones_(module.down.bias)
    assert module.eval()(h).tolist() == [10_001.0, 10_001.0]
    torch.manual_seed(0)
    dropped = module.train()(h)
    # The same elements for both outputs; each counts 0 or 2: within 5 standard deviations of 100.
    assert dropped[0] == dropped[1] != 10_001.0
    assert abs(dropped[0] - 10_001) < 5 * 100
    torch.manual_seed(0)
    assert torch.equal(module(h), dropped)


def test_starts_as_the_identity_with_a_gradient():
    module, h = bottleneck(), torch.randn(3, 4)
    assert torch.equal(module(h), h)
    module(h).square().sum().backward()
    assert module.up.weight.grad.count_nonzero() > 0
    assert module.up.bias.grad.count_nonzero() > 0


@pytest.mark.parametrize(("width", "size"), [(4, 2), (32, 6), (5, 7)])
def test_number_of_parameters(width, size):
    assert report(bottleneck(width=width, size=size)).total_parameters == 2 * size * width + width + size


@every_architecture
def test_placed_on_what_the_sublayers_write(architecture):
    model = applied(architecture, "adapter")
    gpt2 = architecture == "gpt2"
    prefix, projection = ("transformer.h", "attn.c_proj") if gpt2 else ("model.layers", "self_attn.o_proj")
    found = [path for path, module in model.named_modules() if isinstance(module, BottleneckAdapter)]
    assert found == [f"{prefix}.{i}.{where}.adapter" for i in range(2) for where in (projection, "mlp")]


@every_architecture
def test_names_of_the_base_stay(architecture):
    model = applied(architecture, "adapter-norms")
    base = list(tiny_model(architecture).state_dict())
    assert [name for name in model.state_dict() if ".adapter." not in name] == base


def test_before_the_post_norm_and_the_residual_sum():
    """Gemma 3 normalises what a sublayer gives and then adds it: an adapter that adds a constant shows where it is."""
    model = applied("gemma3", "adapter").eval()
    block = model.model.layers[0]
    block.self_attn.o_proj.adapter.up.bias.data.fill_(2.0)
    block.mlp.adapter.up.bias.data.fill_(3.0)
    seen = {}
    for name, module in block.named_modules():
        module.register_forward_hook(lambda _, args, output, name=name: seen.__setitem__(name, (args, output)))
    model(input_ids=inputs())
    o_proj = block.self_attn.o_proj
    attention = F.linear(seen["self_attn.o_proj"][0][0], o_proj.weight)
    torch.testing.assert_close(seen["post_attention_layernorm"][0][0], attention + 2.0)
    mlp, mlp_input = block.mlp, seen["mlp"][0][0]
    plain = mlp.down_proj(mlp.act_fn(mlp.gate_proj(mlp_input)) * mlp.up_proj(mlp_input))
    torch.testing.assert_close(seen["post_feedforward_layernorm"][0][0], plain + 3.0)


def test_order_with_gpt2s_dropout():
    """The attention's adapter comes before resid_dropout, the feed-forward's after the dropout inside mlp."""
    model = applied("gpt2", "adapter", resid_pdrop=0.999).train()
    block, seen = model.transformer.h[0], {}
    block.attn.c_proj.adapter.up.bias.data.fill_(100.0)
    block.mlp.adapter.up.bias.data.fill_(100.0)
    for name in ("attn.resid_dropout", "mlp"):
        hook = lambda _, args, output, name=name: seen.__setitem__(name, output)  # noqa: E731
        block.get_submodule(name).register_forward_hook(hook)
    torch.manual_seed(0)
    model(input_ids=inputs())
    assert (seen["attn.resid_dropout"] == 0).float().mean() > 0.9
    assert (seen["mlp"] == 0).float().mean() < 0.1


def test_a_feed_forward_that_returns_its_routing_too():
    module = torch.nn.Module()
    module.add_module("adapter", bottleneck())
    perturb(module)
    hidden, routing = torch.ones(1, 4), torch.zeros(1, 2)
    output = adapter._adapt(module, (), (hidden, routing))
    assert torch.equal(output[0], module.adapter(hidden))
    assert output[1] is routing


def test_files(tmp_path):
    section = SECTIONS["adapter-norms"]
    model = applied("llama", "adapter-norms")
    adapter.save(model, section, tmp_path, BaseIdentity("org/base", "abc", "sha256:1"))
    config, state = read_adapter(tmp_path, peft_type=BOTTLENECK)
    assert config == {
        "peft_type": "FTKIT_BOTTLENECK",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/base",
        "revision": "abc",
        "bottleneck": 6,
        "reduction_factor": None,
        "non_linearity": "tanh",
        "placement": ["attention", "feed_forward"],
        "insertion": "sequential",
        "scale": 1.0,
        "dropout": 0.0,
        "train_norms": True,
    }
    assert set(state) == set(trained(model))
    block = "model.layers.1"
    assert {name for name in state if name.startswith(block)} == {
        f"{block}.{where}.adapter.{part}.{kind}"
        for where in ("self_attn.o_proj", "mlp")
        for part in ("down", "up")
        for kind in ("weight", "bias")
    } | {f"{block}.input_layernorm.weight", f"{block}.post_attention_layernorm.weight"}
    assert "model.norm.weight" in state
    assert adapter.load(tiny_model("llama"), tmp_path) == section


def test_files_of_the_first_versions(tmp_path):
    """They say bottleneck, non-linearity and norms, and mean sequential adapters in both places."""
    model = applied("llama", "adapter-norms")
    perturb(model)
    adapter.save(model, SECTIONS["adapter-norms"], tmp_path, BaseIdentity("org/base"))
    path = tmp_path / "adapter_config.json"
    old = {
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "bottleneck",
        "non_linearity",
        "train_norms",
    }
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name in old}))
    loaded = tiny_model("llama")
    assert adapter.load(loaded, tmp_path) == SECTIONS["adapter-norms"]
    assert torch.equal(logits(loaded), logits(model))


def test_a_bad_configuration_is_named(tmp_path):
    adapter.save(applied("llama", "adapter"), SECTIONS["adapter"], tmp_path, BaseIdentity("org/base"))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "non_linearity": "swoosh", "extra": 1}))
    with pytest.raises(UserError) as caught:
        adapter.load(tiny_model("llama"), tmp_path)
    assert sorted(problem.what.partition(":")[0] for problem in caught.value.problems) == ["extra", "non_linearity"]


@pytest.mark.parametrize("case", ["adapter", "adapter-norms", "adapter-parallel"])
@every_architecture
def test_on_a_bfloat16_base(architecture, case):
    """Trained weights stay float32, activations are bfloat16; logits within 5% of the float32 model's maximum."""
    exact = applied(architecture, case)
    perturb(exact)
    model = tiny_model(architecture)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    adapter.apply(model, SECTIONS[case], seed=1)
    adapter.load_state(model, adapter.trained_state(exact))
    compute_in(model, torch.bfloat16)
    expected = logits(exact)
    assert (logits(model).float() - expected).abs().max() <= 0.05 * expected.abs().max()
    loss(model.train()).backward()
    for name, parameter in trained(model).items():
        assert parameter.dtype == torch.float32, name
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name
    assert describe(model).blocks_path == describe(exact).blocks_path
    assert set(adapter.trained_state(model)) == set(adapter.trained_state(exact))


def test_a_factor_above_the_width_is_refused():
    section = SECTIONS["adapter-parallel"].model_copy(update={"reduction_factor": 33.0})
    with pytest.raises(
        UserError, match="width is 32, which divided by 33 leaves no bottleneck; set at most 32"
    ) as caught:
        adapter.apply(tiny_model("llama"), section, seed=0)
    assert caught.value.problems[0].key == ("method", "reduction_factor")


def test_merging_is_refused_with_the_way_out():
    assert "non-linearity" in adapter.merge_refusal
    assert "ftkit export" in adapter.merge_refusal
