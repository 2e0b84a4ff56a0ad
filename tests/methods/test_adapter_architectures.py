"""Bottleneck adapters of every form, on every kind of block: one module for a feed-forward part, none, experts."""

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from ftkit.methods import adapter
from ftkit.methods.adapter import BottleneckAdapter
from ftkit.methods.base import report
from ftkit.methods.files import BaseIdentity
from ftkit.models.architecture import norm_modules
from ftkit.models.precision import compute_in
from ftkit.recipe.schema import AdapterMethod
from tests.methods.cases import inputs, logits, loss, perturb, trained
from tests.tiny_models import CONFIGS, tiny_model

WIDTH, LAYERS = 32, 2
MORE = {
    # Neither has a module of its own for the feed-forward part; the second normalises after the residual sum.
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": WIDTH, "dropout": 0.0},
    "opt-350m": {"ffn_dim": 64, "word_embed_proj_dim": WIDTH, "dropout": 0.0, "do_layer_norm_before": False},
    "gpt_neox": {"hidden_dropout": 0.0, "tie_word_embeddings": False},
    "phi3": {"resid_pdrop": 0.0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.1},
    # Its experts return their routing beside the hidden states.
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}
ARCHITECTURES = (*CONFIGS, *MORE)
ATTENTION = {"gpt2": ("attn", "c_proj"), "gpt_neox": ("attention", "dense")}
ATTENTION |= dict.fromkeys(("opt", "opt-350m"), ("self_attn", "out_proj"))
FORMS = {
    "houlsby": {},
    "pfeiffer": {"placement": ("feed_forward",), "reduction_factor": 4.0},
    "attention": {"placement": ("attention",), "non_linearity": "gelu_new", "train_norms": True},
    "parallel": {"insertion": "parallel"},
    "parallel, feed-forward": {"insertion": "parallel", "placement": ("feed_forward",), "scale": 0.5, "dropout": 0.2},
}

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
every_form = pytest.mark.parametrize("form", FORMS)


def section_of(form: str) -> AdapterMethod:
    size = {} if "reduction_factor" in FORMS[form] else {"bottleneck": 6}
    return AdapterMethod(type="adapter", **size, **FORMS[form])


def base_of(architecture: str) -> PreTrainedModel:
    if architecture in CONFIGS:
        return tiny_model(architecture)
    return tiny_model("llama", model_type=architecture.partition("-")[0], **MORE[architecture])


def adapted(architecture: str, form: str) -> PreTrainedModel:
    model = base_of(architecture)
    adapter.apply(model, section_of(form), seed=1)
    return model


def adapters(model: nn.Module) -> dict[str, BottleneckAdapter]:
    return {path: module for path, module in model.named_modules() if isinstance(module, BottleneckAdapter)}


@every_form
@every_architecture
def test_starts_as_the_base_and_trains_what_it_inserted(architecture, form):
    model, base, section = adapted(architecture, form), base_of(architecture), section_of(form)
    assert torch.equal(logits(model), logits(base))
    norms = {f"{path}.{name}" for path, norm in norm_modules(base).items() for name, _ in norm.named_parameters()}
    inserted = {name for name, _ in model.named_parameters()} - {name for name, _ in base.named_parameters()}
    assert set(trained(model)) == inserted | (norms if section.train_norms else set())
    m, count = (8 if section.reduction_factor else 6), LAYERS * len(section.placement)
    before = report(base).total_parameters
    assert report(model).total_parameters - before == count * (2 * m * WIDTH + WIDTH + m)
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss(model.train()).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.count_nonzero() > 0, name


@every_form
@every_architecture
def test_saved_loaded_and_switched_off(architecture, form, tmp_path):
    model, base = adapted(architecture, form), base_of(architecture)
    perturb(model)
    adapter.save(model, section_of(form), tmp_path, BaseIdentity("org/base"))
    fresh = base_of(architecture)
    assert adapter.load(fresh, tmp_path) == section_of(form)
    assert torch.equal(logits(fresh), logits(model))
    assert (logits(model) - logits(base)).abs().max() > 1e-3
    assert adapter.places(fresh) == adapter.places(model)
    if not section_of(form).train_norms:
        with adapter.disabled(model):
            assert torch.equal(logits(model), logits(base))
            assert all(each.input is None for each in adapters(model).values()), "an activation is kept alive"


@pytest.mark.parametrize("form", ["houlsby", "parallel", "parallel, feed-forward"])
@every_architecture
def test_checkpointing_changes_no_bit(architecture, form):
    """Dropout included: what is recomputed drops the same elements."""
    gradients = []
    for checkpointing in (False, True):
        model = adapted(architecture, form).train()
        perturb(model)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        loss(model).backward()
        gradients.append({name: parameter.grad for name, parameter in trained(model).items()})
        assert all(each.input is None for each in adapters(model).values()), "an activation is kept alive"
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


@pytest.mark.parametrize("form", ["houlsby", "parallel"])
@every_architecture
def test_in_bfloat16(architecture, form):
    """A frozen bfloat16 base: masters and their gradients stay float32; within 5% of the float32 model."""
    exact = adapted(architecture, form)
    perturb(exact)
    model = base_of(architecture)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    adapter.apply(model, section_of(form), seed=1)
    adapter.load_state(model, adapter.trained_state(exact))
    compute_in(model, torch.bfloat16)
    expected = logits(exact)
    # Experts are chosen anew: a token whose scores are close together may get others.
    error = (logits(model).float() - expected).abs()
    assert error.quantile(0.9) <= 0.05 * expected.abs().max()
    loss(model).backward()
    for name, parameter in trained(model).items():
        assert parameter.grad.dtype == parameter.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


@every_architecture
def test_places_are_named(architecture):
    attention, projection = ATTENTION.get(architecture, ("self_attn", "o_proj"))
    bare = architecture.startswith("opt")
    first, last = ("fc1", "fc2") if bare else ("mlp", "mlp")
    after = f"after attention ({attention}.{projection})", f"after feed-forward ({last})"
    beside = f"beside attention ({attention})", f"beside feed-forward ({f'{first} to {last}' if bare else first})"
    expected = {
        "houlsby": after,
        "pfeiffer": after[1:],
        "attention": after[:1],
        "parallel": beside,
        "parallel, feed-forward": beside[1:],
    }
    for form, places in expected.items():
        model = adapted(architecture, form)
        assert adapter.places(model) == tuple(f"2 x {place}" for place in places)
        assert report(model, adapter).places == adapter.places(model)


@pytest.mark.parametrize("part", ["attention", "feed_forward"])
@every_architecture
def test_a_parallel_adapter_reads_its_sublayers_input(architecture, part):
    """y = f(x) + scale * up(act(down(x))), with what comes in and goes out seen from the outside."""
    section = AdapterMethod(type="adapter", bottleneck=6, insertion="parallel", placement=(part,), non_linearity="relu")
    model = base_of(architecture).eval()
    adapter.apply(model, section, seed=1)
    perturb(model)
    path, inserted = next(iter(adapters(model).items()))
    writer = path.removesuffix(".adapter")
    attention, projection = ATTENTION.get(architecture, ("self_attn", "o_proj"))
    reader = writer.removesuffix(f".{projection}") if part == "attention" else writer.replace("fc2", "fc1")
    assert reader.rpartition(".")[2] in (attention, "mlp", "fc1")
    seen = {}

    def read(module, args, kwargs):
        seen.setdefault("x", (*args, *kwargs.values())[0])

    model.get_submodule(reader).register_forward_pre_hook(read, with_kwargs=True)
    module = model.get_submodule(writer)
    # One before the adapter's own hook, one after it.
    module.register_forward_hook(lambda _, args, output: seen.setdefault("plain", output), prepend=True)
    module.register_forward_hook(lambda _, args, output: seen.setdefault("tuned", output))
    model(input_ids=inputs())
    plain, tuned = (seen[name][0] if isinstance(seen[name], tuple) else seen[name] for name in ("plain", "tuned"))
    inner = torch.relu(seen["x"] @ inserted.down.weight.t() + inserted.down.bias)
    expected = plain + 4.0 * (inner @ inserted.up.weight.t() + inserted.up.bias)
    torch.testing.assert_close(tuned, expected)
    assert not torch.allclose(tuned, plain)
