"""Checkpoints of multimodal models: loaded whole, under the names of their files; what cannot be tuned is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForMultimodalLM

from ftkit.errors import UserError
from ftkit.models.architecture import block_parts, describe, linear_modules, norm_modules, towers
from ftkit.models.isolation import prove_isolation
from ftkit.models.load import BaseModel, load_config, load_weights
from ftkit.models.objective import verify_head
from ftkit.models.small_copy import VOCAB_SIZE, WINDOW, small_copy
from tests.tiny_models import save_tiny
from tests.tiny_multimodal import MULTIMODAL_CONFIGS, image_inputs, multimodal_config, multimodal_model, save_multimodal

every_kind = pytest.mark.parametrize("kind", MULTIMODAL_CONFIGS)
CLASSES = {
    "gemma3": "Gemma3ForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
}
TOWERS = {
    "gemma3": ["model.vision_tower", "model.multi_modal_projector"],
    "mistral3": ["model.vision_tower", "model.multi_modal_projector"],
    "qwen3_5": ["model.visual"],
}


@every_kind
def test_a_checkpoint_is_loaded_whole(kind: str, tmp_path: Path) -> None:
    base = BaseModel("tiny", path=save_multimodal(tmp_path / "base", kind, shards=2))
    model, expected = load_weights(base, dtype=torch.float32), multimodal_model(kind)
    assert type(model).__name__ == CLASSES[kind]
    weights = dict(model.named_parameters())
    assert all(torch.equal(weights[name], parameter) for name, parameter in expected.named_parameters())
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (kind == "gemma3")
    with torch.no_grad():
        assert torch.equal(model(**image_inputs(kind)).logits, expected.eval()(**image_inputs(kind)).logits)
    assert verify_head(model) == ("chunked", None)


@every_kind
def test_the_language_model_is_found_beside_its_towers(kind: str) -> None:
    model = multimodal_model(kind)
    assert list(towers(model)) == TOWERS[kind]
    architecture = describe(model)
    assert architecture.blocks_path == "model.language_model.layers"
    assert len(block_parts(architecture)) == model.config.text_config.num_hidden_layers
    for path in (*linear_modules(model), *norm_modules(model)):
        assert path.startswith("model.language_model.")
    beside = sum(parameter.numel() for parameters in towers(model).values() for parameter in parameters)
    language = {id(p): p.numel() for part in (architecture.decoder, architecture.head) for p in part.parameters()}
    assert beside + sum(language.values()) == model.num_parameters()


def test_a_text_only_model_has_no_towers(tmp_path: Path) -> None:
    assert towers(load_weights(BaseModel("tiny", path=save_tiny(tmp_path)), dtype=torch.float32)) == {}


@every_kind
def test_packed_texts_are_kept_apart_in_the_whole_model_or_padded(kind: str) -> None:
    config = multimodal_config(kind)
    before = config.to_json_string()
    isolation = prove_isolation(config)
    # Linear attention leaks under any attention.
    assert isolation.rung == ("padded" if kind == "qwen3_5" else "ftkit"), isolation.reason
    assert config.to_json_string() == before


def test_a_small_copy_cuts_language_and_vision() -> None:
    text = {"num_hidden_layers": 12, "head_dim": 16, "vocab_size": 5000, "hidden_size": 64, "intermediate_size": 900}
    vision = {"num_hidden_layers": 9, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    vision |= {"image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    small = small_copy(config).config
    assert small.text_config.num_hidden_layers == 6
    assert (small.text_config.vocab_size, small.text_config.sliding_window) == (VOCAB_SIZE, WINDOW)
    assert (small.text_config.hidden_size, small.vision_config.num_hidden_layers) == (64, 1)
    assert config.vision_config.num_hidden_layers == 9


def refusal(directory: Path, config: Any, **changes: Any) -> str:
    """What is said of a model of this configuration."""
    (directory / "config.json").write_text(json.dumps(config.to_dict() | changes))
    with pytest.raises(UserError) as caught:
        load_config(BaseModel("some/model", path=directory))
    (problem,) = caught.value.problems
    assert "Gemma 3" in problem.how
    assert problem.key == ("base_model",)
    return problem.what


def test_what_cannot_be_tuned_is_refused_by_name(tmp_path: Path) -> None:
    what = refusal(tmp_path, AutoConfig.for_model("clip"))
    assert what == "some/model is multimodal (clip), and transformers has no class that loads it whole and writes text"
    classifier = "Gemma3ForSequenceClassification"
    what = refusal(tmp_path, multimodal_config("gemma3"), architectures=[classifier])
    assert what == f"some/model is a {classifier}, not the Gemma3ForConditionalGeneration that writes text"
    what = refusal(tmp_path, AutoConfig.for_model("mllama"))
    assert what.startswith("some/model is multimodal (mllama) with layers between its language layers")
    assert refusal(tmp_path, AutoConfig.for_model("florence2")).startswith("some/model is an encoder-decoder")


@pytest.mark.parametrize(
    ("kind", "reason"), [("blip", "it has no output head"), ("qwen2_5_omni", "it does not tell its token embedding")]
)
def test_a_language_model_that_is_not_found_is_refused_by_name(kind: str, reason: str) -> None:
    with torch.device("meta"):
        model = AutoModelForMultimodalLM.from_config(AutoConfig.for_model(kind))
    with pytest.raises(UserError, match=f"{type(model).__name__} is no decoder that ftkit knows: {reason}") as caught:
        describe(model)
    assert caught.value.problems[0].key == ("base_model",)
