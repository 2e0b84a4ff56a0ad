"""The configuration of prompts and prefixes in peft's files; the weights' names are with each method.

PROMPT_TUNING     prompt_embeddings [N, C]                          N rows, C width of the model
PREFIX_TUNING     prompt_embeddings [N, layers * 2 * K * D]         keys and values of each layer, K heads of width D
ADAPTION_PROMPT   PATH.adaption_prompt [1, N, C], PATH.adaption_gate [1] of each attention module
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from transformers import PreTrainedModel

from ftkit.errors import Problem, UserError
from ftkit.methods.files import CONFIG_NAME
from ftkit.models.architecture import key_value_shape
from ftkit.recipe.method_schema import LlamaAdapterMethod, PrefixMethod, SoftPromptMethod

SOFT_PROMPT, PREFIX, LLAMA_ADAPTER = "PROMPT_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT"
"""Values of `peft_type`."""
ROWS = "prompt_embeddings"
"""The one tensor of the first two."""

# What saved weights compute is told by their shapes; the rest says how they came about.
_WITHOUT_EFFECT = {"peft_type", "base_model_name_or_path", "revision", "task_type", "peft_version", "auto_mapping"}
_WITHOUT_EFFECT |= {"inference_mode", "num_attention_heads", "num_layers", "token_dim", "num_virtual_tokens"}
_WITHOUT_EFFECT |= {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}
_WITHOUT_EFFECT |= {"encoder_hidden_size", "prefix_projection", "init_weights", "adapter_len", "adapter_layers"}
_WITHOUT_EFFECT |= {"target_modules"}

PromptSection = TypeVar("PromptSection", SoftPromptMethod, PrefixMethod, LlamaAdapterMethod)


def soft_prompt_config(model: PreTrainedModel, rows: int, width: int) -> dict[str, Any]:
    """peft's configuration of a soft prompt of so many rows."""
    heads = model.config.get_text_config(decoder=True).num_attention_heads
    sizes = _sizes(model, rows, heads=heads, width=width)
    return {"peft_type": SOFT_PROMPT, **sizes, "prompt_tuning_init": "RANDOM"}


def prefix_config(model: PreTrainedModel, rows: int) -> dict[str, Any]:
    """peft's configuration of a prefix of so many keys and values a layer."""
    heads, width = key_value_shape(model.config)
    sizes = _sizes(model, rows, heads=heads, width=heads * width)
    return {"peft_type": PREFIX, **sizes, "prefix_projection": False, "encoder_hidden_size": heads * width}


def llama_adapter_config(rows: int, layers: int, attention: str) -> dict[str, Any]:
    """peft's configuration of gated prompts in the last `layers` layers; `attention` is the name of their modules."""
    kind = {"peft_type": LLAMA_ADAPTER, "inference_mode": True}
    return {**kind, "adapter_len": rows, "adapter_layers": layers, "target_modules": attention}


def prompt_section(kind: type[PromptSection], config: Mapping[str, Any], where: Path) -> PromptSection:
    """The section that a configuration of peft says.

    Raises:
        UserError: it uses something that ftkit lacks; all of it is named.
    """
    problems = [
        Problem(f"{name}: {json.dumps(value)} is not supported", "load it with peft", str(where / CONFIG_NAME))
        for name, value in sorted(config.items())
        if value and name not in _WITHOUT_EFFECT and not (name == "num_transformer_submodules" and value == 1)
    ]
    if problems:
        raise UserError.of(problems)
    values = {"type": kind.model_fields["type"].annotation.__args__[0]}  # type: ignore[union-attr]  # a Literal
    if kind is LlamaAdapterMethod:
        values |= {"num_virtual_tokens": config.get("adapter_len"), "num_layers": config.get("adapter_layers")}
    else:
        values |= {"num_virtual_tokens": config.get("num_virtual_tokens")}
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        detail = error.errors()[0]
        what = f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}"
        raise UserError(what, how="restore the file as it was written", where=str(where / CONFIG_NAME)) from None


def _sizes(model: PreTrainedModel, rows: int, *, heads: int, width: int) -> dict[str, Any]:
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    sizes = {"num_virtual_tokens": rows, "token_dim": width, "num_attention_heads": heads, "num_layers": layers}
    return {**sizes, "num_transformer_submodules": 1, "inference_mode": True}
