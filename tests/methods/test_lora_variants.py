"""LoRA's variants against peft: each is written by one and read by the other, with equal logits."""

import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from ftkit.errors import UserError
from ftkit.methods import lora
from ftkit.methods.files import CONFIG_NAME, BaseIdentity
from ftkit.methods.lora_init import INITIALISATIONS
from ftkit.recipe.method_schema import LoraMethod
from tests.methods.cases import logits, loss, perturb, trained
from tests.tiny_models import tiny_model

# peft asks for a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

PATTERNS = {
    "llama": {
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 8, ".*down_proj|k_proj": 6},
        "alpha_pattern": {"v_proj": 3.5},
    },
    "gpt2": {"rank_pattern": {r"h\.\d+\.attn\.c_attn": 3}, "alpha_pattern": {"c_proj": 1}},
}
VARIANTS = {
    "rank-stabilized": ({"rank_stabilized": True}, {"use_rslora": True}),
    "gaussian": ({"init": "gaussian"}, {"init_lora_weights": "gaussian"}),
    "dora": ({"dora": True}, {"use_dora": True}),
    "patterns": ({}, {}),
    "patterns, rank-stabilized, dora": (
        {"rank_stabilized": True, "dora": True},
        {"use_rslora": True, "use_dora": True},
    ),
    "patterns, rank-stabilized": ({"rank_stabilized": True}, {"use_rslora": True}),
}
"""Name -> keys of the section, keys of peft's configuration; besides PATTERNS where the name says so."""

every_variant = pytest.mark.parametrize("variant", VARIANTS)
both = pytest.mark.parametrize("architecture", ["llama", "gpt2"])


def patterns_of(variant: str, architecture: str) -> dict:
    return PATTERNS[architecture] if variant.startswith("patterns") else {}


def section_of(variant: str, architecture: str = "llama") -> LoraMethod:
    """Rank 4 and alpha 7 on every linear layer."""
    return LoraMethod(type="lora", rank=4, alpha=7.0, **patterns_of(variant, architecture), **VARIANTS[variant][0])


def ours_of(variant: str, architecture: str = "llama"):
    """A tiny model with the variant, as if trained."""
    model = tiny_model(architecture)
    lora.apply(model, section_of(variant, architecture), seed=1)
    perturb(model)
    return model


def theirs_of(variant: str, architecture: str = "llama") -> PeftModel:
    """The same in peft, with weights of its own."""
    options = {"r": 4, "lora_alpha": 7, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    options |= {"fan_in_fan_out": architecture == "gpt2"} | patterns_of(variant, architecture)
    config = LoraConfig(**options, **VARIANTS[variant][1])
    model = get_peft_model(tiny_model(architecture), config)
    perturb(model)
    return model


@both
@every_variant
def test_peft_loads_ours(variant, architecture, tmp_path):
    model = ours_of(variant, architecture)
    lora.save(model, section_of(variant, architecture), tmp_path, BaseIdentity("org/base"))
    theirs = PeftModel.from_pretrained(tiny_model(architecture), tmp_path)
    assert (logits(theirs) - logits(model)).abs().max() <= 1e-5
    assert (logits(model) - logits(tiny_model(architecture))).abs().max() > 0.1


@both
@every_variant
def test_we_load_what_peft_writes(variant, architecture, tmp_path):
    theirs = theirs_of(variant, architecture)
    theirs.save_pretrained(tmp_path)
    ours = tiny_model(architecture)
    lora.load(ours, tmp_path)
    assert len(trained(ours)) == len(trained(theirs))
    assert (logits(ours) - logits(theirs)).abs().max() <= 1e-5
    assert (logits(ours) - logits(tiny_model(architecture))).abs().max() > 0.1


@both
@every_variant
def test_saved_and_loaded_section_is_the_same(variant, architecture, tmp_path):
    section = section_of(variant, architecture)
    lora.save(ours_of(variant, architecture), section, tmp_path, BaseIdentity("org/base"))
    loaded = lora.load(tiny_model(architecture), tmp_path)
    assert loaded.model_copy(update={"targets": section.targets}) == section


# ------------------------------------------------------------------------------------------------ ranks and scales


def test_the_first_pattern_that_matches_the_end_of_a_path_counts():
    model = ours_of("patterns")
    ranks = {path: layer.lora_A.shape[0] for path, layer in lora._layers(model)}
    scales = {path: layer.lora_scale for path, layer in lora._layers(model)}
    layer = "model.layers.{}.{}_proj".format
    assert ranks[layer(0, "self_attn.q")] == 2
    assert ranks[layer(1, "self_attn.q")] == 8
    assert ranks[layer(0, "self_attn.k")] == 6
    assert ranks[layer(0, "self_attn.v")] == 4
    assert ranks[layer(1, "mlp.down")] == 6
    assert scales[layer(0, "self_attn.q")] == 7 / 2
    assert scales[layer(1, "self_attn.v")] == 3.5 / 4
    assert scales[layer(1, "mlp.up")] == 7 / 4


def test_the_rank_stabilized_scale():
    model = ours_of("patterns, rank-stabilized")
    scales = {path: layer.lora_scale for path, layer in lora._layers(model)}
    assert scales["model.layers.1.self_attn.q_proj"] == 7 / math.sqrt(8)
    assert scales["model.layers.1.mlp.up_proj"] == 7 / math.sqrt(4)


def test_the_order_of_patterns_survives_the_file(tmp_path):
    """peft reads them in the file's order, and the first that matches counts."""
    lora.save(ours_of("patterns"), section_of("patterns"), tmp_path, BaseIdentity("org/base"))
    written = json.loads((tmp_path / CONFIG_NAME).read_text())["rank_pattern"]
    assert list(written) == ["layers.0.self_attn.q_proj", "q_proj", ".*down_proj|k_proj"]


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_no_adapted_layer_is_refused(key):
    section = LoraMethod(type="lora", targets=("q_proj",), **{key: {"k_proj": 2, "q_proj": 3, "q_prj": 4}})
    with pytest.raises(UserError) as caught:
        lora.apply(tiny_model("llama"), section, seed=0)
    (problem,) = caught.value.problems
    assert problem.key == ("method", key)
    assert problem.what == "k_proj, q_prj matches no adapted layer: these are q_proj (2)"
    assert problem.how == "did you mean q_proj?"


def test_a_pattern_that_is_no_expression_is_refused():
    with pytest.raises(ValueError, match="is not a regular expression"):
        LoraMethod(type="lora", rank_pattern={"(": 2})


@both
@every_variant
def test_merged_equals_adapted(variant, architecture):
    model, merged = ours_of(variant, architecture), tiny_model(architecture)
    with torch.no_grad():
        for name, delta in lora.deltas(merged, lora.trained_state(model), section_of(variant, architecture)):
            weight = merged.get_parameter(name)
            weight.add_(delta(weight))
    assert (logits(merged) - logits(model)).abs().max() <= 1e-5


# ------------------------------------------------------------------------------------------------ initial values

PISSA = ["pissa", "patterns, pissa", "patterns, rank-stabilized, pissa", "dora, pissa"]


def pissa_section(architecture: str, variant: str) -> LoraMethod:
    keys = {"init": "pissa", "rank_stabilized": "stabilized" in variant, "dora": "dora" in variant}
    return LoraMethod(type="lora", rank=4, alpha=7.0, **patterns_of(variant, architecture), **keys)


def pissa_model(architecture: str, variant: str, *, trained: bool = True):
    model = tiny_model(architecture)
    lora.apply(model, pissa_section(architecture, variant), seed=1)
    if trained:
        perturb(model)
    return model


def test_gaussian_has_pefts_spread():
    """200,000 numbers of standard deviation 1 / rank: within 5 standard errors."""
    generator = torch.Generator().manual_seed(0)
    a_RI, b_OR = INITIALISATIONS["gaussian"](torch.empty(8, 25_000), 8, 1.0, generator)
    assert abs(a_RI.std() - 1 / 8) < 5 / 8 / (2 * a_RI.numel()) ** 0.5
    assert abs(a_RI.mean()) < 5 / 8 / a_RI.numel() ** 0.5
    assert b_OR.count_nonzero() == 0


@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (200, 300)])
def test_pissa_starts_from_the_largest_singular_components(shape):
    """The best approximation of its rank (Eckart and Young): its error is the singular values left out."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) @ torch.diag(0.9 ** torch.arange(shape[1]))
    before = torch.get_rng_state()
    a_RI, b_OR = INITIALISATIONS["pissa"](weight, 4, 1.75, torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before), "the global generator was drawn from"
    left_out = torch.linalg.svdvals(weight)[4:].norm()
    assert (weight - 1.75 * b_OR @ a_RI).norm() <= 1.001 * left_out
    assert a_RI.is_contiguous()
    torch.testing.assert_close(a_RI.norm(dim=1), b_OR.norm(dim=0))


@both
@pytest.mark.parametrize("variant", PISSA)
def test_pissa_starts_as_the_base_and_keeps_its_weights(variant, architecture):
    base, model = tiny_model(architecture), pissa_model(architecture, variant, trained=False)
    assert (logits(model) - logits(base)).abs().max() <= 1e-5
    for name, parameter in base.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)
    loss(model).backward()
    for name, parameter in trained(model).items():
        assert name.endswith((".lora_A", ".lora_B", ".lora_magnitude"))
        assert parameter.grad.count_nonzero() > 0, "both factors move from the first step on"


@both
@pytest.mark.parametrize("variant", PISSA)
def test_pissa_is_saved_as_a_lora_of_the_base_as_it_is(variant, architecture, tmp_path):
    model = pissa_model(architecture, variant)
    lora.save(model, pissa_section(architecture, variant), tmp_path, BaseIdentity("org/base"))
    theirs = PeftModel.from_pretrained(tiny_model(architecture), tmp_path)
    assert (logits(theirs) - logits(model)).abs().max() <= 1e-5
    assert (logits(model) - logits(tiny_model(architecture))).abs().max() > 0.1
    # Without ftkit's own file, as another tool hands it on, it is that plain LoRA.
    (tmp_path / "ftkit.json").unlink()
    plain = tiny_model(architecture)
    assert lora.load(plain, tmp_path).rank == 8
    assert (logits(plain) - logits(model)).abs().max() <= 1e-5


@both
@pytest.mark.parametrize("variant", PISSA)
def test_pissa_goes_on_where_it_was_saved(variant, architecture, tmp_path):
    """The same section, the same bits of A, B, A0 and B0, and so of every gradient."""
    section, model = pissa_section(architecture, variant), pissa_model(architecture, variant)
    lora.save(model, section, tmp_path, BaseIdentity("org/base"))
    again = tiny_model(architecture)
    assert lora.load(again, tmp_path) == section
    ours = dict(model.named_parameters())
    assert dict(again.named_parameters()).keys() == ours.keys()
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, ours[name]), name
        assert parameter.requires_grad == ours[name].requires_grad
    lora.save(again, section, tmp_path / "again", BaseIdentity("org/base"))
    weights = [path.read_bytes() for path in sorted(tmp_path.rglob("*.safetensors"))]
    assert weights[0] == weights[1]


@both
@pytest.mark.parametrize("variant", PISSA)
def test_pissa_merges(variant, architecture):
    model, merged = pissa_model(architecture, variant), tiny_model(architecture)
    with torch.no_grad():
        for name, delta in lora.deltas(merged, lora.trained_state(model), pissa_section(architecture, variant)):
            weight = merged.get_parameter(name)
            weight.add_(delta(weight))
    assert (logits(merged) - logits(model)).abs().max() <= 1e-5


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights of the model:UserWarning")
def test_we_load_a_pissa_that_peft_converted(tmp_path):
    """peft writes plain LoRA files of one where it is told which adapter it started from."""
    theirs = get_peft_model(
        tiny_model("llama"), LoraConfig(r=4, lora_alpha=7, target_modules="all-linear", init_lora_weights="pissa")
    )
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    perturb(theirs)
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours = tiny_model("llama")
    assert lora.load(ours, tmp_path / "converted").rank == 8
    assert (logits(ours) - logits(theirs)).abs().max() <= 1e-5


def test_more_components_than_a_weight_has_are_refused():
    section = LoraMethod(type="lora", rank=33, init="pissa", targets=("q_proj",))
    with pytest.raises(UserError, match="a weight of 32 x 32 has no 33 singular components") as caught:
        lora.apply(tiny_model("llama"), section, seed=0)
    assert caught.value.problems[0].key == ("method", "rank")
