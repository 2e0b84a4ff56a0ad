"""`export --format adapter`: the adapter's own directory, which peft and servers load beside the base model."""

import shutil
from pathlib import Path

import torch

from ftkit.artifacts.directory import staged
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
from ftkit.models.files import GENERATION_CONFIG_NAME, TOKENIZER_PATTERNS, copy_matching, read_json
from ftkit.runs import Target


def export_adapter(target: Target, output: Path, *, dtype: torch.dtype | None = None, overwrite: bool = False) -> None:
    """Copy the adapter's files and no others, after reading them; see `Exporter` for the arguments and errors."""
    adapter = target.adapter
    if adapter is None:
        raise UserError(f"{target.label} has no adapter", how="--format hf exports a whole model")
    if dtype is not None:
        raise UserError("an adapter keeps its own precision", how="leave --dtype out, or --format hf")
    _check_readable(adapter)
    with staged(output, overwrite=overwrite) as directory:
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            shutil.copyfile(adapter / name, directory / name)
        copy_matching(adapter, directory, (IDENTITY_NAME, GENERATION_CONFIG_NAME))
        copy_matching(target.tokenizer or adapter, directory, TOKENIZER_PATTERNS)


def _check_readable(adapter: Path) -> None:
    kind = read_json(adapter / CONFIG_NAME).get("peft_type")
    read_section = {LORA: lora_section, BOTTLENECK: bottleneck_section}
    if kind not in read_section:
        raise UserError(f"{adapter} is an adapter of the kind {kind}", how="ftkit reads LoRA and bottleneck adapters")
    config, _ = read_adapter(adapter, peft_type=kind)
    read_section[kind](config, adapter)
