import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ftkit.errors import UserError
from ftkit.methods import full
from ftkit.methods.files import BaseIdentity
from tests.methods.cases import SECTIONS, applied, logits, loss, perturb
from tests.tiny_models import CONFIGS, tiny_model

IDENTITY = BaseIdentity("org/base")


def test_tied_weights_stay_tied_and_are_saved_once(tmp_path):
    model = tiny_model("llama").bfloat16()
    full.apply(model, SECTIONS["full"], seed=0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    state = full.trained_state(model)
    assert "model.embed_tokens.weight" in state
    assert "lm_head.weight" not in state
    full.save(model, SECTIONS["full"], tmp_path, IDENTITY)
    assert set(load_file(tmp_path / "model.safetensors")) == set(state)
    other = applied("llama", "full")
    full.load_state(other, state)
    assert torch.equal(other.lm_head.weight, model.model.embed_tokens.weight)
    assert other.lm_head.weight is other.model.embed_tokens.weight


def test_untied_heads_are_saved():
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(full.trained_state(tiny_model("qwen3")))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_result_is_an_ordinary_model_directory(architecture, tmp_path):
    model = applied(architecture, "full")
    perturb(model)
    full.save(model, SECTIONS["full"], tmp_path, IDENTITY)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"


def test_masters_of_a_bfloat16_base_lose_no_bit(tmp_path):
    """A step too small for bfloat16 survives training, saving and loading."""
    model = tiny_model("llama").bfloat16()
    full.apply(model, SECTIONS["full"], seed=0)
    before = model.model.norm.weight.detach().clone()
    with torch.no_grad():
        model.model.norm.weight.mul_(1.0 + 1e-5)
    full.save(model, SECTIONS["full"], tmp_path, IDENTITY)
    fresh = tiny_model("llama").bfloat16()
    full.load(fresh, tmp_path)
    assert fresh.model.norm.weight.dtype == torch.float32
    assert torch.equal(fresh.model.norm.weight, model.model.norm.weight)
    assert not torch.equal(fresh.model.norm.weight, before)


def test_a_directory_that_lacks_weights_is_refused(tmp_path):
    full.save(applied("llama", "full"), SECTIONS["full"], tmp_path, IDENTITY)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights of LlamaForCausalLM: model\.norm\.weight"):
        full.load(tiny_model("llama"), tmp_path)


def test_every_weight_moves():
    model = applied("gpt2", "full")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loss(model).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert not [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
