"""The proof of isolation: who passes it, on which rung, and that it finds what is broken."""

import copy
import time
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, PreTrainedConfig

from ftkit.errors import UserError
from ftkit.models import attention
from ftkit.models.isolation import ON_CPU, choose_packing, prove_isolation
from tests.tiny_models import CONFIGS, tiny_config

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
GROUPED = {**SMALL, "num_key_value_heads": 2}
MOE = {**GROUPED, "num_local_experts": 8, "num_experts": 8}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4}

BY_BOUNDS: dict[str, dict[str, Any]] = {
    "opt": {**SMALL, "word_embed_proj_dim": 64},
    "gpt_neox": SMALL,
    "gemma2": {**GROUPED, "head_dim": 16},
    "gpt_oss": {**MOE, "head_dim": 16},
    "mixtral": MOE,
    "qwen3_moe": {**MOE, "moe_intermediate_size": 32, "head_dim": 16},
    "cohere2": GROUPED,
    "phi3": {**GROUPED, "pad_token_id": 0, "sliding_window": 8},
    "smollm3": {**GROUPED, "pad_token_id": 0},
    "deepseek_v3": {**SMALL, "num_key_value_heads": 4, "moe_intermediate_size": 32, "kv_lora_rank": 16},
}
BY_POSITIONS: dict[str, dict[str, Any]] = {
    "stablelm": GROUPED,
    "llama4_text": {**MOE, "intermediate_size_mlp": 96, "head_dim": 16},
}
NOT_AT_ALL: dict[str, dict[str, Any]] = {
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2},
    "lfm2": {**GROUPED, "layer_types": ["conv", "conv", "full_attention", "conv"]},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "qwen3_5_text": {**GROUPED, "head_dim": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 4},
    "jamba": MOE,
}
BY_VERSION: dict[str, dict[str, Any]] = {
    "gptj": {**GPT, "rotary_dim": 8},
    "falcon": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
}
"""transformers 5.24 lets these two be kept apart where 5.23 did not: the proof says so, not a list of names."""


def config_of(model_type: str, **overrides: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(model_type, vocab_size=1000, **overrides)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_architectures_that_ftkit_must_work_on_are_kept_apart_by_bounds(architecture: str) -> None:
    isolation = prove_isolation(tiny_config(architecture))
    assert (isolation.rung, isolation.attn_implementation) == ("ftkit", "ftkit"), isolation.reason
    assert isolation.figures["difference"] <= ON_CPU.tolerance
    assert isolation.figures["leak"] == 0.0
    assert isolation.figures["control_difference"] > 0.1
    assert isolation.figures["control_leak"] > 0.1


@pytest.mark.parametrize("model_type", BY_BOUNDS)
def test_windows_caps_sinks_and_experts_are_kept_apart_by_bounds(model_type: str) -> None:
    isolation = prove_isolation(config_of(model_type, **BY_BOUNDS[model_type]))
    assert isolation.rung == "ftkit", isolation.reason


@pytest.mark.parametrize("model_type", BY_POSITIONS)
def test_models_that_drop_the_bounds_are_kept_apart_by_positions(model_type: str) -> None:
    isolation = prove_isolation(config_of(model_type, **BY_POSITIONS[model_type]))
    assert (isolation.rung, isolation.attn_implementation) == ("position_ids", None), isolation.reason
    assert isolation.figures["leak"] == 0.0


@pytest.mark.parametrize("model_type", NOT_AT_ALL)
def test_models_that_leak_are_found_out(model_type: str) -> None:
    isolation = prove_isolation(config_of(model_type, **NOT_AT_ALL[model_type]))
    assert (isolation.rung, isolation.packed) == ("padded", False)
    assert isolation.figures["leak"] > 0.1
    assert "position_ids: a document's gradient reaches another one" in isolation.reason
    assert "\n" not in isolation.reason


@pytest.mark.parametrize("model_type", BY_VERSION)
def test_a_model_that_the_library_has_changed_is_judged_by_what_it_does(model_type: str) -> None:
    isolation = prove_isolation(config_of(model_type, **BY_VERSION[model_type]))
    exact = isolation.figures["leak"] == 0.0 and isolation.figures["difference"] <= ON_CPU.tolerance
    told_apart = min(isolation.figures["control_leak"], isolation.figures["control_difference"]) > 0.1
    assert isolation.packed == (exact and told_apart), isolation.reason


def test_the_proof_takes_little_time_on_a_small_model() -> None:
    # SmolLM2-135M.
    config = AutoConfig.for_model(
        "llama",
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
    )
    started = time.process_time()
    assert prove_isolation(config).rung == "ftkit"
    assert time.process_time() - started < 3.0


def test_configuration_and_random_state_stay_as_they_were() -> None:
    config = tiny_config("gemma3")
    before, state = copy.deepcopy(config.to_dict()), torch.get_rng_state()
    prove_isolation(config)
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("requested", ["sdpa", "eager"])
def test_another_attention_is_used_where_the_recipe_asks_for_it(requested: str) -> None:
    isolation = prove_isolation(tiny_config("llama"), requested=requested)
    assert (isolation.rung, isolation.attn_implementation) == ("position_ids", requested)


def test_what_cannot_be_proven_is_padded() -> None:
    isolation = prove_isolation(tiny_config("llama"), requested="flash_attention_2")
    assert (isolation.rung, isolation.attn_implementation) == ("padded", "flash_attention_2")
    assert isolation.reason == "padded: the proof of packing cannot run flash_attention_2 on a CPU"
    # One head too many for the width.
    isolation = prove_isolation(tiny_config("gpt2", n_head=5))
    assert isolation.rung == "padded"
    assert "packing cannot be proven on a small copy (ValueError:" in isolation.reason
    assert isolation.figures == {}


# --------------------------------------------------------------------------------- the proof finds what is broken


def ignores_bounds(module: Any, q: Any, k: Any, v: Any, mask: Any = None, **kwargs: Any) -> Any:
    whole_row = attention.bounds_kwargs(torch.tensor([0, q.shape[2]], dtype=torch.int32))
    return attention.document_attention(module, q, k, v, mask, **{**kwargs, **whole_row})


def ignores_window(*args: Any, **kwargs: Any) -> Any:
    return attention.document_attention(*args, **{**kwargs, "sliding_window": None})


def wrong_by_little(*args: Any, **kwargs: Any) -> Any:
    return attention.document_attention(*args, **{**kwargs, "scaling": kwargs["scaling"] * 1.001})


def window_too_wide(*args: Any, **kwargs: Any) -> Any:
    return attention.document_attention(*args, **{**kwargs, "sliding_window": kwargs["sliding_window"] + 1})


def broken_backward(*args: Any, **kwargs: Any) -> Any:
    output, _ = attention.document_attention(*args, **kwargs)
    return output + 1e-20 * (output.sum() - output.sum().detach()), None


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (ignores_bounds, "a document's gradient reaches another one"),
        (ignores_window, "hidden states differ from the document alone"),
        (window_too_wide, "hidden states differ from the document alone"),
        (wrong_by_little, "hidden states differ from the document alone"),
        (broken_backward, "a document's gradient reaches another one"),
    ],
)
def test_broken_attention_is_found_out(function: Any, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "ftkit.models.isolation.register", lambda: AttentionInterface.register(attention.NAME, function)
    )
    try:
        isolation = prove_isolation(tiny_config("mistral"))
    finally:
        attention.register()
    # The library's own isolation, the next rung, is sound.
    assert isolation.rung == "position_ids"
    assert f"not by document bounds: {found}" in isolation.reason


# -------------------------------------------------------------------------------------------- the recipe's choice


def test_packing_off_pads_without_a_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftkit.models.isolation.prove_isolation", lambda *_, **__: pytest.fail("not asked for"))
    for requested, own in (("auto", None), ("ftkit", None), ("eager", "eager")):
        isolation = choose_packing(tiny_config("llama"), packing="off", requested=requested)
        assert (isolation.rung, isolation.attn_implementation) == ("padded", own)


def test_packing_required_is_an_error_where_documents_leak() -> None:
    config = config_of("mamba", **NOT_AT_ALL["mamba"])
    assert not choose_packing(config, packing="auto", requested="auto").packed
    with pytest.raises(UserError, match=r"packing is required but .* reaches another one") as caught:
        choose_packing(config, packing="required", requested="auto")
    assert caught.value.problems[0].key == ("data", "packing")
    assert choose_packing(tiny_config("llama"), packing="required", requested="auto").packed
