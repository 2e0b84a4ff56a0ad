"""LoRA on layers that compute queries, keys and values in one product: one update for all three, as in peft."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from ftkit.methods import lora
from ftkit.methods.base import merged_weight
from ftkit.methods.files import BaseIdentity
from ftkit.models.architecture import linear_modules
from ftkit.recipe.method_schema import LoraMethod
from tests.methods.cases import logits, loss, perturb, trained
from tests.tiny_models import tiny_model

# peft asks for a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

# Phi 3 lays queries, keys and values out one after another, with fewer heads for the last two; NeoX head by head.
FUSED = {"phi3": ("qkv_proj", "gate_up_proj"), "gpt_neox": ("query_key_value", "dense_4h_to_h")}
WIDTHS = {"phi3": 32 + 2 * 16, "gpt_neox": 3 * 32}
CASES = [(model_type, {}) for model_type in FUSED] + [(model_type, {"dora": True}) for model_type in FUSED]
every_case = pytest.mark.parametrize(("model_type", "keys"), CASES)


def fused_model(model_type: str) -> PreTrainedModel:
    dropout = {"hidden_dropout": 0.0} if model_type == "gpt_neox" else {"resid_pdrop": 0.0}
    return tiny_model("llama", model_type=model_type, tie_word_embeddings=False, **dropout)


def section_of(targets, keys) -> LoraMethod:
    return LoraMethod(type="lora", rank=4, alpha=7.0, targets=targets, **keys)


def ours_of(model_type: str, targets, keys) -> PreTrainedModel:
    model = fused_model(model_type)
    lora.apply(model, section_of(targets, keys), seed=1)
    perturb(model)
    return model


@pytest.mark.parametrize("model_type", FUSED)
def test_all_linear_takes_the_fused_layers(model_type):
    names = {path.rpartition(".")[2] for path in linear_modules(fused_model(model_type))}
    assert (
        names
        == {
            "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
            "gpt_neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
        }[model_type]
    )


@pytest.mark.parametrize("model_type", FUSED)
def test_one_update_of_the_whole_width(model_type):
    model = ours_of(model_type, FUSED[model_type], {})
    ((_, layer), *_) = [pair for pair in lora._layers(model) if pair[0].endswith(FUSED[model_type][0])]
    assert layer.lora_B.shape == (WIDTHS[model_type], 4)
    loss(model).backward()
    assert all(parameter.grad.count_nonzero() > 0 for parameter in trained(model).values())


@every_case
@pytest.mark.parametrize("choice", ["all-linear", "names"])
def test_peft_loads_ours(model_type, keys, choice, tmp_path):
    targets = FUSED[model_type] if choice == "names" else choice
    model = ours_of(model_type, targets, keys)
    lora.save(model, section_of(targets, keys), tmp_path, BaseIdentity("org/base"))
    theirs = PeftModel.from_pretrained(fused_model(model_type), tmp_path)
    assert (logits(theirs) - logits(model)).abs().max() <= 1e-5
    assert (logits(model) - logits(fused_model(model_type))).abs().max() > 0.05


@every_case
@pytest.mark.parametrize("choice", ["all-linear", "names"])
def test_we_load_what_peft_writes(model_type, keys, choice, tmp_path):
    targets = list(FUSED[model_type]) if choice == "names" else choice
    config = LoraConfig(
        r=4, lora_alpha=7, target_modules=targets, use_dora=keys.get("dora", False), task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(fused_model(model_type), config)
    perturb(theirs)
    theirs.save_pretrained(tmp_path)
    ours = fused_model(model_type)
    lora.load(ours, tmp_path)
    assert len(trained(ours)) == len(trained(theirs))
    assert (logits(ours) - logits(theirs)).abs().max() <= 1e-5


@every_case
def test_merged_equals_adapted(model_type, keys):
    model, merged = ours_of(model_type, "all-linear", keys), fused_model(model_type)
    with torch.no_grad():
        for name, delta in lora.deltas(merged, lora.trained_state(model), section_of("all-linear", keys)):
            weight = merged.get_parameter(name)
            weight.copy_(merged_weight(weight, delta))
    assert (logits(merged) - logits(model)).abs().max() <= 1e-5
