"""The narrow random copy that smoke runs train."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from ftkit.models import narrow_copy as module
from ftkit.models.architecture import describe
from ftkit.models.narrow_copy import WIDTH, narrow_copy
from ftkit.models.small_copy import layer_kinds

LARGE = {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 12, "vocab_size": 5000}


@pytest.mark.parametrize(
    ("model_type", "settings", "num_layers"),
    [
        ("llama", {"num_hidden_layers": 30, "num_key_value_heads": 3}, 1),
        ("gpt2", {"n_embd": 192, "n_head": 12, "n_layer": 5}, 1),
        ("opt", {"num_hidden_layers": 4, "ffn_dim": 512, "word_embed_proj_dim": 192}, 1),
        # Five layers with a window, then one without: one of each.
        ("gemma3_text", {"num_hidden_layers": 12, "head_dim": 64, "num_key_value_heads": 4}, 2),
        ("lfm2", {"num_hidden_layers": 6, "layer_types": ["conv"] * 4 + ["full_attention", "conv"]}, 2),
        ("qwen3_5_text", {"num_hidden_layers": 8, "num_key_value_heads": 4}, 2),
        ("gpt_oss", {"num_hidden_layers": 8, "num_key_value_heads": 4, "num_local_experts": 32}, 2),
        ("mixtral", {"num_hidden_layers": 4, "num_key_value_heads": 4, "num_local_experts": 64}, 1),
        # The first three layers dense by their number: the shortest prefix with both kinds.
        ("deepseek_v3", {"num_hidden_layers": 6, "num_key_value_heads": 12, "moe_intermediate_size": 256}, 4),
        # One number for each pair of a head's dimensions.
        (
            "phi3",
            {"num_hidden_layers": 3, "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}
             | {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 4096},
             "pad_token_id": 0, "eos_token_id": 1},
            1,
        ),
    ],
)  # fmt: skip
def test_one_layer_of_every_kind_and_all_tokens(model_type: str, settings: dict[str, Any], num_layers: int) -> None:
    config = AutoConfig.for_model(model_type, **{**LARGE, **settings})
    model = narrow_copy(config)
    small = model.config
    assert len(describe(model).blocks) == small.num_hidden_layers == num_layers
    assert small.hidden_size == WIDTH == 64
    assert small.vocab_size == config.vocab_size
    kinds = layer_kinds(model, small)
    if model_type != "deepseek_v3":
        assert len(set(kinds)) == num_layers
    assert config.hidden_size == 192
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert float(parameter.detach().std()) > 0.05, name


def test_what_is_narrow_keeps_its_width() -> None:
    config = AutoConfig.for_model("llama", **{**LARGE, "hidden_size": 48}, num_hidden_layers=3)
    assert narrow_copy(config).config.hidden_size == 48


def test_what_cannot_be_narrowed_keeps_its_width_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(text: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(module, "_narrow", fails)
    config = AutoConfig.for_model("llama", **LARGE, num_hidden_layers=3)
    assert narrow_copy(config).config.hidden_size == 192
    monkeypatch.setattr(module, "MAX_PARAMETERS", 1000)
    with pytest.raises(RuntimeError, match="shapes differ"):
        narrow_copy(config)


def test_it_is_always_the_same_and_leaves_the_random_state_alone() -> None:
    config = AutoConfig.for_model("qwen3", **LARGE, num_hidden_layers=2, num_key_value_heads=4)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = narrow_copy(config).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    second = narrow_copy(config).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
