"""The small random copy that proofs run on."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from ftkit.models import small_copy as module
from ftkit.models.architecture import describe
from ftkit.models.small_copy import VOCAB_SIZE, WINDOW, small_copy
from tests.tiny_models import tiny_config

SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 5000}


@pytest.mark.parametrize(
    ("model_type", "settings", "num_layers"),
    [
        ("llama", {"num_hidden_layers": 30}, 1),
        ("gemma3_text", {"num_hidden_layers": 12, "head_dim": 16}, 6),
        ("gemma2", {"num_hidden_layers": 6, "head_dim": 16}, 2),
        ("lfm2", {"num_hidden_layers": 6, "layer_types": ["conv"] * 4 + ["full_attention", "conv"]}, 5),
        # Every fourth layer without rotary embedding.
        ("smollm3", {"num_hidden_layers": 8, "pad_token_id": 0}, 4),
        # The first three layers dense, then experts.
        ("deepseek_v3", {"num_hidden_layers": 6, "num_key_value_heads": 4, "moe_intermediate_size": 32}, 4),
        ("qwen2", {"num_hidden_layers": 6, "use_sliding_window": True, "max_window_layers": 3}, 4),
    ],
)
def test_the_shortest_prefix_with_every_kind_of_layer(
    model_type: str, settings: dict[str, Any], num_layers: int
) -> None:
    model = small_copy(AutoConfig.for_model(model_type, **{**SMALL, "intermediate_size": 96, **settings}))
    assert len(describe(model).blocks) == model.config.num_hidden_layers == num_layers


def test_width_and_heads_stay_and_the_rest_is_cut() -> None:
    config = AutoConfig.for_model(
        "mixtral",
        **SMALL,
        intermediate_size=4096,
        num_hidden_layers=4,
        sliding_window=4096,
        num_local_experts=64,
        num_experts_per_tok=6,
        attention_dropout=0.5,
        router_jitter_noise=0.3,
    )
    model = small_copy(config)
    small = model.config
    assert (small.hidden_size, small.num_attention_heads, small.num_key_value_heads) == (64, 4, 2)
    assert (small.vocab_size, small.sliding_window, small.intermediate_size) == (VOCAB_SIZE, WINDOW, 256)
    assert small.num_local_experts == 12
    assert (small.attention_dropout, small.router_jitter_noise) == (0.0, 0.0)
    assert model.training
    assert config.num_local_experts == 64


def test_every_parameter_is_noisy_and_float32() -> None:
    config = tiny_config("gemma3")
    config.dtype = torch.bfloat16
    for name, parameter in small_copy(config).named_parameters():
        assert parameter.dtype == torch.float32
        assert float(parameter.detach().std()) > 0.05, name


def test_the_same_configuration_gives_the_same_copy() -> None:
    torch.manual_seed(1)
    first = small_copy(tiny_config("qwen3")).state_dict()
    torch.manual_seed(2)
    second = small_copy(tiny_config("qwen3")).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_copy_that_would_be_large_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PARAMETERS", 1000)
    with pytest.raises(ValueError, match=r"every kind of layer takes 2 layers of .* parameters, too many"):
        small_copy(tiny_config("gemma3"))
