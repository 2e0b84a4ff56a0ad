"""LoRA's variants against peft: each is written by one and read by the other, with equal logits."""

import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from ftkit.errors import UserError
from ftkit.methods import lora
from ftkit.methods.files import CONFIG_NAME, BaseIdentity
from ftkit.recipe.method_schema import LoraMethod
from tests.methods.cases import logits, perturb, trained
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
    "patterns": ({}, {}),
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
