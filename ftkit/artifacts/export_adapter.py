"""`export --format adapter`: the adapter's own directory, which peft and servers load beside the base model."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ftkit.artifacts.directory import GENERATION_CONFIG_NAME, TOKENIZER_PATTERNS, copy_matching, staged
from ftkit.artifacts.proof import Prompt
from ftkit.errors import UserError
from ftkit.methods.files import (
    BOTTLENECK,
    CONFIG_NAME,
    IDENTITY_NAME,
    LORA,
    WEIGHTS_NAME,
    bottleneck_section,
    lora_section,
    read_adapter,
)
from ftkit.models.files import read_json
from ftkit.models.load import BaseModel


def export_adapter(
    model: BaseModel,
    adapter: Path | None,
    output: Path,
    *,
    tokenizer: Path | None = None,
    prompts: Sequence[Prompt] = (),
    chat_template_kwargs: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Copy the adapter's files and no others, after reading them; see `Exporter` for the arguments and errors."""
    if adapter is None:
        raise UserError(f"{model.name} has no adapter", how="--format hf exports a whole model")
    if dtype is not None:
        raise UserError("an adapter keeps its own precision", how="leave --dtype out, or --format hf")
    _check_readable(adapter)
    with staged(output, overwrite=overwrite) as directory:
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            shutil.copyfile(adapter / name, directory / name)
        copy_matching(adapter, directory, (IDENTITY_NAME, GENERATION_CONFIG_NAME))
        copy_matching(tokenizer or adapter, directory, TOKENIZER_PATTERNS)


def _check_readable(adapter: Path) -> None:
    kind = read_json(adapter / CONFIG_NAME).get("peft_type")
    read_section = {LORA: lora_section, BOTTLENECK: bottleneck_section}
    if kind not in read_section:
        raise UserError(f"{adapter} is an adapter of the kind {kind}", how="ftkit reads LoRA and bottleneck adapters")
    config, _ = read_adapter(adapter, peft_type=kind)
    read_section[kind](config, adapter)
