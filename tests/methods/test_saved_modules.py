"""Modules that train in full beside a LoRA, in files that peft and transformers load."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ftkit.errors import UserError
from ftkit.methods import lora, saved_modules
from ftkit.methods.base import merged_weight, report
from ftkit.methods.files import CONFIG_NAME, WEIGHTS_NAME, BaseIdentity
from ftkit.models.precision import compute_in
from ftkit.recipe.method_schema import LoraMethod
from tests.methods.cases import logits, loss, perturb, trained
from tests.tiny_models import tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True:UserWarning"),
]

# Llama's embeddings and GPT-2's are tied to their heads, Mistral's are not.
MODULES = {
    "llama": [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head"), ("model.norm",)],
    "gpt2": [("wte",), ("transformer.wte", "lm_head"), ("ln_f",), ("h.0.ln_1", "h.1.mlp")],
    "mistral": [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head"), ("norm",)],
}
CASES = [(architecture, modules) for architecture, choices in MODULES.items() for modules in choices]
TARGETS = {"llama": ("q_proj",), "mistral": ("q_proj",), "gpt2": ("c_attn",)}
every_case = pytest.mark.parametrize(("architecture", "modules"), CASES, ids=[f"{a}-{'+'.join(m)}" for a, m in CASES])


def section_of(architecture: str, modules: tuple[str, ...], **keys) -> LoraMethod:
    return LoraMethod(type="lora", rank=4, targets=TARGETS[architecture], modules_to_save=modules, **keys)


def model_of(architecture: str, modules: tuple[str, ...], **overrides):
    model = tiny_model(architecture, **overrides)
    lora.apply(model, section_of(architecture, modules), seed=1)
    perturb(model)
    return model


def save(model, architecture: str, modules: tuple[str, ...], directory) -> dict[str, torch.Tensor]:
    lora.save(model, section_of(architecture, modules), directory, BaseIdentity("org/base"))
    return load_file(directory / WEIGHTS_NAME)


@every_case
def test_peft_and_ftkit_load_ours(architecture, modules, tmp_path):
    model = model_of(architecture, modules)
    save(model, architecture, modules, tmp_path)
    theirs = PeftModel.from_pretrained(tiny_model(architecture), tmp_path)
    assert (logits(theirs) - logits(model)).abs().max() <= 1e-5
    again = tiny_model(architecture)
    section = lora.load(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert set(trained(again)) == set(trained(model))
    assert not lora.keeps_base(section)
    without = tiny_model(architecture)
    lora.apply(without, section_of(architecture, ()), seed=1)
    lora.load_state(without, {n: t for n, t in lora.trained_state(model).items() if ".lora_" in n})
    assert (logits(without) - logits(model)).abs().max() > 0.01, "the modules made no difference"


@every_case
def test_we_load_what_peft_writes(architecture, modules, tmp_path):
    tied = architecture != "mistral" and bool({"wte", "transformer.wte", "embed_tokens", "lm_head"} & set(modules))
    config = LoraConfig(
        r=4,
        target_modules=list(TARGETS[architecture]),
        # Of GPT-2 peft knows that the head is tied, not that the embeddings are.
        modules_to_save=["lm_head"] if modules == ("wte",) else list(modules),
        fan_in_fan_out=architecture == "gpt2",
        ensure_weight_tying=tied,
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(tiny_model(architecture), config)
    perturb(theirs)
    theirs.save_pretrained(tmp_path)
    ours = tiny_model(architecture)
    lora.load(ours, tmp_path)
    assert (logits(ours) - logits(theirs)).abs().max() <= 1e-5


@pytest.mark.parametrize("modules", MODULES["llama"])
def test_transformers_loads_ours(modules, tmp_path):
    model = model_of("llama", modules)
    save(model, "llama", modules, tmp_path / "adapter")
    tiny_model("llama").save_pretrained(tmp_path / "base")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs.load_adapter(str(tmp_path / "adapter"))
    assert (logits(theirs) - logits(model)).abs().max() <= 1e-5


@every_case
def test_merged_equals_adapted(architecture, modules):
    model, merged = model_of(architecture, modules), tiny_model(architecture)
    state, section = lora.trained_state(model), section_of(architecture, modules)
    with torch.device("meta"):
        empty = type(merged)(merged.config)
    names = [name for name, _ in lora.deltas(empty, state, section)]
    assert len(set(names)) == len(names)
    with torch.no_grad():
        for name, delta in lora.deltas(merged, state, section):
            weight = merged.get_parameter(name)
            weight.copy_(merged_weight(weight, delta))
    assert names == [name for name, _ in lora.deltas(merged, state, section)]
    assert (logits(merged) - logits(model)).abs().max() <= 1e-5
    for name, parameter in saved_modules.saved_parameters(model).items():
        assert torch.equal(merged.get_parameter(name), parameter), "not its very bits"


# ------------------------------------------------------------------------------------------------ tied weights


@pytest.mark.parametrize("modules", [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")])
def test_tied_weights_train_as_one_and_are_saved_under_both_names(modules, tmp_path):
    model = model_of("llama", modules)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert lora.notes(model) == (
        "model.embed_tokens.weight and lm_head.weight are tied in this model: both train, as one",
    )
    state = save(model, "llama", modules, tmp_path)
    names = {name.removeprefix("base_model.model.") for name in state if "lora" not in name}
    assert names == {"model.embed_tokens.weight", "lm_head.weight"}
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert config["modules_to_save"] == ["embed_tokens", "lm_head"]
    assert config["ensure_weight_tying"] is True
    again = tiny_model("llama")
    lora.load(again, tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    weights = tmp_path / WEIGHTS_NAME
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    assert weights.stat().st_size - header == report(model, lora).saved_bytes


def test_a_tie_that_the_config_does_not_have_is_not_made():
    model = model_of("mistral", ("embed_tokens",))
    assert not model.lm_head.weight.requires_grad
    assert lora.notes(model) == ()


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_weights_that_peft_trained_apart_are_refused_where_the_base_ties_them(modules, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=modules, task_type="CAUSAL_LM")
    theirs = get_peft_model(tiny_model("llama"), config)
    perturb(theirs)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"embed_tokens\.weight and lm_head\.weight were trained apart.*ties them"):
        lora.load(tiny_model("llama"), tmp_path)
    if len(modules) == 2:
        untied = tiny_model("llama", tie_word_embeddings=False)
        untied.lm_head.weight = torch.nn.Parameter(untied.model.embed_tokens.weight.detach().clone())
        reference = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
        for name, parameter in tiny_model("llama").named_parameters():
            untied.get_parameter(name).data.copy_(parameter)
        lora.load(untied, tmp_path)
        assert (logits(untied) - logits(reference)).abs().max() <= 1e-5


# ------------------------------------------------------------------------------------------------ what trains


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masters_are_float32_and_all_of_them_move(dtype):
    model = tiny_model("mistral").to(dtype)
    section = section_of("mistral", ("embed_tokens", "lm_head", "norm"))
    lora.apply(model, section, seed=1)
    full = {name for name in trained(model) if "lora" not in name}
    assert full == {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    assert all(parameter.dtype == torch.float32 for parameter in trained(model).values())
    compute_in(model, dtype)
    loss(model).backward()
    for name in full:
        assert model.get_parameter(name).grad.dtype == torch.float32
        assert model.get_parameter(name).grad.count_nonzero() > 0


def test_the_precision_of_the_frozen_base_is_recorded(tmp_path):
    model = tiny_model("llama").bfloat16()
    lora.apply(model, section_of("llama", ("embed_tokens",)), seed=1)
    save(model, "llama", ("embed_tokens",), tmp_path)
    assert json.loads((tmp_path / "ftkit.json").read_text())["base_dtype"] == "bfloat16"


def test_a_state_without_a_module_is_refused():
    model = model_of("mistral", ("lm_head",))
    state = lora.trained_state(model)
    del state["base_model.model.lm_head.weight"]
    with pytest.raises(UserError, match=r"the saved weights lack: base_model\.model\.lm_head\.weight"):
        lora.load_state(model, state)


def test_a_module_that_the_configuration_does_not_name_is_refused(tmp_path):
    """As peft writes embeddings after it has made them larger."""
    model = model_of("mistral", ())
    state = save(model, "mistral", (), tmp_path)
    save_file(state | {"base_model.model.lm_head.weight": torch.zeros(320, 32)}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(UserError, match=r"do not fit this model: base_model\.model\.lm_head\.weight"):
        lora.load(tiny_model("mistral"), tmp_path)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (("embed_token",), "embed_token is no module of this model that has weights; did you mean embed_tokens?"),
        (("zzz",), "zzz is no module of this model that has weights; there are model, embed_tokens, layers"),
        (("q_proj",), "layers.0.self_attn.q_proj trains in full, and method.targets adapts model.layers.0.self_attn.q"),
        (("layers",), "model.layers trains in full, and method.targets adapts model.layers.0.self_attn.q_proj"),
    ],
)
def test_what_cannot_be_right_is_refused(modules, message):
    with pytest.raises(UserError) as caught:
        lora.apply(tiny_model("llama"), section_of("llama", modules), seed=0)
    assert message in str(caught.value)
    assert caught.value.problems[0].key == ("method", "modules_to_save")


def test_names_for_peft_match_nothing_else():
    """peft takes every path that ends in a name: `norm` would be all of Llama's norms."""
    model = model_of("llama", ("model.norm",))
    assert lora.saved_module_names(model) == ["model.norm"]
    assert lora.saved_module_names(model_of("mistral", ("lm_head",))) == ["lm_head"]
