"""The ways to train. To add one: its section in the recipe's schema, a module of functions, a line here."""

from pathlib import Path

from ftkit.errors import UserError
from ftkit.methods import adapter, full, llama_adapter, lora, prefix, soft_prompt
from ftkit.methods.base import Method
from ftkit.methods.files import BOTTLENECK, CONFIG_NAME, LORA, bottleneck_section, lora_section, trained_as
from ftkit.methods.prompt_files import LLAMA_ADAPTER, PREFIX, SOFT_PROMPT, prompt_section
from ftkit.models.files import read_json
from ftkit.recipe.method_schema import (
    AdapterMethod,
    LlamaAdapterMethod,
    LoraMethod,
    PrefixMethod,
    SoftPromptMethod,
)

METHODS: dict[str, Method] = {
    "full": full,
    "lora": lora,
    "adapter": adapter,
    "soft_prompt": soft_prompt,
    "prefix": prefix,
    "llama_adapter": llama_adapter,
}
"""`method.type` in a recipe -> the functions that do it."""

_BY_PEFT_TYPE: dict[str, Method] = {
    LORA: lora,
    BOTTLENECK: adapter,
    SOFT_PROMPT: soft_prompt,
    PREFIX: prefix,
    LLAMA_ADAPTER: llama_adapter,
}
AnySection = LoraMethod | AdapterMethod | SoftPromptMethod | PrefixMethod | LlamaAdapterMethod
"""The section of what is saved as an adapter."""


def method_of(directory: Path) -> Method:
    """The method that the adapter in `directory` is of.

    Raises:
        UserError: it is of a kind that ftkit does not know.
    """
    config = read_json(directory / CONFIG_NAME)
    kind = config.get("peft_type")
    if kind not in _BY_PEFT_TYPE:
        raise UserError(
            f"an adapter of the kind {kind}: not in this version",
            where=str(directory / CONFIG_NAME),
            how=f"ftkit reads {', '.join(_BY_PEFT_TYPE)}",
        )
    return _BY_PEFT_TYPE[kind]


def section_of(directory: Path) -> AnySection:
    """The section that the adapter in `directory` was trained with, as far as its files say without a model.

    Raises:
        UserError: it uses something that ftkit lacks.
    """
    config, method = read_json(directory / CONFIG_NAME), method_of(directory)
    if method is adapter:
        return bottleneck_section(config, directory)
    if method is soft_prompt:
        return prompt_section(SoftPromptMethod, config, directory)
    if method is prefix:
        return prompt_section(PrefixMethod, config, directory)
    if method is llama_adapter:
        return prompt_section(LlamaAdapterMethod, config, directory)
    return trained_as(directory) or lora_section(config, directory)
