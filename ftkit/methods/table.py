"""The ways to train. To add one: its section in the recipe's schema, a module of functions, a line here."""

from pathlib import Path

from ftkit.errors import UserError
from ftkit.methods import adapter, full, lora
from ftkit.methods.base import Method
from ftkit.methods.files import BOTTLENECK, CONFIG_NAME, LORA, bottleneck_section, lora_section, trained_as
from ftkit.models.files import read_json
from ftkit.recipe.method_schema import AdapterMethod, LoraMethod

METHODS: dict[str, Method] = {"full": full, "lora": lora, "adapter": adapter}
"""`method.type` in a recipe -> the functions that do it."""

_BY_PEFT_TYPE: dict[str, Method] = {LORA: lora, BOTTLENECK: adapter}


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
            how=f"ftkit reads {' and '.join(_BY_PEFT_TYPE)}",
        )
    return _BY_PEFT_TYPE[kind]


def section_of(directory: Path) -> LoraMethod | AdapterMethod:
    """The section that the adapter in `directory` was trained with, as far as its files say without a model.

    Raises:
        UserError: it uses something that ftkit lacks.
    """
    config = read_json(directory / CONFIG_NAME)
    if method_of(directory) is adapter:
        return bottleneck_section(config, directory)
    return trained_as(directory) or lora_section(config, directory)
