"""`export --format hf`: a directory that `AutoModelForCausalLM.from_pretrained` and every server reads."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ftkit.artifacts.directory import copy_companions, staged, write_config
from ftkit.artifacts.merge import merge
from ftkit.artifacts.proof import Prompt
from ftkit.artifacts.weights import copy_weights, rewrite, stored_dtype
from ftkit.models.load import BaseModel, load_config, local_directory


def export_hf(
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
    """Write the model, with a LoRA merged first (proof included); see `Exporter` for the arguments and errors."""
    if adapter is not None:
        merge(
            adapter,
            model,
            output,
            prompts=prompts,
            chat_template_kwargs=chat_template_kwargs,
            dtype=dtype,
            overwrite=overwrite,
        )
        return
    load_config(model)
    source = local_directory(model, weights=True)
    with staged(output, overwrite=overwrite) as directory:
        stored = stored_dtype(source)
        if dtype in (None, stored):
            copy_weights(source, directory)
        else:
            rewrite(source, directory, {}, dtype=dtype)
        write_config(source, directory, dtype or stored)
        copy_companions(model, tokenizer, directory, chat_template_kwargs=chat_template_kwargs or {})
