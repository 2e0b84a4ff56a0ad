import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ftkit.errors import UserError
from ftkit.models.architecture import (
    block_parts,
    describe,
    is_linear,
    is_norm,
    linear_modules,
    linear_shape,
    norm_modules,
    stacked_experts,
)
from tests.tiny_models import CONFIGS, tiny_config, tiny_model

BLOCKS_PATH = {"llama": "model.layers", "qwen3": "model.layers", "gemma3": "model.layers", "mistral": "model.layers"}
BLOCKS_PATH |= {"gpt2": "transformer.h"}
LLAMA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
SMALL |= {"intermediate_size": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def meta_model(model_type: str, **overrides):
    """A model without memory: only its module tree matters."""
    config = AutoConfig.for_model(model_type, **{**SMALL, **overrides})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_parts_of_the_architectures_that_ftkit_promises(architecture):
    model = tiny_model(architecture)
    parts = describe(model)
    assert parts.blocks_path == BLOCKS_PATH[architecture]
    assert [type(block) for block in parts.blocks] == [type(model.get_submodule(f"{parts.blocks_path}.0"))] * 2
    assert parts.backbone is model.base_model
    assert parts.decoder is model.base_model
    assert parts.embeddings is model.get_input_embeddings()
    assert parts.head is model.lm_head
    assert parts.final_norm is not None
    assert parts.final_norm.path == ("transformer.ln_f" if architecture == "gpt2" else "model.norm")
    assert parts.final_norm.module is model.get_submodule(parts.final_norm.path)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_parts_of_a_block(architecture):
    model = tiny_model(architecture)
    first, second = block_parts(describe(model))
    gpt2 = architecture == "gpt2"
    assert first.attention.path == f"{BLOCKS_PATH[architecture]}.0.{'attn' if gpt2 else 'self_attn'}"
    assert first.output_projection.path == f"{first.attention.path}.{'c_proj' if gpt2 else 'o_proj'}"
    assert second.feed_forward.path == f"{BLOCKS_PATH[architecture]}.1.mlp"
    assert second.feed_forward_input == second.feed_forward
    for part in (first.attention, first.output_projection, second.feed_forward):
        assert model.get_submodule(part.path) is part.module


@pytest.mark.parametrize("architecture", CONFIGS)
def test_linear_layers_are_those_of_the_blocks(architecture):
    model = tiny_model(architecture)
    layers = linear_modules(model)
    leaves = ["c_attn", "c_proj", "c_fc", "c_proj"] if architecture == "gpt2" else LLAMA_LAYERS
    assert [path.rpartition(".")[2] for path in layers] == leaves * 2
    assert all(model.get_submodule(path) is layer for path, layer in layers.items())
    assert "lm_head" not in layers


def test_linear_shape_is_input_then_output():
    assert linear_shape(tiny_model("llama").model.layers[0].mlp.down_proj) == (64, 32)
    conv = tiny_model("gpt2").transformer.h[0].attn.c_attn
    assert is_linear(conv)
    assert linear_shape(conv) == (32, 96)
    assert not is_linear(nn.Embedding(2, 2))


@pytest.mark.parametrize(
    ("architecture", "count"), [("llama", 5), ("qwen3", 9), ("gemma3", 13), ("mistral", 5), ("gpt2", 5)]
)
def test_norms_of_the_blocks_and_the_final_one(architecture, count):
    model = tiny_model(architecture)
    norms = norm_modules(model)
    assert len(norms) == count
    assert describe(model).final_norm.path in norms
    assert all(is_norm(norm) for norm in norms.values())


def test_a_norm_without_weights_is_none():
    assert not is_norm(nn.LayerNorm(4, elementwise_affine=False))


def test_blocks_that_own_the_feed_forward_layers():
    """OPT: fc1 and fc2 lie in the block itself, and the decoder is inside the backbone."""
    model = meta_model("opt", ffn_dim=32)
    parts = describe(model)
    assert parts.blocks_path == "model.decoder.layers"
    assert parts.backbone is model.model
    assert parts.decoder is model.model.decoder
    block = block_parts(parts)[0]
    assert block.feed_forward_input.path == "model.decoder.layers.0.fc1"
    assert block.feed_forward.path == "model.decoder.layers.0.fc2"


def test_output_projection_that_is_declared_first():
    """Phi 3 declares o_proj before qkv_proj."""
    parts = block_parts(describe(meta_model("phi3")))
    assert parts[0].output_projection.path == "model.layers.0.self_attn.o_proj"


def test_a_vision_tower_with_as_many_layers_is_left_alone():
    text = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "layer_types": ["full_attention"] * 2}
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert describe(model).blocks_path == "model.language_model.layers"
    assert any("vision_tower" in path for path, module in model.named_modules() if is_linear(module))
    for path in (*linear_modules(model), *norm_modules(model)):
        assert path.startswith("model.language_model.")


def test_routers_are_no_targets_and_stacked_experts_are_named():
    model = meta_model(
        "qwen2_moe", num_key_value_heads=2, num_experts=4, moe_intermediate_size=8, decoder_sparse_step=1
    )
    leaves = {path.rpartition(".")[2] for path in linear_modules(model)}
    assert "shared_expert_gate" not in leaves
    assert "gate" not in leaves
    assert stacked_experts(model)[0] == "model.layers.0.mlp.experts.gate_up_proj"
    assert stacked_experts(tiny_model("llama")) == []


def test_a_shared_layer_appears_once():
    model = tiny_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    assert len(linear_modules(model)) == 7 + 4


def test_an_unknown_block_is_refused_with_its_children():
    model = meta_model("mamba", state_size=4)
    describe(model)
    with pytest.raises(UserError, match=r"backbone\.layers\.0, which has: norm \(MambaRMSNorm\), mixer \(MambaMixer\)"):
        block_parts(describe(model))


def test_a_model_without_blocks_beside_its_embedding_is_refused():
    config = tiny_config("llama")
    model = tiny_model("llama")
    model.config.num_hidden_layers = config.num_hidden_layers + 1
    with pytest.raises(UserError, match="no list of 3 blocks") as caught:
        describe(model)
    assert caught.value.problems[0].key == ("base_model",)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(UserError, match="no output head"):
        describe(tiny_model("llama").model)
