"""Checkpoints of multimodal models: a language model beside towers and projectors for images, sound and the like.

They are loaded as the class that they are, not as the text part alone, whose weights have other names than the files':
servers would find no place for an adapter of it. Only the language model is tuned; no text reaches the rest.
"""

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

IMAGE_LAYERS_KEY = "cross_attention_layers"
"""A text configuration's list of blocks that read images and nothing else (Llama 3.2 Vision)."""


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Whether the language model is a part of a larger one and has a configuration of its own."""
    return config.get_text_config(decoder=True) is not config


def auto_class(config: PreTrainedConfig) -> Any:
    """The class of transformers whose `from_config` and `from_pretrained` build the whole model."""
    return AutoModelForMultimodalLM if is_multimodal(config) else AutoModelForCausalLM


def multimodal_refusal(config: PreTrainedConfig) -> str | None:
    """Why ftkit does not tune this multimodal model; None if it does."""
    name = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(config.model_type)
    saved = next(iter(config.architectures or ()), None)
    if name is None:
        return f"is multimodal ({config.model_type}), and transformers has no class that loads it whole and writes text"
    if saved not in (None, name):
        return f"is a {saved}, not the {name} that writes text"
    if getattr(config.get_text_config(decoder=True), IMAGE_LAYERS_KEY, None):
        return f"is multimodal ({config.model_type}) with layers between its language layers that text does not reach"
    return None
