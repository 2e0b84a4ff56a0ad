"""Tiny multimodal models with their vision towers, laid out on disk as the models of their kind are on the hub."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from tests.tiny_models import CONFIGS, MORE_CONFIGS, add_noise, tiny_tokenizer

IMAGE_TOKEN = 300
"""Beyond the tokens of the tiny tokenizer: no text is one."""
_TOWER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}

MULTIMODAL_CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": CONFIGS["gemma3"],
        "vision_config": {**_TOWER, "image_size": 28, "patch_size": 14, "vision_use_head": False},
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE_TOKEN,
    },
    "mistral3": {
        "text_config": CONFIGS["mistral"],
        "vision_config": {**_TOWER, "model_type": "pixtral", "image_size": 56, "patch_size": 14, "head_dim": 8},
        "image_token_index": IMAGE_TOKEN,
        "tie_word_embeddings": False,
    },
    "qwen3_5": {
        "text_config": MORE_CONFIGS["qwen3_5"],
        "vision_config": {
            "depth": 2,
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "patch_size": 4,
            "num_position_embeddings": 16,
        },
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": 301,
        "vision_start_token_id": 302,
        "vision_end_token_id": 303,
    },
}
"""Kind of model -> keyword arguments of `AutoConfig.for_model`."""

ON_THE_HUB = {
    "gemma3": ("vision_tower.", "vision_tower.vision_model."),
    "mistral3": ("vision_tower.", "vision_tower."),
    "qwen3_5": ("model.visual.", "model.visual."),
}
"""Beginnings of names that transformers gives a model that was made here, and those that the hub's files have."""
IGNORED = {"qwen3_5": {"mtp.fc.weight": torch.arange(12.0).reshape(3, 4)}}
"""What the hub's files hold besides and transformers does not load."""
LANGUAGE = {"gemma3": "language_model.", "mistral3": "language_model.", "qwen3_5": "model.language_model."}
"""What the names of the language model's weights in the files begin with, those of a head of its own aside."""


def multimodal_config(kind: str, **overrides: Any) -> PreTrainedConfig:
    """A configuration whose language and vision models have 2 to 4 layers."""
    return AutoConfig.for_model(kind, **{**MULTIMODAL_CONFIGS[kind], **overrides})


def multimodal_model(kind: str, **overrides: Any) -> PreTrainedModel:
    """A random float32 model; noise on every parameter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(multimodal_config(kind, **overrides), dtype=torch.float32)
    return add_noise(model)


def save_multimodal(
    directory: Path, kind: str, *, dtype: torch.dtype = torch.float32, shards: int = 1, **overrides: Any
) -> Path:
    """Write a tiny model under the names of the hub, with tokenizer and processor files; returns `directory`."""
    multimodal_model(kind, **overrides).to(dtype).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    for name, content in (("preprocessor_config.json", {"do_resize": True}), ("processor_config.json", {"seq": 4})):
        (directory / name).write_text(json.dumps(content))
    saved, own = ON_THE_HUB[kind]
    state = load_file(directory / "model.safetensors") | {n: t.to(dtype) for n, t in IGNORED.get(kind, {}).items()}
    (directory / "model.safetensors").unlink()
    names = [own + name.removeprefix(saved) if name.startswith(saved) else name for name in state]
    _write(directory, dict(zip(names, state.values(), strict=True)), shards)
    return directory


def image_inputs(kind: str) -> dict[str, Tensor]:
    """One image and a text that names it."""
    generator = torch.Generator().manual_seed(3)
    if kind == "qwen3_5":
        ids = torch.tensor([[5, 302, *[IMAGE_TOKEN] * 4, 303, 6, 7]])
        # 1 frame of 4 x 4 patches of 2 x 3 x 4 x 4 values, merged 2 x 2.
        pixels = torch.randn((16, 96), generator=generator)
        types = (ids == IMAGE_TOKEN).int()
        return {
            "input_ids": ids,
            "pixel_values": pixels,
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "mm_token_type_ids": types,
        }
    ids = torch.tensor([[5, *[IMAGE_TOKEN] * 4, 6, 7]])
    size = 28 if kind == "gemma3" else 56
    inputs = {"input_ids": ids, "pixel_values": torch.randn((1, 3, size, size), generator=generator)}
    if kind == "mistral3":
        return inputs | {"image_sizes": torch.tensor([[size, size]])}
    return inputs | {"token_type_ids": (ids == IMAGE_TOKEN).int()}


def _write(directory: Path, state: dict[str, Tensor], shards: int) -> None:
    """Write `state` in so many files."""
    if shards == 1:
        save_file(state, directory / "model.safetensors", {"format": "pt"})
        return
    names = sorted(state)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        own = names[shard::shards]
        save_file({name: state[name] for name in own}, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
