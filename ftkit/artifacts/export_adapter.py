"""`export --format adapter`: the adapter's own directory, which peft and servers load beside the base model."""

import shutil
from pathlib import Path

import torch

from ftkit.artifacts.directory import staged
from ftkit.errors import UserError
from ftkit.methods.beside import DIRECTORY as PROMPT
from ftkit.methods.files import CONFIG_NAME, IDENTITY_NAME, WEIGHTS_NAME, read_adapter
from ftkit.methods.table import section_of
from ftkit.models.files import GENERATION_CONFIG_NAME, TOKENIZER_PATTERNS, copy_matching, read_json
from ftkit.runs import Target


def export_adapter(target: Target, output: Path, *, dtype: torch.dtype | None = None, overwrite: bool = False) -> None:
    """Copy adapter and prompt, these files and no others, after reading them; see `Exporter` for arguments."""
    adapter = target.adapter
    if adapter is None:
        raise UserError(f"{target.label} has no adapter", how="--format hf exports a whole model")
    if dtype is not None:
        raise UserError("an adapter keeps its own precision", how="leave --dtype out, or --format hf")
    sources = {".": adapter} | ({PROMPT: target.prompt} if target.prompt is not None else {})
    for source in sources.values():
        _check_readable(source)
    with staged(output, overwrite=overwrite) as directory:
        for place, source in sources.items():
            (directory / place).mkdir(exist_ok=True)
            for name in (CONFIG_NAME, WEIGHTS_NAME):
                shutil.copyfile(source / name, directory / place / name)
            copy_matching(source, directory / place, (IDENTITY_NAME, GENERATION_CONFIG_NAME))
            copy_matching(target.tokenizer or source, directory / place, TOKENIZER_PATTERNS)


def _check_readable(adapter: Path) -> None:
    section_of(adapter)
    read_adapter(adapter, peft_type=read_json(adapter / CONFIG_NAME)["peft_type"])
